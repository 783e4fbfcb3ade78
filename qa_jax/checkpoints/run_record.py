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
ENVIRONMENT = ('XLA_', 'JAX_', 'CUDA_VISIBLE_DEVICES', 'TPU_')


def run_record(*, seed: int, argv: list[str], devices: list[jax.Device],
               hashes: dict[str, str]) -> dict[str, Any]:
  """Returns the content of run.json; `hashes` are the sha256 of the inputs.

  Secrets are left out: only environment variables with the prefixes ENVIRONMENT
  are recorded, and user and password are removed from URLs in the command.
  """
  return {
      'seed': seed,
      'argv': [re.sub(r'(?<=://)[^/@\s]+@', '…@', word) for word in argv],
      'git': _git(), 'python': platform.python_version(),
      'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
      'devices': {'kind': devices[0].device_kind, 'count': len(devices),
                  'processes': len({d.process_index for d in devices}),
                  'platform': devices[0].platform, 'cores': os.cpu_count()},
      'environment': {k: v for k, v in sorted(os.environ.items())
                      if k.startswith(ENVIRONMENT)},
      'sha256': hashes,
  }


def _git() -> dict[str, str]:
  """Returns commit and uncommitted changes of this code, '' where unknown."""
  root = pathlib.Path(__file__).resolve().parents[2]

  def output(*command: str) -> str:
    try:
      return subprocess.run(
          ['git', '-C', str(root), *command], capture_output=True, text=True,
          timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
      return ''
  return {'commit': output('rev-parse', 'HEAD').strip(),
          'diff': output('diff', 'HEAD')[:1_000_000]}
