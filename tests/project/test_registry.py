"""Tests of spec strings: the objects they build and the errors they raise."""

import flax.linen as nn
import pytest

from qa_jax import errors
from qa_jax import registry


def area(width=1, *, height: int, unit: str = 'm', scale: float = 1.0,
         name: bool = True):
  del unit, name
  return width * height * scale


class Module(nn.Module):
  rank: int = 2


TABLE = {'area': area, 'one': lambda: 1, 'module': Module}


def test_bare_name_calls_without_arguments():
  assert registry.build(TABLE, 'one', what='shape') == 1


def test_keyword_literals_are_passed():
  assert registry.build(TABLE, 'area(width=3, height=4)', what='shape') == 12


def test_int_is_taken_for_a_float_and_name_may_be_an_argument():
  assert registry.build(
      TABLE, 'area(height=4, scale=2, name=False)', what='shape') == 8


def test_the_largest_and_smallest_numbers_of_32_bits_are_taken():
  for height, scale in ((2**31 - 1, 1.2e-38), (0, 0.0), (-1, -3.4e38)):
    assert registry.build(
        TABLE, f'area(height={height}, scale={scale})', what='shape'
        ) == area(height=height, scale=scale)


def test_flax_module_takes_its_fields():
  assert registry.build(TABLE, 'module(rank=3)', what='head').rank == 3


def test_nested_spec_survives_as_a_string():
  assert registry.parse_spec('prior(base="mlp(rank=64)")') == (
      'prior', {'base': 'mlp(rank=64)'})


@pytest.mark.parametrize(('spec', 'message'), [
    ('aera(height=1)', "did you mean 'area'"),
    ('area(heigth=1)', "did you mean 'height'"),
    ('area(width=1)', "needs the argument 'height'"),
    ('one(x=1)', 'takes none'),
    ('area(height=1.5)', 'height=1.5, expected int'),
    ('area(height=True)', 'height=True, expected int'),
    ('area(height=None)', 'height=None, expected int'),
    ('area(height=1, unit=2)', 'unit=2, expected str'),
    ('area(height=1, scale="2")', "scale='2', expected float"),
    ('area(height=2147483648)', 'size must be in 1 … 2147483647'),
    ('area(height=-2147483648)', 'height=-2147483648 is 0 or'),
    ('area(height=1, scale=1e-300)', 'scale=1e-300 is 0 or not finite'),
    ('area(height=1, scale=-1e300)', 'size must be in 1.2e-38 … 3.4e'),
    ('area(height=1, name=1)', 'name=1, expected bool'),
    ('area(height=1, height=2)', 'not of the form'),
    ('module(name="x")', "no argument 'name'"),
    ('module(parent=None)', "no argument 'parent'"),
    ('area(3)', 'not of the form'),
    ('area(height=open("x"))', 'not of the form'),
    ('__import__("os").system("true")', 'not of the form'),
    ('area(height=', 'not of the form'),
    ('area(**{"height": 1})', 'not of the form'),
    ('', 'not of the form'),
    ('(' * 5000, 'not of the form'),
    ('area(height=' + '1' * 5000 + ')', 'not of the form'),
    ('area(height="\ud800\0")', 'not of the form'),
])
def test_bad_spec_is_one_line(spec, message):
  with pytest.raises(errors.UserError, match=message) as e:
    registry.build(TABLE, spec, what='shape')
  assert '\n' not in str(e.value)
