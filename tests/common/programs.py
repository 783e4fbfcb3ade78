"""Answers of exported programs, compared with those of their models."""

from collections.abc import Iterable
import pathlib

import pytest

from qa_jax.export import run as run_lib
from qa_jax.export import stablehlo
from qa_jax.inference import predict


def assert_answers_as_its_model(model: predict.QA,
                                questions: Iterable[tuple[str, str]],
                                directory: pathlib.Path) -> None:
  """Exports a model, and compares answers to (question, context) pairs."""
  questions = list(questions)
  stablehlo.export_run(model, directory / 'out', ('cpu',))
  loaded = run_lib.load_program(directory / 'out')
  answers = model.answer_batch(
      [{'question': q, 'context': c} for q, c in questions])
  for (question, context), expected in zip(questions, answers, strict=True):
    result = run_lib.answer_question(loaded, question, context)
    assert (result['text'], result['start'], result['end']) == (
        expected.text, expected.start, expected.end)
    assert result['score'] == (expected.score and pytest.approx(
        expected.score, abs=1e-5))
    assert result['probability'] == pytest.approx(
        expected.probability, abs=1e-6)
