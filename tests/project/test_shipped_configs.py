"""Shipped config files: each resolves to recorded values in every variant.

tests/golden/shipped_configs.json holds the resolved fields of each file and
variant, and the variants of each sweep, as they were when every file spelled
out all its fields.
"""

import ast
import importlib
import json
import pathlib

import pytest

from qa_jax import config
from qa_jax import heads
from qa_jax import registry
from qa_jax.models import ENCODERS
from tests.common.imports import ROOT

RECORDED = json.loads((ROOT / 'tests' / 'golden' / 'shipped_configs.json'
                       ).read_text(encoding='utf-8'))
FILES = sorted(p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')
               if p.stem != 'common')


def test_every_file_and_variant_is_recorded():
  assert {name.partition(':')[0] for name in RECORDED} == set(FILES)


@pytest.mark.parametrize(
    'name', [name for name in RECORDED if 'config' in RECORDED[name]])
def test_a_file_resolves_to_the_recorded_fields(name):
  file, _, variant = name.partition(':')
  module = importlib.import_module(f'configs.{file}')
  fields = module.get_config(*[variant] * bool(variant)).to_dict()
  assert config.check_config(fields).to_dict() == RECORDED[name]['config']
  # Every field is there, so that a flag can override it.
  assert json.loads(json.dumps(fields)) == RECORDED[name]['config']


@pytest.mark.parametrize(
    'name', [name for name in RECORDED if 'sweep' in RECORDED[name]])
def test_a_sweep_yields_the_recorded_variants(name):
  module = importlib.import_module(f'configs.{name}')
  recorded = dict(RECORDED[name])
  assert list(module.sweep()) == recorded.pop('sweep')
  if recorded:
    assert json.loads(json.dumps(module.search_space())) == recorded.pop(
        'search_space')
  assert not recorded


def test_the_sweep_of_heads_has_every_head():
  module = importlib.import_module('configs.sweep_heads')
  assert {registry.parse_spec(v['model.head'])[0] for v in module.sweep()
          } == {*heads.HEADS}


def test_a_rehearsal_overrides_sizes_steps_and_vocabulary():
  common = importlib.import_module('configs.common')
  c = config.defaults()
  c.train.num_epochs, c.train.num_steps = 0.0, 5000
  c.model.hidden_size, c.data.vocab = 768, 'somewhere'
  plain = common.rehearse(config.defaults())
  assert config.check_config(common.rehearse(c)) == config.check_config(plain)


def test_the_sweep_of_encoders_has_every_encoder():
  module = importlib.import_module('configs.sweep_encoders')
  assert ENCODERS.keys() <= module.CHECKPOINTS.keys()
  for variant in ('base', 'tiny'):
    rows = list(module.sweep(variant))
    c = module.get_config(variant).to_dict()
    for row in rows:
      config.check_config(config.override(c, row))
      assert registry.parse_spec(row['model.head'])[0] in heads.HEADS
    assert len(rows) == len(ENCODERS) * len(module.HEADS)
  named = [registry.parse_spec(row['model.encoder'])[0] for row in rows]
  assert [*dict.fromkeys(named)] == [*ENCODERS]


def test_a_file_repeats_no_default():
  """No assignment of a config file repeats the default of its field."""
  defaults = config.check_config(
      {**config.defaults().to_dict(), 'train': {'num_steps': 1}}).to_dict()
  for file in FILES:
    path = pathlib.Path(ROOT / 'configs' / f'{file}.py')
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if not isinstance(node, ast.Assign):
        continue
      target = ast.unparse(node.targets[0])
      if not target.startswith('c.') or not isinstance(
          node.value, ast.Constant):
        continue
      default = defaults
      for part in target.split('.')[1:]:
        default = default[part]
      assert node.value.value != default, f'{file}: {target}'
