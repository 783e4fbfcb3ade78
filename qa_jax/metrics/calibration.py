"""What held-out questions say of a model: its null threshold and temperature.

Glossary of shapes: E questions, T temperatures, M gold spans of all questions.

Numpy and scipy alone. A run keeps what was chosen in calibration.json, and
evaluation and prediction use it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.io import files

NAME = 'calibration.json'


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Chosen on held-out questions, for one checkpoint and way of decoding."""

  threshold: float | None  # None: all of them have an answer, or the rule none
  temperature: float  # of the softmax over all spans of a question, and null
  data: str  # SPEC of the held-out questions
  sha256: str  # their fingerprint
  questions: int
  checkpoint: int  # step
  decode: Mapping[str, Any]  # see DECODE

  def misfit(self, checkpoint: int, decode: Mapping[str, Any]) -> str:
    """Why it says nothing of this checkpoint and decoding, or ''."""
    if checkpoint != self.checkpoint:
      return f'is of step {self.checkpoint}, not {checkpoint}'
    for name, value in self.decode.items():
      if decode[name] != value:
        return f'is of decode.{name}={value!r}, not {decode[name]!r}'
    return ''


# Where log Σ exp is known for the fit, and its bounds: beyond, scores say
# nothing or all. An interval's error is below 1e-4 nats.
TEMPERATURES = tuple(np.geomspace(0.05, 20, 41).tolist())
BINS = 15  # Guo et al. (2017), section 2
DECODE = ('null_rule', 'search', 'max_answer_length')  # what scores depend on


def write_calibration(workdir: pathlib.Path, found: Calibration,
                      held_out: Mapping[str, Any]) -> None:
  """`held_out` is what was measured there, for whoever reads the file."""
  files.write_json(workdir / NAME, {
      **dataclasses.asdict(found), 'held_out': held_out})


def read_calibration(workdir: pathlib.Path) -> Calibration | None:
  """What a run keeps; None if nothing.

  Raises:
    UserError: the file is damaged.
  """
  path = workdir / NAME
  if not path.is_file():
    return None
  value = files.read_object(path)
  value.pop('held_out', None)
  try:
    found = Calibration(**value)
    whole = (
        math.isfinite(found.threshold or 0.0) and isinstance(found.decode, dict)
        and math.isfinite(found.temperature) and found.temperature > 0
        and type(found.checkpoint) is int)
  except (TypeError, ValueError):  # a field too many or too few, or no number
    whole = False
  if not whole:
    raise errors.UserError(
        f'{path}: not what experiments.calibrate writes; run it again')
  return found


def choose_threshold(
    na_score: np.ndarray,  # [E] higher: surer that there is no answer
    answered: np.ndarray,  # [E] score of answering, 0 … 1
    silent: np.ndarray,  # [E] score of no answer
    ) -> tuple[float, float]:
  """The threshold of the best mean score, and that score.

  A question gets no answer iff its `na_score` exceeds the threshold, so equal
  scores fall on one side: unlike the official script's, a threshold keeps what
  it promises. It lies half way between two scores; of equally good ones it is
  the least, the one with the fewest answers.
  """
  scores, group = np.unique(na_score, return_inverse=True)
  gain = np.bincount(group, answered - silent, len(scores))
  reached = np.concatenate([[0.0], np.cumsum(gain)])  # the first k answered
  k = int((reached > reached.max() - 1e-9).argmax())
  edges = np.concatenate([
      [np.nextafter(scores[0], -np.inf)], (scores[1:] + scores[:-1]) / 2,
      scores[-1:]])
  # Half way between neighbours may round to the upper one.
  edges[1:-1] = np.where(edges[1:-1] >= scores[1:], scores[:-1], edges[1:-1])
  return float(edges[k]), float((silent.sum() + reached[k]) / len(silent))


@dataclasses.dataclass(frozen=True)
class TemperatureData:
  """What a temperature is fitted to; questions that cannot be are left out."""

  mass: np.ndarray  # [E, T] log Σ exp(score / t) of all spans
  best: np.ndarray  # [E] score of the best span
  null: np.ndarray | None  # [E] score; None: null is not among the outcomes
  gold: np.ndarray  # [M] score, question by question
  gold_of: np.ndarray  # [M] question, ascending; none: null is right


def join_temperature_data(parts: Sequence[TemperatureData]) -> TemperatureData:
  """Of consecutive questions."""
  sizes = np.cumsum([0, *(len(part.best) for part in parts)])
  return TemperatureData(
      mass=np.concatenate([part.mass for part in parts]),
      best=np.concatenate([part.best for part in parts]),
      null=None if parts[0].null is None else np.concatenate(
          [part.null for part in parts]),
      gold=np.concatenate([part.gold for part in parts]),
      gold_of=np.concatenate([part.gold_of + size for part, size in zip(
          parts, sizes, strict=False)]))


def fit_temperature(data: TemperatureData) -> tuple[float, float, float]:
  """The temperature of the least negative log likelihood; that at 1, and at it.

  Of a question it is log Σ exp(score / t) over null and all spans, less the
  same over its gold spans, or less null / t if it has none (Guo et al., 2017,
  "On calibration of modern neural networks"), in nats, averaged. L-BFGS in
  log t; log Σ exp is a cubic spline in it, of what it exceeds best / t by.
  """
  from scipy import interpolate  # lazily: slow to import
  from scipy import optimize
  if not len(data.best):
    return 1.0, math.nan, math.nan
  grid = np.log(TEMPERATURES)
  spline = interpolate.CubicSpline(
      grid, data.mass - data.best[:, None] / TEMPERATURES, axis=1)
  answerable, first = np.unique(data.gold_of, return_index=True)

  def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Its value and its derivative by x = log t; d(s / t) / dx = -s / t."""
    t = np.exp(x[0])
    log_z = data.best / t + spline(x[0])
    d_log_z = spline(x[0], 1) - data.best / t
    target = np.zeros(len(data.best))
    d_target = np.zeros(len(data.best))
    if data.null is not None:
      null = data.null / t
      total = np.logaddexp(log_z, null)
      d_log_z = (np.exp(log_z - total) * d_log_z
                 - np.exp(null - total) * null)
      log_z, target, d_target = total, null, -null
      target, d_target = target.copy(), d_target.copy()
    if len(first):
      s = data.gold / t
      target[answerable] = np.logaddexp.reduceat(s, first)
      share = np.exp(s - target[data.gold_of])
      d_target[answerable] = np.add.reduceat(-share * s, first)
    return float((log_z - target).mean()), np.array(
        [(d_log_z - d_target).mean()])

  found = optimize.minimize(
      loss, np.zeros(1), jac=True, method='L-BFGS-B',
      bounds=[(grid[0], grid[-1])], options={'ftol': 1e-12, 'gtol': 1e-8})
  return (float(np.exp(found.x[0])), loss(np.zeros(1))[0], float(found.fun))


def reliability_bins(confidence: np.ndarray,  # [E] 0 … 1
                     right: np.ndarray,  # [E] 0 … 1
         ) -> list[dict[str, float]]:
  """The reliability diagram: BINS of equal width, those with a question in.

  A confidence on an edge belongs to the bin below, as sklearn has it.
  """
  edges = np.linspace(0, 1, BINS + 1)
  of = np.searchsorted(edges[1:-1], confidence)
  out = []
  for b in np.unique(of):
    inside = of == b
    out.append({'low': float(edges[b]), 'high': float(edges[b + 1]),
                'count': int(inside.sum()),
                'confidence': float(confidence[inside].mean()),
                'accuracy': float(right[inside].mean())})
  return out


def expected_calibration_error(diagram: Sequence[Mapping[str, float]]) -> float:
  """The expected calibration error: the mean gap between confidence and
  accuracy over questions, 0 … 1 (Naeini et al., 2015)."""
  total = sum(b['count'] for b in diagram)
  return sum(b['count'] * abs(b['confidence'] - b['accuracy'])
             for b in diagram) / total
