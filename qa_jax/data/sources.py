"""Data sources: the table SOURCES, and `load_examples` of a data SPEC.

A SPEC is a path to JSON (SQuAD 1.1 or 2.0, MRQA, or rows) or to a table with
SQuAD's columns (see `tables`), a call such as `tfds(name="squad/v1.1",
split="validation")`, or several joined by "+": a mixture.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import hashlib
import os
import pathlib
import re
import reprlib
from typing import Any

from qa_jax import errors
from qa_jax import registry
from qa_jax.data import examples as examples_lib
from qa_jax.data import synthetic
from qa_jax.data import tables
from qa_jax.data import tfds
from qa_jax.data.examples import UNLOCATED
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import check_text
from qa_jax.data.examples import id_field
from qa_jax.data.examples import place_field
from qa_jax.data.examples import required_field
from qa_jax.data.examples import text_field
from qa_jax.io import files

MARKER = re.compile(r'\[(?:TLE|DOC|PAR|SEP)\]')  # of MRQA's contexts


def squad_json(*, path: str, impossible: bool = True,
               locate_answers: bool = False) -> list[Example]:
  """Reads JSON of any form: SQuAD 1.1 or 2.0, rows, or MRQA.

  SQuAD (Rajpurkar et al., 2016; 2018) has articles with paragraphs. Rows have
  their own context; they are a list, the list `data` of an object, or lines.
  `impossible=False` leaves out unanswerable questions. With `locate_answers`,
  answers may lack answer_start.
  """
  examples = examples_lib.finish_examples(
      (placed for at, entry in tables.read_json(pathlib.Path(path))
       for placed in _entry(entry, at, locate_answers)), path)
  return [e for e in examples if impossible or not e.impossible]


Placed = Iterator[tuple[str, Example]]  # (place for messages, example)


def _entry(entry: Any, at: str, locate: bool) -> Placed:
  """Yields the examples of an article, a paragraph, a row or an MRQA line."""
  fields = entry.keys() if isinstance(entry, dict) else ()
  if 'paragraphs' in fields or not {
      'context', 'question', 'qas', 'header'} & {*fields}:
    for p, paragraph in enumerate(
        required_field(entry, 'paragraphs', list, at)):
      yield from _paragraph(paragraph, entry.get('title'),
                            f'{at}.paragraphs[{p}]', locate)
  elif 'qas' in fields:
    yield from _paragraph(entry, entry.get('title'), at, locate)
  elif 'header' not in fields:
    yield at, tables.row_example(entry, at, locate=locate)


def _paragraph(paragraph: Any, title: Any, at: str, locate: bool) -> Placed:
  context = text_field(paragraph, 'context', at)
  for q, qa in enumerate(required_field(paragraph, 'qas', list, at)):
    here = f'{at}.qas[{q}]'
    if isinstance(qa, dict) and {'qid', 'detected_answers'} & qa.keys():
      yield here, _mrqa_question(qa, context, here, locate)
    else:
      yield here, examples_lib.question_example(
          qa, context, title, here, locate=locate)


def mrqa(*, path: str, markers: bool = True,
         locate_answers: bool = False) -> list[Example]:
  """Reads MRQA 2019 JSONL (Fisch et al., 2019).

  Its spans have inclusive ends. Every detected occurrence is a gold span.
  Predictions are scored with the texts in `answers`, whose spelling may differ
  from the context, as the official script does. `markers=False` replaces [TLE],
  [DOC], [PAR] and [SEP] by spaces of equal length, so that no offset changes.
  With `locate_answers`, a question without detected_answers has the first
  occurrences of `answers` as gold spans.
  """
  examples = []
  for at, row in files.read_rows(pathlib.Path(path)):
    if 'header' in row:
      continue
    context = text_field(row, 'context', at)
    if not markers:
      context = MARKER.sub(lambda match: ' ' * len(match[0]), context)
    for q, qa in enumerate(required_field(row, 'qas', list, at)):
      examples.append(_mrqa_question(
          qa, context, f'{at}: qas[{q}]', locate_answers))
  return examples


def _mrqa_question(qa: Any, context: str, at: str, locate: bool) -> Example:
  accepted = required_field(qa, 'answers', list, at) if (
      isinstance(qa, dict) and 'answers' in qa) else []
  accepted = tuple(check_text(text, f'{at}.answers') for text in accepted)
  golds = {}
  if locate and accepted and 'detected_answers' not in qa:
    golds = dict.fromkeys(GoldAnswer(text, UNLOCATED) for text in accepted)
  else:
    for answer in place_field(qa, 'detected_answers', list, at):
      for span in required_field(answer, 'char_spans', list, at):
        if not (isinstance(span, list) and [*map(type, span)] == [int, int]
                and 0 <= span[0] <= span[1] < len(context)):
          raise errors.UserError(
              f'{at}: char_spans has {reprlib.repr(span)}, expected '
              f'[first, last] within the {len(context)} characters of the '
              'context')
        text = answer.get('text')
        if text == context[span[0]:span[1]] and text:
          raise errors.UserError(
              f'{at}: char_spans has {span}, whose last character is beyond '
              f'{reprlib.repr(text)}; both ends are inclusive')
        golds[GoldAnswer(context[span[0]:span[1] + 1], span[0])] = None
  return Example(id_field(qa, 'qid', at), text_field(qa, 'question', at),
                 context, tuple(golds), accepted=accepted)


def articles(*, of: str, low: float = 0.0, high: float = 1.0,
             seed: int = 0) -> list[Example]:
  """Reads the examples of the SPEC `of` whose article hash is in [low, high).

  The hash in [0, 1) depends on `seed` and the title, or the context if there is
  no title. `high=0.9` and `low=0.9` select two parts that share no article.
  """
  if not 0 <= low < high <= 1:
    raise errors.UserError(
        f'articles: low={low} and high={high} must be 0 <= low < high <= 1')
  return [e for e in load_examples(of) if low <= _article_hash(seed, e) < high]


def _article_hash(seed: int, example: Example) -> float:  # in [0, 1)
  digest = hashlib.sha256(f'{seed} {example.article}'.encode()).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48


def passage_only(*, of: str) -> list[Example]:
  """Reads the examples of the SPEC `of` with '?' as the question of each.

  A model that is trained and scored on them shows which scores need no
  question. Kaushik and Lipton (2018), section 3, give each passage a question
  of another passage instead.
  """
  return [dataclasses.replace(e, question='?') for e in load_examples(of)]


SOURCES: dict[str, Callable[..., list[Example]]] = {
    'squad_json': squad_json, 'mrqa': mrqa, 'table': tables.read_table,
    'tfds': tfds.tfds, 'synthetic': synthetic.synthetic, 'articles': articles,
    'passage_only': passage_only}


def load_examples(spec: str) -> list[Example]:
  """Reads all examples of a data SPEC, in the order of its parts.

  In a mixture, the number of a question without an id follows the index of its
  part: '1-0' is the first question of the second part.

  Raises:
    UserError: the SPEC or the data is wrong, a question id occurs twice, or
      there is no question.
  """
  parts = split_mixture(spec)
  # The reader of one file says more.
  check_spec(spec, must_exist=len(parts) > 1)
  examples = [
      dataclasses.replace(e, id=f'{index}-{e.id}')
      if e.numbered and len(parts) > 1 else e
      for index, part in enumerate(parts) for e in _load_part(part)]
  seen: set[str] = set()
  for example in examples:
    if example.id in seen:
      raise errors.UserError(
          f'{spec}: the question id {example.id!r} stands there twice; give '
          'each question an id of its own, or leave out all ids')
    seen.add(example.id)
  if not examples:
    raise errors.UserError(f'{spec}: holds no question')
  return examples


def check_spec(spec: str, *, must_exist: bool = True) -> None:
  """Raises a UserError if a data SPEC names what there is not; reads no data.

  The existence of files is checked only if `must_exist`.
  """
  parts = split_mixture(spec)
  for part in parts:
    # os.path.exists, unlike pathlib's, is False for a name no file can have.
    if os.path.exists(part):
      continue
    if is_call(part):
      registry.bind(SOURCES, part, what='data source')
    elif not re.search('[/.]', part):
      raise errors.UserError(
          f'data {part!r} is neither a file nor a source'
          f'{errors.did_you_mean(part, SOURCES)}')
    elif must_exist:
      raise errors.UserError(f'{part}: No such file or directory' + (
          f', in the mixture {spec!r}' if len(parts) > 1 else ''))


def load_answered(spec: str) -> list[Example]:
  """Reads the examples of a data SPEC to score; a UserError if it cannot be.

  Each question must have answers or be marked as unanswerable.
  """
  examples = load_examples(spec)
  examples_lib.check_answered(examples, spec)
  return examples


def _load_part(part: str) -> list[Example]:
  if is_call(part) and not os.path.exists(part):
    return _checked(part, registry.build(SOURCES, part, what='data source'))
  read = tables.read_table if tables.is_table(part) else squad_json
  return read(path=part)


def _checked(part: str, examples: Any) -> list[Example]:
  """Returns what a source returned, if it is Examples.

  The sources of this package have checked the types of the fields already.
  """
  with errors.naming(f'data source {part!r}', registry.imported_modules(part)):
    examples = (list(examples) if isinstance(examples, Iterable)
                else [examples])  # a generator runs here
  for example in examples:
    if not isinstance(example, Example):
      raise errors.UserError(
          f'data source {part!r} returns {type(example).__name__}, expected a '
          'list of qa_jax.data.Example')
  constructor = registry.find_constructor(
      SOURCES, registry.parse_spec(part, 'data source')[0],
      what='data source')
  return examples if constructor.__module__.startswith('qa_jax.') else [
      _checked_example(example, f'data source {part!r}: [{i}]')
      for i, example in enumerate(examples)]


def _checked_example(example: Example, at: str) -> Example:
  """Returns an example with its lists as tuples.

  Raises:
    UserError: a field has another type than Example says.
  """
  for name in ('id', 'question', 'context', 'title'):
    check_text(getattr(example, name), f'{at}.{name}')
  errors.require(bool(example.id), f'{at}.id is empty')
  errors.require(
      type(example.impossible) is bool,
      f'{at}.impossible is {type(example.impossible).__name__}, expected bool')
  for name in ('answers', 'accepted'):
    value = getattr(example, name)
    errors.require(type(value) in (tuple, list), (
        f'{at}.{name} is {type(value).__name__}, expected a tuple'))
    if type(value) is list:
      example = dataclasses.replace(example, **{name: tuple(value)})
  for a, answer in enumerate(example.answers):
    here = f'{at}.answers[{a}]'
    errors.require(isinstance(answer, GoldAnswer), (
        f'{here} is {type(answer).__name__}, expected '
        'qa_jax.data.GoldAnswer(text, start)'))
    check_text(answer.text, f'{here}.text')
    errors.require(
        type(answer.start) is int and (
            UNLOCATED <= answer.start <= len(example.context)),
        f'{here}.start is {reprlib.repr(answer.start)}, expected an int within '
        f'the {len(example.context)} characters of the context, or '
        f'{UNLOCATED}: the first occurrence')
  for a, text in enumerate(example.accepted):
    check_text(text, f'{at}.accepted[{a}]')
  examples_lib.check_mark(example.impossible, example.gold_texts, at)
  return example


def is_call(part: str) -> bool:
  """Returns whether a part of a SPEC names a source rather than a file.

  The name of a file may contain parentheses too, but no "name(argument=".
  """
  name, parenthesis, _ = part.partition('(')
  return (registry.is_importable(part) or name.strip() in SOURCES or bool(
      parenthesis and re.match(r'\w+\s*\(\s*(\w+\s*=|\)$)', part)))


def split_mixture(spec: str) -> list[str]:
  """Splits a data SPEC at each "+" outside of the calls of sources.

  The longest path of an existing file is one part, even if it contains "+".
  """
  parts, begin = [], 0
  while begin <= len(spec):
    ends = [*(m.start() for m in re.finditer(r'\+', spec) if
              m.start() >= begin), len(spec)]
    end = next((e for e in reversed(ends)
                if os.path.exists(spec[begin:e].strip())), None)
    if end is None:
      rest = spec[begin:]
      end = (begin + len(registry.split_sum(rest)[0])
             if is_call(rest.lstrip()) else ends[0])
    parts.append(spec[begin:end].strip())
    begin = end + 1
  if not all(parts):
    raise errors.UserError(f'data spec {spec!r} has an empty part')
  return parts
