"""Checks that a user's mistake is one line."""

from collections.abc import Callable
from typing import Any

import pytest

from qa_jax import errors
from qa_jax.data import sources


def refusal(call: Callable[..., Any], *arguments: Any,
            longest: int = 1000) -> str:
  """Returns the message of the UserError that a call must raise."""
  with pytest.raises(errors.UserError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert '\n' not in message and len(message) < longest
  return message


def assert_examples_or_one_line(spec: str) -> None:
  """Asserts that a file gives valid examples or a refusal of one line."""
  try:
    examples = sources.load_examples(spec)
  except errors.UserError as e:
    assert '\n' not in str(e)
    return
  for example in examples:
    repr(example).encode('utf-8')
    assert example.id and not (example.impossible and example.answers)
