"""Windows → n-best → one answer per question → metrics.

Glossary of shapes: B batch, L window length, N windows, K candidates per
window, E questions.

Shared by training, `evaluate` and `predict`. Only [N, K] spans ever leave the
devices, and of these only those of a block of windows are held at a time.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors as errors_lib
from qa_jax import input_pipeline
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration as calibration_lib
from qa_jax.metrics import selective
from qa_jax.metrics import squad
from qa_jax.models import qa as qa_lib
from qa_jax.runtime import console
from qa_jax.runtime import devices
from qa_jax.runtime import processes


class Evaluator:
  """Windows of a data set, ready to be scored again and again."""

  def __init__(self, model: qa_lib.QAModel, windows: windows_lib.WindowSet,
               config: config_lib.Config,
               mesh: jax.sharding.Mesh | None = None, *,
               calibration: calibration_lib.Calibration | None = None):
    if not len(windows):
      raise errors_lib.UserError('the evaluation data has no question')
    self.windows = windows
    self._model, self._config, self._mesh = model, config, mesh
    self._calibration = calibration

  def evaluate(self, params: Any, *, output: pathlib.Path | None = None,
               progress: str = '', seal: bool = True,
               show: Callable[[str, np.ndarray], None] | None = None,
               ) -> dict[str, float]:
    """Metrics; writes the files of `output`, metrics.json last if `seal`.

    `show` is called with the columns of `kept.SPREAD`, a value a window.
    """
    examples, decode = self.windows.examples, self._config.decode
    output = output if processes.is_first_process() else None
    held_out = self._calibration
    temperature = held_out.temperature if held_out else 1.0
    spreads: list[np.ndarray] = []
    answers, *before = decode_lib.answer_at_temperatures(
        self._model, params, self.windows, self._config,
        (temperature, 1.0) if held_out else (1.0,), mesh=self._mesh,
        progress=progress, statistics=spreads.append if show else None)
    odd = int((~np.isfinite(answers.null_score)).sum())
    if odd:
      raise errors_lib.UserError(
          f'the null score of {odd} of {len(examples)} questions is not finite:'
          ' training went astray; lower config.optim.learning_rate')
    if show:
      for name, values in zip(
          candidates.STATISTICS, np.concatenate(spreads).T, strict=True):
        show(name, values)
    always = answers_lib.answer_texts(examples, answers)
    silent = answers.na_score > decode.null_threshold
    predictions = {e.id: '' if silent[i] else always[e.id]
                   for i, e in enumerate(examples)}
    na_scores = None
    if decode.null_rule != 'never':
      na_scores = {e.id: float(answers.na_score[i])
                   for i, e in enumerate(examples)}
    values = squad.squad_metrics(
        examples, predictions, na_scores=na_scores, always_answer=always)
    if held_out:
      values |= report(
          examples, predictions, always, na_scores, held_out,
          before=confidence(before[0], silent),
          after=confidence(answers, silent), output=output)
    if answers.regret is not None:
      values |= decode_regret(answers.regret)
    if output:
      if na_scores is not None:
        files.write_json(output / 'na_probs.json', na_scores)
      files.write_json(output / 'predictions.json', predictions)
      count = np.bincount(self.windows.example_of, minlength=len(examples))
      files.write_jsonl(output / 'nbest.jsonl', (
          {'id': e.id, 'null_score': float(answers.null_score[i]),
           'null_probability': float(np.exp(answers.null_log_p[i])),
           'windows': int(count[i]),
           'answers': answers_lib.n_best_rows(e, answers, i)}
          for i, e in enumerate(examples)))
      if seal:
        files.write_json(output / 'metrics.json', values)
    return values


def decode_regret(regret: np.ndarray) -> dict[str, float]:  # [E]
  """What an inexact search costs: the mean score missed, over questions where
  it found a span, and the share in percent of questions where it missed any.
  """
  found = regret[np.isfinite(regret)]
  mean = {'decode_regret': float(found.mean())} if len(found) else {}
  return {**mean, 'decode_regret_share': 100.0 * float((regret > 0).mean())}


def evaluate_data(qa: predict.QA, data: str, *, output: pathlib.Path | None,
                  progress: str = '') -> dict[str, float]:
  """Metrics of a loaded model on a SPEC; writes the files under `output`.

  Raises:
    UserError: data that cannot be had, or scores that are not finite.
  """
  return evaluate_windows(qa,
                          input_pipeline.load_windows(qa.config, data,
                                                      qa.tokenizer),
                          output=output,
                          progress=progress)


def evaluate_windows(qa: predict.QA,
                     loaded: tuple[windows_lib.WindowSet, str],
                     *,
                     output: pathlib.Path | None,
                     progress: str = '') -> dict[str, float]:
  """The same of what `features.load` gave."""
  windows, made = loaded
  mesh = devices.data_mesh()
  evaluator = Evaluator(
      qa.model, windows, qa.config, mesh, calibration=qa.calibration)
  console.say(made)
  if qa.calibration and qa.calibration.sha256 == store.fingerprint(
      windows.examples):
    console.say('warning: the threshold was chosen on these very questions')
  params = devices.put_tree(qa.params, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()))  # a copy on every device
  return evaluator.evaluate(params, output=output, progress=progress)

PICTURE = 'reliability.png'


def confidence(found: answers_lib.Answers,
               silent: np.ndarray,  # [E] bool: no answer was given
               ) -> np.ndarray:  # [E]
  """The probability of what was said: of the best span, or of null."""
  best = np.full(len(silent), -np.inf)
  has = found.ptr[:-1] < found.ptr[1:]
  best[has] = found.log_p[found.ptr[:-1][has]]
  return np.exp(np.where(silent, found.null_log_p, best))


def report(examples: Sequence[Example], predictions: Mapping[str, str],
           always: Mapping[str, str], na_scores: Mapping[str, float] | None,
           held_out: calibration_lib.Calibration, *,
           before: np.ndarray, after: np.ndarray,  # [E] confidence
           output: pathlib.Path | None) -> dict[str, float]:
  """Entries of metrics.json; draws the reliability diagram into `output`.

  `always` are answers that no threshold has touched.
  """
  right, _ = squad.per_question(examples, predictions)
  bins = {
      'temperature 1':
          calibration_lib.reliability_bins(before, right),
      f'temperature {held_out.temperature:.2f}':
          calibration_lib.reliability_bins(after, right)
  }
  errors = [
      100 * calibration_lib.expected_calibration_error(b)
      for b in bins.values()
  ]
  if output:
    from qa_jax.io import plots  # lazily: matplotlib is slow
    plots.plot_reliability(bins, output / PICTURE)
  values = {'calibration_error_before': errors[0],
            'calibration_error': errors[1],
            'temperature': held_out.temperature}
  if na_scores is not None and held_out.threshold is not None:
    values |= at_thresholds(examples, always, na_scores, held_out.threshold)
  return values


def at_thresholds(examples: Sequence[Example], always: Mapping[str, str],
                  na_scores: Mapping[str, float],
                  held_out: float) -> dict[str, float]:
  """EM and F1 at threshold 0 and at the held-out one; `best_*` of the metrics
  are those of the oracle."""
  found = selective.thresholds(examples, always, na_scores, held_out)
  return {'held_out_threshold': held_out} | {
      f'at_{name}_{score}': found[name][score]
      for name in ('zero', 'held_out') for score in ('exact_match', 'f1')}
