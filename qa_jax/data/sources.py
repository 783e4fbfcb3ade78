"""SOURCES: where examples come from; `load(SPEC)` reads any of them.

A SPEC is a path to SQuAD JSON (1.1 or 2.0) or MRQA JSONL, possibly gzipped, a
call such as `tfds(name="squad/v1.1", split="validation")`, or several joined
by "+": a mixture.
"""

from collections.abc import Callable, Iterator
import gzip
import io
import pathlib
import re
from typing import Any
import zlib

from qa_jax import errors
from qa_jax import files
from qa_jax import registry
from qa_jax.data import synthetic
from qa_jax.data import tfds_source
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import check_text


def squad_json(*, path: str) -> list[Example]:
  """SQuAD 1.1 or 2.0 (Rajpurkar et al., 2016; 2018); plausible answers are
  not answers."""
  return list(parse_squad(files.parse_object(_read(path), path), path))


def parse_squad(data: dict[str, Any], path: str) -> Iterator[Example]:
  """The examples of a decoded SQuAD file; `path` begins every message."""
  for a, article in enumerate(_field(data, 'data', list, path)):
    at_article = f'{path}: data[{a}]'
    title = article.get('title', '') if isinstance(article, dict) else ''
    for p, paragraph in enumerate(
        _field(article, 'paragraphs', list, at_article)):
      at = f'{at_article}.paragraphs[{p}]'
      context = check_text(_field(paragraph, 'context', str, at),
                           f'{at}.context')
      for q, qa in enumerate(_field(paragraph, 'qas', list, at)):
        yield _squad_question(qa, context, str(title), f'{at}.qas[{q}]')


def _squad_question(qa: Any, context: str, title: str, at: str) -> Example:
  impossible = qa.get('is_impossible', False) if isinstance(qa, dict) else 0
  if not isinstance(impossible, bool):
    raise errors.UserError(f'{at}.is_impossible is {impossible!r}, expected '
                           'true or false')
  answers = []
  if not impossible and 'answers' in qa:
    for i, answer in enumerate(_field(qa, 'answers', list, at)):
      here = f'{at}.answers[{i}]'
      start = _field(answer, 'answer_start', int, here)
      if start < 0:
        raise errors.UserError(f'{here}.answer_start is {start}, must be at '
                               'least 0')
      answers.append(GoldAnswer(
          check_text(_field(answer, 'text', str, here), f'{here}.text'),
          start))
  return Example(
      _id(qa, 'id', at), check_text(
          _field(qa, 'question', str, at), f'{at}.question'),
      context, tuple(answers), impossible, title)


def mrqa(*, path: str) -> list[Example]:
  """MRQA 2019 JSONL (Fisch et al., 2019): character spans with inclusive
  ends; every detected occurrence is a gold answer."""
  examples = []
  for number, line in enumerate(_read(path).split('\n'), 1):
    if not line.strip():
      continue
    at = f'{path}:{number}'
    row = files.parse_object(line, at)
    if 'header' in row:
      continue
    context = check_text(_field(row, 'context', str, at), f'{at}: context')
    for q, qa in enumerate(_field(row, 'qas', list, at)):
      here = f'{at}: qas[{q}]'
      golds = {}
      for found in _field(qa, 'detected_answers', list, here):
        for span in _field(found, 'char_spans', list, here):
          if not (isinstance(span, list) and len(span) == 2 and all(
              type(n) is int for n in span)
                  and 0 <= span[0] <= span[1] < len(context)):
            raise errors.UserError(
                f'{here}: char_spans has {span!r}, expected [first, last] '
                f'within the {len(context)} characters of the context')
          golds[GoldAnswer(context[span[0]:span[1] + 1], span[0])] = None
      examples.append(Example(
          _id(qa, 'qid', here), check_text(
              _field(qa, 'question', str, here), f'{here}.question'),
          context, tuple(golds)))
  return examples


SOURCES: dict[str, Callable[..., list[Example]]] = {
    'squad_json': squad_json, 'mrqa': mrqa, 'tfds': tfds_source.tfds,
    'synthetic': synthetic.synthetic}


def load(spec: str) -> list[Example]:
  """All examples of a SPEC, a mixture in the order of its parts.

  Raises:
    UserError: anything that is wrong with the SPEC or the data, in one line.
  """
  examples: list[Example] = []
  for part in _parts(spec):
    examples += _load_part(part)
  seen: dict[str, Example] = {}
  for example in examples:
    if seen.setdefault(example.id, example) is not example:
      raise errors.UserError(
          f'{spec}: the question id {example.id!r} stands there twice')
  if not examples:
    raise errors.UserError(f'{spec}: holds no question')
  return examples


def _load_part(part: str) -> list[Example]:
  if re.fullmatch(r'\w+\s*\(.*\)', part, re.DOTALL):
    return registry.build(SOURCES, part, what='data source')
  if part in SOURCES and not pathlib.Path(part).exists():
    return registry.build(SOURCES, part, what='data source')
  if re.search(r'\.jsonl(\.gz)?$', part):
    return mrqa(path=part)
  if '/' in part or '.' in part or pathlib.Path(part).exists():
    return squad_json(path=part)
  raise errors.UserError(
      f'data {part!r} is neither a file nor a source'
      f'{errors.did_you_mean(part, SOURCES)}')


def _parts(spec: str) -> list[str]:
  """Splits at "+" outside quotes and parentheses; a file's name is whole."""
  if pathlib.Path(spec).exists():
    return [spec]
  parts, depth, quote = [''], 0, ''
  for c in spec:
    if quote:
      quote = '' if c == quote else quote
    elif c in '"\'':
      quote = c
    depth += (c == '(') - (c == ')') if not quote else 0
    if c == '+' and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += c
  parts = [p.strip() for p in parts]
  if not all(parts):
    raise errors.UserError(f'data spec {spec!r} has an empty part')
  return parts


def _read(path: str) -> str:
  """The text of a file, unzipped if its name ends in .gz."""
  if not path.endswith('.gz'):
    return files.read_text(pathlib.Path(path))
  try:
    with gzip.open(path) as f:
      return io.TextIOWrapper(f, encoding='utf-8-sig').read()
  except UnicodeDecodeError as e:
    raise errors.UserError(f'{path}: not UTF-8 at byte {e.start}') from None
  except (OSError, EOFError, zlib.error) as e:
    raise errors.UserError(
        f'{path}: not a whole gzip file ({e}); fetch it again') from None


def _field(holder: Any, key: str, kind: type, at: str) -> Any:
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


def _id(qa: Any, key: str, at: str) -> str:
  value = check_text(_field(qa, key, str, at), f'{at}.{key}')
  if not value:
    raise errors.UserError(f'{at}.{key} is empty')
  return value
