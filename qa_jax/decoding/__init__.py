"""Decoding: span search, null rules, and n-best answers from window scores."""

from qa_jax.decoding.answers import MERGES
from qa_jax.decoding.answers import Answers
from qa_jax.decoding.answers import answer_texts
from qa_jax.decoding.answers import merge_windows
from qa_jax.decoding.candidates import WindowSpans
from qa_jax.decoding.null_rules import NULL_RULES
from qa_jax.decoding.null_rules import NullRule
from qa_jax.decoding.null_rules import WindowScores
from qa_jax.decoding.search import SEARCHES
from qa_jax.decoding.search import Spans
from qa_jax.decoding.search import argmax
from qa_jax.decoding.search import banded
from qa_jax.decoding.search import beam
from qa_jax.decoding.search import dense
from qa_jax.decoding.search import is_exact
from qa_jax.decoding.search import log_partition
from qa_jax.decoding.search import top_k
from qa_jax.decoding.search import two_stage

__all__ = [
    'MERGES', 'NULL_RULES', 'SEARCHES', 'Answers', 'NullRule', 'Spans',
    'WindowScores', 'WindowSpans', 'answer_texts', 'argmax', 'banded', 'beam',
    'dense', 'is_exact', 'log_partition', 'merge_windows', 'top_k',
    'two_stage']
