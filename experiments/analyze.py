r"""Says where the errors of an evaluation are, and what may be said of two.

  python -m experiments.analyze --data=dev-v2.0.json \
      --evaluation=runs/squad/eval/dev-v2.0 [--against=runs/other/eval/dev-v2.0]

Reads what experiments.evaluate wrote: predictions.json, and nbest.jsonl and
na_probs.json if they are there; no model is run. --evaluation and --against
also take a file of predictions alone. Writes analysis.{json,md,html} and a
picture beside them, or into --output.
"""

import pathlib

from absl import flags

from experiments import cli
from qa_jax import analysis
from qa_jax import analysis_report
from qa_jax import errors
from qa_jax import files
from qa_jax import metrics
from qa_jax.data import sources

DATA = flags.DEFINE_string('data', None, 'Data SPEC that was evaluated on.')
EVALUATION = flags.DEFINE_string(
    'evaluation', None, "An evaluation's directory, or predictions.")
AGAINST = flags.DEFINE_string('against', None, 'Another, to compare with.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
SEED = flags.DEFINE_integer('seed', 0, 'Of resampling.')


def main() -> None:
  cli.required(data=DATA.value, evaluation=EVALUATION.value)
  given = pathlib.Path(EVALUATION.value)
  folder = given if given.is_dir() else None
  if not (OUTPUT.value or folder):
    raise errors.UserError(
        '--output is needed with a file of predictions: where results go')
  output = pathlib.Path(OUTPUT.value or folder)
  files.check_writable(output / 'analysis.json')
  predictions = metrics.read_predictions(_predictions(given))
  examples = sources.load(DATA.value)
  analysis.check_ids(examples, predictions, given)
  nbest, windows, na_probs = {}, None, None
  if folder and (folder / 'nbest.jsonl').is_file():
    nbest, windows = analysis.read_nbest(folder / 'nbest.jsonl')
  if folder and (folder / 'na_probs.json').is_file():
    na_probs = metrics.read_na_probs(folder / 'na_probs.json')
  found = analysis.analyse(examples, predictions, nbest, na_scores=na_probs,
                           windows=windows, seed=SEED.value)
  if AGAINST.value:
    other = pathlib.Path(AGAINST.value)
    others = metrics.read_predictions(_predictions(other))
    analysis.check_ids(examples, others, other)
    found['difference'] = {'against': str(other), **analysis.difference(
        examples, predictions, others, seed=SEED.value)}
  analysis_report.write(found, examples, predictions, output,
                        f'{len(examples)} questions of {DATA.value}')
  print(files.read_text(output / 'analysis.md'), end='')
  print(f'{output}/analysis.html shows errors')


def _predictions(path: pathlib.Path) -> pathlib.Path:
  return path / 'predictions.json' if path.is_dir() else path


if __name__ == '__main__':
  cli.run(main)
