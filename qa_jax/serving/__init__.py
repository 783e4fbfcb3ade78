"""Serving: answers over HTTP, and the HTML pages that show a model at work.

The files `server` and `inspect_page` are loaded only when they are imported,
since they need starlette and matplotlib.
"""

from qa_jax.serving.batching import Batcher
from qa_jax.serving.batching import ModelError
from qa_jax.serving.service import Limits
from qa_jax.serving.service import Question
from qa_jax.serving.service import RefusedError
from qa_jax.serving.service import Service

__all__ = [
    'Batcher', 'Limits', 'ModelError', 'Question', 'RefusedError', 'Service']
