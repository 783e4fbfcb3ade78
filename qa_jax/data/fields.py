"""Fields of a decoded row, checked: each mistake is named with its place."""

from typing import Any

from qa_jax import errors
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import check_text


def field(holder: Any, key: str, kind: type, at: str) -> Any:
  """`holder[key]` of exactly the type `kind`; `at` is the holder's place.

  Raises:
    UserError: the holder is no object, has no such key, or another type there.
  """
  if not isinstance(holder, dict):
    raise errors.UserError(
        f'{at} is {type(holder).__name__}, expected an object with {key!r}')
  if key not in holder:
    raise errors.UserError(f'{at} has no {key!r}')
  value = holder[key]
  if type(value) is not kind:
    raise errors.UserError(
        f'{at}.{key} is {type(value).__name__}, expected {kind.__name__}')
  return value


def text(holder: Any, key: str, at: str) -> str:
  return check_text(field(holder, key, str, at), f'{at}.{key}')


def identifier(holder: Any, key: str, at: str) -> str:
  value = text(holder, key, at)
  if not value:
    raise errors.UserError(f'{at}.{key} is empty')
  return value


def gold(answer: Any, context: str, at: str) -> GoldAnswer:
  """SQuAD's {"text": …, "answer_start": …}."""
  start = field(answer, 'answer_start', int, at)
  # An offset within the context may be off: the alignment audit repairs and
  # counts it. One outside belongs to another context.
  if not 0 <= start <= len(context):
    raise errors.UserError(
        f'{at}.answer_start is {start}, outside the {len(context)} characters '
        'of the context')
  return GoldAnswer(text(answer, 'text', at), start)
