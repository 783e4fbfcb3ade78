"""Devices: memory, meshes, placement of arrays, and steps in flight.

Glossary of shapes: B batch over all devices of all processes.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import math
import pathlib
import re
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import errors
from qa_jax.runtime import processes

P = jax.sharding.PartitionSpec


def memory_bytes(device: jax.Device) -> float:
  """Returns the memory of a device in bytes; infinity if it has no limit."""
  return (device.memory_stats() or {}).get('bytes_limit', math.inf)


def free_bytes(device: jax.Device) -> float:
  """Returns the free bytes of a device, of a CPU's machine; else infinity."""
  limit = memory_bytes(device)
  if limit < math.inf:
    return limit - device.memory_stats()['bytes_in_use']
  try:
    text = pathlib.Path('/proc/meminfo').read_text()
    return 1024 * int(re.search(r'MemAvailable:\s+(\d+) kB', text)[1])
  except (OSError, TypeError):  # another system
    return math.inf


def make_mesh(devices, axes: dict[str, int]) -> jax.sharding.Mesh:
  """Returns a mesh whose axes are of the type Auto."""
  # JAX's default type, Explicit, breaks flax's Embed and gathers.
  return jax.make_mesh(
      tuple(axes.values()), tuple(axes), devices=devices,
      axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def on_mesh(mesh: jax.sharding.Mesh | None
            ) -> contextlib.AbstractContextManager[None]:
  """Returns a context to trace a program in whose rows the mesh divides.

  It tells kernels, which the compiler cannot divide, to divide their rows over
  all axes of the mesh.
  """
  if mesh is None:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def data_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of evaluation: all devices on one axis 'data'."""
  devices = select_devices(jax.devices(), 0)
  return make_mesh(devices, {'data': len(devices)})


def mesh_axes(axes: Mapping[str, int] | None, num_devices: int | None
              ) -> dict[str, int]:
  """Returns the sizes of the axes 'data' and 'fsdp', with one -1 resolved.

  If `num_devices` is None, only the names are checked.

  Raises:
    UserError: an axis is unknown, or the product of the sizes is not
      `num_devices`.
  """
  axes = {'data': -1, 'fsdp': 1, **(axes or {})}
  if unknown := set(axes) - {'data', 'fsdp'}:
    raise errors.UserError(
        f'parallel.mesh has no axis {unknown.pop()!r}; known: data, fsdp')
  if num_devices is None:
    return axes
  known = math.prod(n for n in axes.values() if n != -1)
  if list(axes.values()).count(-1) == 1 and known and num_devices % known == 0:
    axes = {k: num_devices // known if n == -1 else n for k, n in axes.items()}
  if math.prod(axes.values()) != num_devices or min(axes.values()) < 1:
    raise errors.UserError(
        f'parallel.mesh {axes} does not multiply to {num_devices} devices; '
        'choose sizes with this product, or -1 for one of them')
  return axes


def local_device(devices: Sequence[jax.Device]) -> jax.Device:
  """Returns the first of `devices` that belongs to this process."""
  return next(d for d in devices if d.process_index == jax.process_index())


def peak_megabytes(device: jax.Device) -> float:
  """Returns the peak memory use of a device, or on a CPU of this process."""
  stats = device.memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 2**20
  # Linux reports ru_maxrss in KiB.
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class RunAhead:
  """A queue of dispatched train steps that bounds how many are in flight.

  Without a bound, XLA on a CPU aborts within 300 small steps with collectives,
  and batches accumulate in memory. The queue waits for a step within `waiting`.
  """

  def __init__(self, depth: int, waiting: Callable[
      [], contextlib.AbstractContextManager] = contextlib.nullcontext):
    self._depth, self._waiting = depth, waiting
    self._pending: collections.deque[Any] = collections.deque()

  def push(self, item: Any, metrics: Any) -> list[tuple[Any, Any]]:
    """Adds a dispatched step; returns (item, metrics) of completed steps."""
    self._pending.append((item, metrics))
    return self._take(self._depth)

  def drain(self) -> list[tuple[Any, Any]]:
    """Waits for all steps; returns (item, metrics) of each."""
    return self._take(0)

  def _take(self, keep: int) -> list[tuple[Any, Any]]:
    done = []
    while len(self._pending) > keep:
      item, metrics = self._pending.popleft()
      with self._waiting():
        done.append((item, jax.device_get(metrics)))
    return done


def select_devices(devices: Sequence[jax.Device], count: int
                   ) -> list[jax.Device]:
  """Returns `count` devices (0: all), equally many of each process in turn.

  Raises:
    UserError: the processes cannot contribute equally many devices, or have not
      equally many, which functions of JAX need.
  """
  of_process: dict[int, list[jax.Device]] = {}
  for device in devices:
    of_process.setdefault(device.process_index, []).append(device)
  have = [len(of_process[p]) for p in sorted(of_process)]
  errors.require(
      len({*have}) == 1, f'the {len(have)} processes have '
      f'{", ".join(map(str, have))} devices; start all with equally many')
  each, rest = divmod(count or len(devices), len(have))
  errors.require(
      not rest and each <= have[0],
      f'config.parallel.num_devices={count} must be a multiple of the '
      f'{len(have)} processes, up to {len(devices)}')
  return [d for p in sorted(of_process) for d in of_process[p][:each]]


def _local_positions(mesh: jax.sharding.Mesh) -> list[int]:
  """Returns the positions in a mesh of the devices of this process."""
  return [i for i, device in enumerate(mesh.devices.flat)
          if device.process_index == jax.process_index()]


def local_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns the rows of this process's devices, from host arrays [B, …]."""
  if not processes.is_multi_process():
    return tree
  places = _local_positions(mesh)
  return jax.tree.map(lambda x: x.reshape(
      mesh.size, -1, *x.shape[1:])[places].reshape(-1, *x.shape[1:]), tree)


def local_shards(tree: Any) -> Any:
  """Returns each array as its shards on this process, in the order of rows."""
  def shards(x: jax.Array) -> list[jax.Array]:
    return [shard.data for shard in sorted(
        x.addressable_shards, key=lambda shard: shard.index[0].start or 0)]

  return jax.tree.map(shards, tree)


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns arrays [B, …] sharded over `mesh`, from rows of `local_rows`."""
  sharding = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
  if not processes.is_multi_process():
    return jax.device_put(tree, sharding)
  places = _local_positions(mesh)

  def place(x: np.ndarray) -> jax.Array:
    rows = len(x) // len(places)  # the rows of one device

    def rows_at(index: tuple[slice, ...]) -> np.ndarray:
      first = places.index((index[0].start or 0) // rows) * rows
      return x[first:first + rows]

    return jax.make_array_from_callback(
        (mesh.size * rows, *x.shape[1:]), sharding, rows_at)

  return jax.tree.map(place, tree)


def put_tree(tree: Any, shardings: Any) -> Any:
  """Puts host arrays that every process has whole on the devices.

  `shardings` is one sharding for all arrays, or a tree of them.
  """
  if not processes.is_multi_process():
    return jax.device_put(tree, shardings)
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  return jax.tree.map(
      lambda x, sharding: jax.make_array_from_callback(
          np.shape(x), sharding, np.asarray(x).__getitem__), tree, shardings)


@functools.cache
def _largest(mesh: jax.sharding.Mesh) -> Any:
  return jax.jit(jnp.max, out_shardings=jax.sharding.NamedSharding(mesh, P()))


def max_over_processes(value: int, mesh: jax.sharding.Mesh) -> jax.Array:
  """Returns the largest `value` of all processes, [] int32, without waiting."""
  rows = np.full(len(_local_positions(mesh)), value, np.int32)
  return _largest(mesh)(put_rows(rows, mesh))
