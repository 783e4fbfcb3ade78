"""Inference: answers and span scores of trained models and checkpoints."""

from qa_jax.inference.decode import answer_questions as answer_questions
from qa_jax.inference.decode import score_windows as score_windows
from qa_jax.inference.pipeline import QuestionAnswering as QuestionAnswering
from qa_jax.inference.predict import QA as QA
from qa_jax.inference.predict import Answer as Answer
from qa_jax.inference.predict import load as load
from qa_jax.inference.predict import read_questions as read_questions
from qa_jax.inference.pretrained import Pretrained as Pretrained
from qa_jax.inference.pretrained import read_pretrained as read_pretrained
from qa_jax.inference.span_view import SpanView as SpanView
