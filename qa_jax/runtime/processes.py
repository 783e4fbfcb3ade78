"""Several processes of one run: joining, leaving, and agreeing on values.

Every process plans the same batches, from window lengths that all of them know,
and reads only the rows of its devices. Spans and metrics are small, and every
process has all of them. The first process writes the files and talks to the
user. In a run of one process the functions of this file do nothing.
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
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from qa_jax import errors
from qa_jax.runtime import stderr_filter

CONNECT_SECONDS = 120.0  # time for all processes to join
# A process that sends no heartbeat for this time is lost, and the others end. A
# thread of its own sends it, so that a save to a slow disk does not delay it.
HEARTBEAT_SECONDS = 60

LOST = ('another process of this run died, failed or stopped answering; the '
        'same commands go on from the last checkpoint')


def join_processes(coordinator: str, num_processes: int | None = None,
                   process_index: int | None = None) -> None:
  """Joins the other processes of a run; call it before JAX lists its devices.

  `coordinator` is HOST:PORT of the first process. It may be 'auto' where SLURM,
  Open MPI, Kubernetes or a TPU pod started this process, which provide all
  three arguments. If the processes have not joined within CONNECT_SECONDS, this
  one ends with a message and code 1.

  The function changes process-wide state: it sends stdout and stderr of native
  code through `stderr_filter`, and replaces sys.stdout and sys.stderr.

  Raises:
    UserError: an argument is missing or out of range, or joining failed.
  """
  address, options = 'the coordinator', {}
  if coordinator != 'auto':
    _check_flags(coordinator, num_processes, process_index)
    address, options = coordinator, dict(
        coordinator_address=coordinator, num_processes=num_processes,
        process_id=process_index, cluster_detection_method='deactivate')
  # JAX's preemption service would handle SIGTERM in place of `signals`.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(CONNECT_SECONDS, _exit, [
      f'not all processes came to {address} within {CONNECT_SECONDS:.0f} s; '
      'look whether one ended with an error, start as many as --num_processes '
      'says, each with the same --coordinator, and open the firewall'])
  late.daemon = True
  late.start()
  _filter_native_output()
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


def _check_flags(coordinator: str, num_processes: int | None,
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
  match = re.fullmatch(r'(\S+):(\d{1,5})', coordinator)
  if not match or not 0 < int(match[2]) < 2**16:
    raise errors.UserError(
        f'--coordinator={coordinator}: expected HOST:PORT of the process with '
        'index 0, or auto')
  host, port = match[1].strip('[]'), int(match[2])
  try:
    socket.getaddrinfo(host, port)
    if process_index == 0:
      socket.create_server(('', port)).close()
  except (OSError, UnicodeError) as e:  # UnicodeError: no name of a host
    raise errors.UserError(
        f'--coordinator={coordinator}: {errors.host_reason(e)}') from None


def _filter_native_output() -> None:
  """Sends file descriptors 1 and 2, of native code, through `stderr_filter`.

  Python's sys.stdout and sys.stderr move to the original descriptors.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  out, err = os.dup(1), os.dup(2)
  process = subprocess.Popen(
      [sys.executable, '-I', '-S', stderr_filter.__file__, f'error: {LOST}'],
      stdin=subprocess.PIPE, stdout=err, stderr=err)
  os.dup2(process.stdin.fileno(), 1)
  os.dup2(process.stdin.fileno(), 2)
  process.stdin.close()
  sys.stdout = os.fdopen(out, 'w', buffering=1)
  sys.stderr = os.fdopen(err, 'w', buffering=1)


def _exit(message: str) -> None:
  print(f'error: {message}', file=sys.stderr, flush=True)
  os._exit(1)


def leave_processes(error: BaseException, code: int) -> None:
  """Ends this process at once with `code` if it is one of several.

  A regular shutdown would wait for the other processes, which wait for this
  one. If `error` says that another process is lost, `stderr_filter` prints LOST
  in place of a traceback, since XLA may abort meanwhile for this reason.
  """
  if not jax.distributed.is_initialized():
    return
  if isinstance(error, RuntimeError) and re.search(
      'gloo|nccl|UNAVAILABLE|coordination', str(error), re.IGNORECASE):
    os.write(2, f'{stderr_filter.ENDS_PROCESS}\n'.encode())
  elif not isinstance(error, SystemExit):
    traceback.print_exception(error)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def is_multi_process() -> bool:
  """Returns whether the run has several processes.

  With one process it does not initialize the devices.
  """
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
  """Returns whether this process writes the files and talks to the user."""
  return not is_multi_process() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Waits until all processes have called this function with `what`."""
  if is_multi_process():
    multihost_utils.sync_global_devices(what)


def gather_rows(tree: Any) -> Any:
  """Returns the rows of all processes, in the order of the processes.

  `tree` has host arrays [B, …], with an equal B on every process.
  """
  return multihost_utils.process_allgather(tree, tiled=True)


def broadcast_from_first(values: Sequence[int]) -> list[int]:
  """Returns the values of the first process, so that all decide alike."""
  if is_multi_process():
    values = multihost_utils.broadcast_one_to_all(np.asarray(values, np.int64))
  return [int(value) for value in values]


def check_equal_on_all(**texts: str) -> None:
  """Raises a UserError with the first text that differs between processes."""
  if not is_multi_process():
    return
  sums = np.stack([
      np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], np.uint32)
      for text in texts.values()])
  sums = multihost_utils.process_allgather(sums)  # process, text, 4 words
  for name, of_text in zip(texts, sums.swapaxes(0, 1), strict=True):
    differs = (of_text != of_text[0]).any(1)
    if differs.any():
      odd = int(np.argmax(differs))
      raise errors.UserError(
          f'{name}: not the same on processes 0 and {odd}; give all the same '
          'command and the same files')
