"""What the server does with a request, without HTTP: limits, then answers."""

import asyncio
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data.examples import Example
from qa_jax.data.examples import check_text
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.serving import batching

LENGTHS = (64, 128, 256)  # buckets of a model that was trained without any


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may ask for; beyond it, 413, 422 or 503."""

  body_bytes: int = 262_144
  question_characters: int = 2_000
  context_characters: int = 100_000
  windows: int = 64  # of one context
  waiting: int = 64  # requests in the house at a time
  seconds: float = 30.0  # from the first byte to the answer
  batch: int = 8  # windows the model sees at a time


class RefusedError(Exception):
  """A request that is not answered: an HTTP status and one line."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


@dataclasses.dataclass(frozen=True)
class Question:
  question: str
  context: str
  n_best: int


def prepare_model(qa: predict.QA, limits: Limits) -> predict.QA:
  """The model with batches that compile into few programs."""
  c = qa.config
  buckets = c.data.buckets or tuple(
      n for n in LENGTHS if n < c.data.max_length)
  return dataclasses.replace(qa, config=dataclasses.replace(
      c, data=dataclasses.replace(c.data, buckets=buckets, packing=False),
      train=dataclasses.replace(c.train, eval_batch_size=limits.batch)))


class Service:
  """A model behind limits; its coroutines belong to one event loop."""

  def __init__(self, qa: predict.QA, limits: Limits):
    self.qa, self.limits = prepare_model(qa, limits), limits
    self.inside = 0  # requests being read, waiting or answered
    self.batcher = batching.Batcher(
        self.qa.answer_batch, max_batch=limits.batch)

  def warm_up(self) -> int:
    """Compiles all programs of requests and returns their number."""
    return self.qa.warm_up()

  def parse(self, body: bytes) -> Question:
    """The request in a body.

    Raises:
      Refused: 422, saying which field is wrong and how.
    """
    try:
      fields = files.parse_object(body.decode('utf-8'), 'body')
      known = ('question', 'context', 'n_best')
      for name in fields:
        if name not in known:
          raise errors.UserError(
              f'no field {name[:40]!r}{errors.did_you_mean(name[:40], known)}')
      asked = Question(check_text(fields.get('question'), 'question'),
                       check_text(fields.get('context'), 'context'),
                       fields.get('n_best', self.qa.config.decode.n_best))
    except UnicodeDecodeError as e:
      raise RefusedError(422, f'body is not UTF-8 at byte {e.start}') from None
    except errors.UserError as e:
      raise RefusedError(422, str(e)) from None
    most = self.qa.config.decode.n_best
    if type(asked.n_best) is not int or not 1 <= asked.n_best <= most:
      raise RefusedError(
          422, f'n_best is {json.dumps(asked.n_best)[:40]}, expected '
          f'an integer in 1 … {most}')
    for name, bound in (('question', self.limits.question_characters),
                        ('context', self.limits.context_characters)):
      length = len(getattr(asked, name))
      if length > bound:
        raise RefusedError(422,
                           f'{name} has {length} characters; at most {bound}')
    return asked

  async def answer(self, asked: Question) -> dict[str, Any]:
    """As `predict.QA.answer`, for JSON."""
    await self._check_windows(asked, self.limits.windows)
    answer = await self.batcher.ask(
        {'question': asked.question, 'context': asked.context})
    return {**dataclasses.asdict(answer),
            'n_best': list(answer.n_best[:asked.n_best])}

  async def spans(self, asked: Question) -> dict[str, Any]:
    """What the heat map shows, over the context's tokens alone.

    `band[i][d]` scores the span of tokens i … i + d; null where there is none.
    """
    await self._check_windows(asked, 1)
    seen = await self.batcher.call(
        self.qa.spans, asked.question, asked.context)
    keep = np.flatnonzero(seen.context_mask)
    band = [[round(float(x), 4) if np.isfinite(x) else None for x in row]
            for row in seen.band[keep]]
    return {'tokens': [seen.tokens[i] for i in keep],
            'offsets': seen.offsets[keep].tolist(),
            'p_start': _rounded(seen.p_start[keep]),
            'p_end': _rounded(seen.p_end[keep]),
            'band': band, 'null_score': float(seen.null_score)}

  async def _check_windows(self, asked: Question, most: int) -> None:
    count = await asyncio.to_thread(self._windows, asked)
    if count > most:
      raise RefusedError(
          422, f'the context needs {count} windows of '
          f'{self.qa.config.data.max_length} tokens; at most {most}')

  def _windows(self, asked: Question) -> int:
    return len(input_pipeline.make_windows(
        self.qa.config, [Example('0', asked.question, asked.context)],
        self.qa.tokenizer))


def _rounded(values: Sequence[float]) -> list[float]:
  return [round(float(x), 6) for x in values]
