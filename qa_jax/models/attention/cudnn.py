"""Attention by cuDNN: for NVIDIA GPUs, 16-bit operands and unpacked rows.

Glossary of shapes: B rows, L row length, H attention heads, K head size.
"""

import jax
import jax.numpy as jnp

from qa_jax.models.attention.base import Drop
from qa_jax.models.attention.base import Visible


def attend(q: jax.Array,  # [B, H, L, K] bfloat16, as are k and v
           k: jax.Array, v: jax.Array, visible: Visible,
           drop: Drop) -> jax.Array:  # [B, H, L, K] float32
  """Computes attention, rounded to 16 bits; padding must end each row."""
  assert visible.segment_ids is None and not drop.active
  # A row of padding only attends to its first token, because a softmax over no
  # token is NaN.
  lengths = jnp.maximum(visible.attention_mask.sum(axis=1, dtype=jnp.int32), 1)
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))  # [B, L, H, K]
  y = jax.nn.dot_product_attention(
      q, k, v, key_value_seq_lengths=lengths, implementation='cudnn')
  return y.transpose(0, 2, 1, 3).astype(jnp.float32)
