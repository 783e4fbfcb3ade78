"""Several processes train one run: how they meet, whose rows are whose.

Glossary of shapes: B batch over all devices, D devices.

Each makes the same plan of batches, from lengths that all know, and reads the
rows that its own devices see. What is small, spans and metrics, every process
has whole; files are written by the first. With one process, all that is here
does nothing.
"""

from collections.abc import Sequence
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import traceback

import jax
from jax.experimental import multihost_utils
import numpy as np

from qa_jax import errors

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


def join_processes(coordinator: str, num_processes: int | None = None,
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


def leave_processes(error: BaseException, code: int) -> None:
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


def is_multi_process() -> bool:
  """Whether this process has others; without them no device is touched."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
  """Whether this process writes the files and talks to the user."""
  return not is_multi_process() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Until all processes have come here."""
  if is_multi_process():
    multihost_utils.sync_global_devices(what)


def broadcast_from_first(values: Sequence[int]) -> list[int]:
  """What the first process has, to decide alike by it."""
  if is_multi_process():
    values = multihost_utils.broadcast_one_to_all(np.asarray(values, np.int64))
  return [int(value) for value in values]


def check_equal_on_all(**texts: str) -> None:
  """Raises a UserError unless all processes have equal texts."""
  if not is_multi_process():
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
