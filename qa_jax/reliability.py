"""What an evaluation of a calibrated run says more: thresholds, reliability.

Glossary of shapes: E questions.
"""

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np

from qa_jax import aggregate
from qa_jax import answering
from qa_jax import calibration
from qa_jax import metrics
from qa_jax.data.examples import Example

PICTURE = 'reliability.png'


def confidence(found: aggregate.Answers,
               silent: np.ndarray,  # [E] bool: no answer was given
               ) -> np.ndarray:  # [E]
  """The probability of what was said: of the best span, or of null."""
  best = np.full(len(silent), -np.inf)
  has = found.ptr[:-1] < found.ptr[1:]
  best[has] = found.log_p[found.ptr[:-1][has]]
  return np.exp(np.where(silent, found.null_log_p, best))


def report(examples: Sequence[Example], predictions: Mapping[str, str],
           always: Mapping[str, str], na_scores: Mapping[str, float] | None,
           held_out: calibration.Calibration, *,
           before: np.ndarray, after: np.ndarray,  # [E] confidence
           output: pathlib.Path | None) -> dict[str, float]:
  """Entries of metrics.json; draws the reliability diagram into `output`.

  `always` are answers that no threshold has touched.
  """
  right, _ = metrics.per_question(examples, predictions)
  bins = {'temperature 1': calibration.bins(before, right),
          f'temperature {held_out.temperature:.2f}': calibration.bins(
              after, right)}
  errors = [100 * calibration.error(b) for b in bins.values()]
  if output:
    from qa_jax import pictures  # lazily: matplotlib is slow
    pictures.reliability(bins, output / PICTURE)
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
  found = answering.thresholds(examples, always, na_scores, held_out)
  return {'held_out_threshold': held_out} | {
      f'at_{name}_{score}': found[name][score]
      for name in ('zero', 'held_out') for score in ('exact_match', 'f1')}
