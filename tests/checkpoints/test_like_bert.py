"""Encoders that are BERT's up to a few constants compute what transformers has.

tests/golden/record_encoders.py recorded the arrays and the configs. The weights
are drawn, here and there by one function.

Glossary of shapes: B batch, L length, N layers, D hidden size, T tensors.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from qa_jax import build
from qa_jax import heads
from qa_jax import objectives
from qa_jax.checkpoints import architectures
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import weight_names
from qa_jax.checkpoints.architectures import bert
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.export import hugging_face as export_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.models import qa as qa_lib
from qa_jax.models.encoders import ENCODERS
from qa_jax.models.encoders import mpnet
from qa_jax.sweeps import plan
from qa_jax.training import optimizer
from qa_jax.training import trainer as trainer_lib
from tests.common import drawn
from tests.common import parity
from tests.common import random_model
from tests.common import scripts
from tests.common import tiny
from tests.common.refusals import refusal

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
CONFIGS = json.loads((GOLDEN / 'encoders_configs.json').read_text())
KINDS = sorted(CONFIGS)


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN / 'encoders_golden.npz') as arrays:
    return dict(arrays)


def write(kind: str, path: pathlib.Path, **fields) -> pathlib.Path:
  """Writes the checkpoint of a kind; a field that is None is left out."""
  config = {k: v for k, v in (CONFIGS[kind] | fields).items() if v is not None}
  path.mkdir(exist_ok=True)
  files.write_json(path / 'config.json', config)
  safetensors.numpy.save_file(
      drawn.tensors({k: tuple(v) for k, v in config.pop('tensors').items()}),
      path / 'model.safetensors')
  return path


@pytest.fixture(scope='module', params=KINDS)
def case(request, golden, tmp_path_factory):
  """Returns (kind, model, parameters, recorded arrays)."""
  kind = request.param
  directory = write(kind, tmp_path_factory.mktemp('case') / kind)
  sizes = hugging_face.read_config(directory)
  model = qa_lib.QAModel(sizes, heads.HEADS['biased']())
  params, notes = hugging_face.load_parameters(
      directory, qa_lib.zero_params(model))
  assert not notes
  return kind, model, params, {
      k.removeprefix(f'{kind}_'): v for k, v in golden.items()
      if k.rpartition('_')[0] == kind or k == f'{kind}_gradient_norms'}


def score(model, params, batch):
  return model.apply({'params': params}, **{
      k: batch[k] for k in qa_lib.INPUTS})


def test_every_layer_and_the_logits_are_those_of_transformers(case):
  kind, model, params, expected = case
  batch = parity.inputs(kind)
  real = batch['attention_mask'] > 0
  scores = jax.jit(score, static_argnums=0)(model, params, batch)
  for ours, theirs in zip((scores.start, scores.end), expected['logits'],
                          strict=True):
    np.testing.assert_allclose(
        np.asarray(ours)[real], theirs[real], atol=1e-5, rtol=0)
  layers = jax.jit(model.config.build().apply)(
      {'params': params['encoder']},
      *(batch[k] for k in ('token_ids', 'token_type_ids', 'attention_mask')))
  stored = parity.recorded_tokens(batch)
  assert len(layers) == len(expected['layers']) == 3
  for ours, theirs in zip(layers, expected['layers'], strict=True):
    np.testing.assert_allclose(
        np.asarray(ours)[stored], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize('kind', ['albert', 'mpnet'])
@pytest.mark.parametrize('change', [{'num_layers': 1}, {'init_head': False}])
def test_a_head_of_fewer_layers_or_unasked_is_fresh(tmp_path, kind, change):
  source = write(kind, tmp_path / kind)
  sizes = hugging_face.read_config(source)
  net = qa_lib.QAModel(dataclasses.replace(
      sizes, num_layers=change.get('num_layers', sizes.num_layers)),
                       heads.HEADS['biased']())
  key = jax.random.key(0)
  params, notes = trainer_lib.initial_parameters(
      net, key, source, init_head=change.get('init_head', True))
  jax.tree.map(np.testing.assert_array_equal, params['head'],
               qa_lib.init_head(net, key)['head'])
  assert len(notes) == 1 and 'fresh' in notes[0]


def test_loss_gradients_and_an_update_are_those_of_torch(case):
  kind, model, params, expected = case
  batch = parity.inputs(kind)
  objective = objectives.cross_entropy(domain='context')
  adamw = optimizer.adamw(lambda t: 1e-3, weight_decay=0.01,
                          bias_table=model.config.BIAS_TABLE)

  @jax.jit
  def step(params):
    loss, gradients = jax.value_and_grad(lambda p: objective.loss(
        score(model, p, batch), batch).mean())(params)
    updates, _ = adamw.update(gradients, adamw.init(params), params)
    return loss, gradients, jax.tree.map(jnp.add, params, updates)

  loss, gradients, updated = jax.device_get(step(params))
  assert loss == pytest.approx(expected['loss'], abs=1e-5)
  architecture = architectures.ARCHITECTURES[CONFIGS[kind]['model_type']]
  names = {weight_names.from_hugging_face(name, CONFIGS[kind]['model_type']): i
           for i, name in enumerate(sorted(CONFIGS[kind]['tensors']))}
  theirs = hugging_face.to_hugging_face(gradients, architecture)
  after = hugging_face.to_hugging_face(updated, architecture)
  if kind == 'distilbert':  # its zero vectors of token types are trained
    assert abs(theirs.pop(bert.TOKEN_TYPES)).max() > 0
  assert theirs.keys() == names.keys()
  steps = 0
  for name, i in names.items():
    if name == bert.POSITIONS and architecture.positions_after_pad:
      for tree in (theirs, after):
        tree[name] = np.pad(tree[name], ((2, 0), (0, 0)))
    norm = expected['gradient_norms'][i]
    np.testing.assert_allclose(
        np.linalg.norm(theirs[name]), norm, rtol=1e-4, atol=1e-6, err_msg=name)
    slope = parity.some(theirs[name])
    np.testing.assert_allclose(
        slope, expected['gradients'][i], atol=1e-4 * max(norm, 0.1), rtol=0,
        err_msg=name)
    # The first step of Adam is as long for a gradient that is rounding alone,
    # as that of a key's bias, so that its direction says nothing.
    clear = abs(expected['gradients'][i]) > 1e-5
    np.testing.assert_allclose(
        parity.some(after[name])[clear], expected['updated'][i][clear],
        atol=1e-6, rtol=0, err_msg=name)  # weight decay moves weights by 2e-6
    steps += clear.sum()
  assert steps > 5 * len(names)


def test_buckets_are_those_of_t5():
  distance = np.arange(-600, 601)
  size = np.maximum(abs(distance), 1).astype(np.float64)
  # Raffel et al. (2020): logarithmic up to the distance 128, a half each side.
  far = np.minimum(8 + np.floor(
      np.log(size / 8) / np.log(128 / 8) * 8 + 1e-9), 15)
  expected = np.where(abs(distance) < 8, abs(distance), far) + np.where(
      distance > 0, 16, 0)
  np.testing.assert_array_equal(
      mpnet.bucket(jnp.asarray(distance)), expected)


# --- config.json


@pytest.mark.parametrize(('kind', 'fields', 'expected'), [
    # Fields that older files omit have the defaults of transformers.
    ('albert', {'embedding_size': None}, {'embedding_size': 128}),
    ('albert', {'hidden_act': None, 'num_hidden_groups': None,
                'inner_group_num': None}, {'hidden_act': 'gelu_new'}),
    ('albert_gelu', {}, {'hidden_act': 'gelu', 'embedding_size': 16}),
    ('electra', {'embedding_size': None, 'layer_norm_eps': None},
     {'embedding_size': 128, 'layer_norm_eps': 1e-12}),
    # DistilBERT has no such field; its code has the number.
    ('distilbert', {'layer_norm_eps': 0.1}, {'layer_norm_eps': 1e-12}),
    ('mpnet', {'pad_token_id': None, 'relative_attention_num_buckets': None,
               'layer_norm_eps': None},
     {'max_position': 150, 'layer_norm_eps': 1e-12, 'type_vocab_size': 0})])
def test_a_config_is_read_field_by_field(kind, fields, expected, tmp_path):
  sizes = hugging_face.read_config(write(kind, tmp_path, **fields))
  assert {name: getattr(sizes, name) for name in expected} == expected
  assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.mlp_size,
          sizes.vocab_size) == (16, 2, 2, 24, 60)


@pytest.mark.parametrize(('name', 'expected'), [
    ('bert', (2, 1e-12, 0, 'gelu')), ('roberta', (1, 1e-5, 0, 'gelu')),
    ('electra', (2, 1e-12, 128, 'gelu')),
    ('albert', (2, 1e-12, 128, 'gelu_new')), ('mpnet', (0, 1e-5, 0, 'gelu'))])
def test_defaults_are_the_constants_of_released_models(name, expected):
  """Those of bert-base, roberta-base, electra-small, albert-base, mpnet-base.
  """
  sizes = ENCODERS[name](vocab_size=9, **ENCODERS[name].PRESETS['tiny'])
  assert sizes.max_position == 512
  assert (sizes.type_vocab_size, sizes.layer_norm_eps, sizes.embedding_size,
          sizes.hidden_act) == expected


@pytest.mark.parametrize(('kind', 'fields', 'message'), [
    ('albert', {'num_hidden_groups': 2}, 'num_hidden_groups 2'),
    ('albert', {'inner_group_num': 2}, 'inner_group_num 2'),
    ('albert', {'hidden_act': 'relu'}, "unknown hidden_act 'relu'"),
    ('albert', {'embedding_size': 0}, 'embedding_size is 0'),
    ('albert', {'position_embedding_type': 'relative_key'}, 'relative_key'),
    ('electra', {'embedding_size': '8'}, "embedding_size is '8'"),
    ('electra', {'is_decoder': True}, 'is_decoder True'),
    ('mpnet', {'relative_attention_num_buckets': 16}, 'num_buckets 16'),
    ('mpnet', {'pad_token_id': 0}, 'pad_token_id 0'),
    ('mpnet', {'hidden_act': 'gelu_new'}, "hidden_act 'gelu_new'")])
def test_a_config_that_computes_something_else_is_refused(
    kind, fields, message, tmp_path):
  assert message in refusal(
      hugging_face.read_config, write(kind, tmp_path, **fields))


def test_a_model_type_is_known_by_its_class_alone(tmp_path):
  for kind in KINDS:
    path = write(kind, tmp_path / kind, model_type=None)
    assert hugging_face.read_config(path) == hugging_face.read_config(
        write(kind, tmp_path / f'{kind}_', architectures=None))


# --- tokenizers and conversion


def wordpiece_of_mpnet() -> tokenizers.Tokenizer:
  vocab = ['<s>', '<pad>', '</s>', '<unk>', '[UNK]', *'abcdefghijklmnopqrst.?',
           *(f'##{c}' for c in 'abcdefghijklmnopqrst'), 'mira', 'built', 'the',
           'who', 'oslo', 'in', 'it', '<mask>']
  library = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      {token: i for i, token in enumerate(vocab)}, unk_token='[UNK]',
      max_input_chars_per_word=100))
  library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  library.decoder = tokenizers.decoders.WordPiece()
  library.add_special_tokens(['<s>', '<pad>', '</s>', '[UNK]', '<mask>'])
  library.post_processor = tokenizers.processors.RobertaProcessing(
      ('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=False)
  return library


PIECES = (*'abcdefghijklmnopqrstuvwxyz.?', *(f'\u2581{word}' for word in (
    'mira', 'built', 'the', 'who', 'oslo', 'in', 'it')))


def unigram_of_albert(more: Sequence[str] = PIECES) -> tokenizers.Tokenizer:
  """Makes a tokenizer as AlbertTokenizer of transformers 4 and 5 does.

  SentencePiece's own map of characters is left out.
  """
  pieces = ['<pad>', '<unk>', '[CLS]', '[SEP]', '[MASK]', '\u2581', *more]
  library = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [(piece, -1.0 - 0.1 * (i % 97)) for i, piece in enumerate(pieces)], 1))
  normalizers = tokenizers.normalizers
  library.normalizer = normalizers.Sequence([
      normalizers.Replace('``', '"'), normalizers.Replace("''", '"'),
      normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')])
  library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.WhitespaceSplit(),
      tokenizers.pre_tokenizers.Metaspace()])
  library.decoder = tokenizers.decoders.Metaspace()
  library.add_special_tokens(['<pad>', '<unk>', '[CLS]', '[SEP]', '[MASK]'])
  library.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS]:0 $A:0 [SEP]:0', pair='[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1',
      special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
  return library


LIBRARIES = {'mpnet': wordpiece_of_mpnet, 'albert': unigram_of_albert,
             'albert_gelu': unigram_of_albert}
QUESTION, CONTEXT = 'Who built it?', 'Mi\u0301ra  built the \u00c9tl in Oslo.'


@pytest.mark.parametrize('kind', ['electra', *LIBRARIES])
def test_a_checkpoint_answers_and_leaves_equal(kind, tmp_path):
  source = write(kind, tmp_path / 'in')
  if kind == 'electra':
    (source / 'vocab.txt').write_text('\n'.join([
        '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrst.?',
        *(f'##{c}' for c in 'abcdefghijklmnopqrst')]))
  else:
    LIBRARIES[kind]().save(str(source / 'tokenizer.json'))
  export_lib.write_run_directory(
      export_lib.read_source(str(source)), tmp_path / 'run', [])
  export_lib.write_hugging_face(
      export_lib.read_source(str(tmp_path / 'run')), tmp_path / 'out')
  theirs, ours = (safetensors.numpy.load_file(
      path / 'model.safetensors') for path in (source, tmp_path / 'out'))
  assert theirs.keys() == ours.keys()
  for name, value in theirs.items():
    # transformers never reads the positions of padding.
    rows = slice(2 * name.startswith('mpnet.embeddings.position'), None)
    np.testing.assert_array_equal(ours[name][rows], value[rows], err_msg=name)
  written = files.read_object(tmp_path / 'out' / 'config.json')
  for name, value in CONFIGS[kind].items():
    if name in written and 'dropout' not in name:  # rates are the trainer's
      assert written[name] == value, name
  assert written.keys() >= {
      'model_type', 'architectures', 'hidden_size', 'layer_norm_eps'} | {
          'electra': {'embedding_size'}, 'mpnet': {
              'pad_token_id', 'bos_token_id', 'eos_token_id'}}.get(
                  kind, {'embedding_size', 'hidden_act'})
  models = [predict.load(path, window_overlap=4, max_question_length=6)
            for path in (source, tmp_path / 'run', tmp_path / 'out')]
  answers = [model.answer(QUESTION, CONTEXT) for model in models]
  assert answers[0] == answers[1] == answers[2]
  for candidate in answers[0].n_best:
    text = CONTEXT[candidate['start']:candidate['end']]
    assert text == candidate['text'] == text.strip() != ''
  assert len({model.tokenizer.fingerprint for model in models}) == 1


def test_ids_and_offsets_of_albert_are_those_of_the_library(tmp_path):
  fold = unigram_of_albert().normalizer.normalize_str
  texts = scripts.texts()
  letters = sorted({c for text in texts for c in fold(text) if c.isprintable()})
  begins = ['\u2581' + fold(word)[:4] for group in scripts.words().values()
            for word in group[::3]]
  library = unigram_of_albert([*dict.fromkeys(
      [*(c for c in letters[:400] if c != ' '), *letters[400::3], *begins])])
  library.save(str(tmp_path / 'tokenizer.json'))
  files.write_json(tmp_path / 'tokenizer_config.json', {
      'do_lower_case': True, 'keep_accents': False,
      'tokenizer_class': 'AlbertTokenizer'})
  reader = tokenizer_files.read_tokenizer(tmp_path)
  rows = reader.encode(texts)
  for text, begin, end in zip(texts, rows.ptr[:-1], rows.ptr[1:], strict=True):
    theirs = library.encode(text, add_special_tokens=False)
    offsets = rows.offsets[begin:end].tolist()
    assert rows.ids[begin:end].tolist() == theirs.ids, ascii(text)
    ours, expected = ([scripts.core('albert', text, *row) for row in some]
                      for some in (offsets, theirs.offsets))
    assert ours == expected, ascii(text)
    scripts.assert_covered('albert', text, offsets)
    assert all(text[a:b] == text[a:b].strip() for a, b in offsets)
  assert len(rows.ids) > 10 * len(texts)


@pytest.mark.parametrize('kind', LIBRARIES)
def test_a_window_is_the_pair_of_the_library(kind, tmp_path):
  """Also without tokenizer_config.json, which names the special tokens."""
  library = LIBRARIES[kind]()
  library.save(str(tmp_path / 'tokenizer.json'))
  reader = tokenizer_files.read_tokenizer(tmp_path)
  expected = library.encode(QUESTION, CONTEXT)
  window = windows_lib.make_windows(
      [Example('0', QUESTION, CONTEXT)], reader, max_length=90,
      window_overlap=1, max_question_length=60).gather(
          np.zeros(1, int), len(expected.ids))
  assert window['token_ids'][0].tolist() == expected.ids
  assert window['token_type_ids'][0].tolist() == expected.type_ids
  assert reader.special[4] == {'mpnet': '<mask>'}.get(kind, '[MASK]')
  typed = reader.encode([' '.join(reader.special) + '[MASK]<mask>']).ids
  assert not {reader.index[t] for t in reader.special if t != '[UNK]' and (
      t != '<unk>')}.intersection(typed.tolist())


# --- training and its limits


@pytest.mark.parametrize('kind', ['albert', 'mpnet'])
def test_training_starts_from_a_checkpoint(kind, tmp_path):
  source = write(kind, tmp_path / kind)
  LIBRARIES[kind]().save(str(source / 'tokenizer.json'))
  trainer = trainer_lib.build_trainer(tiny.config(
      model={'init_from': str(source), 'head': 'biased', 'hidden_size': 0,
             'num_layers': 0, 'num_heads': 0, 'mlp_size': 0},
      data={'max_length': 28, 'window_overlap': 4, 'max_question_length': 10}))
  expected, _ = hugging_face.load_parameters(
      source, qa_lib.zero_params(trainer.model))
  jax.tree.map(np.testing.assert_array_equal, trainer.state.params, expected)


def test_training_decays_no_bias_of_relative_positions():
  trainer = trainer_lib.build_trainer(tiny.config(
      model={'encoder': 'mpnet'}, optim={'warmup_fraction': 0.0},
      data={'eval': ''}, parallel={'mode': 'jit', 'num_devices': 1}))
  batch = trainer.place(*trainer.batches.next_rows())
  plain, decayed = (jax.jit(trainer.step)(
      trainer.state, batch,
      rates={'learning_rate': 0.1, 'weight_decay': decay})[0].params['encoder']
                    for decay in (0.0, 0.5))
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), plain, decayed)
  assert moved['embeddings']['word']['embedding']
  assert not moved['embeddings']['relative']['embedding']


def test_rates_by_layer_are_refused_where_layers_share_parameters():
  config = tiny.config(model={'encoder': 'albert'}, optim={'layer_decay': 0.5})
  for check in (trainer_lib.build_trainer, lambda c: plan.check_trials(
      plan.plan_trials(c, [{}], 1, pathlib.Path('none')))):
    assert ("config.optim.layer_decay=0.5, but the layers of the encoder "
            "'albert'") in refusal(check, config)


@pytest.mark.parametrize('name', ['cudnn', 'pallas'])
@pytest.mark.parametrize('biased', ['mpnet', 'deberta_v2'])
def test_attention_without_a_bias_is_refused(name, biased):
  """Also where the config is checked, so that no run starts in vain."""
  sizes = {encoder: build.encoder_config(tiny.config(
      model={'encoder': encoder, 'num_heads': 1}), 60, None)
           for encoder in ('bert', biased)}
  config = tiny.config(model={'attention': name, 'attention_dropout': 0.0},
                       precision={'compute_dtype': 'bfloat16'})
  check = functools.partial(build.check_attention, config, training=False,
                            platform='gpu')
  check(dataclasses.replace(sizes['bert'], attention_dropout=0.0))
  assert f'{name!r} adds no bias to the scores' in refusal(
      check, sizes[biased])


def test_a_padding_that_transformers_ignores_is_not_exported(tmp_path):
  learned = tokenizer_lib.train_tokenizer([QUESTION + CONTEXT], vocab_size=60)
  config = tiny.config(model={'encoder': 'mpnet'})
  run = random_model.write_run(random_model.draw_qa(
      config, build.encoder_config(config, 60, None), learned), tmp_path / 'x')
  message = refusal(export_lib.write_hugging_face,
                    export_lib.read_source(str(run)), tmp_path / 'out')
  assert 'its token of padding has the id 0, but MPNet' in message
  assert not (tmp_path / 'out').exists()
