"""The compilation cache and the allocator: what a command sets, and does not.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import subprocess
import sys
import types

import pytest

from qa_jax.runtime import settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = '''
import jax
from qa_jax.runtime import settings
settings.configure_process()
jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((9, 7))).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
'''


def run(program: str, **environment: str) -> str:
  clean = {k: v for k, v in os.environ.items()
           if not k.startswith(('JAX_', 'MALLOC_'))}
  done = subprocess.run(
      [sys.executable, '-W', 'error', '-c', program], cwd=ROOT, text=True,
      env={**clean, 'JAX_PLATFORMS': 'cpu', **environment},
      capture_output=True, check=False)
  assert not done.returncode, done.stderr
  return done.stdout.strip()


def entries(directory: pathlib.Path) -> list[str]:
  return sorted(p.name for p in directory.rglob('*-cache'))


def test_the_second_process_compiles_nothing(tmp_path):
  count = PROGRAM.replace('settings.configure_process()', '''
from jax import monitoring
hits = []
monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if 'cache_' in name else None)
settings.configure_process()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)''')
  count += 'print(sum(h.endswith("cache_misses") for h in hits))'
  misses = [int(run(count, XDG_CACHE_HOME=str(tmp_path)).split()[-1])
            for _ in range(2)]
  assert misses[0] > 0 and misses[1] == 0
  assert entries(tmp_path / 'qa_jax' / 'compiled')


def test_the_cache_is_bounded_and_needs_a_directory_to_write(
    tmp_path, monkeypatch):
  changes = {}
  monkeypatch.setattr(settings, 'jax', types.SimpleNamespace(
      config=types.SimpleNamespace(update=changes.__setitem__)))
  settings.use_compilation_cache(tmp_path / 'new')
  assert changes['jax_compilation_cache_dir'] == str(tmp_path / 'new')
  assert changes['jax_compilation_cache_max_size'] == 4 * 2**30
  assert changes['jax_persistent_cache_min_compile_time_secs'] < 1
  changes.clear()
  monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)
  settings.use_compilation_cache(tmp_path / 'new')
  assert not changes


@pytest.mark.parametrize(('directory', 'enabled', 'note'), [
    (None, True, ''), ('/d', False, ''), ('/d', True, ', cached afterwards')])
def test_programs_are_cached_where_there_is_a_cache(
    monkeypatch, directory, enabled, note):
  monkeypatch.setattr(settings, 'jax', types.SimpleNamespace(
      config=types.SimpleNamespace(jax_compilation_cache_dir=directory,
                                   jax_enable_compilation_cache=enabled)))
  assert settings.cache_note() == note


def test_programs_are_shared_by_equal_processors_alone(monkeypatch):
  def name(text):
    monkeypatch.setattr(pathlib.Path, 'read_text', lambda *_, **__: text)
    return settings._processor()
  one = 'model name: A\nflags: x y\nFeatures: z\ncpu MHz: 1\n'
  assert name(one) == name(one.replace('MHz: 1', 'MHz: 2') + one)
  assert len({name(one.replace(value, 'w')) for value in 'Axyz-'}) == 5
  assert name(one).startswith(f'{platform.machine()}-')
  monkeypatch.undo()

  def missing(*_, **__):  # no Linux
    raise FileNotFoundError

  monkeypatch.setattr(pathlib.Path, 'read_text', missing)
  assert settings._processor() == platform.machine()


@pytest.mark.parametrize(('variable', 'tunes'), [
    ('GLIBC_TUNABLES', False), ('MALLOC_ARENA_MAX', False), ('MALLOC', True)])
def test_a_setting_of_malloc_is_left_alone(monkeypatch, variable, tunes):
  called = []
  monkeypatch.setattr(os, 'environ', {variable: '1'})
  monkeypatch.setattr(settings.platform, 'system', lambda: 'Linux')
  monkeypatch.setattr(settings, 'may_use_accelerator', lambda: False)
  monkeypatch.setattr(settings, 'tune_malloc', lambda: called.append(1))
  monkeypatch.setattr(settings.files, 'cache_home', lambda: None)
  settings.configure_process()
  assert bool(called) == tunes


def test_the_users_directory_is_kept(tmp_path):
  printed = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path / 'a'),
             JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'b'))
  assert printed == str(tmp_path / 'b') and not (tmp_path / 'a').exists()


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path):
  (tmp_path / 'file').write_text('')
  assert run(PROGRAM, XDG_CACHE_HOME=str(tmp_path / 'file')) == 'None'


# The functions of the C library, in a process that is configured.
LIBC = '''
import ctypes
from qa_jax.runtime import settings
settings.configure_process()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone has mallopt')
@pytest.mark.parametrize(('environment', 'tuned'), [
    ({}, True), ({'MALLOC_ARENA_MAX': '2'}, False)])
def test_malloc_is_tuned_unless_the_user_did(tmp_path, environment, tuned):
  """Tuned, a block of 64 MiB comes from the heap and is not mapped."""
  printed = run(LIBC + '''
block = c.malloc(2**26)
heap = next(line for line in open('/proc/self/maps') if '[heap]' in line)
begin, end = (int(x, 16) for x in heap.split()[0].split('-'))
print(begin <= block < end)
''', XDG_CACHE_HOME=str(tmp_path), **environment)
  assert printed == str(tuned)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone has mallopt')
@pytest.mark.parametrize(('environment', 'tuned'), [
    ({}, True), ({'MALLOC_TRIM_THRESHOLD_': '100000000'}, False)])
def test_a_thread_keeps_the_memory_that_it_frees(tmp_path, environment, tuned):
  """As XLA's do: a block, freed and taken again, faults no page anew."""
  printed = run(LIBC + '''
import resource, threading
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def take():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = c.malloc(100 * 2**20)
  c.memset(block, 1, 100 * 2**20)
  c.free(block)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def work():
  take()
  print(take() < 1000)
thread = threading.Thread(target=work)
thread.start()
thread.join()
''', XDG_CACHE_HOME=str(tmp_path), **environment)
  assert printed == str(tuned)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone has mallopt')
@pytest.mark.parametrize(('environment', 'kept'), [
    ({}, True),
    ({'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '2147483647'}, False)])
def test_the_heap_keeps_more_than_an_int_of_freed_bytes(
    tmp_path, environment, kept):
  """As after an update of BERT-base; no page is touched."""
  printed = run(LIBC + '''
c.sbrk.restype = ctypes.c_void_p
c.sbrk.argtypes = [ctypes.c_ssize_t]
block = c.malloc(9 * 2**28)
end = c.sbrk(0)
c.free(block)
print(c.sbrk(0) == end)
''', XDG_CACHE_HOME=str(tmp_path), **environment)
  assert printed == str(kept)


@pytest.mark.parametrize(('platforms', 'plugins', 'expected'), [
    ('cpu', True, False), ('cuda,cpu', False, True), ('', False, False),
    ('', True, True)])
def test_malloc_is_left_to_a_process_that_may_use_an_accelerator(
    tmp_path, platforms, plugins, expected):
  """A plugin is found by its entry point, and no backend is started."""
  if not (platforms or plugins) and (
      importlib.metadata.entry_points(group='jax_plugins')
      or importlib.util.find_spec('libtpu')):
    pytest.skip('an accelerator is supported here')
  if plugins:
    info = tmp_path / 'plugin-1.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: plugin\nVersion: 1\n')
    (info / 'entry_points.txt').write_text('[jax_plugins]\nx = nowhere\n')
  printed = run('''
from unittest import mock
from qa_jax.runtime import settings
with mock.patch.object(settings, 'tune_malloc') as tune:
  settings.configure_process()
from jax._src import xla_bridge
print(settings.may_use_accelerator(), tune.called,
      xla_bridge.backends_are_initialized())
''', XDG_CACHE_HOME=str(tmp_path), JAX_PLATFORMS=platforms,
                PYTHONPATH=str(tmp_path))
  assert printed == f'{expected} {not expected} False'
