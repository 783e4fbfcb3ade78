"""Inputs for parsers: mutations of valid inputs, and random ones.

Inputs that bring a new refusal, and accepted inputs, enter a pool and are
mutated further, so that mutations get past the first check. All inputs are a
function of the seed.
"""

from collections.abc import Callable, Sequence
import json
import random
import re
from typing import Any

Draw = random.Random
KEPT = 300  # the most kept inputs, besides the seeds
LONGEST = 5000  # the most characters of a kept input's repr
ODD = (
    '', '\0', '\n', '\ud800', '\u202e', '́' * 20, '[SEP]', '[CLS] [MASK]',
    '##', 'İ' * 9, '\U0001f9d1‍\U0001f680', 'a' * 300, '東京', '../../x')
NUMBERS = (
    0, -1, 1, 2, 2**31 - 1, 2**31, 2**63, -2**63, 10**30, 10**400, 0.5, -0.0,
    1e-300, 1e300, float('nan'), float('inf'), -float('inf'))
SYNTAX = (
    b'{', b'}', b'[', b']', b'"', b',', b':', b'\\', b'\\ud800', b'null',
    b'true', b'NaN', b'1e999', b'-', b'9' * 5000, b'[' * 5000, b'{"a":' * 2000,
    b'\xff', b'\0', b'\xef\xbb\xbf', b'(', b')', b'=', b"'", b'+', b'\n')
ALPHABETS = ((32, 127), (32, 127), (0, 32), (0xA0, 0x250), (0x300, 0x370),
             (0x600, 0x700), (0x2000, 0x2070), (0x4E00, 0x5000),
             (0xD800, 0xE000), (0x1F300, 0x1F600), (0, 0x110000))


def text(draw: Draw, longest: int = 30) -> str:
  if draw.random() < 0.3:
    return draw.choice(ODD)
  low, high = draw.choice(ALPHABETS)
  return ''.join(chr(draw.randrange(low, high))
                 for _ in range(draw.randint(0, longest)))


def number(draw: Draw) -> int | float:
  return draw.choice((
      draw.choice(NUMBERS), draw.randint(-10, 600), draw.uniform(-2, 2),
      draw.randint(-10**30, 10**30)))


def tree(draw: Draw, depth: int = 3) -> Any:
  """Returns a random JSON value."""
  kind = draw.randrange(9 if depth else 6)
  if kind < 6:
    return (None, True, False, number(draw), text(draw), text(draw))[kind]
  size = draw.randint(0, 4)
  if kind == 6:
    return {text(draw, 6): tree(draw, depth - 1) for _ in range(size)}
  return [tree(draw, depth - 1) for _ in range(size)]


def changed(draw: Draw, value: Any, others: Sequence[Any]) -> Any:
  """Returns the value with one place changed, mostly to an equal type.

  Bytes that are JSON are changed as a tree or as bytes. Pieces are taken from
  `others`.
  """
  if isinstance(value, bytes):
    return _changed_bytes(draw, value, others)
  if isinstance(value, tuple):
    at = draw.randrange(len(value))
    return (*value[:at], changed(draw, value[at], [o[at] for o in others]),
            *value[at + 1:])
  if isinstance(value, dict | list):
    return _changed_tree(draw, value)
  if isinstance(value, str):
    return _changed_text(draw, value, others)
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + draw.choice((-1, 1, -value, draw.randint(-64, 64)))
  return number(draw)


def _edited(draw: Draw, whole: Any, pieces: Sequence[Any]) -> Any:
  """Returns the content with a part removed, overwritten or moved."""
  at = draw.randint(0, len(whole))
  end = at + draw.choice((0, 0, 1, 2, 8, len(whole)))
  return whole[:at] + draw.choice(pieces) + whole[end:]


def _changed_bytes(draw: Draw, whole: bytes, others: Sequence[Any]) -> bytes:
  if draw.random() < 0.6:
    try:
      return json.dumps(_changed_tree(draw, json.loads(whole)),
                        ensure_ascii=draw.random() < 0.5).encode(
                            'utf-8', 'surrogatepass')
    except (ValueError, RecursionError):
      pass  # not JSON, or no longer JSON
  if whole and draw.random() < 0.3:
    at = draw.randrange(len(whole))
    return (whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)])
            + whole[at + 1:])
  return _edited(draw, whole, (
      draw.choice(SYNTAX), draw.randbytes(draw.randint(0, 8)),
      _piece(draw, draw.choice(others))))


def _changed_text(draw: Draw, whole: str, others: Sequence[Any]) -> str:
  strings = [other for other in others if isinstance(other, str)]
  return _edited(draw, whole, (
      text(draw, 3), draw.choice(ODD), draw.choice(SYNTAX).decode('latin-1'),
      str(number(draw)), _piece(draw, draw.choice(strings or ODD))))


def _piece(draw: Draw, whole: Any) -> Any:
  at = draw.randint(0, len(whole))
  return whole[at:at + draw.randint(0, 20)]


def _changed_tree(draw: Draw, value: Any) -> Any:
  if isinstance(value, dict | list) and value and draw.random() < 0.85:
    value = value.copy()
    key = draw.choice([*value] if isinstance(value, dict)
                      else range(len(value)))
    kind = draw.random()
    if kind < 0.75:
      value[key] = _changed_tree(draw, value[key])
    elif kind < 0.83:
      del value[key]
    elif isinstance(value, list):
      value[key:key] = [value[key]] * draw.choice((1, 1, 1, 50))
    else:
      value[draw.choice((text(draw, 6), *value))] = value[key]
    return value
  if isinstance(value, dict | list) or draw.random() < 0.3:
    return tree(draw)
  return changed(draw, value, ODD)


class Pool:
  """A pool of inputs: seeds, kept mutations and fresh random values."""

  def __init__(self, seeds: Sequence[Any],
               fresh: Callable[[Draw], Any] | None, seed: int):
    self.draw, self._seeds, self._fresh = Draw(seed), list(seeds), fresh
    self._kept: list[Any] = []
    self._told: set[str] = set()

  @property
  def different(self) -> int:
    """Returns the number of refusals that differ beyond names and numbers."""
    return len(self._told)

  def next(self) -> Any:
    draw = self.draw
    if self._fresh and (not self._seeds or draw.random() < 0.3):
      return self._fresh(draw)
    known = self._kept if self._kept and draw.random() < 0.6 else self._seeds
    value = draw.choice(known)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3, 4))):
      value = changed(draw, value, self._seeds)
    return value

  def note(self, value: Any, refusal: str) -> None:
    """Adds the value to the pool if it was accepted or its refusal is new."""
    if refusal:
      kind = re.sub(r"'[^']*'|\d+|\S*/\S*", '', refusal)[:60]
      if kind in self._told:
        return
      self._told.add(kind)
    if self._seeds and len(repr(value)) < LONGEST:
      if len(self._kept) < KEPT:
        self._kept.append(value)
      else:
        self._kept[self.draw.randrange(KEPT)] = value
