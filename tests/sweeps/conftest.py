"""Fixtures that the tests of sweeps share."""

import pathlib

import pytest

from tests.common import sweeps


@pytest.fixture(scope='module')
def sweep_config(tmp_path_factory) -> pathlib.Path:
  """A config file of two steps with a sweep that trains once."""
  return sweeps.write_config(
      tmp_path_factory.mktemp('configs') / 'tiny_sweep.py', '''
def sweep():
  yield {'decode.search': 'two_stage'}
  yield {'decode.search': 'top_k(k=2)'}
''')
