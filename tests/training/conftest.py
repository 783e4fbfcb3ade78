"""A finished run, for tests that only read it."""

import pathlib
import sys
from unittest import mock

import pytest

from qa_jax.training import train
from tests.common import tiny


@pytest.fixture(scope='session')
def finished(tmp_path_factory) -> pathlib.Path:
  """Trains the tiny config to its end; returns the run directory."""
  workdir = tmp_path_factory.mktemp('runs') / 'tiny'
  with mock.patch.object(sys, 'argv', ['train', '--\udcff']):  # not UTF-8
    train.train(tiny.config(), workdir)
  return workdir
