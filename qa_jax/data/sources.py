"""Data sources: the table SOURCES, and `load_examples` of a data SPEC.

A SPEC is a path to SQuAD JSON (1.1 or 2.0), MRQA JSONL or a table with SQuAD's
columns (see `tables`), a call such as `tfds(name="squad/v1.1",
split="validation")`, or several joined by "+": a mixture.
"""

from collections.abc import Callable, Iterable, Iterator
import hashlib
import os
import pathlib
import re
import reprlib
from typing import Any

from qa_jax import errors
from qa_jax import registry
from qa_jax.data import synthetic
from qa_jax.data import tables
from qa_jax.data import tfds
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import check_text
from qa_jax.data.examples import gold_answer
from qa_jax.data.examples import id_field
from qa_jax.data.examples import required_field
from qa_jax.data.examples import text_field
from qa_jax.io import files

MARKER = re.compile(r'\[(?:TLE|DOC|PAR|SEP)\]')  # of MRQA's contexts


def squad_json(*, path: str, impossible: bool = True) -> list[Example]:
  """Reads SQuAD 1.1 or 2.0 (Rajpurkar et al., 2016; 2018).

  `impossible=False` leaves out unanswerable questions.
  """
  examples = parse_squad(files.read_object(pathlib.Path(path)), path)
  return [e for e in examples if impossible or not e.impossible]


def parse_squad(data: dict[str, Any], path: str) -> Iterator[Example]:
  """Yields the examples of a decoded SQuAD file; messages begin with `path`."""
  for a, article in enumerate(required_field(data, 'data', list, path)):
    where = f'{path}: data[{a}]'
    paragraphs = required_field(article, 'paragraphs', list, where)
    title = text_field(article, 'title', where) if 'title' in article else ''
    for p, paragraph in enumerate(paragraphs):
      at = f'{where}.paragraphs[{p}]'
      context = text_field(paragraph, 'context', at)
      for q, qa in enumerate(required_field(paragraph, 'qas', list, at)):
        yield _squad_question(qa, context, title, f'{at}.qas[{q}]')


def _squad_question(qa: Any, context: str, title: str, at: str) -> Example:
  key = id_field(qa, 'id', at)
  question = text_field(qa, 'question', at)
  impossible = 'is_impossible' in qa and required_field(
      qa, 'is_impossible', bool, at)
  answers = () if impossible or 'answers' not in qa else tuple(
      gold_answer(answer, context, f'{at}.answers[{i}]')
      for i, answer in enumerate(required_field(qa, 'answers', list, at)))
  return Example(key, question, context, answers, impossible, title)


def mrqa(*, path: str, markers: bool = True) -> list[Example]:
  """Reads MRQA 2019 JSONL (Fisch et al., 2019).

  Its spans have inclusive ends. Every detected occurrence is a gold span.
  Predictions are scored with the texts in `answers`, whose spelling may differ
  from the context, as the official script does. `markers=False` replaces [TLE],
  [DOC], [PAR] and [SEP] by spaces of equal length, so that no offset changes.
  """
  examples = []
  for at, row in files.read_rows(pathlib.Path(path)):
    if 'header' in row:
      continue
    context = text_field(row, 'context', at)
    if not markers:
      context = MARKER.sub(lambda match: ' ' * len(match[0]), context)
    for q, qa in enumerate(required_field(row, 'qas', list, at)):
      here = f'{at}: qas[{q}]'
      accepted = required_field(qa, 'answers', list, here) if (
          isinstance(qa, dict) and 'answers' in qa) else []
      golds = {}
      for answer in required_field(qa, 'detected_answers', list, here):
        for span in required_field(answer, 'char_spans', list, here):
          if not (isinstance(span, list) and [*map(type, span)] == [int, int]
                  and 0 <= span[0] <= span[1] < len(context)):
            raise errors.UserError(
                f'{here}: char_spans has {reprlib.repr(span)}, expected '
                f'[first, last] within the {len(context)} characters of the '
                'context')
          golds[GoldAnswer(context[span[0]:span[1] + 1], span[0])] = None
      examples.append(Example(
          id_field(qa, 'qid', here), text_field(qa, 'question', here), context,
          tuple(golds), accepted=tuple(check_text(text, f'{here}.answers')
                                       for text in accepted)))
  return examples


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


SOURCES: dict[str, Callable[..., list[Example]]] = {
    'squad_json': squad_json, 'mrqa': mrqa, 'table': tables.read_table,
    'tfds': tfds.tfds, 'synthetic': synthetic.synthetic, 'articles': articles}


def load_examples(spec: str) -> list[Example]:
  """Reads all examples of a data SPEC, in the order of its parts.

  Raises:
    UserError: the SPEC or the data is wrong, a question id occurs twice, or
      there is no question.
  """
  examples = [e for part in split_mixture(spec) for e in _load_part(part)]
  seen: dict[str, Example] = {}
  for example in examples:
    if seen.setdefault(example.id, example) is not example:
      raise errors.UserError(
          f'{spec}: the question id {example.id!r} stands there twice')
  if not examples:
    raise errors.UserError(f'{spec}: holds no question')
  return examples


def _load_part(part: str) -> list[Example]:
  # os.path.exists, unlike pathlib's, is False for a name no file can have.
  if not os.path.exists(part):
    if registry.is_importable(part) or part in SOURCES or re.match(
        r'\w+\s*\(', part):
      return _checked(part, registry.build(SOURCES, part, what='data source'))
    if not re.search('[/.]', part):
      raise errors.UserError(
          f'data {part!r} is neither a file nor a source'
          f'{errors.did_you_mean(part, SOURCES)}')
  if tables.is_table(part):
    return tables.read_table(path=part)
  read = mrqa if re.search(r'\.jsonl(\.gz)?$', part) else squad_json
  return read(path=part)


def _checked(part: str, examples: Any) -> list[Example]:
  """Returns what a source returned, if it is Examples."""
  examples = list(examples) if isinstance(examples, Iterable) else [examples]
  for example in examples:
    if not isinstance(example, Example):
      raise errors.UserError(
          f'data source {part!r} returns {type(example).__name__}, expected a '
          'list of qa_jax.data.Example')
  return examples


def split_mixture(spec: str) -> list[str]:
  """Splits a data SPEC at each "+" outside of quotes and parentheses.

  The path of an existing file is one part, even if it contains "+".
  """
  if os.path.exists(spec):
    return [spec]
  parts = registry.split_sum(spec)
  if not all(parts):
    raise errors.UserError(f'data spec {spec!r} has an empty part')
  return parts
