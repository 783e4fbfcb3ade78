"""Serving: answers over HTTP, and the HTML pages that show a model at work.

The files `server` and `inspect_page` are loaded only when they are imported,
since they need starlette and matplotlib.
"""

from qa_jax.serving.batching import Batcher as Batcher
from qa_jax.serving.batching import ModelError as ModelError
from qa_jax.serving.service import Limits as Limits
from qa_jax.serving.service import Question as Question
from qa_jax.serving.service import RefusedError as RefusedError
from qa_jax.serving.service import Service as Service
