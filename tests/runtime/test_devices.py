"""Devices: their memory, and the rows that a process puts on them."""

import math
import pathlib
import resource
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax.runtime import devices
from qa_jax.runtime import processes


def device(**stats: int) -> types.SimpleNamespace:
  return types.SimpleNamespace(memory_stats=lambda: stats or None)


def test_memory_is_that_of_the_device_or_of_the_machine(monkeypatch):
  gpu = device(bytes_limit=5000, bytes_in_use=2000, peak_bytes_in_use=3 * 2**20)
  assert devices.memory_bytes(gpu) == 5000
  assert devices.free_bytes(gpu) == 3000
  assert devices.peak_megabytes(gpu) == 3
  assert devices.memory_bytes(device()) == math.inf
  texts = {'text': 'MemFree:  1 kB\nMemAvailable:   70 kB\n'}
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda _: texts['text'])
  assert devices.free_bytes(device()) == 70 * 1024
  texts['text'] = 'MemFree:  1 kB\n'  # an old kernel
  assert devices.free_bytes(device()) == math.inf
  texts.clear()

  def missing(_):  # no Linux
    raise FileNotFoundError

  monkeypatch.setattr(pathlib.Path, 'read_text', missing)
  assert devices.free_bytes(device()) == math.inf
  monkeypatch.setattr(resource, 'getrusage', lambda who: types.SimpleNamespace(
      ru_maxrss=4096))
  assert devices.peak_megabytes(device()) == 4
  # As some plugins: a limit, but no peak.
  assert devices.peak_megabytes(device(bytes_limit=5000)) == 4


@pytest.mark.parametrize('places', [[2, 3], [0, 1, 2, 3]])
def test_a_process_gathers_the_rows_of_its_devices(monkeypatch, places):
  """Two rows of each of 4 devices, of which 2 or all are of this process."""
  mesh = devices.make_mesh(jax.devices()[:4], {'data': 2, 'fsdp': 2})
  monkeypatch.setattr(processes, 'is_multi_process', lambda: True)
  monkeypatch.setattr(devices, '_local_positions', lambda _: places)
  rows = {'a': np.arange(8), 'b': np.arange(24).reshape(8, 3)}
  own = devices.local_rows(rows, mesh)
  expected = [row for place in places for row in (2 * place, 2 * place + 1)]
  assert own['a'].tolist() == expected
  assert own['b'].tolist() == [[3 * r, 3 * r + 1, 3 * r + 2] for r in expected]


def test_rows_of_several_processes_are_placed_as_those_of_one(monkeypatch):
  mesh = devices.make_mesh(jax.devices()[:4], {'data': 2, 'fsdp': 2})
  rows = {'a': np.arange(8), 'b': np.arange(24).reshape(8, 3)}
  one = devices.put_rows(rows, mesh)
  monkeypatch.setattr(processes, 'is_multi_process', lambda: True)
  several = devices.put_rows(rows, mesh)
  for name, x in several.items():
    np.testing.assert_array_equal(x, rows[name])
    assert x.sharding == one[name].sharding
    for shard in x.addressable_shards:
      place = list(mesh.devices.flat).index(shard.device)
      np.testing.assert_array_equal(
          shard.data, rows[name][2 * place:2 * place + 2])
  assert devices.max_over_processes(7, mesh) == 7


def test_whole_arrays_are_placed_by_one_sharding_or_a_tree_of_them():
  mesh = devices.make_mesh(jax.devices()[:4], {'data': 4})
  split = jax.sharding.NamedSharding(mesh, devices.P('data'))
  whole = jax.sharding.NamedSharding(mesh, devices.P())
  tree = {'a': np.arange(8), 'b': jnp.float32(3)}
  for shardings in (whole, {'a': split, 'b': whole}):
    placed = devices.put_tree(tree, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed['a'].sharding == (
        whole if shardings is whole else split)
    assert placed['b'].sharding == whole
