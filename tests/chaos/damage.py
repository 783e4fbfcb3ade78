"""Damaged files: checkpoints, caches, data, foreign weights, programs."""

from collections.abc import Callable, Iterator
import fnmatch
import json
import pathlib
import pickle
import random
import shutil
import struct

import numpy as np
import safetensors.numpy

from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import manager
from qa_jax.data import examples
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from tests.chaos import processes
from tests.common import runs
from tests.common import weights

LINE = 1000  # the most characters of a refusal


def flipped(content: bytes, draw: random.Random) -> bytes:
  """Returns the content with one random bit changed."""
  at = draw.randrange(len(content))
  return (content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)])
          + content[at + 1:])


def faults(content: bytes, flips: int, draw: random.Random
           ) -> Iterator[tuple[str, bytes | None]]:
  """Yields damaged versions of a file's content; None means a deleted file."""
  for _ in range(flips if content else 0):
    yield 'flips', flipped(content, draw)
  if content:
    yield 'truncations', content[:len(content) // 2]
    yield 'truncations', content[:-1]
  yield 'additions', content + b'\0'
  yield 'deletions', None


def put(path: pathlib.Path, content: bytes | None) -> None:
  path.unlink(missing_ok=True)  # a memory-mapped file is never written in place
  if content is not None:
    path.write_bytes(content)


def refused(call: Callable[[], object], path: pathlib.Path | str) -> bool:
  """Returns whether a call is refused; a refusal is one line with the file."""
  try:
    call()
  except errors.UserError as e:
    line = str(e)
    assert '\n' not in line and len(line) < LINE and str(path) in line, line
    return True
  return False


def checkpoints(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R3: flips, truncations and deletions of files of a checkpoint."""
  draw, tally = random.Random(seed), {}
  saves = directory / 'checkpoints'
  writer = manager.Checkpoints(saves)
  for step in (1, 2):
    writer.save(step, params={'w': np.full((16, 16), step, np.float32)},
                optimizer={'step': np.asarray(step, np.int32)},
                meta={'position': step}, metrics={'f1': 50.0 + step})
  writer.close()
  reader = manager.Checkpoints(saves, read_only=True)
  paths = [p for p in sorted((saves / '2').rglob('*')) if p.is_file()]
  for path in paths:
    whole, name = path.read_bytes(), path.relative_to(saves / '2')
    for kind, content in faults(whole, count, draw):
      put(path, content)
      assert reader.damage(2).startswith(f'{name}: '), (kind, name)
      tally[kind] = tally.get(kind, 0) + 1
    put(path, whole)
  reader.close()
  for path in paths:  # and training goes on from an older checkpoint
    copy = directory / 'copy'
    shutil.copytree(saves, copy)
    put(copy / path.relative_to(saves), flipped(path.read_bytes(), draw))
    resumed = manager.Checkpoints(copy)
    assert resumed.latest == 1 and (copy / '2.damaged').is_dir()
    resumed.close()
    shutil.rmtree(copy)
  said = ', '.join(f'{n} {kind}' for kind, n in tally.items())
  return (f'{said} in {len(paths)} files: 100 % detected, file and step named; '
          f'{len(paths)} of {len(paths)} resumed from the step before')


SQUAD = {'version': 'v2.0', 'data': [{'title': 'T', 'paragraphs': [{
    'context': 'Mira lives in Bern. Ülo came 東京 in 1999.', 'qas': [
        {'id': 'a', 'question': 'Where?', 'is_impossible': False,
         'answers': [{'text': 'Bern', 'answer_start': 14}]},
        {'id': 'b', 'question': 'Who?', 'is_impossible': True,
         'answers': [], 'plausible_answers': []}]}]}]}


def squad_examples() -> list[examples.Example]:
  """Returns the examples of SQUAD."""
  paragraph, = SQUAD['data'][0]['paragraphs']
  return [examples.question_example(qa, paragraph['context'], 'T', 'data')
          for qa in paragraph['qas']]


def data(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R9: damaged SQuAD files and damaged entries of the feature cache."""
  draw = random.Random(seed)
  path = directory / 'data.json'
  load = lambda: sources.load_examples(str(path))
  whole = json.dumps(SQUAD, ensure_ascii=False).encode()
  for n in range(len(whole) - 1):
    put(path, whole[:n])
    assert refused(load, path), n
  read = 0
  for _ in range(count):
    put(path, flipped(whole, draw))
    read += not refused(load, path)  # a changed letter of a text is valid data
  put(path, b'\xef\xbb\xbf' + whole)
  assert len(load()) == 2
  put(path, whole.replace(b'Where', b'\\ud800'))
  assert refused(load, path)
  tally = _cache(directory / 'entry', count, draw)
  return (f'{len(whole) - 1} of {len(whole) - 1} truncations of a SQuAD file '
          f'refused; of {count} flips {count - read} refused and {read} read as'
          ' other text; a lone surrogate refused, a byte-order mark taken. '
          f'{tally} of {tally} damages to a cache detected')


def _cache(entry: pathlib.Path, count: int, draw: random.Random) -> int:
  tokenizer = tokenizer_lib.train_tokenizer(
      ['Mira lives in Bern.'], vocab_size=60)
  entry.mkdir()
  store.write_store(entry, windows.make_windows(
      squad_examples(), tokenizer, max_length=32,
      window_overlap=4, max_question_length=8), {}, with_vocabulary=True)
  tally = 0
  for path in sorted(entry.iterdir()):
    whole = path.read_bytes()
    for kind, content in faults(whole, max(count // 20, 1), draw):
      put(path, content)
      try:
        store.read_store(entry, {}, tokenizer=None)
      except store.DamagedError as e:
        assert path.name in str(e), (kind, path)
      else:
        raise AssertionError(f'{kind} of {path.name} not detected')
      tally += 1
    put(path, whole)
  return tally


class Bomb:
  """An object whose unpickling runs code."""

  def __reduce__(self) -> tuple[object, tuple[str]]:
    return open, (str(BOMBED), 'w')


BOMBED = pathlib.Path('/nonexistent/bomb')  # set before it is pickled


def weights_of_others(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R13: malformed safetensors, wrong names and shapes, a pickle."""
  draw, tally = random.Random(seed), 0
  tensors = safetensors.numpy.load_file(
      weights.TINY / 'model.safetensors')
  source = directory / 'source'
  shutil.copytree(weights.TINY, source)
  path = source / 'model.safetensors'
  template = weights.fresh()
  load = lambda: hugging_face.load_parameters(source, template)
  load()
  whole = path.read_bytes()
  size, = struct.unpack('<Q', whole[:8])
  malformed = [
      *(whole[:draw.randrange(len(whole))] for _ in range(count)),
      struct.pack('<Q', 2**63) + whole[8:], struct.pack('<Q', 2**40) + whole,
      b'', whole[:8], whole + b'\0', struct.pack('<Q', size - 1) + whole[8:]]
  header = json.loads(whole[8:8 + size])
  name = next(n for n in header if n != '__metadata__')
  for change in ({'data_offsets': [0, 2**62]}, {'data_offsets': [4, 2]},
                 {'shape': [2**40]}, {'dtype': 'F4096'}, {'shape': [-1]},
                 {'data_offsets': [0, header[name]['data_offsets'][1] + 4]}):
    text = json.dumps(header | {name: header[name] | change}).encode()
    malformed.append(struct.pack('<Q', len(text)) + text + whole[8 + size:])
  for content in malformed:
    put(path, content)
    assert refused(load, source), content[:100]
    tally += 1
  key = next(iter(tensors))
  for arrays in ({k: v for k, v in tensors.items() if k != key},
                 tensors | {'encoder.layer.99.extra': np.zeros(2, np.float32)},
                 tensors | {'encoder.../../outside': np.zeros(2, np.float32)},
                 tensors | {key: tensors[key][:-1]},
                 tensors | {key: tensors[key].astype(np.int32)[..., None]}):
    put(path, safetensors.numpy.save(arrays))
    assert refused(load, source), [*arrays][:3]
    tally += 1
  global BOMBED
  BOMBED = directory / 'bombed'
  for name in ('pytorch_model.bin', 'model.safetensors'):
    put(path, None)
    (source / name).write_bytes(pickle.dumps(Bomb()))
    assert refused(load, source) and not BOMBED.exists(), name
    tally += 1
  assert not [(name, pattern) for pattern in hugging_face.FETCHED for name in (
      'pytorch_model.bin', 'x.pkl', 'x.pt', 'x.py', 'x.h5', 'x.msgpack')
              if fnmatch.fnmatch(name, pattern)]
  return (f'{tally} of {tally} malformed or ill-fitting weights refused in one '
          'line; a pickle that runs code was not opened')


def compiled(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R14: entries of the compilation cache cut short or flipped."""
  draw, cache = random.Random(seed), directory / 'compiled'
  fields = {'parallel': {'num_devices': 1}, 'data': {'eval': ''},
            'train': {'num_steps': 3}}

  def rows(name: str) -> list[dict[str, float]]:
    workdir = directory / name
    with processes.Child(directory / f'{name}.log', processes.train_run,
                         workdir, fields, cache) as child:
      assert child.wait() == 0, child.said
    return runs.rows_of(workdir)

  expected = rows('whole')
  # JAX does not always rewrite a damaged entry, so restore the original.
  entries = {path: path.read_bytes() for path in sorted(cache.iterdir())
             if path.name.endswith('-cache')}
  assert entries
  for n in range(count):
    for path, whole in entries.items():
      put(path, whole[:draw.randrange(len(whole))] if n % 2 == 0
          else flipped(whole, draw))
    assert rows(f'run{n}') == expected
  return (f'{count} runs with each of {len(entries)} compiled programs '
          'truncated, or a bit of it flipped: exit code 0, equal values')
