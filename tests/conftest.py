"""Every test runs on 8 virtual CPU devices; rank promotion raises.

Tests compile far more than they compute, so XLA optimises little: with
`XLA_FLAGS= make test` as always, and in twice the time.
"""

import os
import tempfile

import jax

_flags = ['--xla_backend_optimization_level=0']
if jax.__version_info__ < (0, 11):  # unknown to later ones
  _flags.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_flags))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# One program is compiled once, however many tests run it.
_cache = tempfile.TemporaryDirectory(prefix='qa_jax_compiled_')
os.environ['XDG_CACHE_HOME'] = _cache.name  # of commands that a test runs
jax.config.update('jax_compilation_cache_dir', _cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
