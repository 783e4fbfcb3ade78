"""Evaluation of trained models: metrics, calibration, ensembles and reports."""

from qa_jax.evaluation.calibrate import calibrate_run as calibrate_run
from qa_jax.evaluation.calibrate import check_untrained as check_untrained
from qa_jax.evaluation.ensemble import build_ensemble as build_ensemble
from qa_jax.evaluation.ensemble import write_ensemble as write_ensemble
from qa_jax.evaluation.error_report import (
  write_error_report as write_error_report,
)
from qa_jax.evaluation.evaluator import Evaluator as Evaluator
from qa_jax.evaluation.evaluator import evaluate_data as evaluate_data
from qa_jax.evaluation.evaluator import evaluate_windows as evaluate_windows
from qa_jax.evaluation.suite import run_suite as run_suite
from qa_jax.evaluation.suite import write_suite as write_suite
