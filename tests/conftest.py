"""Every test runs on 8 virtual CPU devices; rank promotion raises."""

import os
import tempfile

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# One program is compiled once, however many tests run it.
_cache = tempfile.TemporaryDirectory(prefix='qa_jax_compiled_')
os.environ['XDG_CACHE_HOME'] = _cache.name  # of commands that a test runs
jax.config.update('jax_compilation_cache_dir', _cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
