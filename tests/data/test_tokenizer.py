"""WordPiece with offsets: exact text, closed special tokens."""

import json
import unicodedata

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers

from qa_jax import errors
from qa_jax.data import tokenizer

TEXTS = ['The Ørsted ship left Zürich in 1901.', 'naïve café 東京 [SEP] x']


@pytest.fixture(scope='module')
def words():
  return tokenizer.train_tokenizer(TEXTS * 3, vocab_size=300)


def rows(ragged):
  return [(ragged.ids[a:b], ragged.offsets[a:b])
          for a, b in zip(ragged.ptr[:-1], ragged.ptr[1:], strict=True)]


@pytest.mark.parametrize('text', [*TEXTS, 'é' * 30, 'a\x00b', ' \t\n', ''])
def test_offsets_cover_the_text_but_spaces_and_controls(words, text):
  (_, offsets), = rows(words.encode([text]))
  covered = {i for a, b in offsets for i in range(a, b)}
  rest = [c for i, c in enumerate(text) if i not in covered]
  assert all(c.isspace() or c == '\x00' for c in rest)


def test_accents_and_case_are_folded_but_offsets_are_of_the_original(words):
  (ids, offsets), = rows(words.encode(['CAFÉ']))
  (plain, _), = rows(words.encode(['cafe']))
  assert list(ids) == list(plain)
  assert (offsets[0][0], offsets[-1][1]) == (0, 4)


# What has come out of tokenizers wrong, in one system or another: controls,
# joiners, combining marks, letters that lower-casing makes two of, no spaces.
ODD = ('aSz1.-[#]  \t\n\r\0\x01\x7f\x85\xa0\xad\u0301\u0308\u0591\u200b\u200d'
       '\u2028\u3000\ufe0f\ufeff\ufffd\ue000\U0010ffff東京かカ한éüÅøİıßŒﬁⅷא👩🏽🇩')


@pytest.fixture(scope='module')
def odd_words():
  return tokenizer.train_tokenizer([ODD, ' '.join(ODD)], vocab_size=300)


def fold(text: str) -> str:
  """Normalizes a text like BERT, with the Unicode tables of Python."""
  return ''.join(
      c for c in unicodedata.normalize('NFD', text) if c != '\ufffd'
      and unicodedata.category(c) not in ('Cc', 'Cf', 'Co', 'Mn')).lower()


@hypothesis.given(st.text(max_size=30) | st.text(st.sampled_from(ODD))
                  | st.sampled_from(ODD).map(lambda c: 300 * c))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_offsets_of_any_text_are_in_order_and_spell_the_tokens(odd_words, text):
  ragged = odd_words.encode([text])
  flat = ragged.offsets.reshape(-1)
  assert (np.diff(flat) >= 0).all() and (np.diff(ragged.offsets) > 0).all()
  assert not len(flat) or (flat[0] >= 0 and flat[-1] <= len(text))
  for token, (begin, end) in zip(ragged.ids, ragged.offsets, strict=True):
    piece = odd_words.vocab[token].removeprefix('##')
    assert piece in ('[UNK]', fold(text[begin:end]))


@pytest.mark.parametrize('text', [
    'a' * 10**5, '\u0301' * 10**5, '東' * 10**5, '\0' * 10**5, '👩' * 10**5])
def test_a_word_of_any_length_is_tokenised(words, text):
  offsets = words.encode([text]).offsets
  assert len(offsets) == {'a': 1, '東': 10**5, '👩': 1}.get(text[0], 0)
  assert offsets.max(initial=0) <= len(text)


@hypothesis.given(st.lists(st.text(st.sampled_from(ODD), max_size=9)))
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
def test_a_text_is_tokenised_alike_alone_and_among_others(odd_words, texts):
  for text, (ids, offsets) in zip(texts, rows(odd_words.encode(texts)),
                                  strict=True):
    alone = odd_words.encode([text])
    np.testing.assert_array_equal(alone.ids, ids)
    np.testing.assert_array_equal(alone.offsets, offsets)


def test_typed_special_tokens_are_text(words):
  (ids, _), = rows(words.encode(['[SEP] [CLS] [PAD] [MASK]']))
  assert not {words.sep_id, words.cls_id, words.pad_id} & set(ids.tolist())


@pytest.mark.parametrize('size', [90, 120, 300])
def test_same_text_learns_the_same_vocabulary(size):
  learned = {
      tokenizer.train_tokenizer(TEXTS, vocab_size=size).vocab for _ in range(8)
  }
  assert len(learned) == 1


def test_saved_vocabulary_loads_equal(words, tmp_path):
  words.save(tmp_path)
  assert tokenizer.read_tokenizer(tmp_path) == words


def test_tokenizer_json_loads_without_its_truncation(words, tmp_path):
  whole = tokenizers.Tokenizer.from_str(words.to_json())
  whole.enable_truncation(2)
  whole.save(str(tmp_path / 'tokenizer.json'))
  loaded = tokenizer.read_tokenizer(tmp_path)
  assert loaded == words
  assert len(loaded.encode([TEXTS[0]]).ids) > 2


def test_wrong_case_is_refused(words, tmp_path):
  words.save(tmp_path)
  with pytest.raises(errors.UserError, match=r'set data\.lowercase=True'):
    tokenizer.read_tokenizer(tmp_path, lowercase=False)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('other.txt', b'x', 'no vocabulary'),
    ('vocab.txt', b'a\nb\n', r'lacks \[PAD\]'),
    ('vocab.txt', b'\xff\xfe', 'not UTF-8'),
    ('vocab.txt', b'', r'lacks \[PAD\]'),
    ('tokenizer_config.json', b'{"do_lower_case": "yes"}', "is 'yes'"),
    ('tokenizer.json', b'{"model": []}', r'model \[\] is not supported'),
    ('tokenizer.json', b'{"model": {"vocab": []}}', 'WordPiece'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0, "b": 2}}}', '0 … 1'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0, "b": 0}}}', '0 … 1'),
    ('tokenizer.json', b'{"model": {"vocab": {"a": "0", "b": 1}}}', '0 … 1'),
    ('tokenizer.json', b'{"model": {"vocab": {"\\ud800": 0}}}', 'U\\+D800'),
    ('tokenizer.json', b'{', 'not JSON'),
    ('tokenizer.json', b'[]', 'expected a JSON object'),
    ('tokenizer.json', b'{"model": {"type": "BPE"}}', "'BPE'"),
])
def test_bad_vocabulary_is_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=message) as e:
    tokenizer.read_tokenizer(tmp_path)
  assert '\n' not in str(e.value)


def test_capitals_in_a_bare_vocabulary_make_it_cased(tmp_path):
  (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\nParis\n')
  assert not tokenizer.read_tokenizer(tmp_path).lowercase
