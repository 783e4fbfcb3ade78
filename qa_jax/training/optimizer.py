"""The AdamW optimizer of BERT and the learning-rate schedules.

A schedule is a function of the number of steps so far, t. `peak` is the
largest learning rate, `num_steps` (T) the length of the run, and `warmup_steps`
(W) the length of the warm-up.
"""

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qa_jax import errors

# The rate after the warm-up, as a schedule of t - W, from peak, T and W.
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    # A linear fall to 0 at T, as in Hugging Face transformers.
    'linear': lambda peak, num_steps, warmup_steps: optax.linear_schedule(
        peak, 0.0, max(num_steps - warmup_steps, 1)),
    # peak * (1 - t / T), as in google-research/bert, optimization.py. The rate
    # therefore jumps down at t = W.
    'bert': lambda peak, num_steps, warmup_steps: (
        lambda t: optax.linear_schedule(peak, 0.0, num_steps)(
            t + warmup_steps)),
    # Half a cosine wave down to 0.
    'cosine': lambda peak, num_steps, warmup_steps: (
        optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))),
    'constant': lambda peak, *_: optax.constant_schedule(peak)}


def make_schedule(name: str, *, learning_rate: float, num_steps: int,
                  warmup_fraction: float) -> optax.Schedule:
  """Builds a linear rise to `learning_rate`, then the schedule `name`.

  Raises:
    UserError: there is no such schedule.
  """
  if name not in SCHEDULES:
    raise errors.UserError(f'unknown optim.schedule {name!r}'
                           f'{errors.did_you_mean(name, SCHEDULES)}')
  warmup_steps = int(warmup_fraction * num_steps)
  return optax.join_schedules(
      [optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)),
       SCHEDULES[name](learning_rate, num_steps, warmup_steps)], [warmup_steps])


def adamw(schedule: optax.Schedule, *, weight_decay: float = 0.01,
          clip_norm: float = 1.0, layer_decay: float = 1.0, num_layers: int = 0,
          bias_correction: bool = True, eps: float = 1e-8,
          bias_table: str = '', freeze_encoder: bool = False
          ) -> optax.GradientTransformationExtraArgs:
  """Builds AdamW: clipping, Adam, decoupled decay, layer-wise rates, schedule.

  The gradients must already be averaged over devices, because they are clipped
  by their global norm. `clip_norm` 0 turns clipping off. Without
  `bias_correction`, as in BERT's code, early updates are up to 6.6 times as
  long and fine-tuning becomes unstable (Zhang et al., 2021, section 4).
  `bias_table` is that of `decay_mask`. With `freeze_encoder` the encoder has no
  moments; its gradients must be 0 and are its updates.

  `update` takes two more arguments. `norm` is the global norm of the gradients
  if it is known. If `good`, a bool array, is false, the state does not change.
  """
  chain = optax.chain(
      _clip(clip_norm) if clip_norm else optax.identity(),
      _scale_by_adam(bias_correction, eps),
      optax.add_decayed_weights(
          weight_decay, lambda params: decay_mask(params, bias_table)),
      _scale_layers(layer_decay, num_layers),
      _skippable(optax.scale_by_learning_rate(schedule)))
  if not freeze_encoder:
    return chain
  return optax.masked(chain, lambda params: _map_named(
      lambda name, _: name.startswith('head/'), params))


def _clip(longest) -> optax.GradientTransformationExtraArgs:
  """Returns optax.clip_by_global_norm with a single factor.

  With two operations on each gradient, XLA writes the gradients to memory
  again before it reads them for the moments.
  """
  def update(updates, state, params=None, *, norm=None, **_):
    del params
    norm = optax.tree.norm(updates) if norm is None else norm
    factor = jnp.where(norm < longest, 1.0, longest / norm)
    return jax.tree.map(lambda g: g * factor, updates), state
  return optax.GradientTransformationExtraArgs(optax.identity().init, update)


def _scale_by_adam(bias_correction, eps, decays=(0.9, 0.999)
                   ) -> optax.GradientTransformationExtraArgs:
  adam = _skippable(optax.scale_by_adam(*decays))

  def update(updates, state, params=None, **arguments):
    _, state = adam.update(updates, state, params, **arguments)
    # Without the barrier, XLA for CPUs computes the moments a second time for
    # the parameters, from old moments that it has to copy for that. A GPU
    # updates parameter and moments in one kernel, which a barrier would divide.
    state = jax.lax.platform_dependent(
        state, cpu=jax.lax.optimization_barrier, default=lambda state: state)
    m_factor, v_factor = (
        1 / (1 - jnp.float32(decay) ** state.count) if bias_correction else 1.0
        for decay in decays)
    return jax.tree.map(
        lambda m, v: m * m_factor / (jnp.sqrt(v * v_factor) + eps),
        state.mu, state.nu), state
  return optax.GradientTransformationExtraArgs(adam.init, update)


def _skippable(inner: optax.GradientTransformation
               ) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` with a state that only a `good` update changes."""
  def update(updates, state, params=None, *, good=True, **_):
    updates, new = inner.update(updates, state, params)
    return updates, jax.tree.map(
        lambda new, old: jnp.where(good, new, old), new, state)
  return optax.GradientTransformationExtraArgs(inner.init, update)


def decay_mask(params: Any, bias_table: str = '') -> Any:
  """Returns a tree of bools: True except for biases and LayerNorm scales.

  `bias_table` is the path of a table of biases below the encoder, '' if it has
  none. The Trainer of transformers spares that of MPNet, too.
  """
  return _map_named(
      lambda name, _: not (re.search(r'(^|/)(bias|scale)$', name)
                           or name == f'encoder/{bias_table}'), params)


def layer_scales(params: Any, layer_decay: float, num_layers: int) -> Any:
  """Returns a tree of factors that lower the rates of the early layers.

  With n = `num_layers`, the factor is 1 for the head and for what the encoder
  has behind its last layer, layer_decay ** (n - l) for layer l = 0 … n - 1, and
  layer_decay ** (n + 1) for the embeddings (Clark et al., 2020, without the
  off-by-one of its code, electra#51).

  Raises:
    UserError: an imported encoder has a parameter that is none of these.
  """
  def scale(name: str, _) -> float:
    if name.startswith('head/'):
      return 1.0
    layer = re.search(r'(^|/)layer_(\d+)/', name)
    if layer:
      return layer_decay ** (num_layers - int(layer[2]))
    if re.search(r'(^|/)embeddings/', name):
      return layer_decay ** (num_layers + 1)
    if name.startswith('encoder/final'):
      return 1.0
    raise errors.UserError(
        f'config.optim.layer_decay={layer_decay:g} gives no rate to the '
        f"parameter {name} of the encoder: it is below no module 'layer_N', "
        "'embeddings' or 'final…'; rename the module or set layer_decay to 1")
  return _map_named(scale, params)


def _scale_layers(layer_decay, num_layers) -> optax.GradientTransformation:
  if layer_decay == 1.0:
    return optax.identity()

  def init(params):
    layer_scales(params, layer_decay, num_layers)  # raises before any step
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scales = layer_scales(updates, layer_decay, num_layers)
    return jax.tree.map(lambda u, s: u * s, updates, scales), state
  return optax.GradientTransformation(init, update)


def _map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """Applies fn('encoder/layer_0/…/kernel', leaf) to the leaves of a tree."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: fn('/'.join(k.key for k in path), leaf), tree)
