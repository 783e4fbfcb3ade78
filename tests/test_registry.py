"""Spec strings: what they build and how they fail."""

import pytest

from qa_jax import errors
from qa_jax import registry


def area(width=1, *, height: int):
  return width * height


TABLE = {'area': area, 'one': lambda: 1}


def test_bare_name_calls_without_arguments():
  assert registry.build(TABLE, 'one', what='shape') == 1


def test_keyword_literals_are_passed():
  assert registry.build(TABLE, 'area(width=3, height=4)', what='shape') == 12


def test_nested_spec_survives_as_a_string():
  assert registry.parse('prior(base="mlp(rank=64)")') == (
      'prior', {'base': 'mlp(rank=64)'})


@pytest.mark.parametrize(('spec', 'message'), [
    ('aera(height=1)', "did you mean 'area'"),
    ('area(heigth=1)', "did you mean 'height'"),
    ('area(width=1)', "needs the argument 'height'"),
    ('one(x=1)', 'takes none'),
    ('area(3)', 'not of the form'),
    ('area(height=open("x"))', 'not of the form'),
    ('__import__("os").system("true")', 'not of the form'),
    ('area(height=', 'not of the form'),
    ('area(**{"height": 1})', 'not of the form'),
    ('', 'not of the form'),
    ('(' * 5000, 'not of the form'),
])
def test_bad_spec_is_one_line(spec, message):
  with pytest.raises(errors.UserError, match=message) as e:
    registry.build(TABLE, spec, what='shape')
  assert '\n' not in str(e.value)
