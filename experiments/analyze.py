r"""Says where the errors of an evaluation are, and what may be said of two.

  python -m experiments.analyze --data=dev-v2.0.json \
      --evaluation=runs/squad/eval/dev-v2.0 [--against=runs/other/eval/dev-v2.0]

Reads what experiments.evaluate wrote: predictions.json, and nbest.jsonl and
na_probs.json if they are there; no model is run. --evaluation and --against
also take a file of predictions alone. Several, separated by commas, are seeds
of one system, compared in pairs; the first is analysed. Writes
analysis.{json,md,html} and a picture beside it, or into --output.
"""

from collections.abc import Sequence
import pathlib

from absl import flags

from experiments import cli
from qa_jax import errors
from qa_jax.data import sources
from qa_jax.data.examples import Example
from qa_jax.evaluation import error_report
from qa_jax.io import files
from qa_jax.metrics import error_analysis
from qa_jax.metrics import squad

DATA = flags.DEFINE_string('data', None, 'Data SPEC that was evaluated on.')
EVALUATION = flags.DEFINE_list(
    'evaluation', [], 'Directories of evaluations, or predictions.')
AGAINST = flags.DEFINE_list('against', [], 'Others, to compare with.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
SEED = flags.DEFINE_integer('seed', 0, 'Of resampling.')


def main() -> None:
  cli.required(data=DATA.value, evaluation=','.join(EVALUATION.value))
  ours = [pathlib.Path(p) for p in EVALUATION.value]
  theirs = [pathlib.Path(p) for p in AGAINST.value]
  if theirs and len(ours) != len(theirs):
    raise errors.UserError(
        f'--evaluation has {len(ours)} seeds and --against {len(theirs)}; they '
        'are compared in pairs')
  folder = ours[0] if ours[0].is_dir() else None
  if not (OUTPUT.value or folder):
    raise errors.UserError(
        '--output is needed with a file of predictions: where results go')
  output = pathlib.Path(OUTPUT.value or folder)
  files.check_writable(output / 'analysis.json')
  examples = sources.load_examples(DATA.value)
  of_ours, of_theirs = ([_predictions(p, examples) for p in paths]
                        for paths in (ours, theirs))
  predictions = of_ours[0]
  nbest, windows, na_probs, held_out = {}, None, None, None
  if folder and (folder / 'nbest.jsonl').is_file():
    nbest, windows = error_analysis.read_nbest(folder / 'nbest.jsonl')
  if folder and (folder / 'na_probs.json').is_file():
    na_probs = squad.read_na_probs(folder / 'na_probs.json')
  if folder and (folder / 'metrics.json').is_file():
    held_out = files.read_object(folder / 'metrics.json').get(
        'held_out_threshold')
  found = error_analysis.analyse_errors(examples,
                                        predictions,
                                        nbest,
                                        na_scores=na_probs,
                                        windows=windows,
                                        held_out=held_out,
                                        seed=SEED.value)
  if theirs:
    found['difference'] = {
        'against':
            ', '.join(map(str, theirs)),
        **error_analysis.compare_predictions(examples,
                                             of_ours,
                                             of_theirs,
                                             seed=SEED.value)
    }
  error_report.write_error_report(found, examples, predictions, output,
                                  f'{len(examples)} questions of {DATA.value}')
  print(files.read_text(output / 'analysis.md'), end='')
  print(f'{output}/analysis.html shows errors')


def _predictions(path: pathlib.Path,
                 examples: Sequence[Example]) -> dict[str, str]:
  """Those of a file, or of an evaluation's directory."""
  found = squad.read_predictions(
      path / 'predictions.json' if path.is_dir() else path)
  error_analysis.check_ids(examples, found, path)
  return found


if __name__ == '__main__':
  cli.run(main)
