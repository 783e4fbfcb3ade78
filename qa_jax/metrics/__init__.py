"""Numbers from predicted texts, computed without jax.

EM and F1 of SQuAD, null thresholds and selective prediction, calibration,
significance tests and error analysis.
"""

from qa_jax.data.examples import normalize_answer
from qa_jax.metrics.calibration import Calibration
from qa_jax.metrics.calibration import choose_threshold
from qa_jax.metrics.calibration import expected_calibration_error
from qa_jax.metrics.calibration import fit_temperature
from qa_jax.metrics.calibration import read_calibration
from qa_jax.metrics.calibration import reliability_bins
from qa_jax.metrics.error_analysis import analyse_errors
from qa_jax.metrics.error_analysis import compare_predictions
from qa_jax.metrics.predictions import Predictions
from qa_jax.metrics.predictions import read_n_best
from qa_jax.metrics.predictions import read_na_probs
from qa_jax.metrics.predictions import read_predictions
from qa_jax.metrics.selective import average_precision
from qa_jax.metrics.selective import declines
from qa_jax.metrics.selective import precision_recall
from qa_jax.metrics.selective import risk_coverage
from qa_jax.metrics.significance import article_sums
from qa_jax.metrics.significance import hierarchical_interval
from qa_jax.metrics.significance import holm_adjust
from qa_jax.metrics.significance import sign_flip
from qa_jax.metrics.squad import best_threshold
from qa_jax.metrics.squad import per_question
from qa_jax.metrics.squad import score_answer
from qa_jax.metrics.squad import squad_metrics

__all__ = [
    'Calibration', 'Predictions', 'analyse_errors', 'article_sums',
    'average_precision', 'best_threshold', 'choose_threshold',
    'compare_predictions', 'declines', 'expected_calibration_error',
    'fit_temperature', 'hierarchical_interval', 'holm_adjust',
    'normalize_answer', 'per_question', 'precision_recall', 'read_calibration',
    'read_n_best', 'read_na_probs', 'read_predictions', 'reliability_bins',
    'risk_coverage', 'score_answer', 'sign_flip', 'squad_metrics']
