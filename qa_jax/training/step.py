"""The update: one pure function of a state and a batch.

Glossary of shapes: B batch (windows), over all devices and micro-steps.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Rows = dict[str, jax.Array]  # per row of a batch: 'loss' and what is logged
Loss = Callable[[Any, dict[str, jax.Array], jax.Array], Rows]
# Folded into the key of a step for the random draw that its rows share. Dropout
# folds the number of a row into that key, and no row has this number.
STEP_DRAW = 2**31 - 1


@flax.struct.dataclass
class TrainState:
  """What an update changes."""

  step: jax.Array  # [] int32, updates made or skipped so far
  params: Any
  opt_state: Any
  # [2] uint32: the seed's key, for dropout. It never changes, but as a constant
  # of the program it would have every seed compile its own.
  key_data: jax.Array


def train_step(state: TrainState, batch: dict[str, jax.Array],
               axis_name: str | None = None, *, loss_fn: Loss,
               optimizer: optax.GradientTransformation,
               accumulation: int = 1, skip_norm: float = 0.0
               ) -> tuple[TrainState, dict[str, Any]]:
  """One update from sums: Σ w·∇loss / Σ w over rows, micro-steps, devices.

  `loss_fn(params, batch, key)` gives a value per row of 'loss' and of what
  else is to be averaged and logged. Dividing once, at the end, by the global
  weight is what makes uneven padding exact on any number of devices.

  An update of which a value or the gradient's norm is not finite is skipped:
  it leaves parameters and optimizer as they are, and `skipped` is 1. So is one
  whose gradient is longer than `skip_norm`, before it is clipped; 0: none is.
  """
  key = jax.random.fold_in(
      jax.random.wrap_key_data(state.key_data), state.step)
  batch = {**batch, 'step': jnp.full_like(batch['row'], state.step),
           'draw': jnp.full_like(batch['row'], jax.random.uniform(
               jax.random.fold_in(key, STEP_DRAW)), jnp.float32)}

  def weighted(params, rows):
    totals = {name: jnp.sum(value * rows['weight'])
              for name, value in loss_fn(params, rows, key).items()}
    return totals['loss'], (totals, jnp.sum(rows['weight']))

  def sums(rows):
    (_, (values, weight)), grads = jax.value_and_grad(weighted, has_aux=True)(
        state.params, rows)
    return values, weight, grads

  if accumulation == 1:
    totals = sums(batch)
  else:
    # Row r goes to micro-step r mod A, so a device keeps its own rows.
    micro = jax.tree.map(lambda x: x.reshape(
        -1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(
        sums, jax.tree.map(lambda x: x[0], micro)))
    totals, _ = jax.lax.scan(
        lambda total, rows: (jax.tree.map(jnp.add, total, sums(rows)), None),
        zero, micro)
  if axis_name:
    totals = jax.lax.psum(totals, axis_name)
  values, weight, grads = totals
  weight = jnp.maximum(weight, 1e-8)
  grads = jax.tree.map(lambda g: g / weight, grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  values = {**{name: value / weight for name, value in values.items()},
            'grad_norm': optax.tree.norm(grads)}
  good = jnp.all(jnp.isfinite(jnp.stack([*values.values()])))
  if skip_norm:
    good &= values['grad_norm'] <= skip_norm
  params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (optax.apply_updates(state.params, updates), opt_state),
      (state.params, state.opt_state))
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, {**values, 'skipped': 1.0 - good}
