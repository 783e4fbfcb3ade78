"""This machine's devices, shared out among workers."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import subprocess
import sys

from qa_jax import errors


@dataclasses.dataclass(frozen=True)
class Devices:
  """What each worker has to itself."""

  environments: Sequence[Mapping[str, str]]  # added to that of the worker
  count: int  # devices of a worker


def devices(workers: int) -> Devices:
  """This machine's devices, shared out; `workers` 0: one a GPU, else one.

  Raises:
    UserError: more workers than GPUs, or several on a TPU host, whose chips
      belong to one process.
  """
  # Asked of another process: this one must not take their memory.
  ask = 'import jax; print(jax.default_backend(), jax.local_device_count())'
  told = subprocess.run([sys.executable, '-c', ask], capture_output=True,
                        text=True, check=False)
  if told.returncode:
    raise errors.UserError(
        f'jax finds no device: {told.stderr.strip().splitlines()[-1]}')
  platform, number = told.stdout.split()
  return share(platform, int(number), workers,
               os.environ.get('CUDA_VISIBLE_DEVICES', ''))


def share(platform: str, count: int, workers: int, visible: str) -> Devices:
  """`count` devices among `workers`; `visible` names the GPUs, '' all."""
  if platform == 'cpu':
    return Devices([{}] * (workers or 1), count)
  most = count if platform == 'gpu' else 1
  if workers > most:
    raise errors.UserError(
        f'--workers={workers}, but {count} {platform} devices take at most '
        f'{most}')
  workers = workers or most
  if workers == 1:
    return Devices([{}], count)
  each = count // workers  # as many for all: step times are compared
  names = visible.split(',') if visible else [str(i) for i in range(count)]
  return Devices([
      {'CUDA_VISIBLE_DEVICES': ','.join(names[i * each:(i + 1) * each])}
      for i in range(workers)], each)
