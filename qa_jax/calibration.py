"""What held-out questions say of a model: its threshold of no answer.

Glossary of shapes: E questions.

Numpy alone. A run keeps what was chosen in calibration.json, and evaluation
and prediction use it.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax import files

NAME = 'calibration.json'


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Chosen on held-out questions, for one checkpoint and way of decoding."""

  threshold: float | None  # None: all of them have an answer, or the rule none
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


DECODE = ('null_rule', 'search', 'max_answer_length')  # what scores depend on


def write(workdir: pathlib.Path, found: Calibration,
          held_out: Mapping[str, Any]) -> None:
  """`held_out` is what was measured there, for whoever reads the file."""
  files.write_json(workdir / NAME, {
      **dataclasses.asdict(found), 'held_out': held_out})


def read(workdir: pathlib.Path) -> Calibration | None:
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
    numbers = [0.0 if found.threshold is None else float(found.threshold)]
    whole = all(math.isfinite(x) for x in numbers) and isinstance(
        found.decode, dict) and type(found.checkpoint) is int
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
