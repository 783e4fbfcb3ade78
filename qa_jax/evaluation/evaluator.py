"""Evaluation of a model: windows → one answer per question → metrics.

Glossary of shapes: N windows, E questions.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import examples as examples_lib
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.metrics import calibration as calibration_lib
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics.predictions import Predictions
from qa_jax.models import qa as qa_lib
from qa_jax.runtime import console
from qa_jax.runtime import devices
from qa_jax.runtime import processes
from qa_jax.runtime import settings

RELIABILITY_PLOT = 'reliability.png'


class Evaluator:
  """The windows of a data set, ready to be scored again and again."""

  def __init__(self, model: qa_lib.QAModel, windows: windows_lib.WindowSet,
               config: config_lib.Config, mesh: jax.sharding.Mesh | None = None,
               *, calibration: calibration_lib.Calibration | None = None,
               uncalibrated_threshold: float = 0.0):
    if not len(windows):
      raise errors.UserError('the evaluation data has no question')
    self.windows = windows
    self._model, self._config, self._mesh = model, config, mesh
    self._calibration = calibration
    self._uncalibrated_threshold = uncalibrated_threshold
    self.declined = 0  # number of questions, in the last evaluation
    unanswerable = sum(e.impossible for e in windows.examples)
    if unanswerable and config.decode.null_rule == 'never':
      console.say_once(
          f'decode.null_rule=never answers all {unanswerable} unanswerable '
          'questions of the evaluation data; min_null can decline them')

  @property
  def chosen_on_these_questions(self) -> bool:
    """Returns whether the calibration was computed on these questions."""
    return self._calibration is not None and (
        self._calibration.sha256 == store.fingerprint(self.windows.examples))

  def evaluate(self, params: Any, *, output: pathlib.Path | None = None,
               progress: str = '', seal: bool = True,
               show: Callable[[str, np.ndarray], None] | None = None
               ) -> dict[str, float]:
    """Computes the metrics, and writes the files of the evaluation to `output`.

    Only the first process writes. metrics.json comes last and only if `seal`.
    Questions of which none has an answer are not scored: the metrics are empty.
    `show` gets name and [N] values of each column of `candidates.STATISTICS`.

    Raises:
      NotFiniteError: the score of a window is not finite.
    """
    examples, decode = self.windows.examples, self._config.decode
    calibration, threshold = self._calibration, decode.null_threshold
    output = output if processes.is_first_process() else None
    statistics: list[np.ndarray] = []
    answers, *uncalibrated = decode_lib.answer_at_temperatures(
        self._model, params, self.windows, self._config,
        (calibration.temperature, 1.0) if calibration else (1.0,),
        mesh=self._mesh, progress=progress,
        statistics=statistics.append if show else None)
    if show:
      for column in zip(candidates.STATISTICS, np.concatenate(statistics).T,
                        strict=True):
        show(*column)
    predictions = Predictions(
        examples, answers_lib.answer_texts(examples, answers),
        None if decode.null_rule == 'never' else {
            e.id: float(answers.na_score[i]) for i, e in enumerate(examples)})
    self.declined = int(predictions.declined(threshold).sum())
    blind = examples_lib.is_blind(examples)
    metrics = {} if blind else predictions.metrics(threshold)
    if output:  # of an earlier evaluation
      with contextlib.suppress(OSError):
        (output / RELIABILITY_PLOT).unlink()
    if calibration and not blind:
      metrics |= calibration_metrics(
          predictions, calibration, threshold, before=uncalibrated[0],
          after=answers, output=output)
      metrics[predictions_lib.CHOSEN_HERE] = self.chosen_on_these_questions
      metrics |= {f'uncalibrated_{name}': value for name, value in (
          predictions.metrics(self._uncalibrated_threshold).items())
                  if name in predictions_lib.AT_THRESHOLD}
    if answers.regret is not None and not blind:
      metrics |= decode_regret(answers.regret)
    if output:
      windows = np.bincount(self.windows.example_of, minlength=len(examples))
      predictions_lib.write_evaluation(
          output, predictions, threshold=threshold,
          metrics=metrics if seal and not blind else None, n_best=(
              {'id': e.id, 'null_score': float(answers.null_score[i]),
               'null_probability': float(np.exp(answers.null_log_p[i])),
               'windows': int(windows[i]),
               'answers': answers_lib.n_best_rows(e, answers, i)}
              for i, e in enumerate(examples)))
    return metrics


def evaluate_data(qa: predict.QA, data: str, *,
                  output: pathlib.Path | None = None,
                  run: RunDirectory | None = None, label: str = '',
                  progress: str = '') -> dict[str, float]:
  """Computes the metrics of a model on a data SPEC, and writes its files.

  They go to `output`, or to the directory of this SPEC and `label` in `run`. If
  no question has an answer, they are predictions alone, and the metrics are
  empty.

  Raises:
    UserError: the data cannot be read, a part of its questions has no answers,
      predictions would be lost, or scores are not finite.
  """
  windows, note = input_pipeline.load_windows(qa.config, data, qa.tokenizer)
  console.say(note)
  blind = examples_lib.is_blind(windows.examples)
  if not blind:
    examples_lib.check_answered(windows.examples, data)
  elif not (output or run):
    raise errors.UserError(
        f'{data}: no question has an answer to score with; give --output=DIR '
        'for the predictions')
  recorded = bool(run and not output)
  if recorded:
    output = run.record_evaluation(data, label)
  values = evaluate_windows(qa, windows, output=output, progress=progress)
  if recorded and qa.step is not None:
    run_directory.record_step(output, qa.step)
  if blind:
    console.say(f'{data}: no question has an answer, so nothing was scored; '
                f'{output} has the predictions')
  return values


def evaluate_windows(qa: predict.QA, windows: windows_lib.WindowSet, *,
                     output: pathlib.Path | None,
                     progress: str = '') -> dict[str, float]:
  """Computes the metrics of a model on windows, shared by all devices.

  Raises:
    UserError: the model, its decoding or the data differ between processes.
  """
  if processes.is_multi_process():
    _check_equal_on_all(qa, windows)
  qa.say_window_note(windows)
  console.say(f'evaluating {len(windows)} windows; the first batch of each '
              f'length is compiled{settings.cache_note()}')
  mesh = devices.data_mesh()
  evaluator = Evaluator(
      qa.model, windows, qa.config, mesh, calibration=qa.calibration,
      uncalibrated_threshold=qa.uncalibrated_threshold)
  if evaluator.chosen_on_these_questions:
    chosen = 'temperature' if qa.calibration.threshold is None else 'threshold'
    console.say(f'warning: the {chosen} was chosen on these very questions')
  params = devices.put_tree(qa.params, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()))  # a copy on every device
  metrics = evaluator.evaluate(params, output=output, progress=progress)
  examples = windows.examples
  if evaluator.declined and not examples_lib.is_blind(examples) and not any(
      e.impossible for e in examples):
    console.say(f'{evaluator.declined} of {len(examples)} questions are '
                'declined, though all have answers; --decode.null_rule=never '
                'answers every question')
  return metrics


def _check_equal_on_all(qa: predict.QA, windows: windows_lib.WindowSet) -> None:
  """Raises a UserError if an input of an evaluation differs on a process.

  Each process computes a part of every batch, so that the answers would be of
  several models, or of several data sets.
  """
  weights = hashlib.sha256()
  for leaf in jax.tree.leaves(qa.params):
    weights.update(np.ascontiguousarray(leaf))
  processes.check_equal_on_all(
      config=repr(qa.config), calibration=repr(qa.calibration),
      vocabulary=qa.tokenizer.fingerprint,
      data=store.fingerprint(windows.examples), weights=weights.hexdigest())


def decode_regret(regret: np.ndarray) -> dict[str, float]:  # [E]
  """Computes the score that an inexact search misses.

  `decode_regret` is the mean over questions, but those of which the search
  missed every span; `decode_regret_share` the percent whose best span it
  missed.
  """
  finite = regret[np.isfinite(regret)]
  mean = {'decode_regret': float(finite.mean())} if len(finite) else {}
  return {**mean, 'decode_regret_share': 100.0 * float((regret > 0).mean())}


def calibration_metrics(
    predictions: Predictions, calibration: calibration_lib.Calibration,
    threshold: float, *, before: answers_lib.Answers,
    after: answers_lib.Answers, output: pathlib.Path | None
    ) -> Mapping[str, float]:
  """Computes the entries of metrics.json for a calibrated run.

  The answers are those `before` calibration, at temperature 1, and `after` it.
  Calibration errors are percentages. `output` gets the reliability diagram.
  """
  exact_match, _ = predictions.scores(threshold)
  declined = predictions.declined(threshold)
  bins = {label: calibration_lib.reliability_bins(
      confidence(answers, declined), exact_match) for label, answers in (
          ('temperature 1', before),
          (f'temperature {calibration.temperature:.2f}', after))}
  error_before, error = (100 * calibration_lib.expected_calibration_error(b)
                         for b in bins.values())
  if output:
    from qa_jax.io import plots  # lazily: matplotlib is slow
    plots.plot_reliability(bins, output / RELIABILITY_PLOT)
  metrics = {'calibration_error_before': error_before,
             'calibration_error': error,
             'temperature': calibration.temperature}
  if predictions.na_scores is not None and calibration.threshold is not None:
    metrics |= predictions.held_out_metrics(calibration.threshold)
  return metrics


def confidence(answers: answers_lib.Answers,
               declined: np.ndarray) -> np.ndarray:  # [E] bool → [E]
  """Computes the probability of each prediction: of the best span, or of null.

  It is 0 for a question without candidates that was not declined.
  """
  best = np.full(len(declined), -np.inf)
  first, end = answers.ptr[:-1], answers.ptr[1:]
  best[first < end] = answers.log_p[first[first < end]]
  return np.exp(np.where(declined, answers.null_log_p, best))
