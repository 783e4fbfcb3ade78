r"""Evaluates a run on a data set, or scores a file of predictions.

  python -m experiments.evaluate --workdir=runs/squad --data=dev-v2.0.json
  python -m experiments.evaluate --data=dev-v2.0.json \
      --predictions=predictions.json \
      [--na_probs=na_probs.json --na_threshold=THRESHOLD]
  python -m experiments.evaluate --data=dev-v2.0.json --audit

--workdir also takes a Hugging Face directory or hub id of a model for question
answering; its results are written only with --output. --data takes a path, a
call such as tfds(name="squad/v1.1", split="train"), or several joined by +. If
the data has no answers, predictions are written but not scored.

The results of a run go to WORKDIR/eval/NAME, or to --output. NAME is the name
of the data; the flags of decoding, --checkpoint and --nocalibrated add their
values to it. A calibrated run predicts at its held-out null threshold.
metrics.json has EM and F1 at threshold 0, at the held-out threshold and at the
best threshold for this data (an oracle).

With --coordinator, several processes share the questions. --audit runs no
model. It reports how gold answers became token spans, with the tokenizer and
the window lengths of --workdir, or with a vocabulary learned from --data.
"""

from collections.abc import Sequence
import math
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from qa_jax import errors

if TYPE_CHECKING:
  from qa_jax.data.examples import Example

WORKDIR = flags.DEFINE_string('workdir', None, 'Run, checkpoint or hub id.')
DATA = flags.DEFINE_string(
    'data', None, 'SQuAD file or other data SPEC to evaluate on.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
PREDICTIONS = flags.DEFINE_string(
    'predictions', None, 'JSON {id: text} to score; no model is run.')
NA_PROBS = flags.DEFINE_string(
    'na_probs', None, 'JSON {id: score}; higher means no answer.')
NA_THRESHOLD = flags.DEFINE_float(
    'na_threshold', 1.0, 'A question counts as not answered if its score in '
    '--na_probs exceeds this. 1 fits probabilities; log odds, as in the '
    'na_probs.json of a run, need the null threshold of the run.')
AUDIT = flags.DEFINE_bool(
    'audit', False, 'Report how gold answers became token spans.')
# Metrics that are printed; metrics.json has all of them.
PRINTED = ('exact_match', 'f1', 'total', 'has_answer_exact_match',
           'has_answer_f1', 'no_answer_exact_match', 'no_answer_total',
           'missing', 'unknown')


def main() -> None:
  from qa_jax.io import files
  from qa_jax.metrics import predictions as predictions_lib

  for name in cli.PROCESSES if AUDIT.value or PREDICTIONS.value else ():
    errors.require(
        flags.FLAGS[name].value is None, f'--{name} goes with a model to run; '
        'leave it out with --audit and --predictions')
  if flags.FLAGS['na_threshold'].present and not NA_PROBS.value:
    raise errors.UserError('--na_threshold goes with --na_probs')
  if AUDIT.value:
    _audit()
    return
  if bool(WORKDIR.value) == bool(PREDICTIONS.value):
    raise errors.UserError('give one of --workdir and --predictions')
  if NA_PROBS.value and not PREDICTIONS.value:
    raise errors.UserError('--na_probs goes with --predictions')
  errors.require(not math.isnan(NA_THRESHOLD.value),
                 '--na_threshold=nan, expected a number')
  if PREDICTIONS.value and (of_model := [*_decode_flags(), *_model_flags()]):
    raise errors.UserError(
        f'--predictions runs no model; leave out {", ".join(of_model)}')
  errors.require(OUTPUT.value != '', '--output is empty; give a directory')
  output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
  if output:
    files.check_writable(output / predictions_lib.METRICS)
  cli.join()
  values, output = (_score(output), output) if PREDICTIONS.value else (
      score_model(output))
  # All of them if no file has them.
  cli.print_metrics({name: value for name, value in values.items()
                     if not output or name in PRINTED})
  if output and values:
    print(f'results: {output}')


def _decode_flags() -> list[str]:
  """Returns the flags of decoding and windows that are given."""
  return [f'--{name if name in cli.WINDOWS else cli.DECODE + name}'
          for name in cli.decoding()]


def _model_flags() -> list[str]:
  """Returns the flags that choose a checkpoint or its calibration, if given."""
  return [f'--{name}' for name in ('checkpoint', 'calibrated')
          if flags.FLAGS[name].present]


def _score(output: pathlib.Path | None) -> dict[str, float]:
  from qa_jax.data import sources
  from qa_jax.io import files
  from qa_jax.metrics import error_analysis
  from qa_jax.metrics import predictions as predictions_lib
  from qa_jax.metrics import squad

  examples = sources.load_answered(DATA.value)
  errors.require(not (output and (output / predictions_lib.N_BEST).exists()), (
      f'--output={output} is the evaluation of a model; choose another'))
  predictions = predictions_lib.read_predictions(
      pathlib.Path(PREDICTIONS.value))
  if predictions.keys().isdisjoint(e.id for e in examples):
    error_analysis.check_ids(examples, predictions,
                             pathlib.Path(PREDICTIONS.value))
  na_scores = _na_scores(examples) if NA_PROBS.value else None
  values = squad.squad_metrics(examples, predictions, na_scores=na_scores,
                               na_threshold=NA_THRESHOLD.value)
  if output:
    files.write_json(output / predictions_lib.METRICS, values)
  return values


def _na_scores(examples: Sequence['Example']) -> dict[str, float]:
  """Reads the scores of --na_probs; warns of what they do not fit."""
  from qa_jax.metrics import predictions as predictions_lib
  from qa_jax.metrics import squad

  path, ids = NA_PROBS.value, {e.id for e in examples}
  scores = predictions_lib.read_na_probs(pathlib.Path(path))
  used = {key: value for key, value in scores.items() if key in ids}
  if len(used) < len(scores):
    _warn(f'{path} has {len(scores) - len(used)} scores of questions that the '
          'data does not have')
  if squad.resolve_version(examples, 'auto') == '1.1':
    _warn('--na_probs is not used: all questions have answers, and the metrics '
          'of SQuAD 1.1 decline none')
    return used
  if len(used) < len(ids):
    raise errors.UserError(
        f'{path} has a score for {len(used)} of {len(ids)} questions, and none '
        f'for {min(ids - used.keys())!r}; give one for every question')
  if not flags.FLAGS['na_threshold'].present and any(
      not 0 <= score <= 1 for score in used.values()):
    _warn(f'{path} holds no probabilities, but they are compared with 1; give '
          '--na_threshold')
  return used


def _warn(message: str) -> None:
  print(f'warning: {message}', file=sys.stderr)


def score_model(output: pathlib.Path | None
                ) -> tuple[dict[str, float], pathlib.Path | None]:
  """Computes the metrics of --workdir on --data.

  Returns the metrics, {} in all but the first process, and the directory that
  the files went to, if any.
  """
  from qa_jax.checkpoints import run_directory
  from qa_jax.evaluation import evaluator
  from qa_jax.runtime import console
  from qa_jax.runtime import devices
  from qa_jax.runtime import processes
  from qa_jax.runtime import settings

  settings.configure_process()
  devices.data_mesh()  # refuses devices that JAX cannot read a checkpoint with
  qa = cli.load_model(WORKDIR.value)
  run = run_directory.RunDirectory(pathlib.Path(WORKDIR.value))
  label = cli.evaluation_label()
  # Its SPEC and step would be taken for those of the new scores.
  errors.require(not (output and (output / run_directory.SPEC).exists()), (
      f'--output={output} is the evaluation of a run; choose another, or leave '
      'it out'))
  folder = output or (
      run.evaluation(DATA.value, label) if run.is_run() else None)
  if folder is None:
    console.say(f'{WORKDIR.value} is no run, so no file is written; '
                '--output=DIR keeps predictions and metrics')
  values = evaluator.evaluate_data(
      qa, DATA.value, progress='evaluate', output=output,
      run=run if run.is_run() else None, label=label)
  return (values if processes.is_first_process() else {}), folder


def _audit() -> None:
  """Prints the alignment audit; writes alignment.json into --output."""
  from qa_jax import config as config_lib
  from qa_jax import input_pipeline
  from qa_jax.data import alignment
  from qa_jax.io import files

  if PREDICTIONS.value or NA_PROBS.value:
    raise errors.UserError('--audit looks at gold spans, not at predictions; '
                           'leave out --predictions and --na_probs')
  if _model_flags() and not WORKDIR.value:
    raise errors.UserError(f'{_model_flags()[0]} goes with --workdir; leave it '
                           'out of an --audit with a learned vocabulary')
  lengths = cli.decoding()
  if other := [f for f in _decode_flags() if f.startswith(f'--{cli.DECODE}')]:
    raise errors.UserError(f'--audit decodes nothing; leave out {other[0]}')
  output = pathlib.Path(OUTPUT.value) if OUTPUT.value else None
  if output:
    files.check_writable(output / 'alignment.json')
  if WORKDIR.value:
    qa = cli.load_model(WORKDIR.value)
    config, vocabulary = qa.config, qa.tokenizer
  else:
    config = config_lib.check_config(
        {'data': lengths, 'train': {'num_steps': 1}})
    vocabulary = input_pipeline.vocabulary_source(config, None)
  windows, _ = input_pipeline.load_windows(config, DATA.value, vocabulary)
  lines, shown = alignment.describe_audit(
      windows.examples, windows.audit, windows.faults)
  print('\n'.join(lines))
  if output:
    files.write_json(output / 'alignment.json', {
        'counts': windows.audit, 'examples': shown})


if __name__ == '__main__':
  cli.run(main, several=True, model=True, required=('data',))
