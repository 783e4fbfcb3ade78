"""WordPiece with offsets: equal to transformers, exact text, closed roles."""

import json
import pathlib
import unicodedata

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers

from qa_jax import errors
from qa_jax.data import tokenizer
from qa_jax.data import tokenizer_files
from tests.common import scripts

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
TEXTS = ['The Ørsted ship left Zürich in 1901.', 'naïve café 東京 [SEP] x']
KINDS = ('cased', 'uncased', 'accents', 'stripped', 'chinese', 'joined',
         'added', 'flags', 'sequence')


@pytest.fixture(scope='module')
def trained():
  return tokenizer.train_tokenizer(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  return scripts.write_checkpoints(tmp_path_factory.mktemp('kinds') / 'x')


@pytest.fixture(scope='module')
def kinds(directories):
  assert directories.keys() == {*KINDS}
  return {kind: tokenizer_files.read_tokenizer(directory)
          for kind, directory in directories.items()}


def rows(ragged):
  return [(ragged.ids[a:b], ragged.offsets[a:b])
          for a, b in zip(ragged.ptr[:-1], ragged.ptr[1:], strict=True)]


def tokens(wordpiece, text):
  return [wordpiece.vocab[i] for i in wordpiece.encode([text]).ids]


def test_a_learned_vocabulary_has_its_size_or_all_letters():
  texts = ['abcd ' * 3, 'dcba abcd']
  assert len(tokenizer.train_tokenizer(texts, vocab_size=14).vocab) == 14
  small = tokenizer.train_tokenizer(texts, vocab_size=6)
  assert set(small.vocab) == {*tokenizer.SPECIAL, *'abcd',
                              *('##' + c for c in 'abcd')}


def test_accents_and_case_are_folded_but_offsets_are_of_the_original(trained):
  (ids, offsets), = rows(trained.encode(['CAFÉ']))
  (plain, _), = rows(trained.encode(['cafe']))
  assert list(ids) == list(plain)
  assert (offsets[0][0], offsets[-1][1]) == (0, 4)


# Characters that some tokenizers treat wrongly: controls, joiners, combining
# marks, letters that become two in lower case, scripts without spaces.
ODD = ('aSz1.-[#]  \t\n\r\0\x01\x7f\x85\xa0\xad\u0301\u0308\u0591\u200b\u200d'
       '\u2028\u3000\ufe0f\ufeff\ufffd\ue000\U0010ffff東京かカ한éüÅøİıßŒﬁⅷא👩🏽🇩')


@pytest.fixture(scope='module')
def trained_on_odd():
  return tokenizer.train_tokenizer([ODD, ' '.join(ODD)], vocab_size=300)


def fold(text: str) -> str:
  """Normalizes a text like BERT, with the Unicode tables of Python."""
  return ''.join(
      c for c in unicodedata.normalize('NFD', text) if c != '\ufffd'
      and unicodedata.category(c) not in ('Cc', 'Cf', 'Co', 'Mn')).lower()


@hypothesis.given(st.text(max_size=30) | st.text(st.sampled_from(ODD))
                  | st.sampled_from(ODD).map(lambda c: 300 * c))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_offsets_of_any_text_are_in_order_and_spell_the_tokens(
    trained_on_odd, text):
  ragged = trained_on_odd.encode([text])
  flat = ragged.offsets.reshape(-1)
  assert (np.diff(flat) >= 0).all() and (np.diff(ragged.offsets) > 0).all()
  assert not len(flat) or (flat[0] >= 0 and flat[-1] <= len(text))
  for token, (begin, end) in zip(ragged.ids, ragged.offsets, strict=True):
    piece = trained_on_odd.vocab[token].removeprefix('##')
    assert piece in ('[UNK]', fold(text[begin:end]))


@pytest.mark.parametrize('text', [
    'a' * 10**5, '\u0301' * 10**5, '東' * 10**5, '\0' * 10**5, '👩' * 10**5])
def test_a_word_of_any_length_is_tokenised(trained, text):
  offsets = trained.encode([text]).offsets
  assert len(offsets) == {'a': 1, '東': 10**5, '👩': 1}.get(text[0], 0)
  assert offsets.max(initial=0) <= len(text)


@hypothesis.given(st.lists(st.text(st.sampled_from(ODD), max_size=9)))
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
def test_a_text_is_tokenised_alike_alone_and_among_others(
    trained_on_odd, texts):
  for text, (ids, offsets) in zip(texts, rows(trained_on_odd.encode(texts)),
                                  strict=True):
    alone = trained_on_odd.encode([text])
    np.testing.assert_array_equal(alone.ids, ids)
    np.testing.assert_array_equal(alone.offsets, offsets)


# --- ids and offsets of transformers


@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_offsets_are_those_of_transformers(kinds, kind):
  """tests/golden/record_tokenizers.py recorded the checksums."""
  texts = scripts.texts()
  recorded = np.load(GOLDEN / 'tokenizers_golden.npz')[kind]
  different = [
      text for text, row, expected in zip(
          texts, rows(kinds[kind].encode(texts)), recorded, strict=True)
      if scripts.checksum(kind, text, *row) != expected]
  assert not different


def test_the_kinds_of_tokenizers_differ(kinds):
  """Equal results for two kinds would make the test above weaker."""
  texts = scripts.texts()[:200]
  results = {json.dumps([t.vocab[i] for i in t.encode(texts).ids])
             for t in kinds.values()}
  assert len(results) == len(KINDS)


# --- characters that the normaliser removes


LETTERS = 'aéZßяاאกक한東か'
MARKS = ('\u0301\u0308\u064e\u0651\u05b8\u05bf\u0e31\u0e48\u093c\u094d\ufe0f'
         '\ufe00\u200d\u200c\u200b\u200e\xad\ufeff\x01\0')
MARKED = st.builds(
    lambda before, letters: before + ''.join(letters),
    st.text(st.sampled_from(MARKS), max_size=2),
    st.lists(st.builds(lambda c, marks: c + marks, st.sampled_from(LETTERS),
                       st.text(st.sampled_from(MARKS), max_size=3)),
             min_size=1, max_size=4))


@hypothesis.given(st.lists(MARKED, min_size=1, max_size=4),
                  st.sampled_from(KINDS))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_the_span_of_a_whole_word_returns_the_word(kinds, words, kind):
  offsets = kinds[kind].encode([' '.join(words)]).offsets
  begin = 0
  for word in words:
    end = begin + len(word)
    inside = offsets[(offsets[:, 0] < end) & (offsets[:, 1] > begin)]
    assert (inside[0, 0], inside[-1, 1]) == (begin, end), ascii(word)
    begin = end + 1


@hypothesis.given(
    st.text(st.characters(exclude_categories=('Cn', 'Cs')), max_size=30)
    | st.text(st.sampled_from(ODD + LETTERS + MARKS)),
    st.sampled_from(('cased', 'uncased', 'accents', 'stripped', 'joined')))
@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
def test_only_spaces_and_marks_between_spaces_are_in_no_token(
    kinds, text, kind):
  offsets = kinds[kind].encode([text]).offsets
  scripts.assert_covered(kind, text, offsets)


@pytest.mark.parametrize(('text', 'spans'), [
    ('cafe\u0301 x', [(0, 5), (6, 7)]),  # an accent in NFD
    ('x e\u0301, y', [(0, 1), (2, 4), (4, 5), (6, 7)]),
    ('\u0645\u0651 x', [(0, 2), (3, 4)]),  # an Arabic shadda
    ('\u05e9\u05b8 x', [(0, 2), (3, 4)]),  # a Hebrew vowel
    ('x\ufe0f y', [(0, 2), (3, 4)]),  # a variation selector
    ('x\u200d', [(0, 2)]), ('x\ufffd', [(0, 2)]),
    ('\ufeffx', [(0, 2)]),  # a byte-order mark, before its word
    ('x \u0301 y', [(0, 1), (4, 5)]),  # a mark between spaces has no word
    ('x\u0301\u200by', [(0, 3), (3, 4)]),
    ('x\x0c y', [(0, 1), (3, 4)]),  # the normaliser removes this space
])
def test_a_mark_belongs_to_the_token_beside_it(text, spans):
  letters = (*'cafexy,', 'cafe', '##y', '\u0645', '\u05e9')
  wordpiece = tokenizer.Tokenizer((*tokenizer.SPECIAL, *letters), True)
  assert [tuple(s) for s in wordpiece.encode([text]).offsets] == spans


def test_a_mark_at_the_beginning_of_a_token_is_not_in_the_token_before(
    tmp_path):
  """An added token is matched before the normaliser removes its mark."""
  (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
      {'additional_special_tokens': ['\u0301x']}))
  wordpiece = tokenizer_files.read_tokenizer(tmp_path)
  (ids, offsets), = rows(wordpiece.encode(['a\u0301\u0301x b']))
  assert [wordpiece.vocab[i] for i in ids] == ['a', '\u0301x', 'b']
  assert offsets.tolist() == [[0, 2], [2, 4], [5, 6]]


# --- special and added tokens


def test_typed_special_tokens_are_text(trained, kinds):
  for wordpiece in (trained, *kinds.values()):
    text = ' '.join((*wordpiece.special, *scripts.ROLES))
    ids = wordpiece.encode([text]).ids.tolist()
    unknown = wordpiece.index[wordpiece.special[1]]
    assert not ({wordpiece.index[t] for t in wordpiece.special} - {unknown}
                ).intersection(ids)
    assert len(ids) > 10


def test_added_tokens_are_matched(kinds):
  assert tokens(kinds['added'], 'c été [E1]c Covid-19') == [
      'c', 'ÉTÉ', '[E1]', 'c', 'covid-19']
  assert tokens(kinds['sequence'], 'c covid-19 [E1]c') == [
      'c', 'covid-19', '[E1]', 'c']
  assert 'covid-19' not in tokens(kinds['sequence'], 'ccovid-19')


@pytest.mark.parametrize('settings', [
    {'additional_special_tokens': ['[E1]']},
    {'additional_special_tokens': [{'content': '[E1]', 'normalized': True}]},
    {'extra_special_tokens': ['[E1]']}, {'extra_special_tokens': {'a': '[E1]'}},
    {'added_tokens_decoder': {'6': {'content': '[E1]', 'special': True}}}])
def test_a_token_beside_the_vocabulary_gets_the_next_id(tmp_path, settings):
  (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n')
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  wordpiece = tokenizer_files.read_tokenizer(tmp_path)
  assert wordpiece.encode(['a[E1]b']).ids.tolist() == [4, 6, 5]


def test_spaces_beside_an_added_token_are_not_in_its_span(kinds):
  ids, offsets = rows(kinds['flags'].encode(['b \n strip  b']))[0]
  assert kinds['flags'].vocab[ids[1]] == 'strip'
  assert offsets.tolist() == [[0, 1], [4, 9], [11, 12]]


def test_special_tokens_may_have_other_names(kinds):
  wordpiece = kinds['added']
  assert wordpiece.special == ('<pad>', '<unk>', '<s>', '</s>', '<mask>')
  assert [wordpiece.pad_id, wordpiece.cls_id, wordpiece.sep_id] == [0, 2, 3]
  assert tokens(wordpiece, '\u2603') == ['<unk>']


@pytest.mark.parametrize('padding', [  # of length 128: sentence-transformers
    {}, {'length': 128}, {'length': 128, 'direction': 'left'}])
def test_names_of_special_tokens_come_from_tokenizer_json(
    kinds, tmp_path, padding):
  whole = tokenizers.Tokenizer.from_str(kinds['added'].to_json())
  whole.enable_padding(pad_token='<pad>', **padding)
  whole.save(str(tmp_path / 'tokenizer.json'))
  loaded = tokenizer_files.read_tokenizer(tmp_path)
  assert loaded.special[:4] == ('<pad>', '<unk>', '<s>', '</s>')
  assert loaded.vocab == kinds['added'].vocab


# --- files


@pytest.mark.parametrize('size', [90, 120, 300])
def test_same_text_learns_the_same_vocabulary(size):
  learned = {
      tokenizer.train_tokenizer(TEXTS, vocab_size=size).vocab for _ in range(8)
  }
  assert len(learned) == 1


def test_a_saved_tokenizer_loads_equal(trained, kinds, tmp_path):
  for name, wordpiece in {'trained': trained, **kinds}.items():
    wordpiece.save(tmp_path / name)
    loaded = tokenizer_files.read_tokenizer(tmp_path / name)
    assert loaded == wordpiece, name
    assert loaded.fingerprint == wordpiece.fingerprint
    texts = scripts.texts()[:60]
    np.testing.assert_array_equal(loaded.encode(texts).offsets,
                                  wordpiece.encode(texts).offsets)


@pytest.mark.parametrize('piece', ['a\nb', 'a\r', '', '\x85', '\u2028', ' '])
def test_any_piece_of_a_vocabulary_is_saved(tmp_path, piece):
  wordpiece = tokenizer.Tokenizer((*tokenizer.SPECIAL, 'c', piece), True)
  wordpiece.save(tmp_path)
  assert tokenizer_files.read_tokenizer(tmp_path) == wordpiece


def test_fingerprints_tell_tokenizers_apart(kinds):
  assert len({t.fingerprint for t in kinds.values()}) == len(KINDS)


def test_tokenizer_json_loads_without_its_truncation(trained, tmp_path):
  whole = tokenizers.Tokenizer.from_str(trained.to_json())
  whole.enable_truncation(2)
  whole.save(str(tmp_path / 'tokenizer.json'))
  loaded = tokenizer_files.read_tokenizer(tmp_path)
  assert loaded == trained
  assert len(loaded.encode([TEXTS[0]]).ids) > 2


@pytest.mark.parametrize(('settings', 'expected'), [
    ({}, ['CAFÉ']), ({'do_lower_case': True}, ['cafe']),
    ({'do_lower_case': True, 'strip_accents': False}, ['café']),
    ({'strip_accents': True}, ['CAFE']), ({'strip_accents': None}, ['CAFÉ'])])
def test_settings_override_the_normalizer_of_tokenizer_json(
    tmp_path, settings, expected):
  """BertTokenizerFast of transformers gives them this precedence, too.

  Without a setting it takes its default, whatever tokenizer.json has.
  """
  cased = tokenizer.Tokenizer(
      (*tokenizer.SPECIAL, 'CAFÉ', 'café', 'cafe', 'CAFE'), False)
  (tmp_path / 'tokenizer.json').write_text(cased.to_json())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  assert tokens(tokenizer_files.read_tokenizer(tmp_path), 'CAFÉ') == expected


@pytest.mark.parametrize('settings', [
    {'do_lower_case': True}, {'strip_accents': True},
    {'tokenize_chinese_chars': False}])
@pytest.mark.parametrize('kind', tokenizer_files.GENERIC)
def test_a_class_that_reads_no_settings_is_refused_with_others(
    tmp_path, kind, settings):
  """These classes of transformers take tokenizer.json as it is."""
  cased = tokenizer.Tokenizer((*tokenizer.SPECIAL, 'CAFÉ'), False)
  (tmp_path / 'tokenizer.json').write_text(cased.to_json())
  about = tmp_path / 'tokenizer_config.json'
  about.write_text(json.dumps({'tokenizer_class': kind, **settings}))
  name, value = *settings, *settings.values()
  with pytest.raises(errors.UserError, match=f'{name}={value}, but'):
    tokenizer_files.read_tokenizer(tmp_path)
  about.write_text(json.dumps({'tokenizer_class': kind, name: not value}))
  assert tokens(tokenizer_files.read_tokenizer(tmp_path), 'CAFÉ') == ['CAFÉ']


def test_a_limit_of_characters_makes_a_longer_word_unknown(trained, tmp_path):
  whole = json.loads(trained.to_json())
  whole['model']['max_input_chars_per_word'] = 3
  (tmp_path / 'tokenizer.json').write_text(json.dumps(whole))
  limited = tokenizer_files.read_tokenizer(tmp_path)
  assert '[UNK]' not in tokens(limited, 'the in')
  assert tokens(limited, 'ship') == ['[UNK]'] != tokens(trained, 'ship')


def test_of_equal_lines_of_a_vocabulary_the_last_one_counts(tmp_path):
  (tmp_path / 'vocab.txt').write_text(
      '[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n')
  loaded = tokenizer_files.read_tokenizer(tmp_path)
  assert loaded.encode(['a b']).ids.tolist() == [6, 5]
  loaded.save(tmp_path / 'again')
  assert tokenizer_files.read_tokenizer(tmp_path / 'again') == loaded


def test_wrong_case_is_refused(trained, tmp_path):
  trained.save(tmp_path)
  with pytest.raises(errors.UserError, match=r'set data\.lowercase=True'):
    tokenizer_files.read_tokenizer(tmp_path, lowercase=False)


def test_capitals_in_a_bare_vocabulary_make_it_cased(tmp_path):
  (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\nParis\n')
  assert not tokenizer_files.read_tokenizer(tmp_path).lowercase


# --- refusals


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
    ('tokenizer.json', b'{"normalizer": {"lowercase": true}, "model": {"type": '
     b'"WordPiece", "vocab": {"[UNK]": 0}}}', 'tokenizers cannot read it'),
    ('tokenizer.json', b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}',
     r"unk_token '\[UNK\]' is not in its vocabulary"),
    ('tokenizer.json', b'{"model": {"type": "WordPiece", "unk_token": [], '
     b'"vocab": {"a": 0}}}', 'tokenizers cannot read it'),
    ('tokenizer.json', b'{"model": {"type": "Unigram", "unk_id": null, '
     b'"vocab": [["a", 0.0]]}}', 'unk_id is None, expected the number'),
])
def test_a_bad_vocabulary_is_refused_in_one_line(
    tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(errors.UserError, match=message) as e:
    tokenizer_files.read_tokenizer(tmp_path)
  assert '\n' not in str(e.value)


TOKEN = {'content': 'x', 'single_word': False}


@pytest.mark.parametrize(('kind', 'name', 'content', 'message'), [
    ('uncased', 'tokenizer_config', {'do_basic_tokenize': False}, 'do_basic'),
    ('uncased', 'tokenizer_config', {'clean_text': False}, 'clean_text'),
    ('uncased', 'tokenizer_config', {'never_split': ['x']}, 'never_split'),
    ('uncased', 'tokenizer_config', {'never_split': 'x'}, 'expected a list'),
    ('uncased', 'tokenizer_config', {'strip_accents': 1}, 'strip_accents is 1'),
    ('uncased', 'tokenizer_config', {'word_tokenizer_type': 'mecab'}, 'mecab'),
    ('uncased', 'tokenizer_config', {'wordpieces_prefix': '@@'}, "has '##'"),
    ('uncased', 'tokenizer_config', {'max_input_chars_per_word': 9}, '100'),
    ('uncased', 'tokenizer_config', {'tokenizer_class': 'T5Tokenizer'}, 'T5'),
    ('uncased', 'tokenizer_config', {'model_max_length': 'x'}, "is 'x'"),
    ('uncased', 'tokenizer_config', {'model_max_length': 0}, 'is 0'),
    ('uncased', 'tokenizer_config', {'cls_token': 3}, 'cls_token is int'),
    ('uncased', 'tokenizer_config', {'cls_token': '<x>'}, 'lacks <x>'),
    ('uncased', 'tokenizer_config', {'added_tokens_decoder': []}, 'a dict'),
    ('uncased', 'tokenizer_config', {'added_tokens_decoder': {'a': TOKEN}},
     "the id of .* is 'a', expected"),
    ('uncased', 'tokenizer_config', {'added_tokens_decoder': {'9': {}}},
     'not an added token'),
    ('uncased', 'tokenizer_config',
     {'added_tokens_decoder': {'9': TOKEN | {'content': 'n e w'}}}, 'id 9'),
    ('uncased', 'tokenizer_config',
     {'additional_special_tokens': [3]}, 'not an added token'),
    ('uncased', 'tokenizer_config', {'extra_special_tokens': 'x'},
     'expected a list'),
    ('uncased', 'added_tokens', {'n e w': 10**6}, 'id 1000000'),
    ('uncased', 'added_tokens', {'n e w': 'x'}, "is 'x'"),
    ('added', 'tokenizer_config', {'cls_token': '[CLS]'}, 'cls_token is'),
    ('added', 'tokenizer_config', {'unk_token': '[UNK]'}, 'unk_token is'),
    ('sequence', 'tokenizer_config', {'do_lower_case': False}, 'has True'),
    ('sequence', 'tokenizer_config', {'strip_accents': False}, 'has True'),
    ('sequence', 'tokenizer_config', {'unk_token': '[MASK]'}, r"has '\[UNK\]'"),
    ('sequence', 'tokenizer_config', {'cls_token': '[MASK]'}, 'post_processor'),
])
def test_settings_that_cannot_be_honoured_are_refused(
    directories, tmp_path, kind, name, content, message):
  for path in directories[kind].iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  path = tmp_path / f'{name}.json'
  stored = json.loads(path.read_text()) if path.is_file() else {}
  path.write_text(json.dumps(stored | content))
  with pytest.raises(errors.UserError, match=message) as e:
    tokenizer_files.read_tokenizer(tmp_path)
  assert '\n' not in str(e.value) and len(str(e.value)) < 600


def test_two_vocabularies_that_differ_are_refused(trained, tmp_path):
  trained.save(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(trained.to_json())
  assert tokenizer_files.read_tokenizer(tmp_path) == trained
  lines = [*trained.vocab[:-2], trained.vocab[-1], trained.vocab[-2]]
  (tmp_path / 'vocab.txt').write_text('\n'.join(lines) + '\n')
  with pytest.raises(errors.UserError, match='give 2 tokens another id'):
    tokenizer_files.read_tokenizer(tmp_path)


@pytest.mark.parametrize('change', [
    json.loads(tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1',
        special_tokens=[('[CLS]', 2), ('[SEP]', 3)]).__getstate__()),
    {'type': 'BertProcessing', 'sep': ['[SEP]', 3], 'cls': ['[SEP]', 3]}])
def test_another_layout_of_rows_is_refused(trained, tmp_path, change):
  whole = json.loads(trained.to_json())
  whole['post_processor'] = change
  (tmp_path / 'tokenizer.json').write_text(json.dumps(whole))
  (tmp_path / 'tokenizer_config.json').write_text('{"cls_token": "[CLS]"}')
  with pytest.raises(errors.UserError, match='post_processor makes'):
    tokenizer_files.read_tokenizer(tmp_path)
