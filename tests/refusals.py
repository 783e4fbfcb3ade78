"""A mistake is one line: what tests of refusals share."""

from collections.abc import Callable
from typing import Any

import pytest

from qa_jax import errors


def refusal(call: Callable[..., Any], *arguments: Any,
            longest: int = 1000) -> str:
  """The message of the UserError that a call must raise."""
  with pytest.raises(errors.UserError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert '\n' not in message and len(message) < longest
  return message
