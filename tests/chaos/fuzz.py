"""Fuzzing of every parser: an input gives a result or the documented error."""

import contextlib
import inspect
import json
import struct
from typing import Any

import numpy as np

from qa_jax import build
from qa_jax import config
from qa_jax import errors
from qa_jax import heads
from qa_jax import input_pipeline
from qa_jax import objectives
from qa_jax import registry
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import tensorflow as tensorflow_lib
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import examples
from qa_jax.data import sources
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import windows
from qa_jax.decoding import search
from qa_jax.inference import predict
from qa_jax.metrics import error_analysis
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad as squad_lib
from qa_jax.serving import service as service_lib
from qa_jax.training import optimizer
from qa_jax.training import parallel
from tests.chaos import damage
from tests.chaos import inputs
from tests.chaos import overrides as overrides_lib
from tests.chaos.campaign import parser
from tests.common import random_model
from tests.common import tensorflow
from tests.common import tiny
from tests.common import weights


def dumped(*values: Any) -> list[bytes]:
  return [json.dumps(value).encode() for value in values]


def noise(draw: inputs.Draw) -> bytes:
  return draw.randbytes(draw.randint(0, 40))


@parser(dumped(damage.SQUAD), noise)
def squad(directory):
  path = directory / 'a.json'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    for example in sources.load_examples(str(path)):
      repr(example).encode('utf-8')
      assert example.id and not (example.impossible and example.answers)
  return call


MRQA = {'context': 'Mira lives in Bern.', 'qas': [
    {'qid': 'a', 'question': 'Who?', 'detected_answers': [
        {'text': 'Mira', 'char_spans': [[0, 3]]}]}]}


@parser([*dumped(MRQA, {'header': {}}), dumped(MRQA)[0] + b'\n'], noise)
def mrqa(directory):
  path = directory / 'a.jsonl'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    sources.load_examples(str(path))
  return call


WORDS = tokenizer_lib.train_tokenizer(
    ['Mira lives in Bern, 東京 é ##'], vocab_size=120)


def prose(draw: inputs.Draw) -> str:
  return ''.join(draw.choice(('Mira', ' ', 'lives in Bern', '.', inputs.text(
      draw))) for _ in range(draw.randint(0, 8)))


@parser(fresh=lambda draw: (prose(draw), prose(draw)))
def tokens(directory):
  del directory

  def call(texts: tuple[str, str]) -> None:
    for text in texts:
      examples.check_text(text, 'text')
    encoded = WORDS.encode(texts)
    for text, begin, end in zip(
        texts, encoded.ptr[:-1], encoded.ptr[1:], strict=True):
      offsets = encoded.offsets[begin:end]
      assert (offsets >= 0).all() and (offsets <= len(text)).all()
      assert (offsets[:, 0] <= offsets[:, 1]).all()
      # A stripped accent leaves no token; the order of tokens stays.
      assert (np.diff(offsets[:, 0]) >= 0).all()
      for special in (WORDS.cls_id, WORDS.sep_id, WORDS.pad_id):
        assert special not in encoded.ids[begin:end]
    window_set = windows.make_windows(
        [examples.Example('0', *texts)], WORDS, max_length=24,
        window_overlap=4, max_question_length=8)
    assert (window_set.total_lengths <= 24).all()
  return call


SPECS = [
    'biaffine(rank=32)', 'compound(base="mlp(rank=64)")', 'beam',
    'cross_entropy(domain="all")', 'label_smoothing(epsilon=0.1)',
    'length_prior(base="independent")', 'top_k(k=5)', 'conditional',
    'answerability(base="span_softmax(temperature=2.0)")',
    'synthetic(seed=1, size=2)+synthetic(seed=2, size=1)']
TABLES = {'head': heads.HEADS, 'objective': objectives.OBJECTIVES,
          'search': search.SEARCHES}
# (name, parameter) of all entries that a spec can build.
PARAMETERS = [(name, key) for table in TABLES.values()
              for name, make in table.items()
              for key in (*inspect.signature(make).parameters, 'rnak')]


def spec_of(draw: inputs.Draw) -> str:
  name, key = draw.choice(PARAMETERS)
  return f'{name}({key}={inputs.tree(draw, 1)!r})'


@parser(SPECS, spec_of)
def specs(directory):
  del directory

  def call(spec: str) -> None:
    for what, table in TABLES.items():
      with contextlib.suppress(errors.UserError):
        registry.build(table, spec, what=what)
    registry.parse_spec(spec)
  return call


@parser(SPECS)
def data_specs(directory):
  del directory

  def call(spec: str) -> None:
    if 'size' not in spec and 'tfds' not in spec:  # slow, not wrong
      sources.load_examples(spec)
  return call


def parts(checked: config.Config) -> None:
  """Checks a config as far as possible before reading or compiling."""
  input_pipeline.batch_buckets(checked)
  parallel.check_batch(checked.train.batch_size, max(
      checked.parallel.num_devices, 1), checked.train.grad_accumulation)
  optimizer.make_schedule(checked.optim.schedule, learning_rate=1.0,
                          num_steps=1, warmup_fraction=0.0)
  if not checked.model.init_from:
    build.encoder_config(checked, 100, None)


@parser(fresh=overrides_lib.changes)
def overrides(directory):
  del directory

  def call(given: dict[str, Any]) -> None:
    checked = config.check_config(config.override(tiny.FIELDS, given))
    assert config.check_config(checked.to_dict()) == checked
    parts(checked)
  return call


@parser(dumped(tiny.config().to_dict(), config.override(
    tiny.config().to_dict(), {'train.num_steps': 0, 'train.num_epochs': 2.0,
                              'data.buckets': [32, 48]})), noise)
def stored_config(directory):
  path = directory / 'config.json'

  def call(content: bytes) -> None:
    path.write_bytes(content)
    parts(RunDirectory(directory).read_config())
  return call


HEADER = {'__metadata__': {'format': 'pt'}, **{
    name: {'dtype': kind, 'shape': [2, 3],
           'data_offsets': [12 * n, 12 * n + 12]}
    for n, (name, kind) in enumerate((
        ('bert.embeddings.word_embeddings.weight', 'F16'),
        ('bert.encoder.layer.0.output.dense.weight', 'BF16'),
        ('qa_outputs.weight', 'I16')))}}
MORE = (0, 0, 0, 0, 1, -1, 2**31, 2**63 - 1)  # of the header's length
SIZES = (36, 36, 36, 35, 0, 40)  # of the data


@parser([(header, 0) for header in dumped(HEADER)])
def safetensors(directory):
  fields = json.loads((weights.TINY / 'config.json').read_text())
  (directory / 'config.json').write_text(json.dumps(fields))
  path, template = directory / 'model.safetensors', weights.fresh()

  def call(given: tuple[bytes, int]) -> None:
    header, chance = given
    length = len(header) + MORE[chance % len(MORE)]
    path.write_bytes(struct.pack('<Q', length % 2**64) + header + bytes(
        range(SIZES[chance // len(MORE) % len(SIZES)])))
    checkpoint = hugging_face.read_checkpoint(directory)
    try:
      hugging_face.fit_tensors(checkpoint, template)
    except errors.UserError as e:  # accepted inputs are changed further
      assert '\n' not in str(e)
  return call


ROW = tensorflow.field
GOOD = (ROW(1, 1) + ROW(2, ROW(2, ROW(1, 3))) + ROW(4, 0) + ROW(5, 12)
        + tensorflow.varint(6 << 3 | 5)
        + tensorflow.masked_crc(bytes(12)))
FLIPS = (None, None, None, None, (0, 1), (20, 255), (-9, 1), (-1, 1))


@parser([(ROW(1, 1), b'name', GOOD, b'other', GOOD, 0)])
def bundles(directory):
  prefix = directory / 'model'
  prefix.with_name('model.data-00000-of-00001').write_bytes(bytes(12))

  def call(given: tuple[bytes, bytes, bytes, bytes, bytes, int]) -> None:
    header, name, row, other, another, chance = given
    content = bytearray(tensorflow.table(
        {name: row, other: another, b'': header}, compression=chance & 1))
    if flip := FLIPS[chance // 2 % len(FLIPS)]:
      content[flip[0]] ^= flip[1]
    prefix.with_name('model.index').write_bytes(content)
    index = tensorflow_lib.read_index(prefix)
    tensorflow_lib.read_tensors(index, index.entries)
  return call


BODY = {'question': 'Who?', 'context': 'Mira lives in Bern.', 'n_best': 2}


@parser(dumped(BODY), noise)
def bodies(directory):
  del directory
  service = service_lib.Service(
      random_model.random_qa('independent'), service_lib.Limits())

  def call(body: bytes) -> None:
    asked = service.parse(body)
    assert service._count_windows(asked) > 0
  return call


QUESTIONS = damage.squad_examples()
SAID = {'a': 'Bern', 'b': ''}
SURE = {'a': 0.1, 'b': -3.5}
NBEST = {'id': 'a', 'null_score': 1.5, 'windows': 1, 'answers': [
    {'text': 'Bern', 'start': 14, 'end': 18, 'score': 2.5}]}


@parser([tuple(dumped(SAID, SURE, NBEST))])
def evaluations(directory):
  paths = [directory / name for name in (
      'predictions.json', 'na_probs.json', 'nbest.jsonl')]

  def call(contents: tuple[bytes, bytes, bytes]) -> None:
    for path, content in zip(paths, contents, strict=True):
      path.write_bytes(content)
    said = predictions_lib.read_predictions(paths[0])
    sure = predictions_lib.read_na_probs(paths[1])
    squad_lib.squad_metrics(QUESTIONS, said, na_scores=sure)
    n_best = predictions_lib.read_n_best(paths[2])
    error_analysis.check_ids(QUESTIONS, said, paths[0])
    error_analysis.analyse_errors(QUESTIONS, said, n_best, na_scores=sure)
  return call


@parser([b'{"question": "Who?", "context": "Mira", "id": 3}\n', *dumped(
    {'question': 'Who?', 'context': 'Mira.', 'id': 'a'})], noise)
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
