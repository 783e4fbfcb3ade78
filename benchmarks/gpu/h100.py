"""Programs compiled for an H100 by XLA's GPU compiler, on a machine without a
GPU.

The packages jax-cuda13-plugin and jax-cuda13-pjrt suffice, without any CUDA
library. Fusions, kernels, bytes and temporary arrays are those of the device.
Products are not autotuned, calls of cuDNN stay calls, and nothing can run.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_of_jax
from jax.experimental import topologies
import numpy as np

from benchmarks.gpu import cases
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.training import population
from qa_jax.training import step as step_lib
from qa_jax.training import trainer as trainer_lib

# Without it, the plugin refuses to load where it finds no cuDNN.
os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
NAME = 'NVIDIA H100 80GB HBM3'
# Sizes as the driver reports them, in XLA's form for a target.
TARGET = f'''
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" device_description_str: "{NAME}"
dnn_version_info {{ major: 9 minor: 19 }}
runtime_version {{ major: 13 }}
'''


def device() -> jax.Device:
  """Returns the described H100.

  Raises:
    UserError: the plugin of jax for CUDA is not installed.
  """
  try:
    described = topologies.get_topology_desc(
        'h100', 'cuda', topology='1x1x1', target_config=TARGET)
  except Exception as e:  # jax raises several types where no plugin is found
    raise errors.UserError(
        'jax cannot compile for a GPU here: '
        f'{str(e).splitlines()[0][:200]}; install the extra: pip install -e '
        "'.[gpu-compile]', with jax 0.11") from None
  return described.devices[0]


@contextlib.contextmanager
def lowering() -> Iterator[None]:
  """Makes qa_jax and jax choose as they would on an H100."""
  with (mock.patch.object(jax, 'default_backend', lambda: 'gpu'),
        mock.patch.object(
            cudnn_of_jax, 'check_cudnn_version', lambda: 91_900),
        cases.on_device(NAME, None, 'gpu')):
    yield


def compile_step(config: config_lib.Config,
                 options: Mapping[str, Any] | None = None, members: int = 0
                 ) -> tuple[jax.stages.Compiled, dict[str, np.ndarray]]:
  """Compiles the train step of a config; returns the program and a batch.

  `options` are flags of XLA. The batch has the first shape of the epoch. The
  step is that of a population if there are `members`.
  """
  replicated = jax.sharding.NamedSharding(
      jax.sharding.Mesh([device()], ('data',)), jax.sharding.PartitionSpec())
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    trainer = trainer_lib.build_trainer(config)
  batch, rates, axes = next(trainer.batches), (), ()
  if trainer.dispatch > 1 or members:
    batch = step_lib.stack_batches([batch], trainer.dispatch)
  if members:
    train_step = jax.vmap(population.member_step(trainer),
                          axis_name=population.MEMBERS)
    rates = (dict.fromkeys(population.RATES, np.float32(0)),)
    axes = (members,)
  elif trainer.dispatch > 1:
    train_step = step_lib.several_updates(trainer.step)
  else:
    train_step = trainer.step
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      axes + x.shape, x.dtype, sharding=replicated),
                        (trainer.state, *rates, batch))
  step = jax.jit(train_step, donate_argnums=0,
                 out_shardings=replicated)
  with lowering():
    lowered = step.trace(*shapes).lower(lowering_platforms=('cuda',))
  return lowered.compile(compiler_options=dict(options or {})), batch
