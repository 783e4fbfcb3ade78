"""Wrappers that run one pure train step on devices: jit, pmap and mesh.

The step is `step(state, batch, axis_name=None) -> (state, metrics)`. Every
wrapper takes a state without a leading device axis, and a host batch of which
each process passes the rows of its devices.

The results of the wrappers agree to float32 rounding. Dropout is keyed by the
step and the row of the global batch, and sums are divided only after they are
added over devices.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from qa_jax import errors
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes

Step = Callable[..., tuple[Any, Any]]
Options = dict[str, bool] | None  # flags of XLA for one program
# On a GPU, XLA adds the gradients of an embedding by atomic operations, in any
# order. With this flag it sorts them first. Programs for a CPU ignore the flag.
DETERMINISTIC: Options = {'xla_gpu_deterministic_ops': True}
P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class Parallel:
  """A train step that is wrapped for devices, and the placement of arrays."""
  step: Step  # (state, device batch) → (state, metrics); donates the state
  lower: Callable[[Any, Any], jax.stages.Lowered]  # takes what `step` takes
  place_batch: Callable[[Any], Any]  # host batch → device batch
  state_sharding: Callable[[Any], Any]  # a state (or shapes) → shardings
  mesh: jax.sharding.Mesh

  def compile(self, state: Any, batch: Any) -> jax.stages.Compiled:
    """Compiles the program that `step(state, batch)` would run."""
    return self.lower(state, batch).compile()


def _jit(step: Step, devices, axes, options: Options) -> Parallel:
  del axes
  return _sharded(step, devices_lib.make_mesh(devices[:1], {'data': 1}),
                  parameters=None, options=options)


def _data_mesh(step: Step, devices, axes, options: Options) -> Parallel:
  """Splits the batch over 'data' and 'fsdp', and the state over 'fsdp'."""
  return _sharded(step, devices_lib.make_mesh(
      devices, devices_lib.mesh_axes(axes, len(devices))), parameters='fsdp',
                  options=options)


def _sharded(step, mesh, *, parameters: str | None, options: Options
             ) -> Parallel:
  def leaf_sharding(leaf) -> jax.sharding.NamedSharding:
    size = mesh.shape.get(parameters, 1)
    axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
    spec = [None] * len(leaf.shape)
    if size > 1 and axes:
      spec[max(axes, key=lambda i: leaf.shape[i])] = parameters
    return jax.sharding.NamedSharding(mesh, P(*spec))

  replicated = jax.sharding.NamedSharding(mesh, P())

  def gathered(state, batch):
    # Without this constraint the compiler may split the activations in the way
    # the parameters are split. It then moves many times more bytes.
    with devices_lib.on_mesh(mesh):
      return step(state.replace(params=jax.lax.with_sharding_constraint(
          state.params, replicated)), batch)

  @functools.cache
  def jitted(treedef, shapes):
    state = jax.tree.unflatten(treedef, [
        leaf_sharding(jax.ShapeDtypeStruct(s, np.float32)) for s in shapes])
    return jax.jit(gathered, donate_argnums=0, compiler_options=options,
                   out_shardings=(state, replicated))

  def step_for(state):
    leaves, treedef = jax.tree.flatten(state)
    return jitted(treedef, tuple(x.shape for x in leaves))

  return Parallel(
      lambda state, batch: step_for(state)(state, batch),
      lambda state, batch: step_for(state).lower(state, batch),
      lambda batch: devices_lib.put_rows(batch, mesh),
      functools.partial(jax.tree.map, leaf_sharding), mesh)


def _pmap(step: Step, devices, axes, options: Options) -> Parallel:
  """Wraps with pmap; the state is replicated, without a device axis."""
  del axes
  mesh = devices_lib.make_mesh(devices, {'data': len(devices)})
  replicated = jax.sharding.NamedSharding(mesh, P())
  split = jax.sharding.NamedSharding(mesh, P('data'))
  step = functools.partial(step, axis_name='data')
  if options or processes.is_multi_process():
    # pmap takes only arrays of its own process and would copy the state at each
    # call. jit of shard_map, as pmap of jax 0.10 does itself, takes arrays that
    # span all processes, and flags of the compiler.
    mapped = jax.jit(jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P('data')), out_specs=P(),
        check_vma=False), donate_argnums=0, compiler_options=options)
    place = lambda batch: devices_lib.put_rows(batch, mesh)
  else:
    mapped = jax.pmap(step, axis_name='data', in_axes=(None, 0), out_axes=None,
                      donate_argnums=0, devices=devices)
    place = lambda batch: jax.device_put(jax.tree.map(
        lambda v: v.reshape(len(devices), -1, *v.shape[1:]), batch), split)
  return Parallel(
      mapped, mapped.lower, place,
      functools.partial(jax.tree.map, lambda _: replicated), mesh)


MODES: dict[str, Callable[..., Parallel]] = {
    'pmap': _pmap, 'mesh': _data_mesh, 'jit': _jit}


def wrap_step(step: Step, *, mode: str, devices: list[jax.Device],
              axes: dict[str, int] | None = None,
              deterministic: bool = False) -> Parallel:
  """Wraps a step for `devices` in mode 'pmap', 'mesh' or 'jit'.

  `axes` are the sizes of the mesh axes 'data' and 'fsdp' for mode 'mesh'. A
  `deterministic` step repeats its results bit for bit on a GPU too.

  Raises:
    UserError: there is no such mode, or the axes fit neither it nor the
      devices.
  """
  check_mode(mode, axes or {}, len(devices))
  return MODES[mode](step, list(devices), axes,
                     DETERMINISTIC if deterministic else None)


def check_mode(mode: str, axes: Mapping[str, int],
               num_devices: int | None) -> None:
  """Checks that a mode exists and that the axes of `wrap_step` fit it.

  Raises:
    UserError: there is no such mode, the axes do not fit the devices, or a mode
      other than 'mesh' has axes.
  """
  if mode not in MODES:
    raise errors.UserError(
        f'unknown parallel.mode {mode!r}{errors.did_you_mean(mode, MODES)}')
  if mode == 'mesh':
    devices_lib.mesh_axes(axes, num_devices)
  elif devices_lib.mesh_axes(axes, None) != devices_lib.mesh_axes({}, None):
    raise errors.UserError(
        f'parallel.mesh {dict(axes)} is only for parallel.mode=mesh, but the '
        f'mode is {mode}; set parallel.mode=mesh or leave out parallel.mesh')


def check_batch(batch_size: int, num_devices: int, accumulation: int) -> None:
  """Checks that the rows divide evenly over devices and micro-steps.

  Raises:
    UserError: they do not.
  """
  if batch_size % (num_devices * accumulation):
    raise errors.UserError(
        f'train.batch_size {batch_size} is not divisible by {num_devices} '
        f'devices x {accumulation} accumulation steps; choose a multiple of '
        f'{num_devices * accumulation} or set parallel.num_devices')
