"""Examples, checked fields of rows, and the normal form of answer texts."""

import dataclasses
import functools
import re
import string
from typing import Any

from qa_jax import errors


@dataclasses.dataclass(frozen=True)
class GoldAnswer:
  """A gold span: `context[start:start + len(text)] == text`, in code points."""

  text: str
  start: int


@dataclasses.dataclass(frozen=True)
class Example:
  """A question with its context and gold answers, from a data source.

  `answers` is empty if the question is `impossible` or the file has no answers.
  The context is never normalized, because predictions are slices of it.
  """

  id: str
  question: str
  context: str
  answers: tuple[GoldAnswer, ...] = ()
  impossible: bool = False
  title: str = ''
  accepted: tuple[str, ...] = ()  # correct answer texts, if the file lists them

  @property
  def article(self) -> str:
    """Returns the title, or the context if there is no title."""
    return self.title or self.context

  @functools.cached_property
  def gold_texts(self) -> tuple[str, ...]:
    """Returns the answer texts that predictions are scored with."""
    return self.accepted or tuple(a.text for a in self.answers)


def check_text(text: object, where: str) -> str:
  """Returns `text` if it is a string that UTF-8 can encode.

  Raises:
    UserError: it is no string or has a lone surrogate, at the place `where`.
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
  """Returns `holder[key]`, which must have exactly the type `kind`.

  Raises:
    UserError: `holder`, whose place is `at`, is no JSON object, or the value is
      missing or has another type.
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
  """Returns the text `holder[key]`, checked as by `check_text`."""
  return check_text(required_field(holder, key, str, at), f'{at}.{key}')


def id_field(holder: Any, key: str, at: str) -> str:
  """Returns the text `holder[key]`, which must not be empty."""
  value = text_field(holder, key, at)
  if not value:
    raise errors.UserError(f'{at}.{key} is empty')
  return value


def gold_answer(answer: Any, context: str, at: str) -> GoldAnswer:
  """Returns the GoldAnswer of SQuAD's {"text": …, "answer_start": …}.

  Raises:
    UserError: a field is missing or of another type, or answer_start is
      outside the context.
  """
  start = required_field(answer, 'answer_start', int, at)
  # A wrong offset inside the context is repaired and counted by the alignment
  # audit. An offset outside the context must belong to another context.
  if not 0 <= start <= len(context):
    raise errors.UserError(
        f'{at}.answer_start is {start}, outside the {len(context)} characters '
        'of the context')
  return GoldAnswer(text_field(answer, 'text', at), start)


_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)  # ASCII only


def normalize_answer(text: str) -> str:
  """Returns an answer text in the normal form of SQuAD's official script.

  The text is lower-cased; then punctuation and articles are removed, and white
  space becomes single spaces.
  """
  text = text.lower().translate(_NO_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())
