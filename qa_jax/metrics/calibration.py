"""Calibration on held-out data: the null threshold and the temperature.

Glossary of shapes: E questions, T temperatures, M gold spans of all questions.
A run stores its calibration in calibration.json for evaluation and prediction.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import shlex
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.io import files
from qa_jax.metrics import selective

NAME = 'calibration.json'
# Temperatures at which log-partitions are computed, and the bounds of the fit:
# beyond them all spans are nearly equal, or one has all the probability. The
# error of interpolation between two of them is below 1e-4 nats.
TEMPERATURES = tuple(np.geomspace(0.05, 20, 41).tolist())
BINS = 15  # as in table 1 of Guo et al. (2017)
# Fields of config.decode that set the answers and their scores.
DECODE = ('null_rule', 'search', 'max_answer_length', 'n_best', 'merge',
          'whole_words')


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A threshold and a temperature for one checkpoint and way of decoding."""

  # None: every held-out question has an answer, or the null rule is never.
  threshold: float | None
  temperature: float  # of the softmax over null and all spans of a question
  data: str  # SPEC of the held-out questions
  sha256: str  # fingerprint of the held-out questions
  questions: int
  checkpoint: int  # step
  decode: Mapping[str, Any]  # values of the fields in DECODE

  def misfit(self, checkpoint: int, decode: Mapping[str, Any]) -> str:
    """Returns why this does not fit a step and a config.decode, or ''."""
    if checkpoint != self.checkpoint:
      return f'is of step {self.checkpoint}, not {checkpoint}'
    differences = [
        f'of decode.{name}={value!r}, not {decode[name]!r}'
        for name, value in self._other_fields(decode).items()]
    return f'is {", ".join(differences)}' if differences else ''

  def remedy(self, decode: Mapping[str, Any]) -> str:
    """Returns what to do if this does not fit a config.decode or its step."""
    flags = [f'--decode.{name}={decode[name]}'
             for name in self._other_fields(decode)]
    return f'calibrate with {shlex.join(flags)}' if flags else 'calibrate anew'

  def _other_fields(self, decode: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored fields that differ from those of a config.decode."""
    # A file of older code lacks fields: it was computed at their defaults.
    stored = {'merge': 'none', 'whole_words': False, **self.decode}
    if stored['merge'] == 'none':
      # Neither the best answer nor a score depends on n_best.
      stored.pop('n_best', None)
    return {name: value for name, value in stored.items()
            if decode.get(name, value) != value}


def write_calibration(workdir: pathlib.Path, calibration: Calibration,
                      held_out: Mapping[str, Any]) -> None:
  """Writes calibration.json; `held_out` are metrics that no code reads."""
  files.write_json(workdir / NAME, {
      **dataclasses.asdict(calibration), 'held_out': held_out})


def read_calibration(workdir: pathlib.Path) -> Calibration | None:
  """Reads the calibration of a run; None if it has none.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / NAME
  if not path.is_file():
    return None
  fields = files.read_object(path)
  fields.pop('held_out', None)
  try:
    calibration = Calibration(**fields)
    whole = (math.isfinite(calibration.threshold or 0.0)
             and isinstance(calibration.decode, dict)
             and 0 < calibration.temperature < math.inf
             and type(calibration.checkpoint) is int)
  except (TypeError, ValueError):  # a field too many or too few, or no number
    whole = False
  if not whole:
    raise errors.UserError(
        f'{path}: not what experiments.calibrate writes; run it again')
  return calibration


def choose_threshold(na_score: np.ndarray,  # [E] higher: surer of no answer
                     answered: np.ndarray,  # [E] score of the answer, 0 … 1
                     unanswered: np.ndarray,  # [E] score of no answer, 0 … 1
                     ) -> tuple[float, float]:
  """Returns the null threshold of the best mean score, and this mean score.

  Questions of equal `na_score` lie on one side of every threshold, so that it
  reaches this mean; the threshold of the official script may not. It lies half
  way between two scores and is the lowest of equally good thresholds.
  """
  scores, group = np.unique(na_score, return_inverse=True)
  gain = np.bincount(group, answered - unanswered, len(scores))
  total = np.concatenate([[0.0], np.cumsum(gain)])  # with the first k answered
  k = int((total > total.max() - 1e-9).argmax())
  edges = np.concatenate([[np.nextafter(scores[0], -np.inf)],
                          (scores[1:] + scores[:-1]) / 2, scores[-1:]])
  # Half way between neighbours may round to the upper one.
  edges[1:-1] = np.where(selective.declines(scores[1:], edges[1:-1]),
                         edges[1:-1], scores[:-1])
  return float(edges[k]), float((unanswered.sum() + total[k]) / len(unanswered))


@dataclasses.dataclass(frozen=True)
class TemperatureData:
  """The scores that a temperature is fitted to.

  Left out are questions for which no search may return a gold span, unless no
  answer is their right answer.
  """

  log_partition: np.ndarray  # [E, T] log Σ exp(score / t) over all spans
  best: np.ndarray  # [E] score of the best span
  null: np.ndarray | None  # [E] null score; None: null is not an outcome
  gold: np.ndarray  # [M] scores of gold spans, question by question
  gold_of: np.ndarray  # [M] question, ascending; null is right for the rest


def join_temperature_data(parts: Sequence[TemperatureData]) -> TemperatureData:
  """Joins the data of consecutive blocks of questions."""
  join = lambda name: np.concatenate([getattr(part, name) for part in parts])
  sizes = np.cumsum([0, *(len(part.best) for part in parts)])
  return TemperatureData(
      log_partition=join('log_partition'), best=join('best'),
      null=None if parts[0].null is None else join('null'), gold=join('gold'),
      gold_of=np.concatenate([part.gold_of + size for part, size in zip(
          parts, sizes, strict=False)]))


def fit_temperature(data: TemperatureData) -> tuple[float, float, float]:
  """Returns the temperature of the least loss, the loss at 1 and at it.

  The loss is the mean negative log likelihood in nats (Guo et al., 2017, "On
  calibration of modern neural networks"). For one question it is
  log Σ exp(score / t) over null and all spans, minus this sum over its gold
  spans, or minus null / t if the question has no answer. L-BFGS searches over
  log t. A cubic spline in log t interpolates the difference of the log Σ exp of
  all spans and best / t. Without questions the temperature is 1.
  """
  from scipy import interpolate  # lazily: slow to import
  from scipy import optimize
  if not len(data.best):
    return 1.0, math.nan, math.nan
  grid = np.log(TEMPERATURES)
  spline = interpolate.CubicSpline(
      grid, data.log_partition - data.best[:, None] / TEMPERATURES, axis=1)
  answerable, first = np.unique(data.gold_of, return_index=True)

  def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Computes the loss and its derivative by x = log t: d(s/t)/dx = -s/t."""
    t = np.exp(x[0])
    log_z = data.best / t + spline(x[0])
    d_log_z = spline(x[0], 1) - data.best / t
    target, d_target = np.zeros((2, len(data.best)))
    if data.null is not None:
      null = data.null / t
      total = np.logaddexp(log_z, null)
      d_log_z = np.exp(log_z - total) * d_log_z - np.exp(null - total) * null
      log_z, target, d_target = total, null.copy(), -null
    if len(first):
      s = data.gold / t
      target[answerable] = np.logaddexp.reduceat(s, first)
      share = np.exp(s - target[data.gold_of])
      d_target[answerable] = np.add.reduceat(-share * s, first)
    return float((log_z - target).mean()), (d_log_z - d_target).mean(
        keepdims=True)

  fit = optimize.minimize(
      loss, np.zeros(1), jac=True, method='L-BFGS-B',
      bounds=[(grid[0], grid[-1])], options={'ftol': 1e-12, 'gtol': 1e-8})
  return float(np.exp(fit.x[0])), loss(np.zeros(1))[0], float(fit.fun)


def reliability_bins(confidence: np.ndarray,  # [E] 0 … 1
                     right: np.ndarray) -> list[dict[str, float]]:  # [E] 0 … 1
  """Computes the reliability diagram: BINS of equal width, without empty ones.

  A confidence on an edge belongs to the bin below, as in sklearn.
  """
  edges = np.linspace(0, 1, BINS + 1)
  bin_of = np.searchsorted(edges[1:-1], confidence)
  return [{'low': float(edges[b]), 'high': float(edges[b + 1]),
           'count': int((bin_of == b).sum()),
           'confidence': float(confidence[bin_of == b].mean()),
           'accuracy': float(right[bin_of == b].mean())}
          for b in np.unique(bin_of)]


def expected_calibration_error(diagram: Sequence[Mapping[str, float]]) -> float:
  """Computes the mean gap of confidence and accuracy (Naeini et al., 2015)."""
  return sum(b['count'] * abs(b['confidence'] - b['accuracy'])
             for b in diagram) / sum(b['count'] for b in diagram)
