"""Question answering data of TensorFlow Datasets, without TensorFlow."""

import contextlib
import io
import os
import pathlib
import socket
import sys
from typing import Any
import urllib.parse
import urllib.request

from qa_jax import errors
from qa_jax.data import examples
from qa_jax.data.examples import Example
from qa_jax.data.examples import check_text

PROBE_SECONDS = 3.0
FEATURES = ('id', 'question', 'context', 'answers')


def data_directory(data_dir: str) -> pathlib.Path:
  """Returns the directory of prepared data sets; '' is that of TFDS."""
  return pathlib.Path(data_dir or os.environ.get(
      'TFDS_DATA_DIR', '~/tensorflow_datasets')).expanduser()


def tfds(*, name: str, split: str, data_dir: str = '') -> list[Example]:
  """Reads a TFDS data set with SQuAD's features, such as `squad/v1.1`.

  The first call prepares it as array_record files, from raw files in
  DATA_DIR/downloads/manual/ or else the network. The order of TFDS differs from
  that of the raw file. `split` may be a slice, such as `train[:10%]`.

  Raises:
    UserError: the name or split is unknown, files are damaged, or the network
      is needed and down.
  """
  import tensorflow_datasets as library  # here: it takes 0.3 s

  # Without this import, older data sets such as xquad are unknown: the library
  # stops importing them at the first one that needs TensorFlow.
  import tensorflow_datasets.question_answering

  where = data_directory(data_dir)
  try:
    builder = library.builder(name, data_dir=str(where),
                              file_format='array_record')
  except library.core.registered.DatasetNotFoundError:
    known = library.list_builders(with_community_datasets=False)
    raise errors.UserError(
        f'tfds has no data set {name!r}'
        f'{errors.did_you_mean(name.split("/")[0], known)}') from None
  except Exception as e:  # the library's errors share no base class
    raise errors.UserError(
        f'tfds {name!r} in {where}: {_one_line(e)}') from None
  lacks = [f for f in FEATURES if f not in builder.info.features]
  if lacks:
    raise errors.UserError(
        f'tfds {name!r} has no {" and no ".join(lacks)}: it is not a data set '
        'of questions, contexts and answers')
  if not pathlib.Path(builder.data_dir).is_dir():
    _prepare(builder, where)
  splits = builder.info.splits
  try:
    if splits and not splits[split].num_examples:
      return []
  except (KeyError, ValueError):
    raise errors.UserError(
        f'tfds {name!r} has no split {split!r}'
        f'{errors.did_you_mean(split, splits)}') from None
  try:
    placed = ((at := f'tfds {name} {split}[{i}]', _example(row, at))
              for i, row in enumerate(builder.as_data_source(split=split)))
    return examples.finish_examples(placed, f'tfds {name} {split}')
  except errors.UserError:
    raise
  except Exception as e:  # damaged records can raise any exception
    raise errors.UserError(
        f'{builder.data_dir}: damaged ({_one_line(e)}); delete it to prepare '
        'it again') from None


def _prepare(builder: Any, where: pathlib.Path) -> None:
  manual = where / 'downloads' / 'manual'
  needed = {pathlib.PurePosixPath(urllib.parse.urlparse(url).path).name: url
            for url in builder.url_infos or {}}
  wanted = _wanted(builder, needed)
  missing = [f for f in wanted if not (manual / f).is_file()]
  if missing and not _reachable(needed[missing[0]]):
    raise errors.UserError(
        f'tfds {builder.name}: not prepared in {where}, and the network is '
        f'down; put {", ".join(missing)} into {manual}')
  shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
  try:
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
      builder.download_and_prepare(download_dir=str(where / 'downloads'))
  except Exception as e:  # the library's errors share no base class
    raise errors.UserError(
        f'tfds {builder.name}: could not be prepared in {where} '
        f'({type(e).__name__}: {_one_line(e)})') from None


class _RequestedUrls(Exception):
  """The URLs that a data set requests, thrown to end its preparation."""

  @staticmethod
  def download_and_extract(urls: Any) -> None:  # of a download manager
    raise _RequestedUrls(urls)


def _wanted(builder: Any, needed: dict[str, str]) -> list[str]:
  """Returns the raw files of this configuration, or all if unknown."""
  requested: Any = None
  try:
    builder._split_generators(_RequestedUrls)
  except _RequestedUrls as e:
    requested, = e.args
  except AttributeError:  # the data set uses another download method
    pass
  urls = {*requested.values()} if isinstance(requested, dict) else {requested}
  return sorted(f for f, url in needed.items() if url in urls) or sorted(needed)


def _reachable(url: str) -> bool:
  """Returns whether the host answers; the library would retry for minutes."""
  parts = urllib.parse.urlparse(url)
  if parts.scheme in urllib.request.getproxies():
    return True  # behind a proxy the host need not answer directly
  port = parts.port or (443 if parts.scheme == 'https' else 80)
  with contextlib.suppress(OSError):
    socket.create_connection((parts.hostname, port), PROBE_SECONDS).close()
    return True
  return False


def _example(row: Any, at: str) -> Example:
  texts, starts = (row['answers'][name] for name in ('text', 'answer_start'))
  plain = {name: _text(row[name], f'{at}.{name}')
           for name in ('id', 'question', 'context')}
  answers = {'text': [_text(text, f'{at}.answers') for text in texts],
             'answer_start': [int(start) for start in starts]}
  marked = ({'is_impossible': bool(row['is_impossible'])}
            if 'is_impossible' in row else {})
  return examples.question_example(
      {**plain, **marked, 'answers': answers}, plain['context'],
      _text(row.get('title', b''), f'{at}.title'), at)


def _text(value: Any, at: str) -> str:
  return check_text(
      value.decode('utf-8') if isinstance(value, bytes) else value, at)


def _one_line(e: BaseException) -> str:
  return ' '.join(str(e).split())[:300]
