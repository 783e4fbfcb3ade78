"""Example: a question, its context and its gold answers, with invariants."""

import dataclasses
import functools
import re
import string
from typing import Any

from qa_jax import errors


@dataclasses.dataclass(frozen=True)
class GoldAnswer:
  """A gold span: `context[start:start + len(text)] == text`, in characters."""

  text: str
  start: int


@dataclasses.dataclass(frozen=True)
class Example:
  """A question with its context; what a data source yields.

  `answers` is empty if `impossible`, and where a file gives none. Offsets are
  code points into `context`, which is never normalised: predictions are slices
  of it.
  """

  id: str
  question: str
  context: str
  answers: tuple[GoldAnswer, ...] = ()
  impossible: bool = False
  title: str = ''
  accepted: tuple[str, ...] = ()  # right texts, where a file has them apart

  @property
  def article(self) -> str:
    """What it shares with the questions that are most like it."""
    return self.title or self.context

  @functools.cached_property
  def gold_texts(self) -> tuple[str, ...]:
    """What predictions are scored with."""
    return self.accepted or tuple(a.text for a in self.answers)


def check_text(text: object, where: str) -> str:
  """`text` if it is a str that UTF-8 can hold.

  Raises:
    UserError: not a string, or a lone surrogate (named by its position).
  """
  if not isinstance(text, str):
    raise errors.UserError(
        f'{where} is {type(text).__name__}, expected a string')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as e:
    raise errors.UserError(
        f'{where} holds a lone surrogate U+{ord(text[e.start]):04X} at '
        f'character {e.start}; re-encode the text as UTF-8') from None
  return text


def required_field(holder: Any, key: str, kind: type, at: str) -> Any:
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


def text_field(holder: Any, key: str, at: str) -> str:
  return check_text(required_field(holder, key, str, at), f'{at}.{key}')


def id_field(holder: Any, key: str, at: str) -> str:
  value = text_field(holder, key, at)
  if not value:
    raise errors.UserError(f'{at}.{key} is empty')
  return value


def gold_answer(answer: Any, context: str, at: str) -> GoldAnswer:
  """SQuAD's {"text": …, "answer_start": …}."""
  start = required_field(answer, 'answer_start', int, at)
  # An offset within the context may be off: the alignment audit repairs and
  # counts it. One outside belongs to another context.
  if not 0 <= start <= len(context):
    raise errors.UserError(
        f'{at}.answer_start is {start}, outside the {len(context)} characters '
        'of the context')
  return GoldAnswer(text_field(answer, 'text', at), start)

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)  # ASCII alone


def normalize_answer(text: str) -> str:
  """Lower case, then no punctuation, then no articles, then single spaces."""
  text = text.lower().translate(_NO_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())
