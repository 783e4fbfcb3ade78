"""AdamW with BERT's decay mask, schedules, clipping, layer-wise rates."""

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qa_jax import errors


def linear(peak: float, num_steps: int, warmup_steps: int) -> optax.Schedule:
  """0 → peak over the warm-up, then → 0 at `num_steps` (transformers)."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
       optax.linear_schedule(peak, 0.0, max(num_steps - warmup_steps, 1))],
      [warmup_steps])


def bert(peak: float, num_steps: int, warmup_steps: int) -> optax.Schedule:
  """google-research/bert optimization.py: peak * (1 - t / T) from step 0 on,
  replaced by peak * t / W while t < W; it jumps down where the two meet."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
       lambda t: optax.linear_schedule(peak, 0.0, num_steps)(
           t + warmup_steps)],
      [warmup_steps])


def cosine(peak: float, num_steps: int, warmup_steps: int) -> optax.Schedule:
  """0 → peak over the warm-up, then a half cosine → 0."""
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
       optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))],
      [warmup_steps])


def constant(peak: float, num_steps: int,
             warmup_steps: int) -> optax.Schedule:
  """0 → peak over the warm-up, then peak."""
  del num_steps
  return optax.join_schedules(
      [optax.linear_schedule(0.0, peak, max(warmup_steps, 1)),
       optax.constant_schedule(peak)],
      [warmup_steps])


SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    'linear': linear, 'bert': bert, 'cosine': cosine, 'constant': constant}


def make_schedule(name: str, *, learning_rate: float, num_steps: int,
                  warmup_fraction: float) -> optax.Schedule:
  """The learning rate as a function of the number of updates made so far."""
  if name not in SCHEDULES:
    raise errors.UserError(
        f'unknown optim.schedule {name!r}'
        f'{errors.did_you_mean(name, SCHEDULES)}')
  return SCHEDULES[name](
      learning_rate, num_steps, int(warmup_fraction * num_steps))


def adamw(
    schedule: optax.Schedule, *, weight_decay: float = 0.01,
    clip_norm: float = 1.0, layer_decay: float = 1.0, num_layers: int = 0,
    bias_correction: bool = True,
    eps: float = 1e-8) -> optax.GradientTransformation:
  """Clip by global norm → Adam → decoupled decay → layer-wise rate → rate.

  Feed it gradients that are already averaged over devices: the clip must see
  the global norm. `clip_norm` 0 turns clipping off. Without `bias_correction`
  early updates are up to 6.6 times as long, as in BERT's code; fine-tuning gets
  unstable (Zhang et al., 2021, section 4).
  """
  return optax.chain(
      optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
      _scale_by_adam(bias_correction, eps),
      optax.add_decayed_weights(weight_decay, decay_mask),
      _scale_layers(layer_decay, num_layers),
      optax.scale_by_learning_rate(schedule))


def _scale_by_adam(bias_correction, eps) -> optax.GradientTransformation:
  adam = optax.scale_by_adam(eps=eps)
  if bias_correction:
    return adam

  def update(updates, state, params=None):
    _, state = adam.update(updates, state, params)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps),
                        state.mu, state.nu), state
  return optax.GradientTransformation(adam.init, update)


def decay_mask(params: Any) -> Any:
  """True where weight decay applies: all but biases and LayerNorms."""
  return _map_named(
      lambda name, _: not re.search(r'(^|/)(bias|layer_norm/scale)$', name),
      params)


def layer_scales(params: Any, layer_decay: float, num_layers: int) -> Any:
  """layer_decay ** (layers above): head 1, layer l: decay ** (n - l), and
  embeddings decay ** (n + 1), for l = 0 … n - 1 (Clark et al., 2020, less
  the off-by-one of its code, electra#51)."""
  def scale(name: str, _) -> float:
    layer = re.search(r'(^|/)layer_(\d+)/', name)
    if layer:
      return layer_decay ** (num_layers - int(layer[2]))
    if re.search(r'(^|/)embeddings/', name):
      return layer_decay ** (num_layers + 1)
    if re.match(r'head/', name):
      return 1.0
    raise AssertionError(f'no layer-wise rate covers parameter {name}')
  return _map_named(scale, params)


def _scale_layers(layer_decay, num_layers) -> optax.GradientTransformation:
  if layer_decay == 1.0:
    return optax.identity()

  def update(updates, params=None):
    scales = layer_scales(updates, layer_decay, num_layers)
    return jax.tree.map(lambda u, s: u * s, updates, scales)
  return optax.stateless(update)


def _map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps fn('encoder/layer_0/…/kernel', leaf) over a tree of dicts."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: fn('/'.join(k.key for k in path), leaf), tree)
