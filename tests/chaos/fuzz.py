"""Any input to any parser: a result, or the one line that is documented.

An input fails if anything else is raised, if it takes a second of the
processor, or if the process has grown by MOST_MEBIBYTES after all.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import pathlib
import resource
import signal
import string
import struct
from typing import Any

import hypothesis
from hypothesis import strategies as st
import numpy as np

from qa_jax import analysis
from qa_jax import config
from qa_jax import errors
from qa_jax import heads
from qa_jax import metrics
from qa_jax import objectives
from qa_jax import predict
from qa_jax import registry
from qa_jax import search
from qa_jax import tensor_bundle
from qa_jax import weight_files
from qa_jax.data import examples
from qa_jax.data import sources
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from qa_jax.web import service as service_lib
from tests import test_tensor_bundle
from tests import test_view
from tests import tiny
from tests.chaos import damage

SECONDS = 1.0  # of the processor, for one input
MOST_MEBIBYTES = 256
LINE = errors.MAX_CHARACTERS + 10

TEXT = st.text(st.characters(), max_size=30)
ODD = st.sampled_from([
    '', '\0', '\n', '\ud800', '\u202e', '́' * 20, '[SEP]', '[CLS] [MASK]',
    '##', 'İ' * 9, '\U0001f9d1‍\U0001f680', 'a' * 300, '東京', '../../x'])
NUMBER = (st.integers(-10**30, 10**30) | st.floats()
          | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        TEXT | st.sampled_from(['id', 'text', 'answers', 'question']), inner,
        max_size=4), max_leaves=8)
SYNTAX = st.sampled_from([
    b'{', b'}', b'[', b']', b'"', b',', b':', b'\\', b'\\ud800', b'null',
    b'NaN', b'1e999', b'-', b'9' * 5000, b'[' * 5000, b'{"a":' * 2000,
    b'\xff', b'\0', b'\xef\xbb\xbf', b'(', b')', b'=', b"'", b'+', b'\n'])


class Hang(BaseException):
  """An input took longer than it may."""


@st.composite
def edits(draw: Any, wholes: tuple[bytes, ...]) -> bytes:
  """One of these with a few places changed."""
  content = draw(st.sampled_from(wholes))
  for _ in range(draw(st.integers(0, 4))):
    at = draw(st.integers(0, len(content)))
    end = at + draw(st.sampled_from([0, 0, 1, 2, 8, 10**9]))
    put = draw(SYNTAX | st.binary(max_size=8))
    content = content[:at] + put + content[end:]
  return content


@st.composite
def trees(draw: Any, whole: Any) -> bytes:
  """The JSON of a tree with one or two values replaced."""
  def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
      for key in (value if isinstance(value, dict) else range(len(value))):
        yield from places(value[key], (*path, key))

  def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
      return new
    value = value.copy()
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value
  tree = whole
  for _ in range(draw(st.integers(1, 2))):
    tree = replaced(
        tree, draw(st.sampled_from([*places(tree)])), draw(JSON))
  return json.dumps(tree).encode()


def campaign(strategy: st.SearchStrategy, call: Callable[[Any], Any],
             directory: pathlib.Path, count: int, seed: int) -> str:
  """Calls with `count` inputs; what came of them."""
  tally = {'inputs': 0, 'refused': 0}
  longest = 0.0

  @hypothesis.seed(seed)
  @hypothesis.settings(
      max_examples=count, deadline=None, database=None,
      suppress_health_check=[*hypothesis.HealthCheck], phases=[
          hypothesis.Phase.generate, hypothesis.Phase.shrink])
  @hypothesis.given(strategy)
  def one(value: Any) -> None:
    nonlocal longest
    tally['inputs'] += 1
    with limited() as spent:
      try:
        call(value)
      except (errors.UserError, service_lib.Refused) as e:
        tally['refused'] += 1
        assert '\n' not in str(e) and len(str(e)) < LINE, str(e)[:3000]
    longest = max(longest, spent())

  before = _peak()
  one()
  grown = _peak() - before
  assert grown < MOST_MEBIBYTES, grown
  return (f'{tally["inputs"]} inputs, {tally["refused"]} refused in one line, '
          f'no other error; at most {longest:.2f} s of the processor and '
          f'{grown:.0f} MiB more')


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], float]]:
  """Hang after SECONDS of the processor; gives what was spent of them."""
  def hang(*_: object) -> None:
    raise Hang
  before = signal.signal(signal.SIGVTALRM, hang)
  signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
  left = [SECONDS]
  try:
    yield lambda: SECONDS - left[0]
  finally:
    left[0] = signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0]
    signal.signal(signal.SIGVTALRM, before)


def _peak() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def parser(strategy: st.SearchStrategy) -> Callable:
  """Makes a program of prepare(directory) → call."""
  def program(prepare: Callable) -> Callable[[pathlib.Path, int, int], str]:
    @functools.wraps(prepare)
    def run(directory: pathlib.Path, count: int, seed: int) -> str:
      return campaign(strategy, prepare(directory), directory, count, seed)
    return run
  return program


SQUAD = json.dumps(damage.SQUAD).encode()


@parser(edits((SQUAD,)) | trees(damage.SQUAD) | st.binary(max_size=40))
def squad(directory):
  path = directory / 'a.json'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    for example in sources.load(str(path)):
      repr(example).encode('utf-8')
      assert example.id and not (example.impossible and example.answers)
  return call


MRQA = {'context': 'Mira lives in Bern.', 'qas': [
    {'qid': 'a', 'question': 'Who?', 'detected_answers': [
        {'text': 'Mira', 'char_spans': [[0, 3]]}]}]}


@parser(edits((json.dumps(MRQA).encode() + b'\n',)) | trees(MRQA))
def mrqa(directory):
  path = directory / 'a.jsonl'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    sources.load(str(path))
  return call


WORDS = tokenizer_lib.train(
    ['Mira lives in Bern, 東京 é ##'], vocab_size=120)
PROSE = st.lists(TEXT | ODD | st.sampled_from(
    ['Mira', ' ', 'lives in Bern', '.'])).map(''.join)


@parser(st.tuples(PROSE, PROSE))
def tokens(directory):
  del directory

  def call(texts: tuple[str, str]) -> None:
    for text in texts:
      examples.check_text(text, 'text')
    found = WORDS.encode(texts)
    for text, begin, end in zip(
        texts, found.ptr[:-1], found.ptr[1:], strict=True):
      offsets = found.offsets[begin:end]
      assert (offsets >= 0).all() and (offsets <= len(text)).all()
      assert (offsets[:, 0] <= offsets[:, 1]).all()
      # Of accents that are stripped nothing is left; the order stays.
      assert (np.diff(offsets[:, 0]) >= 0).all()
      for special in (WORDS.cls_id, WORDS.sep_id, WORDS.pad_id):
        assert special not in found.ids[begin:end]
    made = windows.make_windows(
        [examples.Example('0', *texts)], WORDS, max_length=24,
        window_overlap=4, max_question_length=8)
    assert (made.total_lengths <= 24).all()
  return call


SPECS = (b'biaffine(rank=32)', b'compound(base="mlp(rank=64)")', b'beam',
         b'cross_entropy(domain="all")', b'label_smoothing(epsilon=0.1)',
         b'length_prior(base="independent")', b'top_k(k=5)', b'conditional',
         b'answerability(base="span_softmax(temperature=2.0)")',
         b'synthetic(seed=1, size=2)+synthetic(seed=2, size=1)')
TABLES = {'head': heads.HEADS, 'objective': objectives.OBJECTIVES,
          'search': search.SEARCHES}


@parser(edits(SPECS).map(lambda b: b.decode('utf-8', 'surrogateescape'))
        | st.builds('{}({}={!r})'.format, st.sampled_from(
            [name for table in TABLES.values() for name in table]),
            st.text(string.ascii_lowercase + '_', max_size=9), JSON))
def specs(directory):
  del directory

  def call(spec: str) -> None:
    for what, table in TABLES.items():
      with contextlib.suppress(errors.UserError):
        registry.build(table, spec, what=what)
    registry.parse(spec)
  return call


@parser(edits(SPECS).map(lambda b: b.decode('utf-8', 'surrogateescape')).filter(
    lambda spec: 'size' not in spec and 'tfds' not in spec))
def data_specs(directory):
  del directory
  return sources.load


FIELDS = [f'{group}.{name}' for group, values in config.Config().to_dict(
    ).items() if isinstance(values, dict) for name in values] + ['seed']


@parser(st.dictionaries(
    st.sampled_from(FIELDS) | TEXT | st.builds(
        '{}.{}'.format, st.sampled_from(FIELDS), TEXT),
    JSON | st.lists(st.integers(0, 600)), max_size=3))
def overrides(directory):
  del directory

  def call(changes: dict[str, Any]) -> None:
    made = config.check(config.override(tiny.FIELDS, changes))
    assert config.check(made.to_dict()) == made
  return call


@parser(trees(config.Config().to_dict()) | edits((json.dumps(
    config.Config().to_dict()).encode(),)))
def stored_config(directory):
  path = directory / 'config.json'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    config.read(directory)
  return call


HEADER = {'__metadata__': {'format': 'pt'}, **{
    name: {'dtype': kind, 'shape': [2, 3],
           'data_offsets': [12 * n, 12 * n + 12]}
    for n, (name, kind) in enumerate((
        ('bert.embeddings.word_embeddings.weight', 'F16'),
        ('bert.encoder.layer.0.output.dense.weight', 'BF16'),
        ('qa_outputs.weight', 'I16')))}}


@parser(st.tuples(
    trees(HEADER) | edits((json.dumps(HEADER).encode(),)),
    st.sampled_from([0, 0, 0, 0, 1, -1, 2**31, 2**63 - 1]),
    st.sampled_from([36, 36, 36, 35, 0, 40])))
def safetensors(directory):
  fields = json.loads((damage.test_weights.TINY / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(fields))
  path = directory / 'model.safetensors'

  def call(parts: tuple[bytes, int, int]) -> None:
    header, more, size = parts
    path.write_bytes(struct.pack('<Q', (len(header) + more) % 2**64) + header
                     + bytes(range(size)))
    weight_files.read(directory)
  return call


ROW = test_tensor_bundle.field
GOOD = (ROW(1, 1) + ROW(2, ROW(2, ROW(1, 3))) + ROW(4, 0) + ROW(5, 12)
        + test_tensor_bundle.varint(6 << 3 | 5)
        + test_tensor_bundle.masked_crc(bytes(12)))


@parser(st.tuples(
    edits((ROW(1, 1),)), st.dictionaries(
        st.binary(min_size=1, max_size=6) | st.just(b'name'), edits((GOOD,)),
        max_size=3),
    st.sampled_from([None, None, None, (0, 1), (20, 255), (-9, 1)]),
    st.booleans()))
def bundles(directory):
  prefix = directory / 'model'
  prefix.with_name('model.data-00000-of-00001').write_bytes(bytes(12))

  def call(parts: tuple[bytes, dict[bytes, bytes], Any, bool]) -> None:
    header, rows, flip, packed = parts
    content = bytearray(test_tensor_bundle.table(
        {b'': header, **rows}, compression=int(packed)))
    if flip:
      content[flip[0]] ^= flip[1]
    prefix.with_name('model.index').write_bytes(content)
    index = tensor_bundle.read_index(prefix)
    tensor_bundle.read_tensors(index, index.entries)
  return call


BODY = {'question': 'Who?', 'context': 'Mira lives in Bern.', 'n_best': 2}


@parser(edits((json.dumps(BODY).encode(),)) | trees(BODY)
        | st.binary(max_size=40))
def bodies(directory):
  del directory
  service = service_lib.Service(
      test_view.random_qa('independent'), service_lib.Limits())

  def call(body: bytes) -> None:
    asked = service.parse(body)
    assert service._windows(asked) > 0
  return call


QUESTIONS = list(sources.parse_squad(damage.SQUAD, 'data'))
SAID = {'a': 'Bern', 'b': ''}
SURE = {'a': 0.1, 'b': -3.5}
NBEST = {'id': 'a', 'null_score': 1.5, 'windows': 1, 'answers': [
    {'text': 'Bern', 'start': 14, 'end': 18, 'score': 2.5}]}


@parser(st.tuples(*(
    trees(whole) | edits((json.dumps(whole).encode(),)) | st.just(
        json.dumps(whole).encode()) for whole in (SAID, SURE, NBEST))))
def evaluations(directory):
  paths = [directory / name for name in (
      'predictions.json', 'na_probs.json', 'nbest.jsonl')]

  def call(parts: tuple[bytes, bytes, bytes]) -> None:
    for path, content in zip(paths, parts, strict=True):
      path.write_bytes(content)
    said = metrics.read_predictions(paths[0])
    sure = metrics.read_na_probs(paths[1])
    metrics.squad_metrics(QUESTIONS, said, na_scores=sure)
    candidates, counts = analysis.read_nbest(paths[2])
    analysis.check_ids(QUESTIONS, said, paths[0])
    analysis.analyse(QUESTIONS, said, candidates, na_scores=sure,
                     windows=counts)
  return call


@parser(edits((b'{"question": "Who?", "context": "Mira", "id": 3}\n',))
        | trees({'question': 'Who?', 'context': 'Mira.', 'id': 'a'}))
def questions(directory):
  path = directory / 'in.jsonl'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    predict.read_questions(path)
  return call


PARSERS = {
    'squad': squad, 'mrqa': mrqa, 'tokens': tokens, 'specs': specs,
    'data-specs': data_specs, 'overrides': overrides,
    'stored-config': stored_config, 'safetensors': safetensors,
    'bundles': bundles, 'bodies': bodies, 'evaluations': evaluations,
    'questions': questions}
