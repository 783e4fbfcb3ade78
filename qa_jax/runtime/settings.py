"""Process-wide settings for commands: the compilation cache and malloc.

The library itself does not call these functions, so that a notebook that
imports qa_jax keeps its settings.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform

import jax

from qa_jax.io import files

# Limit of the compilation cache; the least recently used programs are deleted.
CACHE_BYTES = 4 * 2**30

# Environment variable of glibc → number of the parameter in <malloc.h>, value.
MALLOC = {
    'MALLOC_MMAP_MAX_': (-4, 0),  # Large blocks come from the heap.
    'MALLOC_TRIM_THRESHOLD_': (-1, -1),  # The heap is never shrunk.
    'MALLOC_TOP_PAD_': (-2, 2**28),  # The heap grows by 256 MiB.
    # One heap for all threads: the heap of a thread ends at 64 MiB, and larger
    # blocks would be mapped in spite of MALLOC_MMAP_MAX_.
    'MALLOC_ARENA_MAX': (-8, 1),
}


def configure_process() -> None:
  """Sets the compilation cache and, on Linux, malloc for this whole process.

  JAX_COMPILATION_CACHE_DIR names another directory for compiled programs, and
  JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. malloc is not changed
  if the environment has a setting of it (MALLOC_…, GLIBC_TUNABLES), or JAX may
  compute on an accelerator.
  """
  home = files.cache_home()
  if jax.config.jax_compilation_cache_dir is None and home:
    use_compilation_cache(home / 'compiled' / _processor())
  # XLA's CPU client calls malloc for every temporary array. By default, malloc
  # maps and unmaps each block above 32 MiB, and every page of it faults again.
  # Other clients keep arrays on their device, and XLA compiles for a GPU in
  # many threads, which would wait for each other at a single heap.
  if platform.system() == 'Linux' and not may_use_accelerator() and not any(
      name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES'
      for name in os.environ):
    tune_malloc()


def may_use_accelerator() -> bool:
  """Returns whether JAX may choose another backend than the CPU.

  It looks at JAX_PLATFORMS and the installed plugins and starts no backend,
  since several processes of a run must join before that.
  """
  if jax.config.jax_platforms:
    return jax.config.jax_platforms.split(',')[0] != 'cpu'
  return bool(importlib.metadata.entry_points(group='jax_plugins')
              or importlib.util.find_spec('libtpu'))


def use_compilation_cache(directory: pathlib.Path) -> None:
  """Makes JAX keep compiled programs in `directory`, if it can be written."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if not os.access(directory, os.W_OK):
    return
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  # Half of the start-up time is spent on programs that compile in less than a
  # second each, which JAX does not keep by default.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def cache_note() -> str:
  """Returns ', cached afterwards' if JAX stores compiled programs, else ''."""
  return (', cached afterwards' if jax.config.jax_compilation_cache_dir
          and jax.config.jax_enable_compilation_cache else '')


def tune_malloc() -> bool:
  """Sets malloc's parameters and returns whether it succeeded (glibc only)."""
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  return all(mallopt(number, value) for number, value in MALLOC.values())


def _processor() -> str:
  """Returns a name for this kind of processor; several may share a home."""
  kind = platform.machine()
  try:
    info = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return kind
  lines = sorted({line for line in info.splitlines()
                  if line.startswith(('model name', 'flags', 'Features'))})
  return f'{kind}-{hashlib.sha256("".join(lines).encode()).hexdigest()[:12]}'
