"""Tokenizers with character offsets into the original text.

WordPiece (BERT), byte-level BPE (RoBERTa) and Unigram (XLM-R, DeBERTa) are
supported. The library `tokenizers` normalises, splits and matches. A tokenizer
is read from the files that transformers writes, and written to them again.

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
import re
import reprlib
import shlex
from typing import Any
import unicodedata

import numpy as np
import tokenizers

from qa_jax import errors
from qa_jax.data.examples import check_text
from qa_jax.io import files

SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
# Names in RoBERTa's vocabulary, and in those of XLM-R and CamemBERT.
ROBERTA_SPECIAL = ('<pad>', '<unk>', '<s>', '</s>', '<mask>')
ROLES = ('pad_token', 'unk_token', 'cls_token', 'sep_token', 'mask_token')
# Settings of tokenizer_config.json that transformers gives to BertNormalizer.
NORMALIZER = {'do_lower_case': 'lowercase', 'strip_accents': 'strip_accents',
              'tokenize_chinese_chars': 'handle_chinese_chars'}
# Values of other settings that BERT's tokenizer has; there is no code for
# further values.
SUPPORTED = {'do_basic_tokenize': (None, True), 'clean_text': (None, True),
             'word_tokenizer_type': (None, 'basic'),
             'subword_tokenizer_type': (None, 'wordpiece')}
# Classes whose vocab.txt is read like that of BertTokenizer.
CLASSES = (None, *(f'{name}Tokenizer{fast}' for fast in ('', 'Fast')
                   for name in ('Bert', 'DistilBert', 'Electra')))
# Classes whose vocab.json and merges.txt are read like those of
# RobertaTokenizer.
BPE_CLASSES = (None, 'RobertaTokenizer', 'RobertaTokenizerFast')
UNLIMITED = 10**9  # transformers writes 10**30 if the length has no limit


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
          f'{", ".join(map(_shown, missing))}: it is not the vocabulary of a '
          'supported tokenizer, or tokenizer_config.json lacks the names of '
          'its special tokens')

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
    return not self.definition or _is_wordpiece(json.loads(self.definition))

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
      return _pipeline(self.index, self.lowercase, self.special[1]).to_str()
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


def _shown(token: str) -> str:
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
  inside = inside_words(text)[np.minimum(begin, len(text))]
  inside[1:] |= begin[1:] < end[:-1]
  return inside


def byte_level(whole: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the ByteLevel pre-tokenizer of a tokenizer.json, if it has one."""
  part = whole.get('pre_tokenizer') or {}
  return next((p for p in part.get('pretokenizers', [part])
               if p.get('type') == 'ByteLevel'), None)


def _is_wordpiece(whole: dict[str, Any]) -> bool:
  return whole['model'].get('type', 'WordPiece') == 'WordPiece'


def _pipeline(vocab: dict[str, int], lowercase: bool,
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
  """Returns whether BertTokenizer can have this tokenizer.json."""
  return all((whole[part] or {}).get('type') == kind for part, kind in (
      ('normalizer', 'BertNormalizer'), ('pre_tokenizer', 'BertPreTokenizer')))


def read_tokenizer(directory: str | pathlib.Path,
                   lowercase: bool | None = None) -> Tokenizer:
  """Reads the tokenizer of a directory from the files of transformers.

  It is in tokenizer.json, or else in the vocab.txt of BERT or in the vocab.json
  and merges.txt of RoBERTa.

  tokenizer_config.json, special_tokens_map.json and added_tokens.json are read
  if they are present, with the precedence of BertTokenizerFast of transformers
  4.57. Truncation and padding do not concern windows and are left out.
  `lowercase=None` takes the setting of the directory.

  Raises:
    UserError: the vocabulary is missing or malformed, a setting is not
      supported or contradicts another one, or the case of the vocabulary
      differs from `lowercase`, which would silently cost 6.5 F1
      (transformers#4549).
  """
  directory = pathlib.Path(directory)
  about, names, numbered = (
      files.read_object(directory / name) if (directory / name).is_file()
      else {} for name in ('tokenizer_config.json', 'special_tokens_map.json',
                           'added_tokens.json'))
  where = directory / 'tokenizer_config.json'
  _check_settings(about, where)
  library = None
  if (directory / 'tokenizer.json').is_file():
    library = _read_library(directory / 'tokenizer.json')
    _check_vocabulary(library, directory)
  special = _special_tokens(about, names, library, directory)
  if library is None and (directory / 'vocab.json').is_file():
    library = _read_roberta(directory, about, special)
  if library:
    stored = folds = _set_normalizer(library, about, where)
  else:
    library, stored = _read_bert(directory, about, special, lowercase)
    folds = _set_normalizer(library, about, where)
  if None not in (stored, lowercase) and stored != lowercase:
    raise errors.UserError(
        f'data.lowercase={lowercase}, but the vocabulary in {directory} is '
        f'{"lower-cased" if stored else "cased"}; set data.lowercase={stored}')
  _check_model(library, about | {'unk_token': special[1]}, where)
  _set_prefix_space(library, about, where)
  _add_tokens(library, about, names, numbered, special, directory)
  limit = about.get('model_max_length', about.get('max_len'))
  tokenizer = Tokenizer(
      _vocabulary(library, directory), folds,
      _definition(library, folds, special), special,
      None if limit is None or limit > UNLIMITED else int(limit),
      *_read_layout(library, special, directory))
  _check_closed(tokenizer, directory)
  return tokenizer


def _check_settings(about: dict[str, Any], where: pathlib.Path) -> None:
  """Raises a UserError if tokenizer_config.json asks for missing features."""
  for name in NORMALIZER:
    errors.require(
        type(about.get(name)) in (type(None), bool),
        f'{where}: {name} is {about.get(name)!r}, expected true or false')
  for name, values in SUPPORTED.items():
    errors.require(
        about.get(name) in values,
        f'{where}: {name}={reprlib.repr(about.get(name))} is not supported; '
        f'only {values[1]!r} is')
  for name in ('model_max_length', 'max_len'):
    limit = about.get(name, 1)
    errors.require(
        limit is None or (type(limit) in (int, float) and limit >= 1),
        f'{where}: {name} is {limit!r}, expected a positive number of tokens')
  for name, kind in (('never_split', list), ('added_tokens_decoder', dict)):
    errors.require(
        about.get(name) is None or isinstance(about[name], kind),
        f'{where}: {name} is {reprlib.repr(about.get(name))}, expected a '
        f'{kind.__name__}')


def _read_library(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Reads tokenizer.json, without its truncation."""
  whole = files.read_object(path)
  _check_json_vocabulary(whole, path)
  try:
    library = tokenizers.Tokenizer.from_str(json.dumps(whole))
  except Exception as e:  # the library raises no narrower class
    raise errors.UserError(
        f'{path}: the library tokenizers cannot read it '
        f'({" ".join(str(e).split())}); save the tokenizer again') from None
  for token in whole.get('added_tokens') or ():
    _check_id(library, token['content'], token['id'], path)
  library.no_truncation()
  return library


def _check_json_vocabulary(whole: dict[str, Any], path: pathlib.Path) -> None:
  """Raises a UserError unless tokenizer.json has a supported vocabulary."""
  model = whole.get('model')
  kind = model.get('type', 'WordPiece') if isinstance(model, dict) else model
  supported = 'WordPiece, byte-level BPE and Unigram vocabularies are'
  vocab = model.get('vocab') if isinstance(model, dict) else None
  errors.require(
      kind in ('WordPiece', 'BPE', 'Unigram') and isinstance(
          vocab, list if kind == 'Unigram' else dict),
      f'{path}: model {reprlib.repr(kind)} is not supported; {supported}')
  if kind == 'Unigram':
    errors.require(
        all(isinstance(row, list) and len(row) == 2 and type(row[0]) is str
            for row in vocab) and len({row[0] for row in vocab}) == len(vocab),
        f'{path}: its vocabulary is not a list of distinct pieces with scores')
    check_text('\n'.join(row[0] for row in vocab), f'{path}: vocabulary')
    return
  if kind == 'BPE':
    errors.require(
        byte_level(whole) is not None,
        f'{path}: model BPE without the pre-tokenizer ByteLevel is not '
        f'supported; {supported}')
    errors.require(
        not model.get('dropout'),
        f'{path}: BPE dropout {model.get("dropout")!r} makes tokens random; '
        'set it to null')
  if not all(type(i) is int for i in vocab.values()) or (
      sorted(vocab.values()) != list(range(len(vocab)))):
    raise errors.UserError(
        f'{path}: its {len(vocab)} tokens are not numbered '
        f'0 … {len(vocab) - 1}')
  check_text('\n'.join(vocab), f'{path}: vocabulary')


def _read_roberta(directory: pathlib.Path, about: dict[str, Any],
                  special: tuple[str, ...]) -> tokenizers.Tokenizer:
  """Reads the tokenizer of vocab.json and merges.txt, as RobertaTokenizerFast.

  Radford et al. (2019) describe its bytes and its pre-tokenizer.
  """
  path, kind = directory / 'vocab.json', about.get('tokenizer_class')
  errors.require(
      kind in BPE_CLASSES,
      f'{directory / "tokenizer_config.json"}: tokenizer_class {kind!r} is not '
      'supported without a tokenizer.json; save the fast tokenizer there')
  vocab, merges = files.read_object(path), directory / 'merges.txt'
  errors.require(merges.is_file(), f'{merges} is missing; fetch it again')
  _check_json_vocabulary(
      {'model': {'type': 'BPE', 'vocab': vocab},
       'pre_tokenizer': {'type': 'ByteLevel'}}, path)
  pairs = []
  for number, line in enumerate(files.read_text(merges).split('\n'), 1):
    if line and not (number == 1 and line.startswith('#version')):
      pair = tuple(line.split(' '))
      errors.require(
          len(pair) == 2 and {*pair, ''.join(pair)} <= vocab.keys(),
          f'{merges}: line {number} {reprlib.repr(line)} is not a pair of '
          'tokens of vocab.json whose union is one, too')
      pairs.append(pair)
  library = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab, pairs, continuing_subword_prefix='', end_of_word_suffix=''))
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  missing = [t for t in special[2:4] if t not in vocab]
  errors.require(not missing, f'{path}: it lacks '
                 f'{", ".join(map(_shown, missing))}, the first or separator '
                 'token of RoBERTa; tokenizer_config.json may name another')
  library.post_processor = tokenizers.processors.RobertaProcessing(
      (special[3], vocab[special[3]]), (special[2], vocab[special[2]]),
      add_prefix_space=False)
  return library


def _read_bert(directory: pathlib.Path, about: dict[str, Any],
               special: tuple[str, ...], lowercase: bool | None,
               ) -> tuple[tokenizers.Tokenizer, bool | None]:
  """Reads the tokenizer of a vocab.txt.

  Also returns whether the directory has it lower-cased, None if unknown; then
  `lowercase` decides, True by default.
  """
  path, kind = directory / 'vocab.txt', about.get('tokenizer_class')
  if not path.is_file():
    slow = sorted(f.name for f in directory.glob('*.model'))
    raise errors.UserError(
        f'{directory}: no vocabulary; expected tokenizer.json, vocab.txt, or '
        'vocab.json with merges.txt' + (
            f'; {slow[0]} is not read: save the fast tokenizer there where '
            'transformers is installed: python -c "import sys, transformers; d '
            '= sys.argv[1]; transformers.AutoTokenizer.from_pretrained(d)'
            f'.save_pretrained(d)" {shlex.quote(str(directory))}'
            if slow else '; of a hub id with a SentencePiece model alone, save '
            'the fast tokenizer of transformers to a directory'))
  errors.require(
      kind in CLASSES,
      f'{directory / "tokenizer_config.json"}: tokenizer_class {kind!r} is not '
      'supported without a tokenizer.json; save the fast tokenizer there')
  vocab, stored = _read_vocabulary(path), about.get('do_lower_case')
  if stored is None and any(
      re.search('[A-Z]', t) for t in vocab
      if not t.startswith('[') and t not in special):
    stored = False  # only a cased vocabulary has capitals
  chosen = next(x for x in (stored, lowercase, True) if x is not None)
  return _pipeline(vocab, chosen, special[1]), stored


def _read_vocabulary(path: pathlib.Path) -> dict[str, int]:
  """Reads {token: id} from vocab.txt.

  Of equal lines the last one counts, as in transformers. The earlier lines get
  names with a space, which no piece of a word has.
  """
  lines = files.read_text(path).rstrip('\n').split('\n')
  last = {token: i for i, token in enumerate(lines)}
  return {token if last[token] == i else f'duplicate of {token} {i}': i
          for i, token in enumerate(lines)}


def _check_vocabulary(library: tokenizers.Tokenizer,
                      directory: pathlib.Path) -> None:
  """Raises a UserError if vocab.txt or .json contradicts tokenizer.json."""
  for name, read in (('vocab.txt', _read_vocabulary),
                     ('vocab.json', files.read_object)):
    if not (directory / name).is_file():
      continue
    lines, ids = read(directory / name), library.get_vocab()
    pieces = library.get_vocab(with_added_tokens=False)
    wrong = [t for t in {**lines, **pieces} if lines.get(t) != ids.get(t)]
    errors.require(
        not wrong, f'{directory}: {name} and tokenizer.json give '
        f'{len(wrong)} tokens another id, first {reprlib.repr(wrong[:1])}; '
        'remove the file that is not of this checkpoint')


def _special_tokens(about: dict[str, Any], names: dict[str, Any],
                    library: tokenizers.Tokenizer | None,
                    directory: pathlib.Path) -> tuple[str, ...]:
  """Returns the special tokens in the order of ROLES.

  A token that the files do not name is the one that tokenizer.json uses, or
  else that of BERT or, in other vocabularies than WordPiece, of RoBERTa.
  """
  used, names_of = {}, SPECIAL
  if library is None and (directory / 'vocab.json').is_file():
    names_of = ROBERTA_SPECIAL
  if library:
    if not isinstance(library.model, tokenizers.models.WordPiece):
      names_of = ROBERTA_SPECIAL
    used['unk_token'] = _unknown_token(library)
    used['pad_token'] = (library.padding or {}).get('pad_token')
    for role in (0, 4):  # MPNet and ALBERT have names of both families
      present = [names[role] for names in (SPECIAL, ROBERTA_SPECIAL)
                 if library.token_to_id(names[role]) is not None]
      if len(present) == 1:
        used[ROLES[role]] = used.get(ROLES[role]) or present[0]
    if library.post_processor:
      pair = library.encode('', '').tokens
      used |= {'cls_token': pair[0], 'sep_token': pair[-1]} if pair else {}
  special = []
  for role, standard in zip(ROLES, names_of, strict=True):
    stored = []
    for source, name in ((about, 'tokenizer_config.json'),
                         (names, 'special_tokens_map.json')):
      token = source.get(role)
      if isinstance(token, dict):
        token = token.get('content')
      if source.get(role) is not None:
        stored.append(check_text(token, f'{directory / name}: {role}'))
    errors.require(
        len(set(stored)) < 2,
        f'{directory}: {role} is {" and ".join(map(_shown, stored))} in '
        'tokenizer_config.json and special_tokens_map.json; correct one')
    special.append(stored[0] if stored else used.get(role) or standard)
  return tuple(special)


def _unknown_token(library: tokenizers.Tokenizer) -> str | None:
  """Returns the token that the model gives for unknown text, if it names one.

  Byte-level BPE knows every text.
  """
  model = json.loads(library.to_str())['model']
  if model['type'] == 'Unigram':
    number = model.get('unk_id')
    return None if number is None else model['vocab'][number][0]
  return model.get('unk_token')


def _set_normalizer(library: tokenizers.Tokenizer, about: dict[str, Any],
                    where: pathlib.Path) -> bool:
  """Gives the settings to a BertNormalizer; returns whether case is folded.

  Raises:
    UserError: another normaliser contradicts a setting.
  """
  fold = (library.normalizer.normalize_str if library.normalizer
          else lambda text: text)
  settings = {name: about[name] for name in NORMALIZER
              if about.get(name) is not None}
  state = (json.loads(library.normalizer.__getstate__())
           if library.normalizer else {})
  if state.pop('type', None) == 'BertNormalizer':
    state |= {NORMALIZER[name]: value for name, value in settings.items()}
    library.normalizer = tokenizers.normalizers.BertNormalizer(**state)
    return state['lowercase']
  folds = {'do_lower_case': 'a' in fold('A'),
           'strip_accents': 'e' in fold('\u00e9')}
  for name, value in folds.items():
    errors.require(
        settings.get(name) in (None, value),
        f'{where}: {name}={settings.get(name)}, but the normalizer of '
        f'tokenizer.json has {value}; correct one of the files')
  return folds['do_lower_case']


def _check_model(library: tokenizers.Tokenizer, about: dict[str, Any],
                 where: pathlib.Path) -> None:
  """Raises a UserError if a setting of WordPiece contradicts the vocabulary."""
  model = library.model
  if not isinstance(model, tokenizers.models.WordPiece):
    unknown = _unknown_token(library)
    errors.require(
        unknown in (None, about['unk_token']),
        f'{where}: unk_token={reprlib.repr(about["unk_token"])}, but the '
        f'tokenizer has {unknown!r}; correct one of the files')
    return
  for name, value in (
      ('unk_token', model.unk_token),
      ('wordpieces_prefix', model.continuing_subword_prefix),
      ('max_input_chars_per_word', model.max_input_chars_per_word)):
    errors.require(
        about.get(name) in (None, value),
        f'{where}: {name}={reprlib.repr(about.get(name))}, but the tokenizer '
        f'has {value!r}; write the value into tokenizer.json')


def _set_prefix_space(library: tokenizers.Tokenizer, about: dict[str, Any],
                      where: pathlib.Path) -> None:
  """Gives add_prefix_space to the pre-tokenizer, as transformers does.

  Raises:
    UserError: the pre-tokenizer has no such setting.
  """
  value = about.get('add_prefix_space')
  if value is None or isinstance(library.model, tokenizers.models.WordPiece):
    return
  state = json.loads(library.pre_tokenizer.__getstate__())
  if state['type'] == 'ByteLevel' and type(value) is bool:
    state.pop('type')
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        **state | {'add_prefix_space': value})
    return
  level = byte_level({'pre_tokenizer': state})
  stored = level['add_prefix_space'] if level else True  # that of Metaspace
  errors.require(
      value is stored, f'{where}: add_prefix_space={reprlib.repr(value)} is '
      f'not supported; the pre-tokenizer of tokenizer.json has {stored}')


def _add_tokens(library: tokenizers.Tokenizer, about: dict[str, Any],
                names: dict[str, Any], numbered: dict[str, Any],
                special: tuple[str, ...], directory: pathlib.Path) -> None:
  """Adds the tokens that files beside tokenizer.json name, as transformers."""
  extra, path = {}, directory / 'tokenizer_config.json'
  decoder = about.get('added_tokens_decoder')
  for source in (about, {} if decoder is not None else names):
    for token in _extra_tokens(source, path):
      extra[token.content] = token
  present = library.get_added_tokens_decoder()
  rows = [*(decoder or {}).items()]
  if decoder is None:
    path = directory / 'added_tokens.json'
    rows = [(i, {'content': token, 'special': token in {*extra, *special}})
            for token, i in numbered.items()]
  added = {}
  for i, fields in rows:
    errors.require(
        type(i) is int or (type(i) is str and re.fullmatch('[0-9]{1,9}', i)),
        f'{path}: the id of {reprlib.repr(fields)} is {reprlib.repr(i)}, '
        'expected a whole number')
    if decoder is not None or i not in present:
      added[int(i)] = _added_token(fields, path)
  new = [token for i, token in sorted(added.items())
         if repr(present.get(i)) != repr(token)
         and not (token.content in special
                  and library.token_to_id(token.content) == i)]
  known = {token.content for token in (*present.values(), *new)}
  library.add_tokens(new + [t for name, t in extra.items()
                            if name not in known])
  for i, token in added.items():
    _check_id(library, token.content, i, path)
  split = about.get('never_split') or []
  errors.require(
      set(map(str, split)) <= {*special, *extra},
      f'{directory / "tokenizer_config.json"}: never_split='
      f'{reprlib.repr(split)} is not supported; add its words as tokens')


def _extra_tokens(source: dict[str, Any], path: pathlib.Path
                  ) -> list[tokenizers.AddedToken]:
  """Returns the special tokens without a role, by their names in both APIs.

  `extra_special_tokens` is a list in transformers 5 and a dict in 4.57.
  """
  out = []
  for name in ('additional_special_tokens', 'extra_special_tokens'):
    tokens = source.get(name) or []
    errors.require(isinstance(tokens, (list, dict)),
                   f'{path}: {name} is {reprlib.repr(tokens)}, expected a list')
    out += [_added_token(t if isinstance(t, dict) else {'content': t}, path,
                         special=True)
            for t in (tokens.values() if isinstance(tokens, dict) else tokens)]
  return out


def _added_token(fields: Any, path: pathlib.Path,
                 **more: bool) -> tokenizers.AddedToken:
  try:
    fields = {k: v for k, v in fields.items() if k != '__type'} | more
    fields['content'] = check_text(fields['content'], 'content')
    # The library's default is no constant: special tokens are not normalised.
    fields.setdefault('normalized', not fields.get('special', False))
    return tokenizers.AddedToken(**fields)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise errors.UserError(
        f'{path}: {reprlib.repr(fields)} is not an added token ({e})'
    ) from None


def _check_id(library: tokenizers.Tokenizer, token: str, i: int,
              path: pathlib.Path) -> None:
  errors.require(
      library.token_to_id(token) == i,
      f'{path}: the token {token!r} has the id {i}, but follows from the '
      f'vocabulary as {library.token_to_id(token)}; number added tokens '
      'without a gap behind the vocabulary')


def _read_layout(library: tokenizers.Tokenizer, special: tuple[str, ...],
                 directory: pathlib.Path) -> tuple[int, int]:
  """Returns (separators, context_type) of a Tokenizer.

  Raises:
    UserError: the rows of tokenizer.json are laid out otherwise.
  """
  path = directory / 'tokenizer.json'
  if library.post_processor is None:
    errors.require(
        isinstance(library.model, tokenizers.models.WordPiece),
        f'{path}: it has no post_processor, which says where its special '
        'tokens stand; save the fast tokenizer again')
    return 1, 1
  library.no_padding()
  pair = library.encode('a', 'b')
  a, b = (library.encode(x, add_special_tokens=False).tokens for x in 'ab')
  _, _, first, separator, _ = special
  for count, kind in ((1, 1), (2, 0), (1, 0), (2, 1)):
    if (pair.tokens == [first, *a, *[separator] * count, *b, separator]
        and pair.type_ids == [0] * (len(a) + count + 1)
        + [kind] * (len(b) + 1)):
      return count, kind
  raise errors.UserError(
      f'{path}: its post_processor makes '
      f'{" ".join(map(_shown, pair.tokens))} with token types {pair.type_ids} '
      f'of the pair (a, b); only {_shown(first)} A {_shown(separator)} B '
      f'{_shown(separator)} with token types 0 and 1, or with two '
      f'{_shown(separator)} between A and B, or with type 0 alone, is '
      'supported')


def _check_closed(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
  """Raises a UserError if a special token that is typed in a text is matched.

  WordPiece tokenizers have this by their pre-tokenizers.
  """
  if tokenizer.is_wordpiece:
    return
  roles = {tokenizer.index[t] for t in tokenizer.special[2:]
           if t in tokenizer.index} | {tokenizer.pad_id}
  text = ' '.join(f'{t} a{t}a' for t in tokenizer.special)
  matched = roles.intersection(tokenizer.encode([text]).ids.tolist())
  errors.require(
      not matched, f'{directory / "tokenizer.json"}: it matches '
      f'{", ".join(_shown(tokenizer.vocab[i]) for i in sorted(matched))} in '
      'the text of a question or context, where it would become a special '
      'token; such a vocabulary is not supported')


def _vocabulary(library: tokenizers.Tokenizer,
                directory: pathlib.Path) -> tuple[str, ...]:
  ids = library.get_vocab()
  errors.require(
      sorted(ids.values()) == list(range(len(ids))),
      f'{directory}: its {len(ids)} tokens, added ones included, are not '
      f'numbered 0 … {len(ids) - 1}')
  return tuple(sorted(ids, key=ids.get))


def _definition(library: tokenizers.Tokenizer, lowercase: bool,
                special: tuple[str, ...]) -> str:
  """Returns the definition of a tokenizer, '' if it is BERT's.

  Special tokens in the vocabulary are left out: they are not matched in texts.
  """
  whole = json.loads(library.to_str())
  pieces = whole['model']['vocab']
  if whole['model']['type'] == 'Unigram':
    pieces = {piece for piece, _ in pieces}
  whole |= dict.fromkeys(('truncation', 'padding', 'post_processor'))
  whole['added_tokens'] = [
      token for token in whole['added_tokens']
      if token['content'] not in special or token['content'] not in pieces]
  if _is_wordpiece(whole):
    standard = json.loads(_pipeline(pieces, lowercase, special[1]).to_str())
    if whole | {'decoder': standard['decoder']} == standard:
      return ''
  return json.dumps(whole, ensure_ascii=False)


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
