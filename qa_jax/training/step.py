"""The train step: one pure function of a train state and a batch.

Glossary of shapes: B batch (windows), over all devices and micro-steps;
K updates of a dispatch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
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

  `batch` has 'row' [B] int32, the number of a row in the global batch, 'weight'
  [B] float32, and the arrays that `loss_fn` reads; 'step' and 'draw' are added.

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


COUNT = 'updates'  # [B] int32 array of a stack of batches: how many are real


def stack_batches(batches: Sequence[dict[str, np.ndarray]], most: int
                  ) -> dict[str, np.ndarray]:
  """Stacks batches of one shape on the second axis, for `several_updates`.

  The first axis stays that of rows, by which arrays are placed on devices. The
  stack has room for `most` batches; the room that is left is zero.
  """
  def stack(*arrays: np.ndarray) -> np.ndarray:
    out = np.zeros((len(arrays[0]), most, *arrays[0].shape[1:]),
                   arrays[0].dtype)
    for k, array in enumerate(arrays):
      out[:, k] = array
    return out

  stacked = jax.tree.map(stack, *batches)
  return {**stacked, COUNT: np.full(
      len(batches[0]['row']), len(batches), np.int32)}


def several_updates(step: Callable[..., tuple[TrainState, dict[str, Any]]]
                    ) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
  """Returns a step that makes one update for each batch of a stack.

  It equals calls of `step` for one batch after another, up to rounding, and its
  metrics are [K]. One program makes any number of updates up to K, so that the
  few before an evaluation need no program of their own.
  """
  def updates(state: TrainState, batches: dict[str, jax.Array],
              **options: Any) -> tuple[TrainState, dict[str, Any]]:
    stack = {k: v for k, v in batches.items() if k != COUNT}

    def batch(k: jax.Array | int) -> dict[str, jax.Array]:
      return jax.tree.map(
          lambda x: jax.lax.dynamic_index_in_dim(x, k, 1, keepdims=False),
          stack)

    def body(k, carry):
      state, metrics = carry
      # Without barriers XLA fuses, and rounds, even more unlike one update.
      state, values = jax.lax.optimization_barrier(step(
          *jax.lax.optimization_barrier((state, batch(k))), **options))
      return state, jax.tree.map(
          lambda all_, value: all_.at[k].set(value), metrics, values)

    most = stack['row'].shape[1]
    shapes = jax.eval_shape(lambda s: step(s, batch(0), **options)[1], state)
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype),
                           shapes)
    return jax.lax.fori_loop(
        0, batches[COUNT].max(), body, (state, metrics))

  return updates
