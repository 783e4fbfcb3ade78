"""One pure step, wrapped as jit | pmap | mesh; batch placement; run-ahead.

The step is `step(state, batch, axis_name=None) -> (state, metrics)`. Every
wrapper takes the same state (no leading device axis) and the same host batch
[B, …], of which a process has the rows of its own devices; and they agree to
float32 rounding: dropout is keyed by (step, row of the global batch), and sums
are divided only after they crossed devices.
"""

import collections
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import math
import operator
import resource
from typing import Any

import jax
import numpy as np

from qa_jax import errors
from qa_jax import processes

Step = Callable[..., tuple[Any, Any]]
P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class Parallel:
  """How a step runs on devices."""

  step: Step  # (state, device batch) → (state, metrics); donates the state
  compile: Callable[[Any, Any], Any]  # what the same call of `step` will run
  place_batch: Callable[[Any], Any]  # host batch → device batch
  state_sharding: Callable[[Any], Any]  # a state (or shapes) → shardings
  mesh: jax.sharding.Mesh


def _mesh(devices, axes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh with Auto axes: Explicit, the default, breaks Embed and gathers."""
  return jax.make_mesh(
      tuple(axes.values()), tuple(axes), devices=devices,
      axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def data_mesh() -> jax.sharding.Mesh:
  """All devices on one 'data' axis: how evaluation is spread."""
  devices = processes.spread(jax.devices(), 0)
  return _mesh(devices, {'data': len(devices)})


def _jit(step: Step, devices, axes) -> Parallel:
  del axes
  mesh = _mesh(devices[:1], {'data': 1})
  return _sharded(step, mesh, parameters=None)


def _data_mesh(step: Step, devices, axes) -> Parallel:
  """Batch over 'data' and 'fsdp', parameters and optimizer over 'fsdp'."""
  mesh = _mesh(devices, mesh_axes(axes, len(devices)))
  return _sharded(step, mesh, parameters='fsdp')


def _sharded(step, mesh, *, parameters: str | None) -> Parallel:
  def leaf_sharding(leaf) -> jax.sharding.NamedSharding:
    size = mesh.shape.get(parameters, 1)
    axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
    spec = [None] * len(leaf.shape)
    if size > 1 and axes:
      spec[max(axes, key=lambda i: leaf.shape[i])] = parameters
    return jax.sharding.NamedSharding(mesh, P(*spec))

  whole = jax.sharding.NamedSharding(mesh, P())

  def gathered(state, batch):
    # Left to itself, the compiler may split the activations as the parameters
    # are split, and then moves many times the bytes of these.
    return step(state.replace(params=jax.lax.with_sharding_constraint(
        state.params, whole)), batch)

  @functools.cache
  def jitted(treedef, shapes):
    state = jax.tree.unflatten(
        treedef, [leaf_sharding(jax.ShapeDtypeStruct(s, np.float32))
                  for s in shapes])
    return jax.jit(gathered, donate_argnums=0, out_shardings=(state, whole))

  def of(state):
    leaves, treedef = jax.tree.flatten(state)
    return jitted(treedef, tuple(x.shape for x in leaves))

  return Parallel(
      lambda state, batch: of(state)(state, batch),
      lambda state, batch: of(state).lower(state, batch).compile(),
      lambda batch: processes.put_part(batch, mesh),
      functools.partial(jax.tree.map, leaf_sharding), mesh)


def _pmap(step: Step, devices, axes) -> Parallel:
  """pmap with the state replicated but without a leading device axis."""
  del axes
  mesh = _mesh(devices, {'data': len(devices)})
  replicated = jax.sharding.NamedSharding(mesh, P())
  if processes.several():
    return _shard_map(step, mesh, replicated)
  split = jax.sharding.NamedSharding(mesh, P('data'))
  mapped = jax.pmap(
      functools.partial(step, axis_name='data'), axis_name='data',
      in_axes=(None, 0), out_axes=None,
      donate_argnums=0, devices=devices)

  def place(batch):
    return jax.device_put(jax.tree.map(
        lambda v: v.reshape(len(devices), -1, *v.shape[1:]), batch), split)

  return Parallel(
      mapped, lambda state, batch: mapped.lower(state, batch).compile(), place,
      functools.partial(jax.tree.map, lambda _: replicated), mesh)


def _shard_map(step, mesh, replicated) -> Parallel:
  """What pmap does itself (jax 0.10), but on arrays of all processes: pmap's
  own are one process's, and it would copy the state at each call."""
  mapped = jax.jit(jax.shard_map(
      functools.partial(step, axis_name='data'), mesh=mesh,
      in_specs=(P(), P('data')), out_specs=P(),
      check_vma=False), donate_argnums=0)
  return Parallel(
      mapped, lambda state, batch: mapped.lower(state, batch).compile(),
      lambda batch: processes.put_part(batch, mesh),
      functools.partial(jax.tree.map, lambda _: replicated), mesh)


MODES: dict[str, Callable[..., Parallel]] = {
    'pmap': _pmap, 'mesh': _data_mesh, 'jit': _jit}


def wrap(step: Step, *, mode: str, devices: list[jax.Device],
         axes: dict[str, int] | None = None) -> Parallel:
  """Wraps the step for `devices`; `axes` are the mesh sizes (mode 'mesh')."""
  if mode not in MODES:
    raise errors.UserError(
        f'unknown parallel.mode {mode!r}{errors.did_you_mean(mode, MODES)}')
  return MODES[mode](step, list(devices), axes)


@dataclasses.dataclass(frozen=True)
class Population:
  """How members, each with a state of its own, run on devices.

  A tree of them has leading axes [D devices, m members of one]; the last
  member stands in for those that are missing.
  """

  step: Step  # (states, rates, batches) → (states, metrics); donates states
  place: Callable[[Sequence[Any]], Any]  # a host tree a member → on devices
  take: Callable[[Any], list[Any]]  # back to a host tree a member


def population(step: Step, *, members: int,
               devices: Sequence[jax.Device]) -> Population:
  """pmap over devices of vmap over members of step(state, rates, batch).

  Batches may differ in shape: zeros make every array as long as the longest
  member's.
  """
  devices = list(devices[:members])
  each = -(-members // len(devices))
  split = jax.sharding.NamedSharding(
      _mesh(devices, {'data': len(devices)}), P('data'))

  def stack(*leaves: np.ndarray) -> np.ndarray:
    shape = np.max([np.shape(x) for x in leaves], axis=0).astype(int)
    out = np.zeros((len(devices) * each, *shape), np.asarray(leaves[0]).dtype)
    for i in range(len(out)):
      leaf = leaves[min(i, members - 1)]
      out[(i, *(slice(n) for n in np.shape(leaf)))] = leaf
    return out.reshape(len(devices), each, *shape)

  def take(tree: Any) -> list[Any]:
    flat = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree))
    return [jax.tree.map(operator.itemgetter((i, ...)), flat)
            for i in range(members)]

  return Population(
      jax.pmap(jax.vmap(step), axis_name='data', donate_argnums=0,
               devices=devices),
      lambda trees: jax.device_put(jax.tree.map(stack, *trees), split), take)


def mesh_axes(axes: dict[str, int] | None, num_devices: int) -> dict[str, int]:
  """Axis sizes with one -1 resolved; their product is `num_devices`.

  Raises:
    UserError: an unknown axis, or sizes that don't multiply to the devices.
  """
  axes = {'data': -1, 'fsdp': 1, **(axes or {})}
  unknown = set(axes) - {'data', 'fsdp'}
  if unknown:
    raise errors.UserError(
        f'parallel.mesh has no axis {unknown.pop()!r}; known: data, fsdp')
  known = math.prod(n for n in axes.values() if n != -1)
  if list(axes.values()).count(-1) == 1 and known and num_devices % known == 0:
    axes = {k: num_devices // known if n == -1 else n
            for k, n in axes.items()}
  if math.prod(axes.values()) != num_devices or min(axes.values()) < 1:
    raise errors.UserError(
        f'parallel.mesh {axes} does not multiply to {num_devices} devices')
  return axes


def check_batch(batch_size: int, num_devices: int, accumulation: int) -> None:
  """Raises a UserError unless rows divide evenly over devices and micro-steps.
  """
  if batch_size < 1 or accumulation < 1:
    raise errors.UserError(
        f'train.batch_size {batch_size} and train.grad_accumulation '
        f'{accumulation} must be at least 1')
  if batch_size % (num_devices * accumulation):
    raise errors.UserError(
        f'train.batch_size {batch_size} is not divisible by {num_devices} '
        f'devices x {accumulation} accumulation steps; choose a multiple of '
        f'{num_devices * accumulation} or set parallel.num_devices')


def here(devices: Sequence[jax.Device]) -> jax.Device:
  """The first of them that is this process's."""
  return next(d for d in devices if d.process_index == jax.process_index())


def peak_megabytes(device: jax.Device) -> float:
  """The most memory in use so far: of a device, on CPU of the process."""
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 2**20
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB


class RunAhead:
  """Bounds how many steps are in flight.

  Unbounded dispatch of collectives aborts XLA:CPU within 300 small steps, and
  on any device it piles up batches. Each is waited for within `waiting`.
  """

  def __init__(self, depth: int, waiting: Callable[
      [], contextlib.AbstractContextManager] = contextlib.nullcontext):
    self._depth, self._waiting = depth, waiting
    self._pending: collections.deque[Any] = collections.deque()

  def push(self, item: Any, metrics: Any) -> list[tuple[Any, Any]]:
    """Adds a dispatched step; returns the (item, metrics) now complete."""
    self._pending.append((item, metrics))
    return self._take(self._depth)

  def drain(self) -> list[tuple[Any, Any]]:
    return self._take(0)

  def _take(self, keep: int) -> list[tuple[Any, Any]]:
    done = []
    while len(self._pending) > keep:
      item, metrics = self._pending.popleft()
      with self._waiting():
        done.append((item, jax.device_get(metrics)))
    return done
