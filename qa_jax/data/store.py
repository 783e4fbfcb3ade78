"""Storage of a WindowSet as a directory of .npy files with checksums.

Glossary of shapes: E examples, N windows, C distinct contexts, A gold answers,
S strings, T tokens of all rows.

Arrays are memory-mapped, and strings are decoded at the first access, so a data
set of SQuAD's size opens in milliseconds. `read_store` checks the sha256 of
every file (15 ms for SQuAD on two cores), so damaged data are never returned.
The manifest is a sealed JSON file, unlike that of checkpoints and exports, to
protect the checksums themselves and the description of the windows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.io import files

MANIFEST = 'manifest.json'
# Fields of a WindowSet that are stored as they are.
FIELDS = ('context_of', 'example_of', 'begin', 'length', 'best_begin',
          'best_end', 'gold_spans', 'trainable')
RAGGED = tuple(f'{rows}_{part}' for rows in ('contexts', 'questions')
               for part in ('ids', 'offsets', 'ptr'))
EXAMPLES = ('text', 'text_ptr', 'title_of', 'impossible', 'answer_ptr',
            'answer_start', 'accepted_ptr')
ARRAYS = FIELDS + RAGGED + EXAMPLES
THREADS = 2  # the largest file takes as long to hash as all others together


class DamagedError(Exception):
  """A store whose files are not as written; the message names the file."""


class StoredExamples(Sequence[Example]):
  """The examples of a store, decoded at the first access to one of them."""

  def __init__(self, arrays: Mapping[str, np.ndarray], context_of: np.ndarray,
               fingerprint: str):
    self._arrays, self._context_of = arrays, context_of
    self.fingerprint = fingerprint

  def __len__(self) -> int:
    return len(self._context_of)

  def __getitem__(self, index: Any) -> Any:  # a list if `index` is a slice
    return self._rows[index]

  def __iter__(self) -> Iterator[Example]:
    return iter(self._rows)

  @functools.cached_property
  def _rows(self) -> list[Example]:
    text = self._arrays['text'].tobytes()
    pointers, title_of, impossible, answer_ptr, starts, accepted_ptr = (
        self._arrays[name].tolist() for name in EXAMPLES[1:])
    strings = (text[a:b].decode() for a, b in itertools.pairwise(pointers))
    context_of = self._context_of.tolist()
    contexts, titles, ids, questions, answers = (
        [*itertools.islice(strings, count)] for count in (
            max(context_of, default=-1) + 1, max(title_of, default=-1) + 1,
            len(self), len(self), len(starts)))
    golds, accepted = list(map(GoldAnswer, answers, starts)), [*strings]
    return [
        Example(ids[e], questions[e], contexts[context_of[e]],
                tuple(golds[answer_ptr[e]:answer_ptr[e + 1]]), impossible[e],
                titles[title_of[e]],
                tuple(accepted[accepted_ptr[e]:accepted_ptr[e + 1]]))
        for e in range(len(self))]


def fingerprint(examples: Sequence[Example]) -> str:
  """Returns the sha256 of ids, questions, contexts and answers.

  The gold answers count with their starts, the accepted ones as texts.
  """
  if isinstance(examples, StoredExamples):
    return examples.fingerprint
  digest = hashlib.sha256()
  for e in examples:
    digest.update(repr((e.id, e.question, e.context, e.answers,
                        *[e.accepted] * bool(e.accepted))).encode())
  return digest.hexdigest()


def write_store(directory: pathlib.Path, windows: windows_lib.WindowSet,
                about: Mapping[str, Any], *, with_vocabulary: bool) -> None:
  """Writes windows to an empty directory, durably.

  `about` is a JSON value that describes the origin of the windows; `read_store`
  requires an equal one. A vocabulary that no other file has is stored too.
  """
  written = {}
  for name, array in _arrays(windows).items():
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    written[f'{name}.npy'] = [buffer.tell(), write_durably(
        directory / f'{name}.npy', buffer.getbuffer())]
  vocabulary = list(windows.tokenizer.vocab) if with_vocabulary else None
  write_durably(directory / MANIFEST, seal({
      'about': about, 'files': written, 'audit': windows.audit,
      'faults': windows.faults, 'examples': fingerprint(windows.examples),
      'vocabulary': vocabulary, 'lowercase': windows.tokenizer.lowercase}))


def read_store(
    directory: pathlib.Path, about: Mapping[str, Any], *,
    tokenizer: tokenizer_lib.Tokenizer | None) -> windows_lib.WindowSet:
  """Reads the windows that `write_store` wrote.

  Without `tokenizer`, the stored vocabulary is used.

  Raises:
    FileNotFoundError: the directory does not exist.
    DamagedError: a file is missing or changed, or `about` differs.
  """
  manifest = _verify(directory, about)
  # Plain arrays on the mapped memory: np.memmap is slower to index.
  arrays = {name: np.asarray(np.load(directory / f'{name}.npy', mmap_mode='r',
                                     allow_pickle=False)) for name in ARRAYS}
  contexts, questions = (
      tokenizer_lib.Ragged(*(arrays[name] for name in names))
      for names in (RAGGED[:3], RAGGED[3:]))
  return windows_lib.WindowSet(
      examples=StoredExamples({name: arrays[name] for name in EXAMPLES},
                              arrays['context_of'], manifest['examples']),
      contexts=contexts, questions=questions, audit=manifest['audit'],
      faults=manifest['faults'],
      tokenizer=tokenizer or tokenizer_lib.Tokenizer(
          tuple(manifest['vocabulary']), manifest['lowercase']),
      **{name: arrays[name] for name in FIELDS})


def seal(value: Any) -> bytes:
  """Returns `value` as JSON, preceded by the sha256 of that JSON."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  digest = hashlib.sha256(text.encode()).hexdigest()
  return f'{digest}\n{text}\n'.encode()


def unseal(sealed: bytes) -> Any:
  """Returns the value given to `seal`; a DamagedError if a byte differs."""
  digest, _, text = sealed.partition(b'\n')
  text, end = text[:-1], text[-1:]
  if end != b'\n' or hashlib.sha256(text).hexdigest().encode() != digest:
    raise DamagedError(f'{MANIFEST} does not match its own sha256')
  return json.loads(text)


def write_durably(path: pathlib.Path, content: bytes | memoryview) -> str:
  """Writes and fsyncs a file; returns the sha256 of `content`."""
  with path.open('wb') as f:
    f.write(content)
    f.flush()
    os.fsync(f.fileno())
  return hashlib.sha256(content).hexdigest()


def _arrays(windows: windows_lib.WindowSet) -> dict[str, np.ndarray]:
  """Returns every array of ARRAYS."""
  arrays = {name: getattr(windows, name) for name in FIELDS}
  for name in ('contexts', 'questions'):
    rows = getattr(windows, name)
    arrays |= {f'{name}_ids': _narrow(rows.ids), f'{name}_ptr': rows.ptr,
               f'{name}_offsets': _narrow(rows.offsets)}
  examples, titles = windows.examples, {}
  for e in examples:
    titles.setdefault(e.title, len(titles))
  answers = [a for e in examples for a in e.answers]
  strings = [s.encode() for s in itertools.chain(
      dict.fromkeys(e.context for e in examples), titles,
      (e.id for e in examples), (e.question for e in examples),
      (a.text for a in answers), *(e.accepted for e in examples))]
  return arrays | {
      'text': np.frombuffer(b''.join(strings), np.uint8),
      'text_ptr': _pointers(len(s) for s in strings),
      'title_of': np.array([titles[e.title] for e in examples], np.int32),
      'impossible': np.array([e.impossible for e in examples], bool),
      'answer_ptr': _pointers(len(e.answers) for e in examples),
      'answer_start': np.array([a.start for a in answers], np.int64),
      'accepted_ptr': _pointers(len(e.accepted) for e in examples)}


def _narrow(array: np.ndarray) -> np.ndarray:  # uint16 if all values fit
  fits = array.max(initial=0) < 2**16
  return array.astype(np.uint16 if fits else np.int32)


def _pointers(lengths: Iterable[int]) -> np.ndarray:  # [rows + 1] int64
  return np.array([*itertools.accumulate(lengths, initial=0)], np.int64)


def _verify(directory: pathlib.Path, about: Mapping[str, Any]) -> Any:
  """Returns the manifest, after checking every file against it."""
  directory.stat()
  try:
    manifest = unseal((directory / MANIFEST).read_bytes())
    if manifest['about'] != about:
      raise DamagedError(f'{MANIFEST} belongs to another store')
    for name, (size, _) in manifest['files'].items():
      if (stored := (directory / name).stat().st_size) != size:
        raise DamagedError(f'{name} has {stored} bytes, not {size}')
    largest_first = sorted(manifest['files'].items(), key=lambda f: -f[1][0])
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      sums = pool.map(lambda f: files.sha256(directory / f[0]), largest_first)
      for (name, (_, expected)), actual in zip(
          largest_first, sums, strict=True):
        if actual != expected:
          raise DamagedError(f'{name} does not match its sha256')
  except FileNotFoundError as e:
    raise DamagedError(f'{pathlib.Path(e.filename).name} is missing') from None
  return manifest
