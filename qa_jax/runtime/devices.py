"""Devices: meshes, placement of arrays, memory, steps in flight."""

import collections
from collections.abc import Callable, Sequence
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


def free_bytes(device: jax.Device) -> float:
  """Of a device's memory, on CPU of the machine's; infinite if unknown."""
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats['bytes_in_use']
  try:
    text = pathlib.Path('/proc/meminfo').read_text()
    return 1024 * int(re.search(r'MemAvailable:\s+(\d+) kB', text)[1])
  except (OSError, TypeError):  # another system
    return math.inf


def make_mesh(devices, axes: dict[str, int]) -> jax.sharding.Mesh:
  """A mesh with Auto axes: Explicit, the default, breaks Embed and gathers."""
  return jax.make_mesh(
      tuple(axes.values()), tuple(axes), devices=devices,
      axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def data_mesh() -> jax.sharding.Mesh:
  """All devices on one 'data' axis: how evaluation is spread."""
  devices = select_devices(jax.devices(), 0)
  return make_mesh(devices, {'data': len(devices)})


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


def local_device(devices: Sequence[jax.Device]) -> jax.Device:
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

P = jax.sharding.PartitionSpec


def select_devices(devices: Sequence[jax.Device],
                   count: int) -> list[jax.Device]:
  """`count` of the devices (0: all), as many of each process, side by side.

  Raises:
    UserError: they cannot be as many of each.
  """
  own: dict[int, list[jax.Device]] = {}
  for device in devices:
    own.setdefault(device.process_index, []).append(device)
  each = (count or len(devices)) // len(own)
  if each * len(own) != (count or len(devices)) or any(
      len(d) < each for d in own.values()):
    have = ', '.join(str(len(own[p])) for p in sorted(own))
    raise errors.UserError(
        f'config.parallel.num_devices={count}: {count or len(devices)} cannot '
        f'be as many of each of {len(own)} processes, which have {have}')
  return [d for p in sorted(own) for d in own[p][:each]]


def _places(mesh: jax.sharding.Mesh) -> list[int]:
  """Which of a mesh's devices, counted through, are this process's."""
  return [i for i, device in enumerate(mesh.devices.flat)
          if device.process_index == jax.process_index()]


def local_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of host arrays [B, …] over all devices, the rows of this process's."""
  if not processes.is_multi_process():
    return tree
  places = _places(mesh)
  return jax.tree.map(lambda x: x.reshape(
      mesh.size, -1, *x.shape[1:])[places].reshape(-1, *x.shape[1:]), tree)


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """What `part` gives → [B, …] over all devices, by `mesh`'s axes."""
  sharding = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
  if not processes.is_multi_process():
    return jax.device_put(tree, sharding)
  places = _places(mesh)

  def place(x: np.ndarray) -> jax.Array:
    rows = len(x) // len(places)  # of a device

    def of(index: tuple[slice, ...]) -> np.ndarray:
      at = places.index((index[0].start or 0) // rows) * rows
      return x[at:at + rows]

    return jax.make_array_from_callback(
        (mesh.size * rows, *x.shape[1:]), sharding, of)

  return jax.tree.map(place, tree)


def put_tree(tree: Any, shardings: Any) -> Any:
  """device_put of what every process has whole; one sharding or a tree."""
  if not processes.is_multi_process():
    return jax.device_put(tree, shardings)
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(
        x.shape, sharding, x.__getitem__)

  return jax.tree.map(place, tree, shardings)


def replicated_sharding(
    mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
  """The sharding of results that every process needs; None: any."""
  if mesh is None or not processes.is_multi_process():
    return None
  return jax.sharding.NamedSharding(mesh, P())


@functools.cache
def _largest(mesh: jax.sharding.Mesh) -> Any:
  return jax.jit(jnp.max, out_shardings=replicated_sharding(mesh))


def max_over_processes(value: int, mesh: jax.sharding.Mesh) -> jax.Array:
  """The largest of the processes' values, [] int32; does not wait for it."""
  own = np.full(len(_places(mesh)), value, np.int32)
  return _largest(mesh)(put_rows(own, mesh))
