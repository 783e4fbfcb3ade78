"""Texts of twelve scripts, and checkpoints with tokenizers of several kinds.

Everything is generated from code points with a fixed seed, so that the script
that records the results of transformers and the tests see equal inputs. The
code points are older than Unicode 10: their properties are equal in Python and
in the library `tokenizers`.
"""

from collections.abc import Iterable
import functools
import json
import pathlib
import random
import unicodedata
import zlib

import tokenizers

ROLES = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
OTHER_ROLES = {'pad_token': '<pad>', 'unk_token': '<unk>', 'cls_token': '<s>',
               'sep_token': '</s>', 'mask_token': '<mask>'}


def span(first: int, last: int) -> str:
  """Returns the assigned characters `first` to `last`."""
  return ''.join(c for c in map(chr, range(first, last + 1))
                 if unicodedata.category(c) != 'Cn')


# Letters and marks of a script; each word has letters, and may have marks.
SCRIPTS = {
    'latin': (span(0x41, 0x5a) + span(0x61, 0x7a) + span(0xc0, 0x17f),
              span(0x300, 0x316)),
    'greek': (span(0x391, 0x3c9) + span(0x1f00, 0x1f15), '\u0301\u0313\u0345'),
    'cyrillic': (span(0x410, 0x44f) + 'ёЁїЇўЎ', '\u0301\u0306\u0308'),
    'arabic': (span(0x627, 0x64a), span(0x64b, 0x652) + '\u200c\u200d\u200f'),
    'hebrew': (span(0x5d0, 0x5ea), span(0x5b0, 0x5bc) + '\u05bf\u200e'),
    'devanagari': (span(0x905, 0x939) + '\u093e\u093f\u0940',
                   '\u0901\u0902\u093c\u0941\u0942\u0947\u094d\u200d'),
    'tamil': (span(0xb85, 0xb95) + '\u0bbe\u0bbf', '\u0bc0\u0bcd'),
    'thai': (span(0xe01, 0xe2e) + '\u0e30\u0e32\u0e40\u0e41',
             '\u0e31\u0e34\u0e35\u0e36\u0e37\u0e48\u0e49'),
    'han': (span(0x4e00, 0x4e3f) + '東京北大\u3400\U00020000', '\ufe00'),
    'japanese': (span(0x3041, 0x3096) + span(0x30a1, 0x30fa) + 'ｱｲ',
                 '\u3099\u309a'),
    'hangul': (span(0xac00, 0xac3f) + span(0x1100, 0x1107)
               + span(0x1161, 0x1167) + span(0x11a8, 0x11ac), '\u302e'),
    'emoji': (span(0x1f600, 0x1f61f) + '❤👩👨💻🚀🇩🇪🏽', '\ufe0f\u200d\u20e3'),
}
ODD = '\0\x01\x7f\x85\xad\u200b\u2028\ufeff\ufffd\ue000ﬁ²½ßİẞ…—“”«»„¿。、·'
GAPS = (' ', ' ', ' ', '  ', '\t', '\n', '\r\n', '\xa0', '\u3000', '\u2003',
        '', '-', ', ', '. ', " '", '(', ')', '/')
# Kinds of tests/golden/record_roberta.py.
BEYOND_WORDPIECE = ('roberta', 'xlm_roberta')
# The tokenizer.json of DeBERTa as transformers 4 and 5 write it.
DEBERTA = ('deberta_4', 'deberta_5')
ADDED = ('covid-19', 'ÉTÉ', '[E1]', 'strip', 'whole')


def word(rng: random.Random, letters: str, marks: str) -> str:
  length = rng.choice((1, 2, 3, 4, 5, 9))
  return ''.join(
      rng.choice(letters) + rng.choice(marks) * (rng.random() < 0.3)
      for _ in range(length))


@functools.cache
def words() -> dict[str, list[str]]:
  """Returns forty words of each script; about half are vocabulary entries."""
  rng = random.Random(1)
  return {name: [word(rng, *pools) for _ in range(40)]
          for name, pools in SCRIPTS.items()}


@functools.cache
def texts(count: int = 2000) -> list[str]:
  """Returns texts, most of them in one script."""
  rng = random.Random(2)
  out = []
  for i in range(count):
    name = [*SCRIPTS][i % len(SCRIPTS)]
    parts = []
    for _ in range(rng.randint(1, 6)):
      source = rng.choice([*SCRIPTS]) if rng.random() < 0.1 else name
      chosen = (rng.choice(words()[source]) if rng.random() < 0.6
                else word(rng, *SCRIPTS[source]))
      if rng.random() < 0.1:
        chosen = rng.choice(ADDED)
      if rng.random() < 0.02:  # about the limit of 100 characters
        chosen = rng.choice(SCRIPTS[source][0]) * rng.choice((99, 100, 101))
      if rng.random() < 0.1:
        chosen = rng.choice((str.upper, str.lower, str.title))(chosen)
      if rng.random() < 0.1:
        chosen = unicodedata.normalize(
            rng.choice(('NFC', 'NFD', 'NFKC')), chosen)
      if rng.random() < 0.15:
        place = rng.randint(0, len(chosen))
        chosen = chosen[:place] + rng.choice(ODD) + chosen[place:]
      parts += [chosen, rng.choice(GAPS)]
    out.append(''.join(parts[:-1] if rng.random() < 0.8 else parts))
  return out


@functools.cache
def pieces() -> tuple[str, ...]:
  """Returns WordPieces: letters, parts of words and whole words, no roles."""
  rng = random.Random(3)
  chars = {c for text in texts() for c in text if not c.isspace()}
  chars |= {d for c in chars for form in (c.lower(), c.upper())
            for d in (form + unicodedata.normalize('NFD', form))}
  whole = [w for group in words().values() for w in group[::2]]
  whole += [f(w) for w in whole for f in (
      str.lower, lambda w: unicodedata.normalize('NFD', w.lower()))]
  whole += [''.join(c for c in w if unicodedata.category(c) not in ('Mn', 'Cf'))
            for w in whole]
  parts = [w[i:i + 2] for w in whole for i in range(len(w) - 1)]
  out = {c for c in sorted(chars) if rng.random() < 0.95}
  out |= {'##' + c for c in sorted(chars) if rng.random() < 0.95}
  out |= {*whole, *parts, *('##' + p for p in parts)}
  return tuple(sorted(w for w in out if w.removeprefix('##') and not any(
      c.isspace() for c in w)))


def _write(directory: pathlib.Path, vocab: list[str],
           **contents: dict) -> pathlib.Path:
  """Writes vocab.txt and JSON files; names of arguments are their stems."""
  directory.mkdir(parents=True)
  text = '\n'.join(vocab) + '\n'
  (directory / 'vocab.txt').write_text(text, encoding='utf-8')
  for name, content in contents.items():
    (directory / f'{name}.json').write_text(json.dumps(content))
  return directory


def _sequence(directory: pathlib.Path, vocab: list[str]) -> pathlib.Path:
  """Writes a tokenizer.json with sequences of normalisers and splitters."""
  library = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {token: i for i, token in enumerate(vocab)}, unk_token='[UNK]',
      max_input_chars_per_word=12))
  normalizers, splitters = tokenizers.normalizers, tokenizers.pre_tokenizers
  library.normalizer = normalizers.Sequence([
      normalizers.Replace(tokenizers.Regex('[\u200b\xad]'), ''),
      normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
  library.pre_tokenizer = splitters.Sequence([
      splitters.WhitespaceSplit(), splitters.Punctuation(),
      splitters.Digits(individual_digits=True)])
  library.add_special_tokens([*ROLES, '[E1]'])
  library.add_tokens([tokenizers.AddedToken('covid-19', single_word=True)])
  library.post_processor = tokenizers.processors.BertProcessing(
      ('[SEP]', vocab.index('[SEP]')), ('[CLS]', vocab.index('[CLS]')))
  directory.mkdir(parents=True)
  library.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **{f'{t[1:-1].lower()}_token': t for t in ROLES}}))
  return directory


def write_checkpoints(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes the tokenizer files of every kind; returns their directories."""
  vocab = [*ROLES, *pieces()]
  new = {token: len(vocab) + i for i, token in enumerate(ADDED[:3])}
  flags = {'single_word': False, 'lstrip': False, 'rstrip': False,
           'normalized': True, 'special': False}
  decoder = {
      '0': {**flags, 'content': '[PAD]', 'normalized': False, 'special': True},
      str(len(vocab)): {**flags, 'content': 'strip', 'lstrip': True,
                        'rstrip': True},
      str(len(vocab) + 1): {**flags, 'content': 'whole', 'single_word': True,
                            'normalized': False}}
  make = lambda name, config, **more: _write(
      root / name, vocab, tokenizer_config=config, **more)
  return {
      'cased': make('cased', {'do_lower_case': False}),
      'uncased': make('uncased', {'do_lower_case': True}),
      'accents': make('accents', {
          'do_lower_case': True, 'strip_accents': False}),
      'stripped': make('stripped', {
          'do_lower_case': False, 'strip_accents': True}),
      'chinese': _write(root / 'chinese', [
          *ROLES, *(p for p in pieces() if p.lower() == p)],
                        tokenizer_config={'do_lower_case': False}),
      'joined': make('joined', {
          'do_lower_case': True, 'tokenize_chinese_chars': False}),
      'added': _write(
          root / 'added', [*OTHER_ROLES.values(), *pieces()],
          tokenizer_config={'do_lower_case': True, 'model_max_length': 128},
          added_tokens=new, special_tokens_map={
              **OTHER_ROLES, 'additional_special_tokens': ['[E1]']}),
      'flags': make('flags', {
          'do_lower_case': True, 'added_tokens_decoder': decoder,
          'model_max_length': 10**30}),
      'sequence': _sequence(root / 'sequence', vocab)}


def deberta_tokenizer(kind: str) -> tokenizers.Tokenizer:
  """Returns a tokenizer like DeBERTa's, with the pieces of a few scripts.

  NFKC stands for the character map of SentencePiece in files of transformers 4.
  """
  rng, normalizers = random.Random(5), tokenizers.normalizers
  letters = sorted({c for text in texts() for c in text if c.isprintable()})
  whole = ['\u2581' + w[:4] for group in words().values() for w in group[::3]]
  library = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [*((token, 0.0) for token in ('[PAD]', '[CLS]', '[SEP]', '[UNK]')),
       ('\u2581', -4.0),
       *((piece, round(-5 - 5 * rng.random(), 3)) for piece in dict.fromkeys(
           [*letters[1:300], *letters[300::5], *whole]))], 3))
  library.normalizer = normalizers.Sequence([
      normalizers.Strip(), normalizers.NFKC(),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')]
      if kind == 'deberta_4' else [
          normalizers.Replace(tokenizers.Regex(r'\s{2,}|[\n\r\t]'), ' '),
          normalizers.NFC(), normalizers.Strip(left=False, right=True)])
  library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Metaspace()])
  library.decoder = tokenizers.decoders.Metaspace()
  library.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'])
  library.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS]:0 $A:0 [SEP]:0', pair='[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1',
      special_tokens=[('[CLS]', 1), ('[SEP]', 2)])
  return library


def is_mark(kind: str, c: str) -> bool:
  """Returns whether the tokenizer of a kind removes c, from Unicode's tables.

  Whitespace does not count.
  """
  category = unicodedata.category(c)
  if kind in (*BEYOND_WORDPIECE, *DEBERTA):  # NF(K)C composes marks and jamo
    return kind != 'roberta' and (
        (kind == 'xlm_roberta' and c in '\u200b\xad\ufeff')
        or category[0] == 'M' or '\u1160' <= c <= '\u11ff')
  if kind == 'albert':  # its accents are removed after NFKD
    return category[0] == 'M'
  if kind == 'sequence':
    return category in ('Mn', 'Mc', 'Me') or c in '\u200b\xad'
  stripped = kind not in ('cased', 'accents', 'chinese')
  return not c.isspace() and (c == '\ufffd' or category[0] == 'C' or (
      stripped and category == 'Mn'))


def core(kind: str, text: str, begin: int, end: int) -> tuple[int, int]:
  """Returns [begin, end) without marks and spaces at its ends.

  A token of BPE or Unigram without other characters has the range [0, 0).
  """
  outer = lambda c: c.isspace() or is_mark(kind, c)
  while begin < end and outer(text[begin]):
    begin += 1
  while begin < end and outer(text[end - 1]):
    end -= 1
  if kind in (*BEYOND_WORDPIECE, *DEBERTA, 'albert') and begin >= end:
    return 0, 0
  return begin, end


def checksum(kind: str, text: str, ids: Iterable[int],
             offsets: Iterable[tuple[int, int]]) -> int:
  """Returns the CRC-32 of ids and offsets, marks and outer spaces left out."""
  rows = [(int(i), *core(kind, text, int(a), int(b)))
          for i, (a, b) in zip(ids, offsets, strict=True)]
  return zlib.crc32(repr(rows).encode())


def assert_covered(kind: str, text: str, offsets) -> None:
  """Checks that tokens cover a text but for spaces and marks between spaces."""
  covered = {i for a, b in offsets for i in range(a, b)}
  for i, c in enumerate(text):
    if i not in covered and not c.isspace():
      assert is_mark(kind, c)
      assert not {i - 1, i + 1} & covered
