"""SQuAD and its kin out of TensorFlow Datasets, without TensorFlow."""

import os
import pathlib
import socket
from typing import Any
import urllib.parse

from qa_jax import errors
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.data.examples import check_text

PROBE_SECONDS = 3.0


def tfds(*, name: str, split: str, data_dir: str = '') -> list[Example]:
  """A TFDS data set with SQuAD's features, such as `squad/v1.1`.

  Prepared once as array_record. The raw files are looked for in
  DATA_DIR/downloads/manual/ before the network is tried.

  Raises:
    UserError: unknown name or split, damaged files, or no network.
  """
  import tensorflow_datasets as library  # lazily: it costs 0.3 s
  where = pathlib.Path(data_dir or os.environ.get(
      'TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()
  try:
    builder = library.builder(
        name, data_dir=str(where), file_format='array_record')
  except (library.core.registered.DatasetNotFoundError, ValueError,
          AssertionError) as e:
    raise errors.UserError(
        f'tfds has no data set {name!r}: {_one_line(e)}') from None
  if not pathlib.Path(builder.data_dir).is_dir():
    _prepare(builder, where, library)
  if split.split('[')[0] not in builder.info.splits:
    raise errors.UserError(
        f'tfds {name!r} has no split {split!r}'
        f'{errors.did_you_mean(split, builder.info.splits)}')
  try:
    rows = builder.as_data_source(split=split)
    return [_example(row, f'tfds {name} {split}[{i}]')
            for i, row in enumerate(rows)]
  except (RuntimeError, ValueError) as e:
    if isinstance(e, errors.UserError):
      raise
    raise errors.UserError(
        f'{builder.data_dir}: damaged ({_one_line(e)}); delete it to prepare '
        'it again') from None


def _prepare(builder: Any, where: pathlib.Path, library: Any) -> None:
  manual = where / 'downloads' / 'manual'
  needed = {pathlib.PurePosixPath(urllib.parse.urlparse(url).path).name: url
            for url in builder.url_infos}
  wanted = _wanted(builder, needed)
  missing = [f for f in wanted if not (manual / f).is_file()]
  if missing and not _reachable(needed[missing[0]]):
    raise errors.UserError(
        f'tfds {builder.name}: not prepared in {where}, and the network is '
        f'down; put {", ".join(missing)} into {manual}')
  try:
    builder.download_and_prepare(
        download_dir=str(where / 'downloads'),
        download_config=library.download.DownloadConfig(
            manual_dir=str(manual)), file_format='array_record')
  except Exception as e:  # the library's errors share no base class
    raise errors.UserError(
        f'tfds {builder.name}: could not be prepared in {where} '
        f'({type(e).__name__}: {_one_line(e)})') from None


def _wanted(builder: Any, needed: dict[str, str]) -> list[str]:
  """The raw files of this configuration, by version number in the name."""
  version = builder.builder_config.name if builder.builder_config else ''
  return sorted(f for f in needed if version in f) or sorted(needed)


def _reachable(url: str) -> bool:
  """Whether the host answers: the library would retry for minutes."""
  parts = urllib.parse.urlparse(url)
  port = parts.port or (443 if parts.scheme == 'https' else 80)
  try:
    socket.create_connection((parts.hostname, port), PROBE_SECONDS).close()
  except OSError:
    return False
  return True


def _example(row: Any, at: str) -> Example:
  answers = row['answers']
  golds = tuple(
      GoldAnswer(_text(text, f'{at}.answers'), int(start))
      for text, start in zip(answers['text'], answers['answer_start'],
                             strict=True))
  impossible = bool(row.get('is_impossible', False))
  return Example(
      _text(row['id'], f'{at}.id'), _text(row['question'], f'{at}.question'),
      _text(row['context'], f'{at}.context'), () if impossible else golds,
      impossible, _text(row.get('title', b''), f'{at}.title'))


def _text(value: Any, at: str) -> str:
  return check_text(
      value.decode('utf-8') if isinstance(value, bytes) else value, at)


def _one_line(e: BaseException) -> str:
  return ' '.join(str(e).split())[:200]
