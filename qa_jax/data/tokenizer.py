"""Tokenizers with character offsets into the original text.

WordPiece (BERT), byte-level BPE (RoBERTa) and Unigram (XLM-R, DeBERTa) are
supported. The library `tokenizers` normalises, splits and matches.
tokenizer_files.py reads a tokenizer from the files that transformers writes;
`save` writes them again.

Padding, unknown, first, separator and mask token are never matched in a text,
so "[SEP]" in a user's text is tokenised as text and never becomes the separator
token. Other added tokens are matched, as in transformers.

Glossary of shapes: T tokens, N characters of a text.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import reprlib
from typing import Any
import unicodedata

import numpy as np
import tokenizers

from qa_jax import errors
from qa_jax.io import files

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
ROLES = ('pad_token', 'unk_token', 'cls_token', 'sep_token', 'mask_token')
# Settings of tokenizer_config.json that transformers gives to BertNormalizer.
NORMALIZER = {'do_lower_case': 'lowercase', 'strip_accents': 'strip_accents',
              'tokenize_chinese_chars': 'handle_chinese_chars'}


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Rows of T tokens in all; row r is the range `[ptr[r], ptr[r + 1])`."""

  # int32, or uint16 from the cache of windows if all values fit.
  ids: np.ndarray  # [T]
  offsets: np.ndarray  # [T, 2] code points [begin, end) of the text
  ptr: np.ndarray  # [rows + 1] int64

  @property
  def lengths(self) -> np.ndarray:  # [rows]
    return np.diff(self.ptr)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer, its vocabulary in id order and the layout of its windows.

  Without a definition it is BERT's (Devlin et al., 2019). A window is one first
  token, the question, `separators` separator tokens, a part of the context and
  one separator token.
  """

  vocab: tuple[str, ...]  # added tokens included
  lowercase: bool
  # The tokenizer.json of a tokenizer that differs from BERT's in more than the
  # other fields; '' if there is no such difference.
  definition: str = ''
  special: tuple[str, ...] = SPECIAL  # tokens in the order of ROLES
  max_length: int | None = None  # tokens of a window, model_max_length
  separators: int = 1  # between question and context; RoBERTa has 2
  context_type: int = 1  # token type of the context; that of the question is 0

  def __post_init__(self):
    missing = [t for t in self.special[:4] if t not in self.index]
    if missing:
      raise errors.UserError(
          f'vocabulary of {len(self.vocab)} entries lacks '
          f'{", ".join(map(shown, missing))}: it is not the vocabulary of a '
          'supported tokenizer, or tokenizer_config.json lacks the names of '
          'its special tokens')

  def __getstate__(self) -> dict[str, Any]:
    """Leaves cached properties out of a copy; a pickle cannot have them all."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  @functools.cached_property
  def index(self) -> dict[str, int]:
    return {token: i for i, token in enumerate(self.vocab)}

  pad_id = property(lambda self: self.index[self.special[0]])
  cls_id = property(lambda self: self.index[self.special[2]])
  sep_id = property(lambda self: self.index[self.special[3]])

  @property
  def outer_length(self) -> int:
    """The number of tokens of a window beside question and context."""
    return self.separators + 2

  @functools.cached_property
  def is_wordpiece(self) -> bool:
    return not self.definition or is_wordpiece(json.loads(self.definition))

  @functools.cached_property
  def _continues_by_id(self) -> np.ndarray:  # [vocabulary] bool
    """Whether a token, by its id, is a later piece "##…" of its word."""
    return np.array([t.startswith('##') and len(t) > 2 for t in self.vocab])

  def continues_word(self, text: str, ids: np.ndarray,
                     offsets: np.ndarray) -> np.ndarray:
    """Returns whether each token of a text is a later piece of its word [T].

    `ids` [T] and `offsets` [T, 2] are those of `encode`. WordPiece marks such
    tokens with "##". Other vocabularies do not: there the characters decide,
    with the words of BERT (see `inside_words`).
    """
    if self.is_wordpiece:
      return self._continues_by_id[ids]
    return tokens_inside_words(text, offsets)

  def readable(self, token_id: int) -> str:
    """Returns a token for a page or a picture."""
    token = self.vocab[token_id]
    if self.is_wordpiece or token in self.special:
      return token
    return self._library.decode(
        [token_id], skip_special_tokens=False).strip() or '␣'

  @property
  def fingerprint(self) -> str:
    text = '\n'.join(self.vocab) + f'\nlowercase={self.lowercase}'
    if (self.definition, self.special) != ('', SPECIAL):
      text += repr((self.definition, self.special))
    if (self.separators, self.context_type) != (1, 1):
      text += repr((self.separators, self.context_type))
    return hashlib.sha256(text.encode()).hexdigest()

  @functools.cached_property
  def _library(self) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer.from_str(self.closed_json())
    library.encode_special_tokens = True
    return library

  @functools.cached_property
  def _removes(self) -> Callable[[str], bool]:
    """The test whether the normaliser removes a character, but no space."""
    normalizer = self._library.normalizer
    return functools.cache(lambda c: bool(
        normalizer and not c.isspace() and not normalizer.normalize_str(c)))

  def encode(self, texts: Sequence[str],
             progress: Callable[[int], None] | None = None) -> Ragged:
    """Tokenises texts without special tokens; `progress` gets the count."""
    ids, offsets, lengths = [], [], [0]
    for begin in range(0, len(texts), 1024):
      part = list(texts[begin:begin + 1024])
      for text, enc in zip(part, self._library.encode_batch(
          part, add_special_tokens=False), strict=True):
        ids.append(np.array(enc.ids, np.int32))
        offsets.append(self._whole(text, np.fromiter(
            itertools.chain.from_iterable(enc.offsets), np.int32,
            2 * len(ids[-1])).reshape(-1, 2)))
        lengths.append(len(ids[-1]))
      if progress:
        progress(len(ids))
    empty = np.zeros(0, np.int32)
    return Ragged(np.concatenate(ids or [empty]),
                  np.concatenate(offsets or [empty.reshape(-1, 2)]),
                  np.cumsum(lengths, dtype=np.int64))

  def _whole(self, text: str, offsets: np.ndarray) -> np.ndarray:
    """Returns offsets [T, 2] with the marks, and without spaces at the ends.

    The library leaves marks that the normaliser removes, or composes with the
    letter before them, out of the offsets. It includes spaces beside an added
    token with `lstrip` or `rstrip`, and the spaces that are part of a token in
    BPE and Unigram. A token of spaces alone begins at the next character that
    is no space and ends behind the last one before it, so that spans from or to
    it have no spaces at their ends.
    """
    letters = set(text)
    if self.is_wordpiece:
      marks = {c for c in letters if self._removes(c)}
      if marks:
        offsets = attach_marks(offsets, _mask(text, marks))
    if self.definition and len(offsets):
      spaces = _mask(text, {c for c in letters if c.isspace()})
      if not self.is_wordpiece:
        # Normalisers that compose letters and marks leave the marks out, too.
        depth = np.zeros(len(text) + 1, np.int32)
        np.add.at(depth, offsets[:, 0], 1)
        np.add.at(depth, offsets[:, 1], -1)
        outside = (np.cumsum(depth)[:-1] == 0) & ~spaces
        if outside.any():
          offsets = attach_marks(offsets, outside)
      after, before = _edges(spaces)
      begin, end = offsets.T
      offsets = np.stack([after[begin], before[end]], 1).astype(np.int32)
    return offsets

  def closed_json(self) -> str:
    """Returns a tokenizer.json for `encode_special_tokens = True`.

    Among its added tokens only those of `special` are special, so only these
    are never matched in a text.
    """
    if not self.definition:
      return bert_pipeline(self.index, self.lowercase, self.special[1]).to_str()
    about = json.loads(self.definition)
    for token in about['added_tokens']:
      token['special'] = token['content'] in self.special
    if about['model']['type'] == 'Unigram':
      # A Unigram model matches any piece of its vocabulary. No text that the
      # pre-tokenizer has split has a piece with a space.
      for row in about['model']['vocab']:
        if row[0] in self.special:
          row[0] = f'special {row[0]}'
    return json.dumps(about, ensure_ascii=False)

  def to_json(self) -> str:
    """Returns the tokenizer.json of transformers, with all special tokens."""
    library = tokenizers.Tokenizer.from_str(
        self.definition or self.closed_json())
    present = {token.content for token in (  # these keep flags such as lstrip
        library.get_added_tokens_decoder().values()) if token.special}
    library.add_special_tokens([t for t in self.special if t in self.index
                                and t not in present])
    library.post_processor = self._post_processor()
    return library.to_str(pretty=True)

  def _post_processor(self) -> Any:
    """Returns the part of the library that lays out rows as windows are."""
    first, last = (self.special[2], self.cls_id), (self.special[3], self.sep_id)
    if (self.separators, self.context_type) == (1, 1):
      return tokenizers.processors.BertProcessing(last, first)
    level = byte_level(json.loads(self.definition)) if self.definition else None
    if level and (self.separators, self.context_type) == (2, 0):
      return tokenizers.processors.RobertaProcessing(
          last, first, add_prefix_space=level['add_prefix_space'])
    kind = self.context_type
    return tokenizers.processors.TemplateProcessing(
        single=[first[0], '$A', last[0]], special_tokens=[first, last],
        pair=[first[0], '$A', *[last[0]] * self.separators, f'$B:{kind}',
              f'{last[0]}:{kind}'])

  def save(self, directory: pathlib.Path) -> None:
    """Writes the vocabulary and tokenizer_config.json, as transformers does.

    There is a tokenizer.json only if vocab.txt and the settings cannot describe
    the tokenizer and its windows, and a vocab.txt unless another pipeline
    replaces BERT's.
    """
    about: dict[str, Any] = {
        'do_lower_case': self.lowercase, 'tokenizer_class': 'BertTokenizer'}
    pieces = list(self.vocab)
    if self.definition:
      whole = json.loads(self.definition)
      pieces = [*whole['model']['vocab']]
      normalizer = whole['normalizer'] or {}
      if _is_berts(whole):
        about |= {theirs: normalizer[ours]
                  for theirs, ours in NORMALIZER.items()}
      else:
        pieces = []
      extra = [t['content'] for t in whole['added_tokens']
               if t['special'] and t['content'] not in self.special]
      if extra:
        about['additional_special_tokens'] = extra
    is_berts_layout = (self.separators, self.context_type) == (1, 1)
    if not pieces or not is_berts_layout:
      about['tokenizer_class'] = 'PreTrainedTokenizerFast'
      about['model_input_names'] = [  # transformers 5 has no types by default
          'input_ids', *['token_type_ids'] * bool(self.context_type),
          'attention_mask']
    if self.special != SPECIAL or not self.is_wordpiece:
      about |= dict(zip(ROLES, self.special, strict=True))
    if self.max_length:
      about['model_max_length'] = self.max_length
    # A piece that is no line of text cannot be in a vocab.txt.
    has_lines = bool(pieces) and not any(
        not t or '\n' in t or '\r' in t for t in pieces)
    if has_lines:
      files.write_text(directory / 'vocab.txt', '\n'.join(pieces) + '\n')
    if self.definition or not has_lines or not is_berts_layout:
      files.write_text(directory / 'tokenizer.json', self.to_json())
    files.write_json(directory / 'tokenizer_config.json', about)


def shown(token: str) -> str:
  """Returns a token for a message of one line, shortened."""
  return token if token.isprintable() and len(token) < 40 else (
      reprlib.repr(token))


def attach_marks(offsets: np.ndarray, marks: np.ndarray) -> np.ndarray:
  """Returns token offsets [T, 2] that include the marks beside the tokens.

  `marks` [N] is true for characters that the normaliser removes, such as the
  accents of decomposed letters. A mark belongs to the token that ends before
  it, with only marks in between, or else to the token that begins after it.
  """
  if not len(offsets):
    return offsets
  after, before = _edges(marks)
  begin, end = offsets.T
  limit = np.append(begin[1:], len(marks))
  end = np.maximum(end, np.minimum(after[end], limit))
  begin = np.minimum(begin, np.maximum(before[begin], np.append(0, end[:-1])))
  return np.stack([begin, end], 1).astype(np.int32)


def _mask(text: str, letters: set[str]) -> np.ndarray:  # [N] bool
  return np.fromiter((c in letters for c in text), bool, len(text))


def _edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ends and the beginnings [N + 1] of runs of true in a mask [N].

  `after[k]` is the end of a run that begins at k, and `before[k]` the beginning
  of a run that ends at k. Both are k if there is no such run.
  """
  place = np.arange(len(mask), dtype=np.int32)
  after = np.append(np.where(mask, len(mask), place), len(mask))
  before = np.append(0, np.where(mask, 0, place + 1))
  return np.minimum.accumulate(after[::-1])[::-1], np.maximum.accumulate(before)


@functools.cache
def _is_letter(c: str) -> bool:
  """Returns whether a character may stand inside a word of BERT."""
  return not (c.isspace() or (c.isascii() and not c.isalnum())
              or unicodedata.category(c)[0] == 'P'
              or unicodedata.name(c, '').startswith('CJK '))


def inside_words(text: str) -> np.ndarray:
  """Returns whether a word goes on from character i - 1 to i of a text [N + 1].

  Words are those of BERT's pre-tokenizer (Devlin et al., 2019): they end at
  spaces and punctuation, and a Chinese character is a word. In ASCII, every
  character that is neither a letter nor a digit counts as punctuation.
  """
  letters = np.zeros(len(text) + 2, bool)
  letters[1:-1] = _mask(text, {c for c in set(text) if _is_letter(c)})
  return letters[:-1] & letters[1:]


def tokens_inside_words(text: str, offsets: np.ndarray) -> np.ndarray:
  """Returns whether each token [T] goes on with the word of the token before.

  `offsets` [T, 2] are the characters of the tokens. Tokens of BPE may share a
  character, whose bytes they divide.
  """
  begin, end = offsets.T
  inside = inside_words(text)[begin]
  inside[1:] |= begin[1:] < end[:-1]
  return inside


def byte_level(whole: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the ByteLevel pre-tokenizer of a tokenizer.json, if it has one."""
  part = whole.get('pre_tokenizer') or {}
  return next((p for p in part.get('pretokenizers', [part])
               if p.get('type') == 'ByteLevel'), None)


def is_wordpiece(whole: dict[str, Any]) -> bool:
  return whole['model'].get('type', 'WordPiece') == 'WordPiece'


def bert_pipeline(vocab: dict[str, int], lowercase: bool,
              unknown: str = SPECIAL[1]) -> tokenizers.Tokenizer:
  """Returns the tokenizer of BERT, without special tokens."""
  wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      vocab, unk_token=unknown, max_input_chars_per_word=100))
  wordpiece.normalizer = tokenizers.normalizers.BertNormalizer(
      lowercase=lowercase)
  wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  wordpiece.decoder = tokenizers.decoders.WordPiece()
  return wordpiece


def _is_berts(whole: dict[str, Any]) -> bool:
  """Returns whether BertTokenizer can have this tokenizer.json.

  In transformers 5 this class builds it anew from vocabulary and normalizer.
  """
  return all((whole[part] or {}).get(field) == value for part, field, value in (
      ('normalizer', 'type', 'BertNormalizer'),
      ('normalizer', 'clean_text', True),
      ('pre_tokenizer', 'type', 'BertPreTokenizer'),
      ('model', 'continuing_subword_prefix', '##'),
      ('model', 'max_input_chars_per_word', 100)))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int,
                    lowercase: bool = True) -> Tokenizer:
  """Learns a tokenizer of at most `vocab_size` entries from `texts`.

  It has all letters of the texts, each alone and within a word, even if these
  are more entries.

  The library numbers "##x" pieces in hash order and breaks ties by number. Here
  they are special tokens, sorted, so that equal texts give equal vocabularies.
  """
  texts = list(texts)
  wordpiece = bert_pipeline({'[UNK]': 0}, lowercase)
  letters = sorted({c for text in texts
                    for c in wordpiece.normalizer.normalize_str(text)
                    if not c.isspace()})
  fixed = [*SPECIAL, *letters, *('##' + c for c in letters)]
  wordpiece.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(
      vocab_size=vocab_size, special_tokens=fixed, show_progress=False))
  learned = set(wordpiece.get_vocab()) - set(SPECIAL)
  return Tokenizer(SPECIAL + tuple(sorted(learned)), lowercase)
