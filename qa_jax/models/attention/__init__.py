"""ATTENTION: the programs that compute it, with one result, and their limits.

Glossary of shapes: B rows, L length, H heads, K head size.

  y = dropout(softmax(q kᵀ / √K)) v          (Vaswani et al., 2017, section 3.2)

over the real tokens or, in a packed row, over those of the query's own segment.
A new one is a file here, a line in the table and one in LIMITS.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.models.attention import cudnn
from qa_jax.models.attention import pallas
from qa_jax.models.attention import xla
from qa_jax.models.attention.base import Attend
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible


@dataclasses.dataclass(frozen=True)
class Use:
  """What attention is wanted for."""

  platform: str  # jax's name; '': not known yet, and no obstacle
  length: int
  head_size: int
  dtype: jnp.dtype
  packed: bool
  training: bool
  dropout: float = 0.0  # of the weights, in training


def auto(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible,
         drop: Drop) -> jax.Array:
  """What `choose` finds for the platform, decided when traced."""
  return ATTENTION[choose_attention(_use(q, visible, drop))](q, k, v, visible,
                                                             drop)


ATTENTION: dict[str, Attend] = {
    'auto': auto,
    'xla': xla.attend,
    'cudnn': cudnn.attend,
    'pallas': pallas.attend,
}


def choose_attention(use: Use) -> str:
  """The implementation for a use, `xla` where the fast one does not fit.

  `pallas` is nobody's default until it has been measured on a GPU.
  """
  fast = {'gpu': 'cudnn'}.get(use.platform, 'xla')
  return 'xla' if limitation(fast, use) else fast


def _runs_on(platform: str) -> tuple[Callable[[Use], bool], str]:
  return (lambda use: use.platform not in ('', platform),
          f'runs on a {platform.upper()}, and this is a {{use.platform}}')


# Name → what stands in the way, with the words for it.
LIMITS: dict[str, tuple[tuple[Callable[[Use], bool], str], ...]] = {
    'auto': (),
    'xla': (),
    'cudnn': (
        _runs_on('gpu'),
        (lambda use: use.packed, 'takes no packed rows'),
        (lambda use: jnp.dtype(use.dtype).itemsize != 2,
         'takes bfloat16, not {use.dtype}'),
        (lambda use: use.head_size % 8 or use.head_size > 128,
         'takes heads of multiples of 8 up to 128, not {use.head_size}'),
        (lambda use: use.training and use.dropout > 0,
         'drops no weights; attention_dropout is {use.dropout}, not 0')),
    'pallas': (
        _runs_on('gpu'),
        (lambda use: use.head_size not in pallas.HEAD_SIZES,
         f'takes heads of {", ".join(map(str, pallas.HEAD_SIZES))}, not '
         '{use.head_size}'),
        (lambda use: use.length > pallas.LONGEST,
         f'takes up to {pallas.LONGEST} tokens, not {{use.length}}')),
}


def limitation(name: str, use: Use) -> str:
  """What stands between an implementation and a use, or ''."""
  for applies, words in LIMITS[name]:
    if applies(use):
      return words.format(use=use)
  return ''


def attend(name: str, q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Attention by the entry `name` of ATTENTION.

  Raises:
    UserError: there is no such entry, or it is not for this platform or use.
  """
  check_attention(name, _use(q, visible, drop))
  return ATTENTION[name](q, k, v, visible, drop)


def check_attention(name: str, use: Use, what: str = 'attention') -> None:
  """Raises a UserError that names those that fit; `what` is for messages."""
  if name not in ATTENTION:
    raise errors.UserError(
        f'unknown {what} {name!r}{errors.did_you_mean(name, ATTENTION)}')
  problem = limitation(name, use)
  if problem:
    fitting = [other for other in ATTENTION if not limitation(other, use)]
    raise errors.UserError(f'{what}={name!r} {problem}; those that fit: '
                           f'{", ".join(fitting)}')


def _use(q: jax.Array, visible: Visible, drop: Drop) -> Use:
  return Use(
      platform=jax.default_backend(), length=q.shape[2],
      head_size=q.shape[3], dtype=q.dtype,
      packed=visible.segment_ids is not None,
      training=drop.keys is not None, dropout=drop.rate)
