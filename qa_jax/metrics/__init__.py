"""Scores, thresholds, calibration, significance and errors, without jax."""

from qa_jax.data.examples import normalize_answer as normalize_answer
from qa_jax.metrics.calibration import Calibration as Calibration
from qa_jax.metrics.calibration import choose_threshold as choose_threshold
from qa_jax.metrics.calibration import (
  expected_calibration_error as expected_calibration_error,
)
from qa_jax.metrics.calibration import fit_temperature as fit_temperature
from qa_jax.metrics.calibration import read_calibration as read_calibration
from qa_jax.metrics.calibration import reliability_bins as reliability_bins
from qa_jax.metrics.error_analysis import analyse_errors as analyse_errors
from qa_jax.metrics.error_analysis import (
  compare_predictions as compare_predictions,
)
from qa_jax.metrics.predictions import Predictions as Predictions
from qa_jax.metrics.predictions import read_n_best as read_n_best
from qa_jax.metrics.predictions import read_na_probs as read_na_probs
from qa_jax.metrics.predictions import read_predictions as read_predictions
from qa_jax.metrics.selective import average_precision as average_precision
from qa_jax.metrics.selective import declines as declines
from qa_jax.metrics.selective import precision_recall as precision_recall
from qa_jax.metrics.selective import risk_coverage as risk_coverage
from qa_jax.metrics.significance import article_sums as article_sums
from qa_jax.metrics.significance import (
  hierarchical_interval as hierarchical_interval,
)
from qa_jax.metrics.significance import holm_adjust as holm_adjust
from qa_jax.metrics.significance import sign_flip as sign_flip
from qa_jax.metrics.squad import best_threshold as best_threshold
from qa_jax.metrics.squad import per_question as per_question
from qa_jax.metrics.squad import score_answer as score_answer
from qa_jax.metrics.squad import squad_metrics as squad_metrics
