"""The scaling model: its bytes are XLA's, its formulas are those by hand."""

import math
import pathlib
import re

import jax
import numpy as np
import pytest

from benchmarks import scaling_model
from qa_jax import train
from qa_jax.models import bert
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1}
SMALL = bert.BertConfig(vocab_size=100, hidden_size=8, num_layers=2,
                        num_heads=2, mlp_size=16)


def reduced_bytes(hlo: str) -> int:
  """Bytes of every all-reduce of a compiled program, by its result shapes."""
  total = 0
  for result in re.findall(r'= (\S.*?) all-reduce(?:-start)?\(', hlo):
    for kind, shape in re.findall(r'(\w+)\[([\d,]*)\]', result):
      total += BYTES[kind] * math.prod(int(n) for n in shape.split(',') if n)
  return total


@pytest.mark.parametrize('devices', [2, 8])
def test_a_step_reduces_the_gradients_and_five_scalars_at_most(devices):
  trainer = train.Trainer(tiny.config(
      parallel={'num_devices': devices}, data={'eval': ''}))
  wrapped = trainer.parallel
  state = jax.device_put(trainer.state, wrapped.state_sharding(trainer.state))
  batch = wrapped.place_batch(next(trainer.batches))
  program = wrapped.step.lower(state, batch).compile()
  found = reduced_bytes(program.as_text())
  expected = scaling_model.gradient_bytes(trainer.state.params)
  assert 0 <= found - expected <= 5 * 4


def test_flops_are_those_of_the_products_by_hand():
  # Per token and layer: Q, K, V, output; two of the MLP; scores and values.
  weights = 2 * (3 * 8 * 8 + 8 * 8 + 8 * 16 + 16 * 8)
  attention = 2 * (2 * 5 * 8)
  assert scaling_model.window_flops(SMALL, 5) == 3 * 2 * 5 * (
      weights + attention)


def test_an_all_reduce_is_that_of_its_two_levels():
  machine = scaling_model.Machine('x', 1.0, near_bytes=10.0, near=4,
                                  far_bytes=2.0)
  assert scaling_model.all_reduce_seconds(1, 80.0, machine) == 0
  assert scaling_model.all_reduce_seconds(4, 80.0, machine) == pytest.approx(
      2 * 3 / 4 * 80 / 10)
  # Four groups: each device reduces its quarter, 20 bytes, across them.
  assert scaling_model.all_reduce_seconds(16, 80.0, machine) == pytest.approx(
      2 * 3 / 4 * 80 / 10 + 2 * 3 / 4 * 20 / 2)


@pytest.mark.parametrize('count', [8, 64])
def test_windows_for_a_target_are_the_fewest(count):
  windows = scaling_model.windows_for(0.9, count, SMALL, scaling_model.H100)
  found = [scaling_model.efficiency(count, n, SMALL, scaling_model.H100)[0]
           for n in (windows - 1, windows)]
  assert found[0] < 0.9 <= found[1] + 1e-12
  assert np.all(np.asarray(found) > 0)


def test_tables_in_the_document_are_what_the_script_prints(capsys, monkeypatch):
  document = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
  monkeypatch.setattr('sys.argv', ['scaling_model', 'base'])
  scaling_model.main()
  for line in capsys.readouterr().out.splitlines():
    assert line in document, line
