"""WordPiece with offsets: exact text, closed special tokens."""

import json

import pytest

from qa_jax import errors
from qa_jax.data import tokenizer

TEXTS = ['The Ørsted ship left Zürich in 1901.', 'naïve café 東京 [SEP] x']


@pytest.fixture(scope='module')
def words():
  return tokenizer.train(TEXTS * 3, vocab_size=300)


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


def test_typed_special_tokens_are_text(words):
  (ids, _), = rows(words.encode(['[SEP] [CLS] [PAD] [MASK]']))
  assert not {words.sep_id, words.cls_id, words.pad_id} & set(ids.tolist())


@pytest.mark.parametrize('size', [90, 120, 300])
def test_same_text_learns_the_same_vocabulary(size):
  learned = {tokenizer.train(TEXTS, vocab_size=size).vocab for _ in range(8)}
  assert len(learned) == 1


def test_saved_vocabulary_loads_equal(words, tmp_path):
  words.save(tmp_path)
  assert tokenizer.from_directory(tmp_path) == words


def test_tokenizer_json_loads_without_its_truncation(words, tmp_path):
  (tmp_path / 'tokenizer.json').write_text(json.dumps({
      'truncation': {'max_length': 2}, 'normalizer': {'lowercase': True},
      'model': {'type': 'WordPiece', 'vocab': words.index}}))
  loaded = tokenizer.from_directory(tmp_path)
  assert loaded == words
  assert len(loaded.encode([TEXTS[0]]).ids) > 2


def test_wrong_case_is_refused(words, tmp_path):
  words.save(tmp_path)
  with pytest.raises(errors.UserError, match=r'set data\.lowercase=True'):
    tokenizer.from_directory(tmp_path, lowercase=False)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('other.txt', b'x', 'no vocabulary'),
    ('vocab.txt', b'a\nb\n', r'lacks \[PAD\]'),
    ('vocab.txt', b'\xff\xfe', 'not UTF-8'),
    ('tokenizer.json', b'{', 'not JSON'),
    ('tokenizer.json', b'[]', 'expected a JSON object'),
    ('tokenizer.json', b'{"model": {"type": "BPE"}}', "'BPE'"),
])
def test_bad_vocabulary_is_one_line(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=message) as e:
    tokenizer.from_directory(tmp_path)
  assert '\n' not in str(e.value)
