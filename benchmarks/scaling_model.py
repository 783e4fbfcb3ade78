"""A model of the cost of data parallelism: the tables of docs/scaling.md.

  python -m benchmarks.scaling_model [large]

The model uses published peaks and link rates; nothing here is measured.
Glossary of shapes: B windows of a step over all devices, L length, D hidden.
"""

import argparse
import dataclasses
import math

import jax
import numpy as np

from qa_jax import heads
from qa_jax.models import qa
from qa_jax.models.encoders import bert

VOCABULARY = 30522  # of bert-*-uncased
LENGTH = 384
MODEL_FLOPS_UTILISATION = 0.4  # an assumption, equal for every line
BACKWARD_SHARE = 2 / 3  # share of a step that an all-reduce can overlap


@dataclasses.dataclass(frozen=True)
class Machine:
  """Rates of one device; bytes per second count one direction."""

  name: str
  peak_flops: float  # bfloat16, dense
  near_bytes: float  # to the `near` devices around it
  near: int
  far_bytes: float  # to the other devices


# v5e: 197 TFLOP/s, 1,600 Gbit/s of interconnect a chip, a pod of 256 chips
# (cloud.google.com/tpu/docs/v5e); beyond a pod 6.4 Tbit/s for its 256 chips.
V5E = Machine('TPU v5e', 197e12, 1600e9 / 8, 256, 6.4e12 / 8 / 256)
# H100 SXM: 989 TFLOP/s, NVLink 900 GB/s both ways among the 8 of a node
# (NVIDIA's data sheet); a 400 Gbit/s adapter a GPU between nodes (DGX H100).
H100 = Machine('H100', 989e12, 900e9 / 2, 8, 400e9 / 8)


def parameter_shapes(sizes: bert.BertConfig):
  """Returns the parameter shapes of an encoder with the default head."""
  net = qa.QAModel(sizes, heads.HEADS['independent']())
  return jax.eval_shape(lambda: qa.init_params(net, jax.random.key(0)))


def gradient_bytes(params) -> int:
  """Returns the bytes that a step sums over devices: float32 gradients."""
  return sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params))


def window_flops(sizes: bert.BertConfig, length: int) -> float:
  """Returns the FLOPs of one window, forward and backward.

  6 for each weight and token, and those of attention.
  """
  weights = sizes.num_layers * (
      4 * sizes.hidden_size**2 + 2 * sizes.hidden_size * sizes.mlp_size)
  attention = sizes.num_layers * 2 * length * sizes.hidden_size
  return 6 * length * (weights + attention)


def all_reduce_seconds(count: int, size: float, machine: Machine) -> float:
  """Returns the seconds of an all-reduce.

  A ring moves 2 (D - 1) / D of the bytes over the near links. Between groups,
  the devices of a group send their shares over the far links in parallel.
  """
  near = min(count, machine.near)
  groups = count // near
  return (2 * (near - 1) / near * size / machine.near_bytes
          + 2 * (groups - 1) / groups * size / near / machine.far_bytes)


def efficiency(count: int, windows: float, sizes: bert.BertConfig,
               machine: Machine) -> tuple[float, float]:
  """Returns two efficiencies of a step with `windows` windows per device.

  In the first nothing is hidden; in the second the all-reduce overlaps the
  backward pass. 1 means that the step takes as long as on one device.
  """
  compute = windows * window_flops(sizes, LENGTH) / (
      machine.peak_flops * MODEL_FLOPS_UTILISATION)
  reduce = all_reduce_seconds(count, gradient_bytes(parameter_shapes(sizes)),
                              machine)
  exposed = max(0.0, reduce - BACKWARD_SHARE * compute)
  return compute / (compute + reduce), compute / (compute + exposed)


def windows_for(target: float, count: int, sizes: bert.BertConfig,
                machine: Machine) -> int:
  """Returns the fewest windows per device that reach `target` efficiency."""
  one = efficiency(count, 1, sizes, machine)[0]
  return math.ceil(target / (1 - target) * (1 - one) / one)


def table(sizes: bert.BertConfig, machine: Machine, counts: list[int]) -> str:
  rows = ['| devices | all-reduce ms | B = 32, none hidden | 8 windows each, '
          'none hidden | 8 each, hidden | windows each for 0.9 |',
          '|---|---|---|---|---|---|']
  size = gradient_bytes(parameter_shapes(sizes))
  for count in counts:
    fixed = '–' if count > 32 else (
        f'{efficiency(count, 32 / count, sizes, machine)[0]:.2f}')
    plain, hidden = efficiency(count, 8, sizes, machine)
    milliseconds = 1e3 * all_reduce_seconds(count, size, machine)
    rows.append(f'| {count} | {milliseconds:.2f} | {fixed} | {plain:.2f} | '
                f'{hidden:.2f} | {windows_for(0.9, count, sizes, machine)} |')
  return '\n'.join(rows)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__.partition('\n')[0],
      prog='python -m benchmarks.scaling_model')
  parser.add_argument('preset', nargs='?', default='base',
                      choices=bert.BertConfig.PRESETS)
  preset = parser.parse_args().preset
  sizes = bert.BertConfig(
      vocab_size=VOCABULARY, **bert.BertConfig.PRESETS[preset])
  megabytes = gradient_bytes(parameter_shapes(sizes)) / 2**20
  print(f'BERT-{preset}: {megabytes:.0f} MiB of gradients, '
        f'{window_flops(sizes, LENGTH) / 1e9:.0f} GFLOP a window of {LENGTH}, '
        f'{MODEL_FLOPS_UTILISATION:.0%} of the peak assumed')
  for machine, most in ((V5E, 256), (H100, 64)):
    counts = [int(n) for n in 2 ** np.arange(3, math.log2(most) + 1)]
    print(f'\n{machine.name}\n\n{table(sizes, machine, counts)}')


if __name__ == '__main__':
  main()
