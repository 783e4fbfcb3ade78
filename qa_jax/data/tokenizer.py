"""WordPiece tokenizers with character offsets into the original text.

No special token is registered with the library `tokenizers`, so "[SEP]" in a
user's text is tokenised as text and never becomes the separator token.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import reprlib
from typing import Any

import numpy as np
import tokenizers

from qa_jax import errors
from qa_jax.data.examples import check_text
from qa_jax.io import files

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of T tokens in all; row r is the range `[ptr[r], ptr[r + 1])`."""

  ids: np.ndarray  # [T] int32
  offsets: np.ndarray  # [T, 2] int32, code points [begin, end) of the text
  ptr: np.ndarray  # [rows + 1] int64

  @property
  def lengths(self) -> np.ndarray:  # [rows]
    return np.diff(self.ptr)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """BERT's WordPiece (Devlin et al., 2019), its vocabulary in id order."""

  vocab: tuple[str, ...]
  lowercase: bool

  def __post_init__(self):
    missing = [t for t in SPECIAL[:4] if t not in self.index]
    if missing:
      raise errors.UserError(
          f'vocabulary of {len(self.vocab)} entries lacks '
          f'{", ".join(missing)}: it is not a BERT WordPiece vocabulary')

  @functools.cached_property
  def index(self) -> dict[str, int]:
    return {token: i for i, token in enumerate(self.vocab)}

  pad_id = property(lambda self: self.index['[PAD]'])
  cls_id = property(lambda self: self.index['[CLS]'])
  sep_id = property(lambda self: self.index['[SEP]'])

  @functools.cached_property
  def continues_word(self) -> np.ndarray:  # [vocabulary] bool
    """Whether a token, by its id, is a later piece "##…" of its word."""
    return np.array([t.startswith('##') and len(t) > 2 for t in self.vocab])

  @property
  def fingerprint(self) -> str:
    text = '\n'.join(self.vocab) + f'\nlowercase={self.lowercase}'
    return hashlib.sha256(text.encode()).hexdigest()

  @functools.cached_property
  def _wordpiece(self) -> tokenizers.Tokenizer:
    return _pipeline(self.index, self.lowercase)

  def encode(self, texts: Sequence[str],
             progress: Callable[[int], None] | None = None) -> Ragged:
    """Tokenises texts without special tokens; `progress` gets the count."""
    ids, offsets, lengths = [], [], [0]
    for begin in range(0, len(texts), 1024):
      for enc in self._wordpiece.encode_batch(
          list(texts[begin:begin + 1024]), add_special_tokens=False):
        ids.append(np.array(enc.ids, np.int32))
        offsets.append(np.fromiter(itertools.chain.from_iterable(enc.offsets),
                                   np.int32, 2 * len(ids[-1])))
        lengths.append(len(ids[-1]))
      if progress:
        progress(len(ids))
    empty = [np.zeros(0, np.int32)]
    return Ragged(np.concatenate(ids or empty),
                  np.concatenate(offsets or empty).reshape(-1, 2),
                  np.cumsum(lengths, dtype=np.int64))

  def save(self, directory: pathlib.Path) -> None:
    """Writes vocab.txt and tokenizer_config.json, as Hugging Face does."""
    files.write_text(directory / 'vocab.txt', '\n'.join(self.vocab) + '\n')
    files.write_json(directory / 'tokenizer_config.json', {
        'do_lower_case': self.lowercase, 'tokenizer_class': 'BertTokenizer'})


def _pipeline(vocab: dict[str, int], lowercase: bool) -> tokenizers.Tokenizer:
  wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      vocab, unk_token='[UNK]', max_input_chars_per_word=100))
  wordpiece.normalizer = tokenizers.normalizers.BertNormalizer(
      lowercase=lowercase)
  wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  return wordpiece


def read_tokenizer(directory: str | pathlib.Path,
                   lowercase: bool | None = None) -> Tokenizer:
  """Reads the tokenizer in vocab.txt or tokenizer.json of a directory.

  `lowercase=None` takes the setting of the directory.

  Raises:
    UserError: the vocabulary is missing or malformed, or its case differs from
      `lowercase`, which would silently cost 6.5 F1 (transformers#4549).
  """
  directory = pathlib.Path(directory)
  about, whole = (
      files.read_object(directory / name) if (directory / name).is_file()
      else {} for name in ('tokenizer_config.json', 'tokenizer.json'))
  stored = about.get('do_lower_case')
  if stored is None and isinstance(whole.get('normalizer'), dict):
    stored = whole['normalizer'].get('lowercase')
  if stored not in (None, False, True):
    raise errors.UserError(
        f'{directory}: lower-casing is {stored!r}, expected true or false')
  if (directory / 'vocab.txt').is_file():
    text = files.read_text(directory / 'vocab.txt')
    vocab = tuple(text.rstrip('\n').split('\n'))
  elif whole:
    vocab = _json_vocab(whole.get('model'), directory / 'tokenizer.json')
  else:
    raise errors.UserError(
        f'{directory}: no vocabulary; expected vocab.txt or tokenizer.json')
  if stored is None and any(
      re.search('[A-Z]', t) for t in vocab if not t.startswith('[')):
    stored = False  # only a cased vocabulary has capitals
  if None not in (stored, lowercase) and stored != lowercase:
    raise errors.UserError(
        f'data.lowercase={lowercase}, but the vocabulary in {directory} is '
        f'{"lower-cased" if stored else "cased"}; set data.lowercase={stored}')
  if lowercase is None:
    lowercase = True if stored is None else bool(stored)
  return Tokenizer(vocab, lowercase)


def _json_vocab(model: Any, path: pathlib.Path) -> tuple[str, ...]:
  kind = model.get('type', 'WordPiece') if isinstance(model, dict) else model
  if kind != 'WordPiece' or not isinstance(model.get('vocab'), dict):
    raise errors.UserError(
        f'{path}: model {reprlib.repr(kind)} is not supported; a WordPiece '
        'vocabulary is needed')
  ids = model['vocab']
  if not all(type(i) is int for i in ids.values()) or (
      sorted(ids.values()) != list(range(len(ids)))):
    raise errors.UserError(
        f'{path}: its {len(ids)} tokens are not numbered 0 … {len(ids) - 1}')
  vocab = tuple(sorted(ids, key=ids.get))
  check_text('\n'.join(vocab), f'{path}: vocabulary')
  return vocab


def train_tokenizer(texts: Iterable[str], *, vocab_size: int,
                    lowercase: bool = True) -> Tokenizer:
  """Learns a tokenizer of at most `vocab_size` entries from `texts`.

  The library numbers "##x" pieces in hash order and breaks ties by number. Here
  they are special tokens, sorted, so that equal texts give equal vocabularies.
  """
  texts = list(texts)
  wordpiece = _pipeline({'[UNK]': 0}, lowercase)
  letters = sorted({c for text in texts
                    for c in wordpiece.normalizer.normalize_str(text)
                    if not c.isspace()})
  fixed = [*SPECIAL, *letters, *('##' + c for c in letters)]
  wordpiece.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(
      vocab_size=vocab_size, special_tokens=fixed, show_progress=False))
  learned = set(wordpiece.get_vocab()) - set(SPECIAL)
  return Tokenizer(SPECIAL + tuple(sorted(learned)), lowercase)
