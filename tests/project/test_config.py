"""Config fields: mistakes are one line; values survive storage."""


import pytest

from qa_jax import config
from qa_jax import errors

VALID = {'train': {'num_steps': 10}}


@pytest.mark.parametrize(('change', 'message'), [
    ({'optim': {'learning_rat': 1.0}}, "did you mean 'learning_rate'"),
    ({'modle': {}}, "did you mean 'model'"),
    ({'model': 3}, 'expected fields'),
    ({'seed': 'x'}, 'expected int'),
    ({'seed': True}, 'expected int'),
    ({'seed': -1}, 'in 0'),
    ({'train': {'batch_size': 0, 'num_steps': 1}}, 'at least 1'),
    ({'train': {'num_steps': 1, 'num_epochs': 1.0}}, 'set one of'),
    ({'train': {}}, 'set one of'),
    ({'optim': {'learning_rate': float('nan')}}, 'expected float'),
    ({'optim': {'learning_rate': 10**400}}, 'expected float'),
    ({'data': {'train': 'a\udcff.json'}}, 'is not UTF-8'),
    ({'parallel': {'mesh': {'\ud83e': 1}}}, 'names to ints'),
    ({'data': {'buckets': [1, 'a']}}, 'list of ints'),
    ({'data': {'max_length': 513}}, 'in 8 … 512'),
    ({'precision': {'compute_dtype': 'float16'}}, 'float32 or bfloat16'),
])
def test_bad_field_is_one_line(change, message):
  with pytest.raises(errors.UserError, match=message) as e:
    config.check_config({**VALID, **change})
  assert '\n' not in str(e.value)


def test_stored_config_reads_back_equal():
  checked = config.check_config({**VALID, 'data': {'buckets': [8, 9]}})
  assert config.check_config(checked.to_dict()) == checked


def test_differences_name_nested_fields():
  assert config.differences({'a': {'b': 1, 'c': 2}}, {'a': {'b': 3, 'c': 2}}
                            ) == [('a.b', 1, 3)]
