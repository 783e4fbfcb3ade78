"""The train step: one pure function of a train state and a batch.

Glossary of shapes: B batch (windows), over all devices and micro-steps.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Rows = dict[str, jax.Array]  # [B] each: 'loss', and values that are logged
Loss = Callable[[Any, dict[str, jax.Array], jax.Array], Rows]
# Folded into the key of a step for the random draw that its rows share. Dropout
# folds the number of a row into that key, and no row has this number.
STEP_DRAW = 2**31 - 1


@flax.struct.dataclass
class TrainState:
  """The parameters, optimizer state, step number and dropout key of a run."""

  step: jax.Array  # [] int32, number of updates so far, with skipped ones
  params: Any
  opt_state: Any
  # [2] uint32: the dropout key of the seed. It never changes. It is part of the
  # state because as a constant it would make each seed compile its own program.
  key_data: jax.Array


def train_step(state: TrainState, batch: dict[str, jax.Array],
               axis_name: str | None = None, *, loss_fn: Loss,
               optimizer: optax.GradientTransformationExtraArgs,
               accumulation: int = 1, skip_norm: float = 0.0
               ) -> tuple[TrainState, dict[str, Any]]:
  """Makes one optimizer update; returns the new state and the metrics.

  The gradient is Σ w·∇loss / Σ w, where w is the 'weight' of a row and the sums
  run over rows, micro-steps and devices. The sums are divided once, at the end,
  so that uneven padding is exact on any number of devices.

  `optimizer` takes the arguments of optimizer.adamw.
  `loss_fn(params, batch, key)` returns [B] values of 'loss' and of further
  metrics, which are averaged in the same way. `axis_name` is the device axis of
  pmap. `accumulation` is the number of micro-steps.

  An update is skipped if a metric or the gradient norm is not finite, or if the
  gradient norm before clipping exceeds `skip_norm` (0: no limit). A skipped
  update leaves parameters and optimizer state unchanged, and its metric
  'skipped' is 1.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
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
    # Row r goes to micro-step r mod `accumulation`, so that no row moves to
    # another device.
    micro = jax.tree.map(lambda x: x.reshape(
        -1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(
        sums, jax.tree.map(lambda x: x[0], micro)))
    totals, _ = jax.lax.scan(
        lambda total, rows: (jax.tree.map(jnp.add, total, sums(rows)), None),
        zero, micro)
  # XLA would copy all gradients for a sum over one device.
  if axis_name and jax.lax.axis_size(axis_name) > 1:
    totals = jax.lax.psum(totals, axis_name)
  values, weight, grads = totals
  share = 1 / jnp.maximum(weight, 1e-8)
  # The norm is that of the sums, and the gradients are multiplied: XLA writes
  # the result of a division, and what it computes for a norm, to memory.
  values = {**{name: value * share for name, value in values.items()},
            'grad_norm': optax.tree.norm(grads) * share}
  grads = jax.tree.map(lambda g: g * share, grads)
  good = jnp.all(jnp.isfinite(jnp.stack([*values.values()])))
  if skip_norm:
    good &= values['grad_norm'] <= skip_norm
  updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, good=good,
      norm=values['grad_norm'])
  params = jax.tree.map(lambda new, old: jnp.where(good, new, old),
                        optax.apply_updates(state.params, updates),
                        state.params)
  state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
  return state, {**values, 'skipped': 1.0 - good}
