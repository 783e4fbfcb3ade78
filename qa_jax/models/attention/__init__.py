"""The implementations of attention, their table ATTENTION, and their LIMITS.

Glossary of shapes: B rows, L row length, H attention heads, K head size.

  y = dropout(softmax(q kᵀ / √K)) v          (Vaswani et al., 2017, section 3.2)

Some encoders add a bias to the scores, such as that of relative positions. The
softmax is over the tokens that are not padding or, in a packed row, over the
segment of the query; in a local layer, over those in a window around it. All
implementations have the same result up to rounding. A new implementation is a
file here, a line of ATTENTION and a line of LIMITS.
"""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from qa_jax import errors
from qa_jax.models.attention import chunked
from qa_jax.models.attention import cudnn
from qa_jax.models.attention import pallas
from qa_jax.models.attention import pallas_tpu
from qa_jax.models.attention import xla
from qa_jax.models.attention.base import Attend
from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible


@dataclasses.dataclass(frozen=True)
class Use:
  """The platform, shapes and dtype for which attention is used."""

  platform: str  # in the naming of jax; '': unknown yet, any is accepted
  length: int
  num_heads: int
  head_size: int
  dtype: jnp.dtype
  packed: bool
  training: bool
  dropout: float = 0.0  # rate of attention weights, in training
  biased: bool = False  # whether a bias is added to the scores
  # Tokens to either side that a local layer sees; None: no layer is local.
  window: int | None = None


def auto(q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible,
         drop: Drop, bias: jax.Array | None = None) -> jax.Array:
  """Computes attention with the choice of `choose_attention`, when traced."""
  name = choose_attention(_use(q, visible, drop, bias))
  return _attend(name, q, k, v, visible, drop, bias)


ATTENTION: dict[str, Attend] = {
    'auto': auto, 'xla': xla.attend, 'cudnn': cudnn.attend,
    'pallas': pallas.attend, 'pallas_tpu': pallas_tpu.attend,
    'chunked': chunked.attend}
# Tokens of a row from which `auto` computes the weights of a chunk at a time.
# On a CPU, a step at 512 tokens is a tenth faster in one piece, one at 2,048
# tokens is a third faster by chunks (measured in commit 43a5877).
CHUNKED_FROM = 1025


def choose_attention(use: Use) -> str:
  """Returns the fast implementation for a use, or 'xla' if it does not fit.

  On a GPU it is 'pallas' for packed rows and for dropout of weights, of which
  'xla' stores L·L weights a head, and else 'cudnn', which takes bfloat16. On a
  TPU it is 'pallas_tpu'. If that does not fit, and on a CPU, it is 'chunked'
  for long rows: from CHUNKED_FROM tokens on, or beyond three chunks of a local
  window.
  """
  drops = use.training and use.dropout > 0
  fused = {'gpu': 'pallas' if use.packed or drops else 'cudnn',
           'tpu': 'pallas_tpu'}.get(use.platform)
  if fused and not limitation(fused, use):
    return fused
  if use.window is not None:  # a query then computes 3C weights, not L
    long = use.length > 3 * chunked.chunk_of_window(use.window)
  else:
    long = use.length >= CHUNKED_FROM
  return 'chunked' if long and not limitation('chunked', use) else 'xla'


def resolve_attention(name: str, use: Use) -> str:
  """Returns `name`, or what `auto` chooses for a use."""
  return choose_attention(use) if name == 'auto' else name


def _runs_on(platform: str) -> tuple[Callable[[Use], bool], str]:
  return (lambda use: use.platform not in ('', platform),
          f'runs on a {platform.upper()}, and this is a {{use.platform}}')


_NO_BIAS = (lambda use: use.biased,
            'adds no bias to the scores, and this encoder has one')
_NO_WINDOW = (lambda use: use.window is not None,
              'has no local window, and this encoder has one')
# Name → pairs of a condition that excludes the use, and the message for it.
LIMITS: dict[str, tuple[tuple[Callable[[Use], bool], str], ...]] = {
    'auto': (), 'xla': (), 'chunked': (_NO_BIAS,),
    'cudnn': (
        _runs_on('gpu'), _NO_BIAS, _NO_WINDOW,
        (lambda use: use.packed, 'takes no packed rows'),
        (lambda use: jnp.dtype(use.dtype).itemsize != 2,
         'takes bfloat16, not {use.dtype}'),
        (lambda use: use.head_size % 8 or use.head_size > 128,
         'takes heads of multiples of 8 up to 128, not {use.head_size}'),
        (lambda use: use.training and use.dropout > 0,
         'drops no weights; attention_dropout is {use.dropout}, not 0')),
    'pallas': (
        _runs_on('gpu'), _NO_BIAS, _NO_WINDOW,
        (lambda use: use.head_size not in pallas.HEAD_SIZES,
         f'takes heads of {", ".join(map(str, pallas.HEAD_SIZES))}, not '
         '{use.head_size}'),
        (lambda use: use.length > pallas.LONGEST,
         f'takes up to {pallas.LONGEST} tokens, not {{use.length}}')),
    'pallas_tpu': (
        _runs_on('tpu'), _NO_BIAS,
        (lambda use: use.head_size not in pallas_tpu.HEAD_SIZES,
         f'takes heads of {", ".join(map(str, pallas_tpu.HEAD_SIZES))}, not '
         '{use.head_size}'),
        (lambda use: use.num_heads * use.head_size % pallas_tpu.LANES,
         f'takes heads that have a multiple of {pallas_tpu.LANES} numbers '
         'together, not {use.num_heads} heads of {use.head_size}'),
        (lambda use: not pallas_tpu.fits(use.length),
         f'takes up to {pallas_tpu.LONGEST_TILE} tokens, or up to '
         f'{pallas_tpu.LONGEST} in multiples of {min(pallas_tpu.TILES)}, not '
         '{use.length}')),
}


def limitation(name: str, use: Use) -> str:
  """Returns why an implementation cannot serve a use, or '' if it can."""
  return next((message.format(use=use) for excludes, message in LIMITS[name]
               if excludes(use)), '')


def attend(name: str, q: jax.Array,  # [B, H, L, K] compute dtype, as k and v
           k: jax.Array, v: jax.Array, visible: Visible, drop: Drop,
           bias: jax.Array | None = None,  # [B or 1, H, L, L] float32
           ) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention with the entry `name` of ATTENTION.

  `bias` is added to q kᵀ / √K. Raises a UserError if there is no such entry, or
  it cannot serve this use.
  """
  check_attention(name, _use(q, visible, drop, bias))
  return _attend(name, q, k, v, visible, drop, bias)


def _attend(name: str, *inputs: Any) -> jax.Array:
  # An implementation that adds no bias has no argument for it: see _NO_BIAS.
  return ATTENTION[name](*(inputs[:-1] if inputs[-1] is None else inputs))


def check_attention(name: str, use: Use, what: str = 'attention') -> None:
  """Raises a UserError if the implementation `name` cannot serve a use.

  The message lists the implementations that can; `what` names the setting.
  """
  errors.check_known(what, name, ATTENTION)
  problem = limitation(name, use)
  if problem:
    fitting = ', '.join(n for n in ATTENTION if not limitation(n, use))
    raise errors.UserError(
        f'{what}={name!r} {problem}; those that fit: {fitting}')


def import_kernels(name: str, use: Use) -> None:
  """Imports what the implementation `name` needs for a use.

  In JAX 0.11 the import of Pallas for TPUs ends the cache of traces. Amid the
  first layer it would make JAX trace, lower and compile this layer twice.
  """
  if resolve_attention(name, use) == 'pallas_tpu':
    importlib.import_module('jax.experimental.pallas.tpu')


def _use(q: jax.Array, visible: Visible, drop: Drop,
         bias: jax.Array | None) -> Use:
  return Use(platform=jax.default_backend(), length=q.shape[2],
             num_heads=q.shape[1], head_size=q.shape[3], dtype=q.dtype,
             packed=visible.segment_ids is not None,
             training=drop.keys is not None, dropout=drop.rate,
             biased=bias is not None, window=visible.window)
