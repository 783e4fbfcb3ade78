"""Inference: answers and span scores of trained models and checkpoints."""

from qa_jax.inference.decode import answer_questions
from qa_jax.inference.decode import score_windows
from qa_jax.inference.predict import QA
from qa_jax.inference.predict import Answer
from qa_jax.inference.predict import load
from qa_jax.inference.predict import read_questions
from qa_jax.inference.pretrained import Pretrained
from qa_jax.inference.pretrained import read_pretrained
from qa_jax.inference.span_view import SpanView

__all__ = [
    'QA', 'Answer', 'Pretrained', 'SpanView', 'answer_questions', 'load',
    'read_pretrained', 'read_questions', 'score_windows']
