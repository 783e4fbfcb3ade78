"""What a process sets before it computes: a compilation cache, malloc.

Both are for commands; a notebook that imports qa_jax is left as it is.
"""

import ctypes
import hashlib
import os
import pathlib
import platform

import jax

from qa_jax.io import files

CACHE_BYTES = 4 * 2**30  # of compiled programs; the least recently used go

# Of glibc's <malloc.h>: variable → number of the parameter, and its value.
MALLOC = {
    'MALLOC_MMAP_MAX_': (-4, 0),  # large blocks come from the heap,
    'MALLOC_TRIM_THRESHOLD_': (-1, 2**31 - 1),  # which is not given back,
    'MALLOC_TOP_PAD_': (-2, 2**28),  # and grows by 256 MiB.
    # A thread's own heap ends at 64 MiB: what is larger is mapped after all.
    'MALLOC_ARENA_MAX': (-8, 1),
}


def configure_process() -> None:
  """The compilation cache and, on a CPU, the allocator; both can be refused.

  JAX_COMPILATION_CACHE_DIR names another directory for compiled programs,
  JAX_ENABLE_COMPILATION_CACHE=false does without. A setting of malloc's own
  (MALLOC_…, GLIBC_TUNABLES) in the environment is left in force.
  """
  home = files.cache_home()
  if jax.config.jax_compilation_cache_dir is None and home:
    use_compilation_cache(home / 'compiled' / _processor())
  # XLA's CPU client asks malloc for every temporary array. Blocks of more than
  # 32 MiB are mapped and unmapped each time, and every page faults anew.
  if platform.system() == 'Linux' and not any(
      name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES'
      for name in os.environ):
    tune_malloc()


def use_compilation_cache(directory: pathlib.Path) -> None:
  """Keeps compiled programs in `directory`, unless it cannot be written."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if not os.access(directory, os.W_OK):
    return
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  # Of a start-up, half goes into programs that take less than a second each.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def tune_malloc() -> bool:
  """Whether the C library took the settings; only glibc has them."""
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  return all(mallopt(number, value) for number, value in MALLOC.values())


def _processor() -> str:
  """A name for this kind of processor: programs are compiled for it alone.

  On a home directory that machines share, another's would not run.
  """
  kind = platform.machine()
  try:
    info = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return kind
  lines = sorted({line for line in info.splitlines()
                  if line.startswith(('model name', 'flags', 'Features'))})
  return f'{kind}-{hashlib.sha256("".join(lines).encode()).hexdigest()[:12]}'
