"""Decoding: span search, null rules, and n-best answers from window scores."""

from qa_jax.decoding.answers import MERGES as MERGES
from qa_jax.decoding.answers import Answers as Answers
from qa_jax.decoding.answers import answer_texts as answer_texts
from qa_jax.decoding.answers import merge_windows as merge_windows
from qa_jax.decoding.candidates import WindowSpans as WindowSpans
from qa_jax.decoding.null_rules import NULL_RULES as NULL_RULES
from qa_jax.decoding.null_rules import NullRule as NullRule
from qa_jax.decoding.null_rules import WindowScores as WindowScores
from qa_jax.decoding.search import SEARCHES as SEARCHES
from qa_jax.decoding.search import Spans as Spans
from qa_jax.decoding.search import argmax as argmax
from qa_jax.decoding.search import banded as banded
from qa_jax.decoding.search import beam as beam
from qa_jax.decoding.search import dense as dense
from qa_jax.decoding.search import is_exact as is_exact
from qa_jax.decoding.search import log_partition as log_partition
from qa_jax.decoding.search import top_k as top_k
from qa_jax.decoding.search import two_stage as two_stage
