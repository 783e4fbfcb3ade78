"""AdamW and its learning rates in float64 and plain loops, for comparison.

Devlin et al. (2019) and Loshchilov and Hutter (2019), written anew from their
formulas. Parameters are {path: array} with the paths of the parameters of qa.
"""

import math

import numpy as np


def learning_rates(schedule: str, *, peak: float, num_steps: int,
                   warmup_fraction: float) -> list[float]:
  """Returns the learning rate of every step 0 … num_steps - 1."""
  warmup = math.floor(warmup_fraction * num_steps)

  def rate(t: int) -> float:
    if t < warmup:
      return peak * t / warmup
    share = (t - warmup) / (num_steps - warmup)  # of the steps after warm-up
    return peak * {'linear': 1 - share, 'bert': 1 - t / num_steps,
                   'cosine': (1 + math.cos(math.pi * share)) / 2,
                   'constant': 1.0}[schedule]
  return [rate(t) for t in range(num_steps)]


def layer_factor(path: str, layer_decay: float, num_layers: int) -> float:
  """Returns the factor on the learning rate of a parameter."""
  names = path.split('/')
  if names[0] == 'head':
    return 1.0
  layer = [int(n.removeprefix('layer_')) for n in names
           if n.startswith('layer_') and n != 'layer_norm']
  return layer_decay ** (num_layers - (layer[0] if layer else -1))


def has_decay(path: str) -> bool:
  return not path.endswith(('/bias', 'layer_norm/scale'))


def train(params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]],
          rates: list[float], *, weight_decay: float, clip_norm: float,
          layer_decay: float, num_layers: int, bias_correction: bool,
          eps: float) -> dict[str, np.ndarray]:
  """Returns the parameters after one update for each of the gradients."""
  weights = {k: np.asarray(x, np.float64) for k, x in params.items()}
  m, v = ({k: np.zeros_like(x) for k, x in weights.items()} for _ in range(2))
  for t, grads in enumerate(gradients):
    norm = math.sqrt(sum((np.asarray(g, np.float64)**2).sum()
                         for g in grads.values()))
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    for k, g in grads.items():
      g = factor * np.asarray(g, np.float64)
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.999 * v[k] + 0.001 * g**2
      first, second = m[k], v[k]
      if bias_correction:
        first, second = first / (1 - 0.9**(t + 1)), second / (
            1 - 0.999**(t + 1))
      update = first / (np.sqrt(second) + eps)
      if has_decay(k):
        update = update + weight_decay * weights[k]
      weights[k] = weights[k] - rates[t] * layer_factor(
          k, layer_decay, num_layers) * update
  return weights
