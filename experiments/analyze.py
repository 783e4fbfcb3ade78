r"""Analyses the errors of an evaluation, and compares two evaluations.

  python -m experiments.analyze --data=dev-v2.0.json \
      --evaluation=runs/squad/eval/dev-v2.0 [--against=runs/other/eval/dev-v2.0]

Reads the files that experiments.evaluate wrote: predictions.json, and
nbest.jsonl and na_probs.json if they exist. No model is run. --evaluation and
--against also take a file of predictions alone. Several evaluations, separated
by commas, are seeds of one system. The seeds are compared in pairs, and the
first one is analysed. Writes analysis.{json,md,html} and plots into the
directory of the evaluation, or into --output.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from qa_jax import errors

if TYPE_CHECKING:
  from qa_jax.data.examples import Example

DATA = flags.DEFINE_string('data', None, 'Data SPEC of the evaluation.')
EVALUATION = flags.DEFINE_list(
    'evaluation', [], 'Directories of evaluations, or files of predictions; '
    'several are seeds of one system.')
AGAINST = flags.DEFINE_list(
    'against', [], 'Evaluations to compare with, as many as --evaluation has.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of tests and intervals.')


def main() -> None:
  from qa_jax.data import sources
  from qa_jax.evaluation import error_report
  from qa_jax.io import files
  from qa_jax.metrics import error_analysis
  from qa_jax.metrics import predictions as predictions_lib

  ours = [pathlib.Path(p) for p in EVALUATION.value]
  theirs = [pathlib.Path(p) for p in AGAINST.value]
  for path in (*ours, *theirs):
    errors.require(path.exists(), f'{path}: no such evaluation; give the '
                   'directory that evaluate wrote, or a file of predictions')
  folder = ours[0] if ours[0].is_dir() else None
  if not (OUTPUT.value or folder):
    raise errors.UserError(
        '--output is needed with a file of predictions: give a directory for '
        'the results')
  output = pathlib.Path(OUTPUT.value or folder)
  files.check_writable(output / 'analysis.json')
  examples = sources.load_answered(DATA.value)
  first, second = ([_read_predictions(p, examples) for p in paths]
                   for paths in (ours, theirs))
  difference = error_analysis.compare_predictions(
      examples, first, second, seed=SEED.value) if theirs else {}
  read = lambda reader, name: (
      reader(folder / name) if folder and (folder / name).is_file() else None)
  metrics = read(predictions_lib.read_metrics, predictions_lib.METRICS) or {}
  n_best = read(predictions_lib.read_n_best, predictions_lib.N_BEST)
  analysis = error_analysis.analyse_errors(
      examples, first[0], n_best,
      na_scores=read(predictions_lib.read_na_probs, predictions_lib.NA_PROBS),
      held_out=metrics.get('held_out_threshold'), seed=SEED.value)
  if theirs:
    analysis['difference'] = {
        'against': ', '.join(map(str, theirs)), **difference}
  error_report.write_error_report(
      analysis, error_analysis.list_errors(examples, first[0], n_best), output,
      f'{len(examples)} questions of {DATA.value}')
  print('\n'.join(error_report.headline(analysis)))
  print(f'analysis: {output}/analysis.md; with the errors: '
        f'{output}/analysis.html')


def _read_predictions(path: pathlib.Path,
                      examples: Sequence['Example']) -> dict[str, str]:
  """Reads a file of predictions, or that of an evaluation's directory."""
  from qa_jax.metrics import error_analysis
  from qa_jax.metrics import predictions as predictions_lib

  predictions = predictions_lib.read_predictions(
      path / predictions_lib.PREDICTIONS if path.is_dir() else path)
  error_analysis.check_ids(examples, predictions, path)
  if missing := sum(e.id not in predictions for e in examples):
    print(f'warning: {path} has no prediction for {missing} of {len(examples)} '
          'questions, which score 0', file=sys.stderr)
  return predictions


if __name__ == '__main__':
  cli.run(main, required=('data', 'evaluation'))
