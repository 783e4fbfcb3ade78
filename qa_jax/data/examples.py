"""Example: a question, its context and its gold answers, with invariants."""

import dataclasses
import functools

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
