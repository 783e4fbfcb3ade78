"""Evaluation of trained models: metrics, calibration, ensembles and reports.

The modules `evaluator`, `calibrate`, `ensemble`, `suite` and `error_report`
each stand behind the command of their topic.
"""

from qa_jax.evaluation.calibrate import calibrate_run
from qa_jax.evaluation.calibrate import check_untrained
from qa_jax.evaluation.ensemble import build_ensemble
from qa_jax.evaluation.ensemble import write_ensemble
from qa_jax.evaluation.error_report import write_error_report
from qa_jax.evaluation.evaluator import Evaluator
from qa_jax.evaluation.evaluator import evaluate_data
from qa_jax.evaluation.evaluator import evaluate_windows
from qa_jax.evaluation.suite import run_suite
from qa_jax.evaluation.suite import write_suite

__all__ = [
    'Evaluator', 'build_ensemble', 'calibrate_run', 'check_untrained',
    'evaluate_data', 'evaluate_windows', 'run_suite', 'write_ensemble',
    'write_error_report', 'write_suite']
