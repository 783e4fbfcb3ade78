"""The scaling model: bytes as XLA reports them, FLOPs as computed by hand."""

import collections
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from benchmarks import scaling_model
from qa_jax.models.encoders import bert
from qa_jax.training import trainer as trainer_lib
from tests.common import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1}
SMALL = bert.BertConfig(vocab_size=100, hidden_size=8, num_layers=2,
                        num_heads=2, mlp_size=16)


def moved(hlo: str) -> collections.Counter[str]:
  """Returns the bytes of a compiled program's collectives, by result shape."""
  found: collections.Counter[str] = collections.Counter()
  for result, kind in re.findall(
      r'= (\S.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-'
      r'permute)(?:-start)?\(', hlo):
    for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', result):
      found[kind] += BYTES[dtype] * math.prod(
          int(n) for n in shape.split(',') if n)
  return found


def step_of(**fields) -> tuple[collections.Counter[str], int, int]:
  """What a step moves; bytes of its gradients, and of those of positions that
  no window has."""
  trainer = trainer_lib.build_trainer(
      tiny.config(parallel=fields, data={'eval': ''}))
  wrapped = trainer.parallel
  state = jax.device_put(trainer.state, wrapped.state_sharding(trainer.state))
  program = wrapped.compile(state, wrapped.place_batch(next(trainer.batches)))
  sizes, length = trainer.model.config, trainer.config.data.max_length
  return (moved(program.as_text()),
          scaling_model.gradient_bytes(trainer.state.params),
          4 * sizes.hidden_size * (sizes.max_position - length))


@pytest.mark.slow
@pytest.mark.parametrize('devices', [2, 8])
def test_a_step_reduces_the_gradients_and_five_scalars_at_most(devices):
  found, expected, _ = step_of(num_devices=devices)
  assert set(found) == {'all-reduce'}
  assert 0 <= found['all-reduce'] - expected <= 5 * 4


def test_a_mesh_of_data_reduces_no_more():
  found, expected, unused = step_of(num_devices=8, mode='mesh')
  assert set(found) == {'all-reduce'}
  assert 0 <= found['all-reduce'] - expected + unused <= 5 * 4


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'data': 2, 'fsdp': 4}])
def test_fsdp_gathers_the_parameters_once_and_reduces_the_gradients(axes):
  found, expected, _ = step_of(num_devices=8, mode='mesh', mesh=axes)
  # At this size the tokens are not negligible beside the parameters.
  assert expected <= found.pop('all-gather') <= 1.05 * expected
  assert 0 < sum(found.values()) <= expected


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


def test_an_unknown_preset_is_a_line_with_the_choices(capsys, monkeypatch):
  monkeypatch.setattr('sys.argv', ['scaling_model', 'huge'])
  with pytest.raises(SystemExit, match='2'):
    scaling_model.main()
  *_, line = capsys.readouterr().err.splitlines()
  assert "invalid choice: 'huge'" in line and 'minilm_l6' in line
