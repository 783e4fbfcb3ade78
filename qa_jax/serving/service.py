"""The service behind the server: requests, limits and answers, without HTTP."""

import asyncio
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data.examples import Example
from qa_jax.data.examples import text_field
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.serving import batching

# Buckets of a run without config.data.buckets, those below data.max_length.
LENGTHS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Limits:
  """The limits on requests; beyond them the status is 413, 422 or 503."""

  body_bytes: int = 262_144
  question_characters: int = 2_000
  context_characters: int = 100_000
  windows: int = 64  # of one context
  waiting: int = 64  # requests being read or answered at a time
  seconds: float = 30.0  # from the headers of a request to its answer
  batch: int = 8  # windows in a batch, and questions answered together


class RefusedError(Exception):
  """Raised for a request that is refused, with HTTP status and message."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass(frozen=True)
class Question:
  """A checked request for /answer or /spans."""

  question: str
  context: str
  n_best: int


def prepare_model(qa: predict.QA, limits: Limits) -> predict.QA:
  """Returns the model with batch shapes that compile into few programs."""
  c = qa.config
  buckets = c.data.buckets or LENGTHS
  return dataclasses.replace(qa, config=dataclasses.replace(
      c, data=dataclasses.replace(c.data, buckets=buckets, packing=False),
      train=dataclasses.replace(c.train, eval_batch_size=limits.batch)))


class Service:
  """A model with limits; its coroutines belong to one event loop."""

  def __init__(self, qa: predict.QA, limits: Limits, *, name: str = 'model'):
    self.qa, self.limits = prepare_model(qa, limits), limits
    self.name = name  # of the model, for the page and /health
    self.inside = 0  # requests being read, waiting or answered
    self.batcher = batching.Batcher(self.qa.answer_batch,
                                    max_batch=limits.batch)

  def parse(self, body: bytes) -> Question:
    """Parses a JSON body; a RefusedError (422) names the wrong field."""
    try:
      fields = files.parse_object(body.decode('utf-8'), 'body')
      known = ('question', 'context', 'n_best')
      for name in fields:
        if name not in known:
          raise errors.UserError(
              f'no field {name[:40]!r}{errors.did_you_mean(name[:40], known)}')
      question = Question(text_field(fields, 'question', 'body'),
                          text_field(fields, 'context', 'body'),
                          fields.get('n_best', self.qa.config.decode.n_best))
    except UnicodeDecodeError as e:
      raise RefusedError(422, f'body is not UTF-8 at byte {e.start}') from None
    except errors.UserError as e:
      raise RefusedError(422, str(e)) from None
    most = self.qa.config.decode.n_best
    if type(question.n_best) is not int or not 1 <= question.n_best <= most:
      raise RefusedError(422, f'n_best is {json.dumps(question.n_best)[:40]}, '
                         f'expected an integer in 1 … {most}')
    for name, bound in (('question', self.limits.question_characters),
                        ('context', self.limits.context_characters)):
      length = len(getattr(question, name))
      if length > bound:
        raise RefusedError(422, f'{name} has {length} characters; at most '
                           f'{bound}')
    return question

  async def answer(self, question: Question) -> dict[str, Any]:
    """Returns the answer of `predict.QA.answer` as JSON fields."""
    await self._check_windows(question)
    answer = await self.batcher.ask(
        {'question': question.question, 'context': question.context})
    return {**dataclasses.asdict(answer),
            'n_best': list(answer.n_best[:question.n_best])}

  async def spans(self, question: Question) -> dict[str, Any]:
    """Returns the scores and probabilities of the context tokens, as JSON.

    A long context gives the tokens of the window that holds the best span.
    `band[i][d]` is the score of tokens i … i + d; None if they are no span.
    """
    await self._check_windows(question)
    view = await self.batcher.call(self.qa.spans, question.question,
                                   question.context)
    keep = np.flatnonzero(view.context_mask)
    band = [[round(float(x), 4) if np.isfinite(x) else None for x in row]
            for row in view.band[keep]]
    return {'tokens': [view.tokens[i] for i in keep],
            'offsets': view.offsets[keep].tolist(),
            'p_start': _rounded(view.p_start[keep]),
            'p_end': _rounded(view.p_end[keep]), 'band': band,
            'null_score': float(view.null_score),
            'null_probability': view.null_probability,
            'window': view.window, 'windows': view.windows}

  async def _check_windows(self, question: Question) -> None:
    count = await asyncio.to_thread(self._count_windows, question)
    most = self.limits.windows
    if count > most:
      raise RefusedError(
          422, f'the context needs {count} windows of '
          f'{self.qa.config.data.max_length} tokens; at most {most}')

  def _count_windows(self, question: Question) -> int:
    return len(input_pipeline.make_windows(
        self.qa.config, [Example('0', question.question, question.context)],
        self.qa.tokenizer))


def _rounded(values: Sequence[float]) -> list[float]:
  return [round(float(x), 6) for x in values]
