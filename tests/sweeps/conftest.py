"""Fixtures that the tests of sweeps share."""

import pathlib

import pytest

from tests.common import commands
from tests.common import tiny


@pytest.fixture(scope='module')
def sweep_config(tmp_path_factory) -> pathlib.Path:
  """A config file of two steps with a sweep that trains once."""
  path = tmp_path_factory.mktemp('configs') / 'tiny_sweep.py'
  fields = tiny.config(train={'num_steps': 2}, data={'max_length': 48},
                       parallel={'num_devices': 1})
  path.write_text(commands.CONFIG.format(fields=fields.to_dict()) + '''
def sweep():
  yield {'decode.search': 'two_stage'}
  yield {'decode.search': 'top_k(k=2)'}
''')
  return path
