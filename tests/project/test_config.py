"""Config fields: defaults, comments, and one line for every mistake."""

import dataclasses
import inspect
import re
import sys

from absl import flags
from ml_collections import config_flags
import pytest

from qa_jax import config
from qa_jax import errors

VALID = {'train': {'num_steps': 10}}


def keys(tree, path=''):
  return {path + k for k in tree} | {
      name for k, v in tree.items() if isinstance(v, dict)
      for name in keys(v, f'{path}{k}.')}


def test_defaults_hold_every_field_with_its_default():
  c = config.defaults()
  c.train.num_steps = 10
  assert config.check_config(c) == config.check_config(VALID)
  assert keys(c.to_dict()) == keys(config.Config().to_dict())


def test_defaults_take_assignments_of_every_kind_of_field():
  c = config.defaults()
  c.model.preset = 'base'
  c.data.buckets = (128, 256)
  c.parallel.mesh = {'data': 2, 'fsdp': 4}
  c.train.num_epochs = 2
  checked = config.check_config(c)
  assert checked.model.preset == 'base'
  assert checked.data.buckets == (128, 256)
  assert checked.parallel.mesh == {'data': 2, 'fsdp': 4}
  assert checked.train.num_epochs == 2.0
  assert config.defaults().model.preset == 'tiny'


def test_defaults_take_overrides_from_the_command_line(monkeypatch):
  command = ['train', '--config.train.num_steps=7',
             '--config.data.buckets=(8, 9)', '--config.parallel.mesh.fsdp=2',
             '--config.optim.learning_rate=1']
  monkeypatch.setattr(sys, 'argv', command)
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
      'config', config.defaults(), flag_values=values)
  values(command)
  checked = config.check_config(values.config)
  assert checked.train.num_steps == 7
  assert checked.data.buckets == (8, 9)
  assert checked.parallel.mesh == {'data': -1, 'fsdp': 2}
  assert checked.optim.learning_rate == 1.0


@pytest.mark.parametrize('group', [
    config.Config, config.Model, config.Decode, config.Data, config.Train,
    config.Optim, config.ParallelConfig, config.Precision])
def test_comment_above_every_field_is_whole_sentences(group):
  source = inspect.getsource(group)
  for field in dataclasses.fields(group):
    comment = re.search(
        rf'((?:^  # .*\n)+)^  {field.name}: ', source, re.MULTILINE)
    assert comment, field.name
    assert re.fullmatch(r"  # ['A-Z0-9](.|\n)*\.\n", comment[1]), comment[1]


@pytest.mark.parametrize(('change', 'message'), [
    ({'optim': {'learning_rat': 1.0}}, "did you mean 'learning_rate'"),
    ({'modle': {}}, "did you mean 'model'"),
    ({'model': 3}, 'expected fields'),
    ({'seed': 'x'}, 'expected int'),
    ({'seed': True}, 'expected int'),
    ({'seed': -1}, 'in 0'),
    ({'train': {'log_every_steps': 0, 'num_steps': 1}}, 'at least 1'),
    ({'train': {'batch_size': 10**27, 'num_steps': 1}}, 'in 1 … 1000000'),
    ({'model': {'position_base': 1e-300}, 'train': {'num_steps': 1}},
     'position_base=1e-300 must be at least 1, or 0'),
    ({'data': {'vocab_size': 10**10}}, 'in 100 … 1000000'),
    ({'train': {'num_steps': 1, 'num_epochs': 1.0}}, 'set one of'),
    ({'train': {}}, 'set one of'),
    ({'heads': 'biaffine'}, "did you mean 'model.head'"),
    ({'optim': {'learning_rate': float('nan')}}, 'expected a finite float'),
    ({'optim': {'learning_rate': 10**400}}, 'expected a finite float'),
    ({'optim': {'clip_norm': float('inf')}}, 'expected a finite float'),
    ({'decode': {'null_threshold': float('-inf')}}, 'expected a finite float'),
    ({'train': {'num_epochs': 0.0, 'num_steps': 2**31}}, 'in 0 … 2147483647'),
    ({'data': {'train': 'a\udcff.json'}}, 'is not UTF-8'),
    ({'parallel': {'mesh': {'\ud83e': 1}}}, 'names to ints'),
    ({'parallel': {'mesh': {'data': True}}}, 'names to ints'),
    ({'data': {'buckets': [1, 'a']}}, 'list of ints'),
    ({'data': {'buckets': [64, True]}}, 'list of ints'),
    ({'data': {'max_length': 8193}}, 'in 8 … 8192'),
    ({'precision': {'compute_dtype': 'float16'}},
     'choose float32, tf32, bfloat16 or auto'),
    ({'data': {'packing': 'row'}}, "='row'; choose False, True, rows or auto"),
    ({'data': {'packing': 1}}, 'packing=1, expected bool or str'),
    ({'train': {'num_steps': 1, 'updates_per_dispatch': 17}}, 'in 0 … 16'),
])
def test_bad_field_is_one_line(change, message):
  with pytest.raises(errors.UserError, match=message) as e:
    config.check_config({**VALID, **change})
  assert '\n' not in str(e.value)


def test_stored_config_reads_back_equal():
  checked = config.check_config({**VALID, 'data': {'buckets': [8, 9]}})
  assert config.check_config(checked.to_dict()) == checked


def test_differences_name_nested_fields():
  assert config.differences({'a': {'b': 1, 'c': 2}, 'd': 4},
                            {'a': {'b': 3, 'c': 2}, 'e': 5}) == [
      ('a.b', 1, 3), ('d', 4, None), ('e', None, 5)]


def test_override_adds_groups_and_leaves_its_argument_as_it_is():
  fields = {'a': {'b': 1}}
  assert config.override(fields, {'a.b': 2, 'c.d': 3}) == {
      'a': {'b': 2}, 'c': {'d': 3}}
  assert fields == {'a': {'b': 1}}
  with pytest.raises(errors.UserError, match=r"no field 'a\.b\.c'"):
    config.override(fields, {'a.b.c': 2})
