"""Settings of all tests: 8 virtual CPU devices; rank promotion raises.

Tests spend more time on compilation than on computation, so XLA optimises
little here. `XLA_FLAGS= make test` optimises as usual and takes twice as long.
"""

import os
import tempfile

import jax

_flags = ['--xla_backend_optimization_level=0']
if jax.__version_info__ < (0, 11):  # later versions do not know it
  _flags.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(_flags))
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# All tests and processes of a suite share one compilation cache.
_home = tempfile.TemporaryDirectory(prefix='qa_jax_tests_')
os.environ['XDG_CACHE_HOME'] = _home.name
for _name, _value in {
    'jax_compilation_cache_dir': f'{_home.name}/compiled',
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1}.items():
  _value = type(_value)(os.environ.setdefault(_name.upper(), str(_value)))
  jax.config.update(_name, _value)
