"""Several processes train one run: how they meet, whose rows are whose.

Glossary of shapes: B batch over all devices, D devices.

Each makes the same plan of batches, from lengths that all know, and reads the
rows that its own devices see. What is small, spans and metrics, every process
has whole; files are written by the first. With one process, all that is here
does nothing.
"""

from collections.abc import Sequence
import functools
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from qa_jax import errors

P = jax.sharding.PartitionSpec
CONNECT_SECONDS = 120.0  # until all must have come
# Without a sign of life for so long, a process is lost and the others end. A
# save to a slow disk keeps no process from giving one: threads of its own do.
HEARTBEAT_SECONDS = 60

# XLA tells of a lost process by aborting, with a trace of its stack, and only
# another process can tell it better. This one reads what native code prints.
READER = r'''
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
  signal.signal(number, signal.SIG_IGN)
end, held = 'distributed service detected', []
for line in open(0, errors='replace'):
  if held or 'coordination_service' in line or end in line:
    held.append(line)
  elif not line.startswith('[Gloo]'):
    sys.stderr.write(line)
    sys.stderr.flush()
if any(end in line for line in held):
  held = [sys.argv[1] + '\n']
sys.stderr.writelines(held)
'''
LOST = ('another process of this run died, failed or stopped answering; the '
        'same commands go on from the last checkpoint')


def start(coordinator: str, num_processes: int | None = None,
          process_index: int | None = None) -> None:
  """Joins the other processes; before anything asks for a device.

  `coordinator` is HOST:PORT of the first one, or 'auto': where SLURM, Open MPI,
  Kubernetes or a TPU pod started this one, they say all three.

  Raises:
    UserError: values that cannot be, or nothing is found by 'auto'. If not all
      come within CONNECT_SECONDS, the process ends with one line.
  """
  if coordinator == 'auto':
    where, options = 'the coordinator', {}
  else:
    where = coordinator
    _check(coordinator, num_processes, process_index)
    options = dict(
        coordinator_address=coordinator, num_processes=num_processes,
        process_id=process_index, cluster_detection_method='deactivate')
  # It would take SIGTERM from stop.py, and knows no other signal.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(CONNECT_SECONDS, _end, [
      f'not all processes came to {where} within {CONNECT_SECONDS:.0f} s; '
      'start as many as --num_processes says, each with the same '
      '--coordinator, and look whether a firewall lets them reach it'])
  late.daemon = True
  late.start()
  _read_native()
  try:
    jax.distributed.initialize(
        **options, initialization_timeout=int(CONNECT_SECONDS) + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except (ValueError, RuntimeError) as e:
    reason = ' '.join(str(e).split())
    if coordinator == 'auto' and 'should be defined' in reason:
      reason = ('nothing here says what to join, as SLURM, Open MPI, '
                'Kubernetes and TPU pods do; give --coordinator=HOST:PORT, '
                '--num_processes and --process_index')
    raise errors.UserError(
        f'--coordinator={coordinator}: {reason[:300]}') from None
  finally:
    late.cancel()


def _check(coordinator: str, num_processes: int | None,
           process_index: int | None) -> None:
  for name, value in (('num_processes', num_processes),
                      ('process_index', process_index)):
    if value is None:
      raise errors.UserError(
          f'--{name} is needed with --coordinator={coordinator}')
  if num_processes < 1:
    raise errors.UserError(
        f'--num_processes={num_processes} must be at least 1')
  if not 0 <= process_index < num_processes:
    raise errors.UserError(
        f'--process_index={process_index} is outside 0 … {num_processes - 1}, '
        f'of --num_processes={num_processes}')
  found = re.fullmatch(r'(\S+):(\d{1,5})', coordinator)
  if not found or not 0 < int(found[2]) < 2**16:
    raise errors.UserError(
        f'--coordinator={coordinator}: expected HOST:PORT of the process with '
        'index 0, or auto')
  host, port = found[1].strip('[]'), int(found[2])
  try:
    socket.getaddrinfo(host, port)
    if process_index == 0:
      socket.create_server(('', port)).close()
  except OSError as e:
    raise errors.UserError(
        f'--coordinator={coordinator}: {e.strerror or e}') from None


def _read_native() -> None:
  """Has READER read what native code writes; Python's own goes where it went.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  out, err = os.dup(1), os.dup(2)
  reader = subprocess.Popen(
      [sys.executable, '-I', '-S', '-c', READER, f'error: {LOST}'],
      stdin=subprocess.PIPE, stdout=err, stderr=err)
  os.dup2(reader.stdin.fileno(), 1)
  os.dup2(reader.stdin.fileno(), 2)
  reader.stdin.close()
  sys.stdout = os.fdopen(out, 'w', buffering=1)
  sys.stderr = os.fdopen(err, 'w', buffering=1)


def _end(message: str) -> None:
  print(f'error: {message}', file=sys.stderr, flush=True)
  os._exit(1)


def leave(error: BaseException, code: int) -> None:
  """Ends a process that failed at once, if it is one of several.

  A shutdown would wait for the others, who wait for this one; so they see that
  it is gone. If that is what the error says of another one, READER tells it, as
  XLA may be about to abort for the same reason.
  """
  if not jax.distributed.is_initialized():
    return
  if isinstance(error, RuntimeError) and re.search(
      'gloo|nccl|UNAVAILABLE|coordination', str(error), re.IGNORECASE):
    os.write(2, b'distributed service detected\n')
  elif not isinstance(error, SystemExit):
    traceback.print_exception(error)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def several() -> bool:
  """Whether this process has others; without them no device is touched."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
  """Whether this process writes the files and talks to the user."""
  return not several() or jax.process_index() == 0


def wait(what: str) -> None:
  """Until all processes have come here."""
  if several():
    multihost_utils.sync_global_devices(what)


def of_first(values: Sequence[int]) -> list[int]:
  """What the first process has, to decide alike by it."""
  if several():
    values = multihost_utils.broadcast_one_to_all(np.asarray(values, np.int64))
  return [int(value) for value in values]


def check_same(**texts: str) -> None:
  """Raises a UserError unless all processes have equal texts."""
  if not several():
    return
  sums = np.stack([np.frombuffer(
      hashlib.sha256(text.encode()).digest()[:16], np.uint32)
                   for text in texts.values()])
  found = multihost_utils.process_allgather(sums)
  for name, own in zip(texts, found.swapaxes(0, 1), strict=True):
    if (own != own[0]).any():
      odd = int(np.argmax((own != own[0]).any(1)))
      raise errors.UserError(
          f'{name}: not the same on processes 0 and {odd}; give all the same '
          'command and the same files')


def spread(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
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


def part(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Of host arrays [B, …] over all devices, the rows of this process's."""
  if not several():
    return tree
  places = _places(mesh)
  return jax.tree.map(lambda x: x.reshape(
      mesh.size, -1, *x.shape[1:])[places].reshape(-1, *x.shape[1:]), tree)


def put_part(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """What `part` gives → [B, …] over all devices, by `mesh`'s axes."""
  sharding = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
  if not several():
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


def put(tree: Any, shardings: Any) -> Any:
  """device_put of what every process has whole; one sharding or a tree."""
  if not several():
    return jax.device_put(tree, shardings)
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(
        x.shape, sharding, x.__getitem__)

  return jax.tree.map(place, tree, shardings)


def whole(mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding | None:
  """The sharding of results that every process needs; None: any."""
  if mesh is None or not several():
    return None
  return jax.sharding.NamedSharding(mesh, P())


@functools.cache
def _largest(mesh: jax.sharding.Mesh) -> Any:
  return jax.jit(jnp.max, out_shardings=whole(mesh))


def largest(value: int, mesh: jax.sharding.Mesh) -> jax.Array:
  """The largest of the processes' values, [] int32; does not wait for it."""
  own = np.full(len(_places(mesh)), value, np.int32)
  return _largest(mesh)(put_part(own, mesh))
