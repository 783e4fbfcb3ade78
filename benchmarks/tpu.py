r"""Compiles the train step for chips of a TPU v5e, on a machine without a TPU.

  pip install -e '.[tpu]'
  python -m benchmarks.tpu --preset=base --batch=32 --length=384 --chips=4

Takes half a minute for --preset=tiny and some minutes for base on two cores.
The bytes are those to and from the memory of a chip, not its caches. The
milliseconds are what the chip needs at best for these and for the FLOPs that
XLA counts. Nothing is run.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from unittest import mock

import jax
from jax.experimental import topologies
import numpy as np

from benchmarks.gpu import cases
from benchmarks.gpu import hlo
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.models import attention
from qa_jax.models.encoders import bert
from qa_jax.runtime import console
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import trainer as trainer_lib

NAME, KIND = 'TPU v5e', 'TPU v5 lite'  # in the naming of jax
PEAK, BANDWIDTH = 197e12, 819e9  # bfloat16 FLOP/s and bytes/s of a chip
CHIPS = {1: '2x2', 4: '2x2', 8: '2x4'}  # number → the slice that has them
# An array whose layout has a space S(…) is in a cache, not in the memory.
ARRAY = re.compile(
    rf'\b({"|".join(hlo.SIZES)})\[([\d,]*)\]((?:\{{[^}}]*\}})?)')
# Instructions that move nothing: slice-start moves what slice-done returns.
FREE = {*hlo.FREE, 'slice-done'} - {'copy-start'}
JOINED = 'custom_call_target="ConcatBitcast"'  # slices, moved already
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')
# What libtpu asks of the network on a machine with a TPU. Several processes may
# load it here.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled train step of one chip; sizes in bytes."""

  batch: tuple[int, ...]  # the shape of the token ids of all chips
  seconds: float  # of its compilation
  flops: float
  bytes: int  # to and from memory
  temporary: int
  arguments: int
  collectives: dict[str, int]  # name → number of operations

  @property
  def roofline(self) -> float:  # seconds
    return max(self.flops / PEAK, self.bytes / BANDWIDTH)


def memory_bytes(text: str) -> int:
  """Counts the bytes to and from memory of a compiled program for a TPU.

  They are the operands and results of its instructions. The body of a loop
  counts once.
  """
  return _moved(*hlo.read_bodies(text))


def _moved(bodies: Mapping[str, Sequence[str]], name: str) -> int:
  total, sizes = 0, {}
  for line in bodies[name]:
    if not (match := hlo.INSTRUCTION.match(line)):
      continue
    result, shape, operation, rest = match.groups()
    arrays = [(hlo.SIZES[dtype] * math.prod(map(int, filter(None, n.split(',')))
                                            ), 'S(' not in layout)
              for dtype, n, layout in ARRAY.findall(shape)]
    sizes[result] = sum(size for size, outside in arrays if outside)
    if operation in FREE or JOINED in line:
      continue
    if operation in ('while', 'call'):
      called = re.search(r'(?:to_apply|body)=%([\w.\-]+)', line)
      total += _moved(bodies, called[1])
    elif operation in ('copy-start', 'slice-start'):
      # The whole source, the copy or slice, and a mark.
      total += min(size for size, _ in arrays[:2]) * sum(
          outside for _, outside in arrays[:2])
    else:
      operands = {*re.findall(r'%([\w.\-]+)', rest.split('), ')[0])}
      total += sizes[result] + sum(sizes.get(o, 0) for o in operands)
  return total


def describe_chips(count: int) -> list[jax.Device]:
  """Returns chips of a TPU v5e that is not there.

  Raises:
    UserError: libtpu is not installed, or there is no such slice.
  """
  errors.require(count in CHIPS, f'parallel.num_devices={count}: choose one '
                 f'of {", ".join(map(str, CHIPS))} chips')
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    topology = topologies.get_topology_desc(
        platform='tpu', topology_name=f'v5e:{CHIPS[count]}')
  except Exception as e:  # jax raises several types without libtpu
    raise errors.UserError(
        f'jax cannot compile for a TPU here: {str(e).splitlines()[0][:200]}; '
        "install the extra: pip install -e '.[tpu]'") from None
  return list(topology.devices)[:count]


@contextlib.contextmanager
def lowering() -> Iterator[None]:
  """Makes qa_jax and jax choose as they would on a TPU v5e."""
  with (mock.patch.object(jax, 'default_backend', lambda: 'tpu'),
        cases.on_device(KIND, 1, 'tpu')):
    yield


def compile_step(config: config_lib.Config) -> Program:
  """Compiles the train step of a config for as many chips as it trains on."""
  chips = describe_chips(config.parallel.num_devices)
  with lowering():
    trainer = trainer_lib.build_trainer(config)
    step, batch = trainer.step, next(trainer.batches)
    if trainer.dispatch > 1:
      step = step_lib.several_updates(step)
      batch = step_lib.stack_batches([batch], trainer.dispatch)
    wrapped = parallel.wrap_step(
        step, mode=config.parallel.mode, devices=chips,
        axes=dict(config.parallel.mesh))
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        trainer.state, wrapped.state_sharding(trainer.state))
    if config.parallel.mode == 'pmap':
      rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
          (len(chips), len(x) // len(chips), *x.shape[1:]), x.dtype), batch)
    else:
      split = jax.sharding.NamedSharding(
          wrapped.mesh, jax.sharding.PartitionSpec(wrapped.mesh.axis_names))
      rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=split), batch)
    lowered = wrapped.lower(state, rows)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
  costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
  text = compiled.as_text()
  counts = {name: len(re.findall(rf' {name}(?:-start)?\(', text))
            for name in COLLECTIVES}
  return Program(
      np.shape(batch['token_ids']), seconds, costs['flops'],
      memory_bytes(text), memory.temp_size_in_bytes,
      memory.argument_size_in_bytes,
      {name: count for name, count in counts.items() if count})


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--preset', default='base', choices=bert.BertConfig.PRESETS)
  add('--batch', type=int, default=32, help='windows of an update')
  add('--length', type=int, default=384, help='tokens of a row')
  add('--chips', type=int, default=1, choices=CHIPS)
  add('--mode', default='pmap', choices=parallel.MODES)
  add('--fsdp', type=int, default=1, help='chips that divide the parameters')
  add('--attention', default='auto', choices=attention.ATTENTION)
  add('--packing', default='auto', choices=[*map(str, config_lib.PACKINGS)])
  return parser.parse_args()


def main() -> None:
  args = parse()
  # The trainer is built on as many devices of the CPU.
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', args.chips)
  with tempfile.TemporaryDirectory() as scratch:
    program = compile_step(cases.config(
        pathlib.Path(scratch), preset=args.preset, batch=args.batch,
        length=args.length, dtype='auto', attention=args.attention,
        packing=args.packing, train__updates_per_dispatch=0,
        parallel__num_devices=args.chips, parallel__mode=args.mode,
        parallel__mesh__fsdp=args.fsdp))
  console.say(f'jax {jax.__version__}, {args.chips} × {NAME}, compiled in '
              f'{program.seconds:.0f} s, not run')
  print(f'batch {"×".join(map(str, program.batch))}; of a chip:\n'
        f'  {program.flops / 1e9:.0f} GFLOP\n'
        f'  {program.bytes / 1e9:.1f} GB to and from memory\n'
        f'  {1e3 * program.roofline:.1f} ms at best\n'
        f'  {program.temporary / 2**20:.0f} MiB of temporary arrays, '
        f'{program.arguments / 2**20:.0f} MiB of arguments\n'
        f'  collectives: {program.collectives or "none"}')


if __name__ == '__main__':
  try:
    main()
  except errors.UserError as e:
    sys.exit(f'error: {e}')
