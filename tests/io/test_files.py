"""Tests that files are written whole or not at all, with one-line errors."""

import gzip
import json
import os
import pathlib

from matplotlib import figure
import pytest

from qa_jax import errors
from qa_jax.io import files
from qa_jax.io import plots

TEXT = 'Zürich\n東京 \u2028 end\n'


def fail(*_, **__):
  raise OSError(28, 'No space left on device')


def refusal(call, *arguments) -> str:
  with pytest.raises(errors.UserError) as caught:
    call(*arguments)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_written_text_is_read_back_and_parents_are_made(tmp_path):
  path = tmp_path / 'a' / 'b' / 'file.txt'
  files.write_text(path, TEXT)
  assert path.read_bytes() == TEXT.encode()
  assert files.read_text(path) == TEXT


def test_json_keeps_letters_and_jsonl_has_one_line_a_row(tmp_path):
  rows = [{'id': 'é'}, {'id': 'a\nb'}, {'id': '\u2028'}]
  files.write_json(tmp_path / 'a.json', rows[0])
  files.write_jsonl(tmp_path / 'a.jsonl', rows)
  assert files.read_object(tmp_path / 'a.json') == rows[0]
  assert 'é' in (tmp_path / 'a.json').read_text(encoding='utf-8')
  lines = (tmp_path / 'a.jsonl').read_bytes().decode().split('\n')
  assert [json.loads(line) for line in lines[:-1]] == rows and not lines[-1]


@pytest.mark.parametrize(('owner', 'name'), [
    (os, 'replace'), (pathlib.Path, 'write_bytes')])
@pytest.mark.parametrize('old', [None, 'old'])
@pytest.mark.parametrize('write', [
    lambda path: files.write_text(path, 'new'),
    lambda path: plots.save_figure(figure.Figure(), path)],
    ids=['text', 'figure'])
def test_failing_write_leaves_the_old_file_alone(
    tmp_path, monkeypatch, owner, name, old, write):
  path = tmp_path / 'file.png'
  if old:
    path.write_text(old)
  monkeypatch.setattr(owner, name, fail)
  assert 'No space left' in refusal(write, path)
  monkeypatch.undo()
  assert [p.name for p in tmp_path.iterdir()] == ([path.name] if old else [])
  assert not old or path.read_text() == old


def test_rows_that_fail_half_way_leave_the_old_file_alone(tmp_path):
  def rows():
    yield {'a': 1}
    raise KeyboardInterrupt
  path = tmp_path / 'file'
  path.write_text('old')
  with pytest.raises(KeyboardInterrupt):
    files.write_jsonl(path, rows())
  for write, value in ((files.write_json, {'a': float('nan')}),
                       (files.write_jsonl, [{}, {'a': float('inf')}])):
    with pytest.raises(ValueError, match='not JSON compliant'):
      write(path, value)
  assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('name', ['directory', 'file/below', 'x' * 300])
def test_path_that_cannot_be_written_is_refused_in_one_line(tmp_path, name):
  (tmp_path / 'directory').mkdir()
  (tmp_path / 'file').write_text('old')
  assert refusal(files.write_text, tmp_path / name, 'new').startswith(
      f'{tmp_path}/{name}: cannot be written: ')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['directory', 'file']


def test_check_writable_refuses_early_and_writes_nothing(tmp_path):
  (tmp_path / 'file').write_text('old')
  files.check_writable(tmp_path / 'file')
  files.check_writable(tmp_path / 'new' / 'deeper' / 'file')
  for directory in (tmp_path, pathlib.Path('/')):
    assert 'a directory' in refusal(files.check_writable, directory)
  assert 'a device or a pipe' in refusal(files.check_writable,
                                         pathlib.Path('/dev/null'))
  assert f'{tmp_path}/file is not a directory' in refusal(
      files.check_writable, tmp_path / 'file' / 'below')
  if os.path.isdir('/proc/self'):  # to root it seems writable, but is not
    assert '/proc is not a directory to write in' in refusal(
        files.check_writable, pathlib.Path('/proc/new/file'))
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_text_under_a_name_in_gz_is_zipped(tmp_path):
  files.write_jsonl(tmp_path / 'a.jsonl.gz', [{'a': 'é'}])
  assert gzip.decompress((tmp_path / 'a.jsonl.gz').read_bytes()
                         ) == '{"a": "é"}\n'.encode()


def test_byte_order_mark_and_gzip_are_undone(tmp_path):
  for name, content in (
      ('a', b'\xef\xbb\xbf' + TEXT.encode()),
      ('a.gz', gzip.compress(TEXT.encode())),
      ('b.gz', gzip.compress(b'\xef\xbb\xbf' + TEXT.encode()))):
    (tmp_path / name).write_bytes(content)
    assert files.read_text(tmp_path / name) == TEXT


def test_a_gzip_bomb_is_refused_before_it_is_unzipped(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(gzip.compress(b' ' * 2**24))  # zips to a thousandth
  assert len(files.read_text(path)) == 2**24  # below UNZIPPED_FREE
  monkeypatch.setattr(files, 'UNZIPPED_FREE', 2**21)
  read = []
  whole = gzip.GzipFile.read
  monkeypatch.setattr(gzip.GzipFile, 'read', lambda self, size=-1: (
      read.append(whole(self, size)) or read[-1]))
  assert refusal(files.read_text, path).startswith(
      f'{path}: unzips to more than 2097152 bytes, 100 times its size')
  assert sum(map(len, read)) <= 2**21 + 2**20
  path.write_bytes(gzip.compress(b' ' * 2**24, compresslevel=0))
  assert len(files.read_text(path)) == 2**24


@pytest.mark.parametrize(('name', 'message'), [
    ('missing', 'No such file'), ('.', 'Is a directory'),
    ('file/below', 'Not a directory'), ('latin', '1; re-encode it'),
    ('zipped', 'give it a name that ends in .gz'),
    ('table', 'unzipped, a name that ends in .parquet'),
    ('latin.gz', 'not UTF-8 at byte 1'), ('no.gz', 'not a whole gzip'),
    ('half.gz', 'not a whole gzip'), ('missing.gz', 'No such file'),
    ('x' * 300, 'name too long'), ('nul\0', 'null'), ('\ud800', 'surrogates')])
def test_file_that_cannot_be_read_is_refused_in_one_line(
    tmp_path, name, message):
  (tmp_path / 'file').write_text('x')
  (tmp_path / 'latin').write_bytes(b'a\xe9')
  (tmp_path / 'zipped').write_bytes(gzip.compress(b'{}'))
  (tmp_path / 'latin.gz').write_bytes(gzip.compress(b'a\xe9'))
  (tmp_path / 'table').write_bytes(b'PAR1\x15\xff')
  (tmp_path / 'no.gz').write_bytes(b'plain')
  (tmp_path / 'half.gz').write_bytes(gzip.compress(TEXT.encode() * 9)[:-9])
  assert message in refusal(files.read_text, tmp_path / name)


@pytest.mark.parametrize(('text', 'message'), [
    ('{"a": 1,\n}', 'not JSON: Expecting property name'),
    ('{}\n{}', 'not JSON: Extra data at line 2, column 1'),
    ('[]', 'list, expected a JSON object'), ('null', 'NoneType, expected'),
    ('[' * 100_000, 'recursion'), ('{"a": ' + '9' * 5000 + '}', 'digits'),
    ('{"a": "\t"}', 'Invalid control character')])
def test_text_that_is_no_json_object_is_refused_in_one_line(text, message):
  complaint = refusal(files.parse_object, text, 'here')
  assert complaint.startswith('here: ') and message in complaint


def test_a_directory_is_renamed_whole_and_without_what_a_killed_process_left(
    tmp_path):
  target = tmp_path / 'run'
  left = tmp_path / f'run.{os.getpid()}{files.PARTIAL}'
  left.mkdir()
  (left / 'old').touch()

  def fill(directory):
    (directory / 'new').touch()
    assert not target.exists()

  files.write_directory(target, fill)
  assert [path.name for path in target.iterdir()] == ['new']
  assert not left.exists()


@pytest.mark.parametrize('place', ['working directory', 'mount point',
                                   'below a read-only directory'])
def test_a_directory_that_no_rename_can_replace_is_filled(
    tmp_path, monkeypatch, place):
  def fill(directory):
    (directory / 'config.json').write_text('{}')
    (directory / 'tokenizer').mkdir()
    (directory / 'tokenizer' / 'vocab.txt').write_text('a')

  target = tmp_path / 'run'
  target.mkdir()
  before = target.stat().st_ino
  if place == 'working directory':
    monkeypatch.chdir(target)
  elif place == 'mount point':
    monkeypatch.setattr(os.path, 'ismount', lambda path: path == target)
  else:
    monkeypatch.setattr(os, 'access', lambda path, _: path != tmp_path)
  moved, replace = [], pathlib.Path.replace
  monkeypatch.setattr(pathlib.Path, 'replace', lambda path, to: (
      moved.append(path.name), replace(path, to)))
  files.write_directory(target, fill)
  assert moved == ['tokenizer', 'config.json']  # which marks a run
  assert target.stat().st_ino == before
  assert sorted(p.relative_to(target).as_posix() for p in target.rglob('*')
                ) == ['config.json', 'tokenizer', 'tokenizer/vocab.txt']
  assert 'not empty' in refusal(files.write_directory, target, fill)
  assert len(list(target.iterdir())) == 2
