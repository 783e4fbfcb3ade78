"""A model that looks its scores up in a table, with examples for it."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np

from qa_jax import config as config_lib
from qa_jax.data import tokenizer
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.span_scores import SpanScores

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TOKENIZER = tokenizer.Tokenizer((*tokenizer.SPECIAL, *LETTERS), True)
TRACED = collections.Counter()  # (name, batch shape) → number of traces


@dataclasses.dataclass(frozen=True)
class Lookup:
  """A model whose scores are small integers, so that sums are exact.

  The start and end score of a token depend on its id alone. The null score is
  the sum of the window's ids modulo 7: a field of the scores if `null_field`,
  else [CLS] has half of it as start and half of it as end score.
  """

  null_field: bool = False
  name: str = ''

  def apply(self, variables, token_ids, token_type_ids, attention_mask,
            context_mask, start_mask=None):
    del token_type_ids, context_mask, start_mask
    TRACED[self.name, token_ids.shape] += 1
    start, end = (variables['params'][k][token_ids] for k in ('start', 'end'))
    null = ((token_ids * attention_mask).sum(axis=1) % 7).astype(jnp.float32)
    if self.null_field:
      return SpanScores(start, end, null=null)
    return SpanScores(start.at[:, 0].set(null / 2), end.at[:, 0].set(null / 2))


def random_text(rng, count):
  return ' '.join(rng.choice(list(LETTERS[:12]), count))


def make_examples(seed=0, lengths=(9, 0, 30, 7, 61, 1)):
  """Returns questions about contexts of one-letter words.

  Word i is token i and character 2 * i. Odd questions have no answer.
  """
  rng = np.random.default_rng(seed)
  examples = []
  for n, length in enumerate(lengths):
    context = random_text(rng, length)
    start = 2 * int(rng.integers(max(length, 1)))
    gold = () if n % 2 else (GoldAnswer(context[start:start + 3], start),)
    examples.append(Example(f'q{n}', random_text(rng, n % 4), context, gold,
                            impossible=not gold))
  return examples


PARAMS = {k: np.random.default_rng(n).integers(
    -3, 4, len(TOKENIZER.vocab)).astype(np.float32)
          for n, k in enumerate(('start', 'end'))}


def make_config(buckets=(12, 16), eval_batch_size=4, **decode):
  return config_lib.check_config({
      'data': {'max_length': 20, 'window_overlap': 6, 'buckets': buckets,
               'max_question_length': 4},
      'decode': {'max_answer_length': 4, 'n_best': 5, **decode},
      'train': {'num_steps': 1, 'eval_batch_size': eval_batch_size}})
