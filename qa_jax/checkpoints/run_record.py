"""The record of a run, run.json: code, command, packages, devices, inputs."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy',
            'tokenizers', 'safetensors', 'ml_collections')
MAX_CHARACTERS = 1_000_000  # of the diff, and of each new file
ENVIRONMENT = ('XLA_', 'JAX_', 'CUDA_VISIBLE_DEVICES', 'TPU_')


def run_record(*, seed: int, argv: list[str], devices: list[jax.Device],
               hashes: dict[str, str]) -> dict[str, Any]:
  """Returns the content of run.json; `hashes` are the sha256 of the inputs.

  Secrets are left out: only environment variables with the prefixes ENVIRONMENT
  are recorded, and user and password are removed from URLs in the command.
  """
  return {
      'seed': seed,
      'argv': [re.sub(r'(?<=://)([^/@\s:]*:[^@\s]*|[^/@\s]+)@', '…@', word)
               for word in argv],
      'git': _git(), 'python': platform.python_version(),
      'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
      'devices': {'kind': devices[0].device_kind, 'count': len(devices),
                  'processes': len({d.process_index for d in devices}),
                  'platform': devices[0].platform, 'cores': os.cpu_count()},
      'environment': {k: v for k, v in sorted(os.environ.items())
                      if k.startswith(ENVIRONMENT)},
      'sha256': hashes,
  }


def _git() -> dict[str, Any]:
  """Returns commit and uncommitted changes of this code, '' where unknown.

  `untracked` has the texts of new Python files of the library and its configs
  that git does not ignore, by path. A repository that only encloses the
  installed library, and does not track it, is none of this code.
  """
  root = pathlib.Path(__file__).resolve().parents[2]

  def output(*command: str) -> str:
    try:
      return subprocess.run(
          ['git', '-C', str(root), *command], capture_output=True,
          encoding='utf-8', errors='surrogateescape', timeout=10, check=True
          ).stdout
    except (OSError, subprocess.SubprocessError):
      return ''

  if not output('ls-files', '--', 'qa_jax/__init__.py'):
    return {'commit': '', 'diff': '', 'untracked': {}}
  new = output('ls-files', '-z', '--others', '--exclude-standard', '--',
               'qa_jax/*.py', 'configs/*.py').split('\0')
  return {'commit': output('rev-parse', 'HEAD').strip(),
          'diff': output('diff', 'HEAD')[:MAX_CHARACTERS],
          'untracked': {path: (root / path).read_text(
              errors='replace')[:MAX_CHARACTERS]
                        for path in new if (root / path).is_file()}}
