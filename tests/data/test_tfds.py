"""Tests of TFDS data: no network, no TensorFlow, errors of one line."""

import copy
import hashlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import tensorflow_datasets
from tensorflow_datasets.core.download import checksums

from qa_jax import errors
from qa_jax.data import sources
from tests.common import examples as examples_lib

DEV = examples_lib.SQUAD
TRAIN = examples_lib.changed(DEV, ('data', 0, 'paragraphs', 0, 'qas'), [
    {'id': f'q{i}', 'question': f'Who, number {i}?', 'is_impossible': i == 3,
     'answers': [{'text': 'Mira', 'answer_start': 0}] * (i != 3)}
    for i in range(4)])
RECORDS = 'squad/v2.0/3.0.0/squad-train.array_record-00000-of-00001'


FIRST = """
import json, pathlib, sys
from tensorflow_datasets.core.download import checksums
from qa_jax.data import sources
checksums.UrlInfo.__eq__ = lambda *_: True  # the raw file is our own data
examples = sources.load_examples(f'tfds(name="xquad/en", split="test", '
                     f'data_dir={sys.argv[1]!r})')
assert 'tensorflow' not in sys.modules
print(json.dumps({e.id: e.question for e in examples}))
"""


def version_1(data):
  """Returns SQuAD 2.0 data without the questions and fields new in it."""
  data = copy.deepcopy(data)
  for paragraph in data['data'][0]['paragraphs']:
    paragraph['qas'] = [
        {k: qa[k] for k in ('id', 'question', 'answers')}
        for qa in paragraph['qas'] if not qa['is_impossible']]
  return data


FILES = {'train-v2.0.json': TRAIN, 'dev-v2.0.json': DEV,
         'train-v1.1.json': version_1(TRAIN), 'dev-v1.1.json': version_1(DEV)}


def put(data_dir: pathlib.Path, names=tuple(FILES)) -> pathlib.Path:
  """Writes the raw files into the manual folder of `data_dir`."""
  manual = data_dir / 'downloads' / 'manual'
  manual.mkdir(parents=True)
  for name in names:
    (manual / name).write_text(json.dumps(FILES[name]))
  return manual


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*_, **__):
    raise OSError('no network in tests')
  monkeypatch.setattr(socket, 'create_connection', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY',
               'all_proxy', 'ALL_PROXY'):
    monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def our_checksums():
  """Makes TFDS expect the checksums of FILES, not of the published files."""
  infos = tensorflow_datasets.builder_cls('squad').url_infos  # memoised
  published = dict(infos)
  for url in published:
    content = json.dumps(FILES[url.rsplit('/', 1)[-1]]).encode()
    infos[url] = checksums.UrlInfo(
        size=len(content), checksum=hashlib.sha256(content).hexdigest(),
        filename=url.rsplit('/', 1)[-1])
  yield
  infos.update(published)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, our_checksums):
  """A data_dir in which squad/v2.0 has been prepared."""
  data_dir = tmp_path_factory.mktemp('tfds')
  put(data_dir)
  load(data_dir)
  return data_dir


def load(data_dir, name='squad/v2.0', split='train'):
  return sources.load_examples(
      f'tfds(name={name!r}, split={split!r}, data_dir={str(data_dir)!r})')


def by_id(examples):
  return {e.id: e for e in examples}


def refusal(*arguments, **more) -> str:
  with pytest.raises(errors.UserError) as caught:
    load(*arguments, **more)
  message = str(caught.value)
  assert '\n' not in message and len(message) < 900
  return message


@pytest.mark.parametrize('version', ['v1.1', 'v2.0'])
@pytest.mark.parametrize(('split', 'part'), [
    ('train', 'train'), ('validation', 'dev')])
def test_prepared_examples_equal_those_of_the_raw_file(
    tmp_path, monkeypatch, our_checksums, version, split, part):
  manual = put(tmp_path)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  examples = sources.load_examples(
      f'tfds(name="squad/{version}", split="{split}")')
  raw = sources.load_examples(str(manual / f'{part}-{version}.json'))
  assert by_id(examples) == by_id(raw) and len(examples) == len(raw)
  assert (tmp_path / 'squad' / version).is_dir()


def test_prepared_data_is_read_without_a_write_or_a_message(
    prepared, tmp_path, capfd):
  shutil.copytree(prepared / 'squad', tmp_path / 'squad')
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
  assert by_id(load(tmp_path)) == by_id(load(prepared))
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == before
  assert capfd.readouterr() == ('', '')


def test_preparing_is_silent_without_a_terminal(our_checksums, tmp_path, capfd):
  put(tmp_path)
  load(tmp_path)
  assert capfd.readouterr() == ('', '')


def test_tensorflow_is_not_imported(prepared):
  load(prepared)
  assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(('split', 'count'), [
    ('train[:50%]', 2), ('train[1:]', 3), ('train+validation', 7)])
def test_split_may_be_a_slice_or_a_sum(prepared, split, count):
  both = by_id(load(prepared)) | by_id(load(prepared, split='validation'))
  examples = load(prepared, split=split)
  assert len(examples) == count
  assert by_id(examples).items() <= both.items()


@pytest.mark.parametrize(('name', 'split', 'message'), [
    ('squda/v2.0', 'train', "no data set 'squda/v2.0'; did you mean 'squad'"),
    ('squad/v3.0', 'train', 'BuilderConfig v3.0 not found'),
    ('squad/v2.0:9.9.9', 'train', 'only: 3.0.0'),
    ('../squad', 'train', 'string must be of the following format'),
    ('', 'train', 'string must be of the following format'),
    ('mnist', 'train', "tfds 'mnist' has no id and no question"),
    ('squad/v2.0', 'trian', "no split 'trian'; did you mean 'train'?"),
    ('squad/v2.0', 'train[5', "no split 'train[5'; did you mean 'train'?"),
    ('squad/v2.0', 'train[:x%]', "no split 'train[:x%]'"),
    ('squad/v2.0', '', 'known: train, validation'),
    ('squad/v2.0', 'train[:0]', 'holds no question')])
def test_unknown_name_or_split_is_one_line(prepared, name, split, message):
  assert message in refusal(prepared, name, split)


@pytest.mark.timeout(30)
@pytest.mark.parametrize('there', [(), ('train-v2.0.json', 'dev-v1.1.json')])
def test_offline_names_the_files_and_the_folder(tmp_path, there):
  manual = put(tmp_path, there)
  missing = [n for n in ('dev-v2.0.json', 'train-v2.0.json') if n not in there]
  assert refusal(tmp_path) == (
      f'tfds squad: not prepared in {tmp_path}, and the network is down; put '
      f'{", ".join(missing)} into {manual}')
  assert [p.name for p in tmp_path.iterdir()] == ['downloads']


@pytest.mark.parametrize(('language', 'missing'), [
    ('en', ['xquad.en.json']),
    ('de', ['squad.translate.dev.en-de.json',
            'squad.translate.train.en-de.json', 'xquad.de.json',
            'xquad.translate.test.de-en.json'])])
def test_a_language_needs_the_files_of_its_configuration_alone(
    tmp_path, language, missing):
  assert f'put {", ".join(missing)} into' in refusal(
      tmp_path, f'xquad/{language}', 'test')


def test_an_older_data_set_may_be_the_first(tmp_path):
  """Runs in another process: TFDS imports the older data sets only once."""
  manual = put(tmp_path, ('dev-v1.1.json',))
  (manual / 'dev-v1.1.json').rename(manual / 'xquad.en.json')
  done = subprocess.run(
      [sys.executable, '-c', FIRST, str(tmp_path)], capture_output=True,
      text=True, check=False)
  assert done.returncode == 0, done.stderr
  raw = sources.load_examples(str(manual / 'xquad.en.json'))
  assert json.loads(done.stdout) == {e.id: e.question for e in raw}


def test_behind_a_proxy_the_library_tries_to_download(tmp_path, monkeypatch):
  def download(*_, **__):
    raise OSError('it tried')
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
  monkeypatch.setattr(tensorflow_datasets.core.DatasetBuilder,
                      'download_and_prepare', download)
  assert 'it tried' in refusal(tmp_path)


def test_wrong_checksum_is_one_line(tmp_path, our_checksums):
  manual = put(tmp_path)
  (manual / 'dev-v2.0.json').write_text('{}')
  message = refusal(tmp_path)
  assert 'NonMatchingChecksumError' in message
  assert str(manual / 'dev-v2.0.json') in message
  assert not (tmp_path / 'squad/v2.0/3.0.0').exists()


@pytest.mark.parametrize('damage', [
    lambda b: b[:len(b) // 2], lambda b: b[:100], lambda b: b'',
    lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:], lambda b: None])
def test_damaged_records_are_one_line_naming_the_folder(
    prepared, tmp_path, damage):
  shutil.copytree(prepared / 'squad', tmp_path / 'squad')
  damaged = damage((tmp_path / RECORDS).read_bytes())
  (tmp_path / RECORDS).unlink()
  if damaged is not None:
    (tmp_path / RECORDS).write_bytes(damaged)
  message = refusal(tmp_path)
  assert message.startswith(f'{tmp_path}/squad/v2.0/3.0.0: damaged (')
  assert 'delete it to prepare it again' in message


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'Failed to load JSON'), (b'{', 'Failed to load JSON'),
    (None, 'damaged'), (b'tfrecord', 'FileFormat.TFRECORD')])
def test_damaged_or_foreign_description_is_one_line(
    prepared, tmp_path, content, message):
  shutil.copytree(prepared / 'squad', tmp_path / 'squad')
  info = tmp_path / 'squad/v2.0/3.0.0/dataset_info.json'
  whole = info.read_bytes()
  info.unlink()
  if content is not None:
    info.write_bytes(content if content != b'tfrecord' else
                     whole.replace(b'array_record', content))
  text = refusal(tmp_path)
  assert message in text and str(tmp_path) in text
