"""Tests of the feature cache: equality with fresh windows, and damage."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import threading
import time

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import tokenizer
from qa_jax.data import tokenizer_files
from qa_jax.data import windows
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.io import files
from qa_jax.runtime import console
from tests.common import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = 'synthetic(size=30, sentences=20, impossible=0.2)'
VOCABULARY = tokenizer.Tokenizer(
    (*tokenizer.SPECIAL, *'abcdefghijklmnopqrstuvwxyz',
     *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz'), '.', '?'), True)
LENGTHS = dict(max_length=64, window_overlap=16, max_question_length=12)


def fail_if_called(line):
  raise AssertionError(line)


def cached(where, spec=SPEC, vocabulary=VOCABULARY, say=fail_if_called,
           **changes):
  return cache.cached_windows(spec, vocabulary, where=where, say=say,
                              **{**LENGTHS, **changes})


def fresh(spec=SPEC, vocabulary=VOCABULARY, **changes):
  return windows.make_windows(sources.load_examples(spec), vocabulary,
                              **{**LENGTHS, **changes})


def entries(where):
  return sorted((where / 'features').glob('[0-9a-f]*'))


def is_warm(window_set):
  return isinstance(window_set.examples, store.StoredExamples)


def assert_equal(got, expected):
  """Checks that two window sets have equal fields and batches."""
  for field in dataclasses.fields(windows.WindowSet):
    a, b = getattr(got, field.name), getattr(expected, field.name)
    if field.name in ('questions', 'contexts'):
      for part in ('ids', 'offsets', 'ptr'):
        np.testing.assert_array_equal(getattr(a, part), getattr(b, part))
    elif isinstance(b, np.ndarray):
      np.testing.assert_array_equal(a, b, strict=True)
    elif field.name == 'examples':
      assert len(a) == len(b) and list(a) == list(b)
    else:
      assert a == b
  rows = np.append(np.arange(len(expected)), -1)
  for length in (int(expected.total_lengths.max()), 70):
    one, two = got.gather(rows, length), expected.gather(rows, length)
    assert list(one) == list(two)
    for name, value in two.items():
      np.testing.assert_array_equal(one[name], value, strict=True)
  answered = np.flatnonzero(expected.start_positions)
  for one, two in zip(*(w.char_spans(answered, expected.start_positions[
      answered], expected.end_positions[answered]) for w in (got, expected)),
                      strict=True):
    np.testing.assert_array_equal(one, two)


@pytest.fixture(scope='module')
def uncached():
  return fresh()


@pytest.fixture(scope='module')
def squad(tmp_path_factory):
  """A SQuAD file with repeated contexts, titles, and answers of every fate."""
  path = tmp_path_factory.mktemp('squad') / 'train.json'
  qa = lambda i, **more: {'id': f'q{i}', 'question': f'what {i} é 東?', **more}
  path.write_text(json.dumps({'data': [
      {'title': 'One', 'paragraphs': [{'context': 'a bc déf 東京 ' * 9, 'qas': [
          qa(0, answers=[{'text': 'bc', 'answer_start': 2},
                         {'text': 'déf', 'answer_start': 5}]),
          qa(1, answers=[], is_impossible=True)]}]},
      {'title': 'Two', 'paragraphs': [
          {'context': 'x y z', 'qas': [
              qa(2, answers=[{'text': 'zz', 'answer_start': 1}])]},
          {'context': '', 'qas': [qa(3)]}]}]}), encoding='utf-8')
  return path


def test_cached_windows_equal_windows_without_the_cache(tmp_path, uncached):
  cold, warm = cached(tmp_path), cached(tmp_path)
  assert is_warm(warm) and not is_warm(cold)
  assert_equal(cold, uncached)
  assert_equal(warm, uncached)
  assert len(warm) > len(warm.examples)  # some need several windows


def test_parts_of_articles_have_entries_that_follow_their_file(
    tmp_path, squad):
  part = lambda low, high: f'articles(of="{squad}", low={low}, high={high})'
  for _ in range(2):
    one, other = (cached(tmp_path, part(*r)) for r in ((0, 0.5), (0.5, 1)))
    assert len(one.examples) + len(other.examples) == 4
  assert is_warm(one) and is_warm(other)
  text = squad.read_text(encoding='utf-8')
  squad.write_text(text.replace('what 2', 'who 2'), encoding='utf-8')
  assert not all(is_warm(cached(tmp_path, part(*r)))
                 for r in ((0, 0.5), (0.5, 1)))


def test_cached_examples_equal_loaded_examples(tmp_path, squad):
  _, warm = (cached(tmp_path, str(squad)) for _ in range(2))
  expected = sources.load_examples(str(squad))
  assert list(warm.examples) == expected
  assert warm.examples[1] == expected[1] and warm.examples[-1] == expected[-1]
  assert warm.examples[1:3] == expected[1:3] and len(warm.examples) == 4
  assert {e.title for e in warm.examples} == {'One', 'Two'}
  assert warm.audit['unrecoverable'] == 1
  assert warm.faults['unrecoverable'] == ['q2']
  assert_equal(warm, fresh(str(squad)))


def test_fingerprint_of_stored_and_of_loaded_examples_is_equal(tmp_path, squad):
  _, warm = (cached(tmp_path, str(squad)) for _ in range(2))
  assert store.fingerprint(warm.examples) == store.fingerprint(
      sources.load_examples(str(squad)))
  assert store.fingerprint(warm.examples) == store.fingerprint(
      list(warm.examples))


def test_a_warm_start_neither_loads_nor_tokenises(tmp_path, squad, monkeypatch):
  cached(tmp_path, str(squad))
  monkeypatch.setattr(sources, 'load_examples', fail_if_called)
  monkeypatch.setattr(tokenizer.Tokenizer, 'encode', fail_if_called)
  opened = []
  monkeypatch.setattr(files, 'sha256', lambda path, real=files.sha256: (
      opened.append(path), real(path))[1])
  assert is_warm(cached(tmp_path, str(squad)))
  assert opened[0] == squad and len(opened) == 1 + len(store.ARRAYS)


def test_arrays_are_mapped_and_ids_take_two_bytes(tmp_path):
  _, warm = cached(tmp_path), cached(tmp_path)
  assert warm.contexts.ids.dtype == np.uint16
  for array in (warm.contexts.ids, warm.begin, warm.gold_spans):
    assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_ids_beyond_two_bytes_are_stored(tmp_path):
  many = tokenizer.Tokenizer(
      (*tokenizer.SPECIAL, *(f'filler{i}' for i in range(2**16)),
       *VOCABULARY.vocab[len(tokenizer.SPECIAL):]), True)
  _, warm = (cached(tmp_path, vocabulary=many) for _ in range(2))
  assert warm.contexts.ids.dtype == np.int32
  assert warm.contexts.ids.max() > 2**16
  assert_equal(warm, fresh(vocabulary=many))


def test_words_of_a_stored_context_may_be_before_any_number_of_spaces(tmp_path):
  xlm = tokenizer_files.read_tokenizer(ROOT / 'tests/golden/tiny_xlm_roberta')
  examples = [Example('a', 'Who?', 'He met Ada.' + ' ' * 2**16)]
  cold, warm = (cached(tmp_path, examples, xlm) for _ in range(2))
  assert warm.contexts.offsets.dtype == np.uint16
  np.testing.assert_array_equal(warm.continues_word, cold.continues_word)
  assert set(cold.continues_word.tolist()) == {False, True}


def test_a_learned_vocabulary_is_stored_too(tmp_path, monkeypatch):
  learned = cache.LearnedVocabulary(300, True)
  cold = cached(tmp_path, vocabulary=learned)
  monkeypatch.setattr(tokenizer, 'train_tokenizer', fail_if_called)
  warm = cached(tmp_path, vocabulary=learned)
  assert warm.tokenizer == cold.tokenizer
  assert_equal(warm, fresh(vocabulary=cold.tokenizer))
  # A given vocabulary has another fingerprint than a learned one.
  assert not is_warm(cached(tmp_path, vocabulary=cold.tokenizer))


def test_no_cache_writes_nothing(tmp_path, uncached, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert_equal(cached(cache.cache_directory('none')), uncached)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('change', [
    {'max_length': 65}, {'window_overlap': 15}, {'max_question_length': 11},
    {'vocabulary': tokenizer.Tokenizer(VOCABULARY.vocab[:-1], True)},
    {'vocabulary': tokenizer.Tokenizer(VOCABULARY.vocab, False)},
    {'vocabulary': cache.LearnedVocabulary(300, True)},
    {'spec': 'synthetic(size=30, sentences=20)'}])
def test_every_input_of_the_windows_changes_the_entry(tmp_path, change):
  cached(tmp_path)
  assert not is_warm(cached(tmp_path, **change))
  assert is_warm(cached(tmp_path, **change)) and is_warm(cached(tmp_path))
  assert len(entries(tmp_path)) == 2


def test_learned_vocabularies_differ_by_size_and_case(tmp_path):
  for learned in (cache.LearnedVocabulary(300, True),
                  cache.LearnedVocabulary(301, True),
                  cache.LearnedVocabulary(300, False)):
    assert not is_warm(cached(tmp_path, vocabulary=learned))


def test_another_code_version_has_another_entry(tmp_path, monkeypatch):
  cached(tmp_path)
  monkeypatch.setattr(cache, 'code_version', lambda: 'edited')
  assert not is_warm(cached(tmp_path))


def test_slow_reading_is_said_before_the_first_window(tmp_path, monkeypatch):
  said, heard = [], threading.Event()
  monkeypatch.setattr(console, 'say', lambda line: (
      said.append(line), heard.set()))
  monkeypatch.setattr(console, 'FIRST_SECONDS', 0.0)

  def slow() -> list[Example]:
    assert heard.wait(60)
    return sources.load_examples(SPEC)

  monkeypatch.setitem(sources.SOURCES, 'slow', slow)
  config = tiny.config(data={'train': 'slow()', 'cache': str(tmp_path)})
  input_pipeline.load_windows(
      config, 'slow()', cache.LearnedVocabulary(300, True))
  assert said[0] == 'reading slow(), and learning a vocabulary'
  monkeypatch.setattr(console, 'FIRST_SECONDS', 3600.0)
  said.clear()
  input_pipeline.load_windows(config, SPEC, VOCABULARY)
  assert not any('reading' in line for line in said)


def test_an_added_source_may_read_more_than_its_path(tmp_path, monkeypatch):
  def two_files(*, path: str, answers: str) -> list[Example]:
    context, answer = (pathlib.Path(x).read_text() for x in (path, answers))
    return [Example('a', 'who?', context, (GoldAnswer(answer, -1),))]

  monkeypatch.setitem(sources.SOURCES, 'two_files', two_files)
  context, answers = tmp_path / 'context', tmp_path / 'answers'
  spec = f'two_files(path={str(context)!r}, answers={str(answers)!r})'
  context.write_text('ada met bob.')
  for answer in ('ada', 'bob'):
    answers.write_text(answer)
    for part in (spec, f'articles(of={spec!r})'):
      assert_equal(cached(tmp_path / 'cache', part), fresh(part))


def test_another_tokenizers_library_has_another_entry(tmp_path, monkeypatch):
  cached(tmp_path)
  monkeypatch.setattr(cache.tokenizers, '__version__', '0')
  assert not is_warm(cached(tmp_path))


def edited_version(monkeypatch, edit):
  read_bytes = pathlib.Path.read_bytes
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'read_bytes', lambda self: (
        edit(read_bytes(self)) if self.name == 'windows.py'
        else read_bytes(self)))
    return cache.code_version.__wrapped__()


def test_comments_and_docstrings_do_not_change_the_code_version(monkeypatch):
  def edit(source):
    return re.sub(b'(?s)""".*?"""', b'"""Other text."""', source) + (
        b'\n# A comment.\n')
  assert edited_version(monkeypatch, edit) == cache.code_version()


def test_code_changes_the_code_version(monkeypatch):
  assert edited_version(monkeypatch, lambda source: source.replace(
      b'lengths - tokenizer', b'lengths + tokenizer')) != cache.code_version()


@pytest.mark.parametrize('name', ['reader.py', 'folder/reader.py',
                                  'folder/deeper/reader.py'])
def test_any_file_of_the_data_folder_changes_the_code_version(
    tmp_path, monkeypatch, name):
  monkeypatch.setattr(cache, '__file__', str(tmp_path / 'cache.py'))
  versions = [cache.code_version.__wrapped__()]
  path = tmp_path / name
  path.parent.mkdir(parents=True, exist_ok=True)
  for source in ('limit = 1', 'limit = 2'):
    path.write_text(source)
    versions.append(cache.code_version.__wrapped__())
  assert len({*versions}) == 3


def test_code_version_reads_every_module_of_the_data(monkeypatch):
  read = []
  monkeypatch.setattr(pathlib.Path, 'read_bytes', lambda self: (
      read.append(self.name), b'')[1])
  cache.code_version.__wrapped__()
  data = {p.name for p in (ROOT / 'qa_jax' / 'data').rglob('*.py')}
  assert data | {'files.py', 'registry.py', 'errors.py'} == set(read)
  assert 'windows.py' in data


def test_an_edited_file_of_equal_size_and_mtime_is_other_data(
    tmp_path, squad):
  path = tmp_path / 'train.json'
  path.write_bytes(squad.read_bytes())
  before = path.stat()
  cached(tmp_path / 'c', str(path))
  assert is_warm(cached(tmp_path / 'c', str(path)))
  path.write_bytes(squad.read_bytes().replace(b'x y z', b'x z y'))
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  after = cached(tmp_path / 'c', str(path))
  assert not is_warm(after) and after.examples[2].context == 'x z y'


def test_a_copy_is_the_same_data_and_another_ending_is_not(tmp_path, squad):
  cached(tmp_path / 'c', str(squad))
  (tmp_path / 'copy.json').write_bytes(squad.read_bytes())
  assert is_warm(cached(tmp_path / 'c', str(tmp_path / 'copy.json')))
  (tmp_path / 'copy.csv').write_bytes(squad.read_bytes())
  with pytest.raises(errors.UserError, match=r"no column 'context'|not CSV"):
    cached(tmp_path / 'c', str(tmp_path / 'copy.csv'))


def test_a_mixture_is_all_its_parts(tmp_path, squad):
  spec = f'{squad} + synthetic(size=4)'
  _, warm = (cached(tmp_path, spec) for _ in range(2))
  assert is_warm(warm) and list(warm.examples) == sources.load_examples(spec)
  assert not is_warm(cached(tmp_path, f'synthetic(size=4)+{squad}'))
  assert is_warm(cached(tmp_path, f'{squad}+synthetic(size=4)'))
  call = f'squad_json(path="{squad}", impossible=False)'
  assert len(cached(tmp_path, call).examples) == 3
  assert is_warm(cached(tmp_path, call))


@pytest.mark.parametrize('spec', [
    '', 'nosuch.json', 'nosuch', 'synthetic(size=0)', 'synthetic(nosuch=1)',
    'synthetic(size=2) +', 'squad_json()', 'squad_json(path=3)', 'tfds()',
    'tfds(name="/", split="train", data_dir="/nosuch")',
    'squad_json(path="a\\0b")', 'synthetic(1)', '.'])
def test_the_cache_does_not_change_the_message_of_a_bad_spec(tmp_path, spec):
  with pytest.raises(errors.UserError) as without:
    sources.load_examples(spec)
  with pytest.raises(errors.UserError) as error:
    cached(tmp_path, spec)
  assert str(error.value) == str(without.value)
  assert not entries(tmp_path)


def test_prepared_tfds_data_is_identified_by_its_files(
    tmp_path, monkeypatch, uncached):
  spec = f'tfds(name="squad/v1.1", split="train", data_dir="{tmp_path}")'
  load = lambda _: [*uncached.examples]
  monkeypatch.setattr(sources, 'load_examples', load)
  where = tmp_path / 'c'
  cached(where, spec)  # not prepared: nothing to be known by
  assert not entries(where)
  shard = tmp_path / 'squad' / 'v1.1' / '3.0.0' / 'squad-train.array_record'
  shard.parent.mkdir(parents=True)
  shard.write_bytes(b'one')
  cached(where, spec)
  assert is_warm(cached(where, spec))
  assert not is_warm(cached(where, spec.replace('train', 'train[:1]')))
  shard.write_bytes(b'three')
  assert not is_warm(cached(where, spec))


def test_data_that_changes_while_it_is_read_is_not_stored(
    tmp_path, squad, monkeypatch):
  path = tmp_path / 'train.json'
  path.write_bytes(squad.read_bytes())

  def load(spec, real=sources.load_examples):
    examples = real(spec)
    path.write_bytes(squad.read_bytes() + b' ')
    return examples
  monkeypatch.setattr(sources, 'load_examples', load)
  cached(tmp_path / 'c', str(path))
  assert not entries(tmp_path / 'c')


@pytest.mark.parametrize('name', [
    *(f'{n}.npy' for n in store.ARRAYS), store.MANIFEST])
def test_a_damaged_file_is_named_and_written_again(tmp_path, uncached, name):
  cached(tmp_path)
  [entry] = entries(tmp_path)
  path = entry / name
  whole = path.read_bytes()
  rng = np.random.default_rng(len(name))
  flipped = bytearray(whole)
  flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
  for content in (bytes(flipped), whole[:len(whole) // 2], b'', whole + b'\0',
                  None):
    path.unlink()  # a mapped file must not be overwritten
    if content is not None:
      path.write_bytes(content)
    lines = []
    got = cached(tmp_path, say=lines.append)
    assert not is_warm(got) and len(lines) == 1, (content and len(content))
    assert f'{entry}: {name} ' in lines[0] and '\n' not in lines[0]
    assert path.read_bytes() == whole  # mended, byte by byte
  assert_equal(cached(tmp_path), uncached)
  assert [p.name for p in (tmp_path / 'features').iterdir()] == [entry.name]


@pytest.fixture(scope='module')
def stored(tmp_path_factory, uncached):
  directory = tmp_path_factory.mktemp('stored') / 'entry'
  directory.mkdir()
  store.write_store(directory, uncached, {'n': [1]}, with_vocabulary=True)
  return directory, {p.name: p.read_bytes() for p in directory.iterdir()}


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(data=st.data())
def test_no_change_of_bytes_is_ever_read(stored, uncached, data):
  directory, whole = stored
  name = data.draw(st.sampled_from(sorted(whole)))
  content = bytearray(whole[name])
  at = data.draw(st.integers(0, len(content) - 1))
  kind = data.draw(st.sampled_from(['flip', 'cut', 'insert', 'overwrite']))
  noise = data.draw(st.binary(min_size=1, max_size=64))
  if kind == 'flip':
    content[at] ^= noise[0]
  elif kind == 'cut':
    del content[at:at + len(noise)]
  elif kind == 'insert':
    content[at:at] = noise
  else:
    content[at:at + len(noise)] = noise
  (directory / name).unlink()
  (directory / name).write_bytes(content)
  try:
    if bytes(content) == whole[name]:
      assert_equal(
          store.read_store(directory, {'n': [1]}, tokenizer=None), uncached)
    else:
      with pytest.raises(store.DamagedError, match=name):
        store.read_store(directory, {'n': [1]}, tokenizer=None)
  finally:
    (directory / name).unlink()
    (directory / name).write_bytes(whole[name])


TEXT = st.text(st.characters(codec='utf-8'), max_size=12)


@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(rows=st.lists(st.tuples(
    TEXT, st.sampled_from(['', 'a b c', 'dé 東 f', '\0 \n 🦜 z']), st.lists(
        st.tuples(TEXT, st.integers(0, 2**31)), max_size=3), st.booleans(),
    st.sampled_from(['', 'Title', 'Títle']), st.lists(TEXT, max_size=2)),
                              max_size=8))
def test_any_examples_survive_the_round_trip(tmp_path_factory, rows):
  examples = [
      Example(f'{i}', question, context,
              tuple(GoldAnswer(*a) for a in answers), impossible, title,
              tuple(accepted))
      for i, (question, context, answers, impossible, title, accepted)
      in enumerate(rows)]
  expected = windows.make_windows(examples, VOCABULARY, **LENGTHS)
  directory = tmp_path_factory.mktemp('entry')
  store.write_store(directory, expected, {}, with_vocabulary=False)
  got = store.read_store(directory, {}, tokenizer=VOCABULARY)
  assert list(got.examples) == examples
  if examples:
    assert_equal(got, expected)


def test_an_entry_under_another_name_is_not_used(tmp_path):
  cached(tmp_path)
  [entry] = entries(tmp_path)
  cached(tmp_path, max_length=65)
  [other] = {*entries(tmp_path)} - {entry}
  for path in other.iterdir():
    path.unlink()
  other.rmdir()
  entry.rename(other)
  lines = []
  got = cached(tmp_path, max_length=65, say=lines.append)
  assert not is_warm(got) and 'belongs to another' in lines[0]


RACE = '''
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from qa_jax.data import cache, store, tokenizer
where = pathlib.Path(sys.argv[2])
vocabulary = tokenizer.Tokenizer((*tokenizer.SPECIAL, *'abcdefghij'), True)
(where / f'ready{sys.argv[3]}').touch()
while not (where / 'go').exists():
  time.sleep(0.001)
for seed in range(6):
  windows = cache.cached_windows(
      f'synthetic(size=8, seed={seed})', vocabulary, where=where, say=print,
      max_length=64, window_overlap=16, max_question_length=12)
  assert len(windows.examples) == 8
  assert windows.gather(windows.example_of[:1], 64)
'''


def test_processes_may_build_one_entry_at_the_same_time(tmp_path):
  racers = [subprocess.Popen(
      [sys.executable, '-c', RACE, str(ROOT), str(tmp_path), str(i)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for i in range(3)]
  while not all((tmp_path / f'ready{i}').exists() for i in range(3)):
    assert all(r.poll() is None for r in racers)
    time.sleep(0.01)
  (tmp_path / 'go').touch()
  for racer in racers:
    lines, _ = racer.communicate(timeout=120)
    assert (racer.returncode, lines) == (0, '')
  assert len(entries(tmp_path)) == len(
      [*(tmp_path / 'features').iterdir()]) == 6  # and nothing partial
  vocabulary = tokenizer.Tokenizer((*tokenizer.SPECIAL, *'abcdefghij'), True)
  for seed in range(6):
    spec = f'synthetic(size=8, seed={seed})'
    warm = cached(tmp_path, spec, vocabulary)
    assert is_warm(warm)
    assert_equal(warm, fresh(spec, vocabulary))


def test_an_entry_that_another_process_wrote_first_stays(
    tmp_path, uncached, monkeypatch):
  def load(spec, real=sources.load_examples):
    with monkeypatch.context() as patch:
      patch.setattr(sources, 'load_examples', real)
      cached(tmp_path)  # another process is faster
    [entry] = entries(tmp_path)
    first.append(entry.stat().st_ino)
    return real(spec)
  first = []
  monkeypatch.setattr(sources, 'load_examples', load)
  assert_equal(cached(tmp_path), uncached)
  [entry] = entries(tmp_path)
  assert [entry.stat().st_ino] == first


def test_a_run_killed_while_it_writes_leaves_no_entry(tmp_path, monkeypatch):
  def die(*_, **__):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(store, 'seal', die)
    with pytest.raises(KeyboardInterrupt):
      cached(tmp_path)
  assert not list((tmp_path / 'features').iterdir())


def test_files_of_killed_runs_are_removed_after_a_day(tmp_path):
  features = tmp_path / 'features'
  old, new = (
      features / f'.{"a" * 64}.{i}-{"b" * 8}.partial' for i in (1, 2))
  foreign = features / 'holiday pictures'
  for path in (old, new, foreign):
    path.mkdir(parents=True)
    (path / 'x').touch()
  long_ago = time.time() - 1e6
  os.utime(old, (long_ago, long_ago))
  os.utime(foreign, (long_ago, long_ago))
  cached(tmp_path)
  assert not old.exists() and new.exists() and foreign.exists()


def test_the_least_recently_used_entry_goes_first(tmp_path, monkeypatch):
  specs = [f'synthetic(size=8, seed={i})' for i in range(4)]
  seen: set[pathlib.Path] = set()
  for i, spec in enumerate(specs[:3]):
    cached(tmp_path, spec)
    [entry] = {*entries(tmp_path)} - seen
    seen.add(entry)
    os.utime(entry, (1000 + i, 1000 + i))
  assert is_warm(cached(tmp_path, specs[0]))  # used now, so 1 is the oldest
  size = sum(p.stat().st_size for e in seen for p in e.iterdir())
  monkeypatch.setattr(cache, 'MAX_BYTES', int(size * 1.1))  # three and a bit
  cached(tmp_path, specs[3])
  assert len(entries(tmp_path)) == 3
  monkeypatch.setattr(sources, 'load_examples', lambda spec: 1 / 0)
  assert all(is_warm(cached(tmp_path, specs[i])) for i in (0, 2, 3))
  with pytest.raises(ZeroDivisionError):
    cached(tmp_path, specs[1])


def test_an_entry_larger_than_the_bound_is_kept_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(cache, 'MAX_BYTES', 1)
  cached(tmp_path)
  assert is_warm(cached(tmp_path))
  other = entries(tmp_path)[0].with_name('compiled') / 'program'
  other.parent.mkdir()
  other.write_text('of another cache in this directory')
  cached(tmp_path, max_length=65)
  assert other.is_file()
  shutil.rmtree(other.parent)
  assert len(entries(tmp_path)) == 1
  assert is_warm(cached(tmp_path, max_length=65))


def test_windows_outlive_the_removal_of_their_entry(tmp_path, uncached):
  _, warm = cached(tmp_path), cached(tmp_path)
  cache._remove(entries(tmp_path)[0])
  assert_equal(warm, uncached)


def test_a_full_disk_costs_one_line(tmp_path, uncached):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  lines = []
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    got = cached(tmp_path, say=lines.append)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert_equal(got, uncached)
  [line] = lines
  assert str(tmp_path) in line and os.strerror(errno.EFBIG) in line
  assert 'goes on without it' in line
  assert not list((tmp_path / 'features').iterdir())


def test_a_place_that_cannot_be_written_costs_one_line(tmp_path, uncached):
  (tmp_path / 'file').touch()
  lines = []
  assert_equal(cached(tmp_path / 'file' / 'c', say=lines.append), uncached)
  [line] = lines
  assert os.strerror(errno.ENOTDIR) in line and '\n' not in line


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_cache_is_still_read(tmp_path):
  cached(tmp_path)
  try:
    for path in (tmp_path / 'features', *entries(tmp_path)):
      path.chmod(0o500)
    assert is_warm(cached(tmp_path))
    lines = []
    cached(tmp_path, max_length=65, say=lines.append)
    assert len(lines) == 1
  finally:
    (tmp_path / 'features').chmod(0o700)


def test_the_directory_of_the_cache_follows_the_environment(
    monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert cache.cache_directory('auto') == tmp_path / 'qa_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache.cache_directory('auto') == tmp_path / '.cache' / 'qa_jax'
  assert cache.cache_directory('~/c') == tmp_path / 'c'
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # no home
  assert cache.cache_directory('auto') is None
  assert cache.cache_directory('none') is None
  for bad in ('a\0b', ''):
    with pytest.raises(errors.UserError, match=r"is no name.* choose 'auto'"):
      cache.cache_directory(bad)


def data(where):
  return tiny.config(data={'cache': str(where), **LENGTHS})


@pytest.mark.parametrize(
    'vocabulary', [VOCABULARY, cache.LearnedVocabulary(300, True)])
def test_a_run_has_equal_windows_with_and_without_a_cache(tmp_path, vocabulary):
  uncached, *others = (
      input_pipeline.load_windows(data(where), SPEC, vocabulary)
      for where in ('none', tmp_path, tmp_path))
  for (got, line), how in zip(others, ('made', 'from the cache'), strict=True):
    assert_equal(got, uncached[0])
    assert f'of 30 questions {how} in ' in line and ' s; questions cut' in line


def test_examples_in_memory_are_identified_by_all_their_fields(tmp_path):
  rows = sources.load_examples(SPEC)
  _, line = input_pipeline.load_windows(data(tmp_path), rows, VOCABULARY)
  assert 'made' in line
  got, line = input_pipeline.load_windows(data(tmp_path), [*rows], VOCABULARY)
  assert 'from the cache' in line
  assert_equal(got, fresh())
  rows[-1] = dataclasses.replace(rows[-1], title='another')
  got, line = input_pipeline.load_windows(data(tmp_path), rows, VOCABULARY)
  assert 'made' in line and got.examples[-1].title == 'another'


def test_a_run_names_a_damaged_entry_and_builds_it_again(
    tmp_path, capsys, uncached):
  input_pipeline.load_windows(data(tmp_path), SPEC, VOCABULARY)
  path = entries(tmp_path)[0] / 'begin.npy'
  content = path.read_bytes()
  path.unlink()
  path.write_bytes(content[:-1] + b'\xff')
  got, line = input_pipeline.load_windows(data(tmp_path), SPEC, VOCABULARY)
  assert 'made' in line
  assert_equal(got, uncached)
  [line] = capsys.readouterr().err.splitlines()
  assert str(path.parent) in line and 'begin.npy' in line
  assert path.read_bytes() == content


def test_a_bar_counts_tokenised_texts_and_is_absent_for_cached_ones(
    tmp_path, monkeypatch):
  shown, seen = [], []
  class Bar:
    def __init__(self, what, total):
      shown.append((what, total))
      self.update = seen.append
      self.close = lambda: seen.append('closed')
  monkeypatch.setattr(input_pipeline.console, 'Progress', Bar)
  config = tiny.config(data={'cache': str(tmp_path)})
  examples = [Example(f'{n}', f'Who {n}?', f'Mira was number {n // 2}.')
              for n in range(2500)]
  for _ in range(2):
    input_pipeline.load_windows(config, examples, VOCABULARY)
  assert shown == [('tokenise', 1250 + 2500)]
  assert seen == [1024, 1250, 1250 + 1024, 1250 + 2048, 1250 + 2500, 'closed']
