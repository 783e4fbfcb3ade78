"""Examples, checked fields of rows, and the normal form of answer texts."""

from collections.abc import Container, Iterable, Sized
import dataclasses
import difflib
import functools
import re
import reprlib
import string
from typing import Any

from qa_jax import errors

FIELDS = ('id', 'context', 'question', 'answers', 'title', 'is_impossible')
# Columns (text, start) that stand for `answers`, with one answer in a row, or
# with the two lists of the hub's form.
FLAT = (('answers.text', 'answers.answer_start'), ('text', 'answer_start'),
        ('answer', 'answer_start'), ('answer_text', 'answer_start'))
UNLOCATED = -1  # the start of an answer without answer_start
LOCATE = ('the option locate_answers=True of squad_json, mrqa and table takes '
          'the first occurrence of an answer without it')
# A file is refused if more than this share of its questions has an empty list
# of answers and no question is marked. Such a file has lost its answers.
MAX_UNMARKED = 0.75


@dataclasses.dataclass(frozen=True)
class GoldAnswer:
  """A gold span: `context[start:start + len(text)] == text`, in code points.

  The start is UNLOCATED if the file does not give it; the alignment then takes
  the first occurrence.
  """

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
  # Whether an empty list of answers, without is_impossible, made the question
  # `impossible`. It is counted in the audit and is not a part of the question.
  unmarked: bool = dataclasses.field(default=False, compare=False, repr=False)
  # Whether the id is the number of the question in a file without ids.
  numbered: bool = dataclasses.field(default=False, compare=False, repr=False)

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
  """Returns the text or integer `holder[key]` as a text that is not empty."""
  if isinstance(holder, dict) and type(holder.get(key)) is int:
    return str(holder[key])
  value = text_field(holder, key, at)
  if not value:
    raise errors.UserError(f'{at}.{key} is empty')
  return value


def is_missing(value: Any) -> bool:
  """Returns whether a value is None or NaN, which pandas writes for None."""
  return value is None or value != value


def question_example(row: Any, context: str, title: Any, at: str, *,
                     locate: bool = False) -> Example:
  """Returns the example of a row with SQuAD's fields, at the place `at`.

  The id is '' if the row has none. A question with an empty list of answers
  and without is_impossible is only `unmarked` here: `finish_examples` decides.
  If `locate`, answers may lack answer_start.

  Raises:
    UserError: a field is missing, has another type, or has nearly the name of a
      field that is missing.
  """
  question = text_field(row, 'question', at)
  check_names(row, at)
  key = '' if is_missing(row.get('id')) else id_field(row, 'id', at)
  title = '' if is_missing(title) else check_text(title, f'{at}: title')
  answers, marked = _row_answers(row, at), _flag(row, 'is_impossible', at)
  golds = () if is_missing(answers) else gold_answers(
      answers, context, f'{at}.answers', locate=locate)
  check_mark(bool(marked), golds, at)
  return Example(
      key, question, context, golds, bool(marked), title,
      unmarked=marked is None and not is_missing(answers) and not golds)


def flat_columns(names: Container[str]) -> tuple[str, str] | None:
  """Returns the pair of FLAT that stands for `answers`, if any.

  Its start may be missing, unless the text is in the column `text`, which may
  be something else then.
  """
  whole = [pair for pair in FLAT if all(name in names for name in pair)]
  texts = [pair for pair in FLAT if pair[0] in names and pair[0] != 'text']
  return None if 'answers' in names else next(iter(whole + texts), None)


def _row_answers(row: dict[str, Any], at: str) -> Any:
  """Returns `answers`, or a form of it from one or two columns of FLAT."""
  pair = flat_columns(row)
  if not pair:
    return row.get('answers')
  text, start = (row.get(name) for name in pair)
  texts = text if isinstance(text, list) else [text]
  if any(isinstance(t, dict) for t in texts):
    raise _near_name_error(at, pair[0], 'answers')
  if is_missing(text) and is_missing(start):
    return None
  if isinstance(start, float) and start.is_integer():
    start = int(start)  # pandas writes integers beside a missing one as floats
  answer = {'text': text, 'answer_start': start}
  return answer if isinstance(text, list) else [answer]


def check_mark(impossible: bool, answers: Sized, at: str) -> None:
  """Raises a UserError if a question is unanswerable and has answers."""
  errors.require(not (impossible and answers), (
      f'{at}: is_impossible is true, but there are answers; correct one of '
      "them, or call answers that only seem right 'plausible_answers'"))


def _flag(row: dict[str, Any], key: str, at: str) -> bool | None:
  """Returns a truth value, which may be 0 or 1; None if it is missing."""
  value = row.get(key)
  if is_missing(value):
    return None
  if not isinstance(value, bool | int | float) or value not in (0, 1):
    raise errors.UserError(
        f'{at}.{key} is {type(value).__name__} {reprlib.repr(value)}, expected '
        'true, false, 0 or 1')
  return bool(value)


def finish_examples(placed: Iterable[tuple[str, Example]],
                    path: str) -> list[Example]:
  """Returns the examples of one file, from pairs (place, example).

  If no question has an id, the ids are '0', '1', …. An `unmarked` question
  becomes impossible, unless all questions of the file are unmarked: then the
  file is a test set whose answers are not public.

  Raises:
    UserError: some questions have no id, or so many have an empty list of
      answers and no mark that the file must have lost its answers.
  """
  placed = list(placed)
  examples = [e for _, e in placed]
  nameless = [at for at, e in placed if not e.id]
  if nameless and len(nameless) < len(placed):
    raise errors.UserError(
        f"{nameless[0]} has no 'id'; {len(placed) - len(nameless)} of "
        f'{len(placed)} questions have one: give one to all or to none')
  if nameless:
    examples = [dataclasses.replace(e, id=str(n), numbered=True)
                for n, e in enumerate(examples)]
  unmarked = sum(e.unmarked for e in examples)
  if unmarked == len(examples):
    return [dataclasses.replace(e, unmarked=False) for e in examples]
  if unmarked > MAX_UNMARKED * len(examples) and not any(
      e.impossible for e in examples):
    at = next(at for at, e in placed if e.unmarked)
    raise errors.UserError(
        f"{path}: 'answers' is empty for {unmarked} of {len(examples)} "
        f'questions, the first at {at}, and no question is marked; write '
        '"is_impossible": true if they have no answer, or give their answers')
  return [dataclasses.replace(e, impossible=True) if e.unmarked else e
          for e in examples]


def check_answered(examples: Iterable[Example], data: str) -> None:
  """Checks that every question can be scored: answered, or unanswerable.

  Raises:
    UserError: some or all questions of the SPEC `data` have no answers.
  """
  examples = list(examples)
  without = [e.id for e in examples if not (e.impossible or e.gold_texts)]
  require_answers(len(without), len(examples), data, without[:1])


def require_answers(without: int, questions: int, data: str,
                    ids: Iterable[str] = ()) -> None:
  """Raises a UserError if `without` questions have neither answers nor mark."""
  first = ''.join(f', the first is {i!r}' for i in ids)
  errors.require(without < questions or not questions,
                 f'{data}: none of the {questions} questions has answers: '
                 'there is nothing to score or to train on')
  errors.require(not without,
                 f'{data}: {without} of {questions} questions have neither '
                 f'answers nor a mark{first}; write "is_impossible": true, or '
                 'leave them out')


def is_blind(examples: Iterable[Example]) -> bool:
  """Returns whether no question has an answer or is marked unanswerable."""
  return not any(e.impossible or e.gold_texts for e in examples)


def gold_answers(answers: Any, context: str, at: str, *,
                 locate: bool = False) -> tuple[GoldAnswer, ...]:
  """Returns the gold answers of a list, or of an object of two lists.

  The forms are SQuAD's list of {"text": …, "answer_start": …}, the hub's
  {"text": […], "answer_start": […]} and, if `locate`, a list of texts.
  """
  if isinstance(answers, dict):
    texts = required_field(answers, 'text', list, at)
    if locate and is_missing(answers.get('answer_start')):
      starts = [None] * len(texts)
    else:
      starts = place_field(answers, 'answer_start', list, at)
    if len(texts) != len(starts):
      raise errors.UserError(
          f'{at} has {len(texts)} text and {len(starts)} answer_start')
    answers = [{'text': t, 'answer_start': s}
               for t, s in zip(texts, starts, strict=True)]
  if not isinstance(answers, list):
    raise errors.UserError(
        f'{at} is {type(answers).__name__}, expected a list of {{"text": …, '
        '"answer_start": …}')
  return tuple(gold_answer(a, context, f'{at}[{i}]', locate=locate)
               for i, a in enumerate(answers))


def gold_answer(answer: Any, context: str, at: str, *,
                locate: bool = False) -> GoldAnswer:
  """Returns the GoldAnswer of SQuAD's {"text": …, "answer_start": …}.

  Raises:
    UserError: a field is missing or of another type, or answer_start is
      outside the context.
  """
  if locate and isinstance(answer, str):
    return GoldAnswer(check_text(answer, at), UNLOCATED)
  start = answer.get('answer_start') if isinstance(answer, dict) else None
  if locate and isinstance(answer, dict) and (start is None or start == -1):
    return GoldAnswer(text_field(answer, 'text', at), UNLOCATED)
  start = place_field(answer, 'answer_start', int, at)
  # A wrong offset inside the context is repaired and counted by the alignment
  # audit. An offset outside the context must belong to another context.
  if not 0 <= start <= len(context):
    raise errors.UserError(
        f'{at}.answer_start is {start}, outside the {len(context)} characters '
        f'of the context; correct it, or leave it out: {LOCATE}')
  return GoldAnswer(text_field(answer, 'text', at), start)


def place_field(holder: Any, key: str, kind: type, at: str) -> Any:
  """Returns the places of answers `holder[key]`, checked by `required_field`.

  Its UserError also names the option to do without them.
  """
  try:
    return required_field(holder, key, kind, at)
  except errors.UserError as e:
    raise errors.UserError(f'{e}; {LOCATE}') from None


def check_names(names: Iterable[str], at: str) -> None:
  """Checks that no name resembles the name of a field that is missing.

  Raises:
    UserError: one does, such as `Answers` if there is no `answers`, or there is
      `answer_start` and no text beside it.
  """
  names = frozenset(names)
  if flat_columns(names):
    names |= {'answers'}
  errors.require('answers' in names or 'answer_start' not in names, (
      f"{at} has 'answer_start' and no 'answers'; call the field of the "
      "answer's text 'text'"))
  near = _near_name(names)
  if near:
    raise _near_name_error(at, *near)


def _near_name_error(at: str, name: str, wanted: str) -> errors.UserError:
  return errors.UserError(
      f'{at} has {name!r} and no {wanted!r}; rename it to {wanted!r}, or '
      'remove it if it is something else')


@functools.lru_cache
def _near_name(names: frozenset[str]) -> tuple[str, str] | None:
  """Returns (name, name of the missing field that it resembles), if any."""
  for name in sorted(names.difference(FIELDS)):
    letters = re.sub('[^a-z]', '', name.casefold())
    like = lambda field, least, letters=letters: difflib.SequenceMatcher(
        None, letters, field.replace('_', '')).ratio() >= least
    for field, near in (
        ('answers', letters.startswith('answer') or like('answers', 0.7)),
        ('is_impossible', 'impossible' in letters or 'unanswerable' in letters
         or like('is_impossible', 0.8)),
        ('title', like('title', 0.85)),
        ('id', letters in ('id', 'ids', 'qid', 'questionid', 'qasid', 'uid',
                           'exampleid'))):
      if near and field not in names:
        return name, field
  return None


_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)  # ASCII only


def normalize_answer(text: str) -> str:
  """Returns an answer text in the normal form of SQuAD's official script.

  The text is lower-cased; then punctuation and articles are removed, and white
  space becomes single spaces.
  """
  text = text.lower().translate(_NO_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())
