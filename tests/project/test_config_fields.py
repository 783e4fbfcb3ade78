"""Each config field acts: it changes a result in the way computed by hand.

CHECKS has one function for each field, found by walking the dataclasses of
qa_jax/config.py, so a new field without a function fails. A check sets only its
field, and compares results of the code that commands run with a computation of
its own. Fields that by design change no result (attention, parallel, the number
of micro-steps) are seen in the traced program or in the placement of arrays.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, get_type_hints
from unittest import mock

from flax import traverse_util
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.checkpoints import manager
from qa_jax.data import batch_plans
from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.evaluation import evaluator
from qa_jax.inference import decode as decode_lib
from qa_jax.metrics import predictions
from qa_jax.models import attention
from qa_jax.models import qa
from qa_jax.runtime import watchdog
from qa_jax.training import checkpointing
from qa_jax.training import metrics_log
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import adamw
from tests.common import lookup
from tests.common import random_model
from tests.common import runs
from tests.common import tiny


def paths(cls: type = config_lib.Config, prefix: str = '') -> Iterator[str]:
  """Yields the dotted name of every field that is not a group of fields."""
  for name, kind in get_type_hints(cls).items():
    if dataclasses.is_dataclass(kind):
      yield from paths(kind, f'{prefix}{name}.')
    else:
      yield prefix + name


def config(**changes: Any) -> config_lib.Config:
  """Returns the tiny config with fields replaced: optim__eps=0.1."""
  return config_lib.check_config(config_lib.override(tiny.FIELDS, {
      name.replace('__', '.'): value for name, value in changes.items()}))


@functools.lru_cache
def _built(changes: str) -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(config(**json.loads(changes)))


def built(**changes: Any) -> trainer_lib.Trainer:
  """Returns the trainer of a config, at its start."""
  return rewound(_built(json.dumps({'data__eval': '', **changes})))


def rewound(trainer: trainer_lib.Trainer) -> trainer_lib.Trainer:
  """Moves the stream of batches to its start."""
  trainer.batches.seek({'epoch': 0, 'index': 0})
  return trainer


def first_batch(trainer: trainer_lib.Trainer) -> dict[str, np.ndarray]:
  """Returns the first batch, with the arrays that the train step adds."""
  batches = rewound(trainer).batches
  batch = batches.gather(*batches.next_rows())
  count = len(batch['row'])
  return {**batch, 'step': np.full(count, 0, np.int32),
          'draw': np.full(count, 0.5, np.float32)}


def losses(trainer: trainer_lib.Trainer, loss_fn=None, params=None):
  """Returns the losses of the first batch, with one dropout key for all."""
  return np.asarray(jax.jit(loss_fn or trainer.loss_fn)(
      params or trainer.state.params, first_batch(trainer),
      jax.random.key(5))['loss'])


def arrays(tree: Any) -> dict[str, np.ndarray]:
  return traverse_util.flatten_dict(jax.device_get(tree), sep='/')


def equal(a: Any, b: Any) -> bool:
  a, b = arrays(a), arrays(b)
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- seed and model


def check_seed(tmp_path):
  made = [built(), built(seed=9)]
  for seed, trainer in zip((3, 9), made, strict=True):
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    assert equal(trainer.state.params, qa.init_params(trainer.model, init_key))
    assert np.array_equal(trainer.state.key_data,
                          jax.random.key_data(dropout_key))
    plan = batch_plans.plan_epoch(
        trainer.windows.total_lengths, trainer.batches.indices, batch_size=8,
        buckets=trainer.buckets, seed=seed, epoch=0)
    assert trainer.batches.next_rows()[1]['window'].tolist() == (
        plan[0][1].tolist())
  assert not equal(made[0].state.params, made[1].state.params)


def shapes(**changes) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the parameters of a config."""
  settings = config(**changes)
  model = build.build_model(
      settings, build.encoder_config(settings, 300, None))
  return {k: x.shape for k, x in traverse_util.flatten_dict(jax.eval_shape(
      lambda: qa.init_params(model, jax.random.key(0))), sep='/').items()}


def sizes(found: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
  """Returns layers, hidden size and MLP size of parameters."""
  layers = {k.split('/')[1] for k in found if k.startswith('encoder/layer_')}
  width, = [s for k, s in found.items() if k.endswith('word/embedding')]
  mlp = {s for k, s in found.items() if 'mlp/' in k and k.endswith('kernel')}
  return (len({x for x in layers if x != 'layer_norm'}), width[1],
          max(max(s) for s in mlp))


NO_SIZES = {'model__hidden_size': 0, 'model__num_layers': 0,
            'model__num_heads': 0, 'model__mlp_size': 0}


def check_encoder(tmp_path):
  """RoBERTa has one token type, BERT two."""
  for name, count in (('', 2), ('bert', 2), ('roberta', 1)):
    table = shapes(model__encoder=name)[
        'encoder/embeddings/token_type/embedding']
    assert table[0] == count


def check_preset(tmp_path):
  for name, expected in (('mini', (4, 256, 1024)), ('small', (4, 512, 2048)),
                         ('minilm_l6', (6, 384, 1536))):
    assert sizes(shapes(model__preset=name, **NO_SIZES)) == expected


def check_hidden_size(tmp_path):
  assert sizes(shapes(model__hidden_size=24)) == (1, 24, 32)


def check_num_layers(tmp_path):
  assert sizes(shapes(model__num_layers=3)) == (3, 16, 32)


def check_mlp_size(tmp_path):
  assert sizes(shapes(model__mlp_size=40)) == (1, 16, 40)


def check_num_heads(tmp_path):
  """All heads have the query of the first one if the others have none."""
  one, four = built(model__num_heads=1), built(model__num_heads=4)
  params = arrays(one.state.params)
  name, = [k for k in params if k.endswith('query_key_value/kernel')]
  uniform = {**params, name: params[name].copy()}
  uniform[name][:, :16] = 0  # no query: every head averages all values
  for start, same in ((params, False), (uniform, True)):
    tree = traverse_util.unflatten_dict(start, sep='/')
    scores = [t.model.apply({'params': tree}, **qa.model_inputs(first_batch(
        built(model__num_heads=n)))) for t, n in ((one, 1), (four, 4))]
    assert np.allclose(scores[0].start, scores[1].start, atol=1e-6) == same


def check_rate(place: str) -> None:
  """The losses are those of a model that is made with the rate directly."""
  off = {'model__dropout': 0.0, 'model__attention_dropout': 0.0,
         'model__initializer_range': 0.3}  # so that attention matters
  trainer = built(**{**off, f'model__{place}': 0.4})
  settings = config(**off)
  made = dataclasses.replace(build.encoder_config(
      settings, len(trainer.windows.tokenizer.vocab), None), **{place: 0.4})
  model = qa.QAModel(
      config=made, head=trainer.model.head, attention='xla',
      compute_dtype=jnp.dtype('float32'))
  expected = losses(trainer, trainer_lib.build_loss(
      model, trainer.objective, settings.decode))
  without = losses(built(**off))
  np.testing.assert_allclose(losses(trainer), expected, rtol=1e-5)
  assert np.abs(expected - without).max() > 1e-3


def check_dropout(tmp_path):
  check_rate('dropout')


def check_attention_dropout(tmp_path):
  check_rate('attention_dropout')


def check_attention(tmp_path):
  """The model calls the table entry of the name, and no other."""
  trainer = built()
  def losses_of(name):
    settings = config(model__attention=name)
    return losses(trainer, trainer_lib.build_loss(
        build.build_model(settings, trainer.model.config), trainer.objective,
        settings.decode))
  before = losses_of('xla')
  with mock.patch.dict(attention.ATTENTION, {
      'auto': lambda q, *rest: jnp.zeros_like(q, jnp.float32)}):
    assert np.array_equal(losses_of('xla'), before)
    assert np.abs(losses_of('auto') - before).max() > 1e-4
  with pytest.raises(errors.UserError, match='cudnn'):
    build.check_attention(config(model__attention='cudnn'),
                          trainer.model.config, training=True)


def check_initializer_range(tmp_path):
  narrow, wide = (arrays(built(model__initializer_range=x).state.params)
                  for x in (0.02, 0.06))
  kernels = [k for k in narrow if k.startswith('encoder/') and k.endswith(
      ('kernel', 'embedding'))]
  assert len(kernels) > 5
  for name in kernels:
    np.testing.assert_allclose(wide[name], 3 * narrow[name], rtol=1e-5)
    assert 0.01 < narrow[name].std() < 0.03


def check_position_base(tmp_path):
  drawn, waves = (arrays(built(
      model__position_base=b, model__initializer_range=0.05).state.params)
                  for b in (0.0, 30.0))
  name = 'encoder/embeddings/position/embedding'
  size = drawn[name].shape[1]
  for p in (0, 1, 7, 40):
    for i in range(size // 2):
      angle = p / 30.0 ** (2 * i / size)
      for column, wave in ((i, math.sin), (i + size // 2, math.cos)):
        assert waves[name][p, column] == pytest.approx(
            0.05 * 8 ** 0.5 * wave(angle), abs=1e-5)
  assert equal({k: v for k, v in waves.items() if k != name},
               {k: v for k, v in drawn.items() if k != name})
  _, fields = stored(tmp_path)
  for others, message in ((fields, 'has its positions'),
                          ({'model__encoder': 'modernbert'}, 'no table')):
    with pytest.raises(errors.UserError, match=message):
      built(**others, model__position_base=30.0)


def check_equal_query_key(tmp_path):
  for encoder, name, parts in (
      ('bert', 'attention/query_key_value', 3),
      ('modernbert', 'attention/query_key_value', 3),
      ('deberta_v2', 'attention/query_key', 2)):
    drawn, twins = (arrays(built(
        model__encoder=encoder, model__equal_query_key=equal_too).state.params)
                    for equal_too in (False, True))
    names = [key for key in drawn if f'{name}/kernel' in key]
    assert names
    for key in names:
      query, other, *value = np.split(twins[key], parts, axis=1)
      np.testing.assert_array_equal(query, other)
      before = np.split(drawn[key], parts, axis=1)
      assert np.abs(before[1] - query).mean() > 0.01  # of 0.02 each
      np.testing.assert_allclose([query, *value], [before[0], *before[2:]],
                                 rtol=1e-5)
    assert equal({k: v for k, v in twins.items() if k not in names},
                 {k: v for k, v in drawn.items() if k not in names})
  _, fields = stored(tmp_path)
  with pytest.raises(errors.UserError, match='has its weights; set it to'):
    built(**fields, model__equal_query_key=True)


def stored(tmp_path) -> tuple[Any, dict[str, Any]]:
  """Returns the parameters of a run, and the fields that start from it."""
  source = random_model.random_qa('independent')
  path = random_model.write_run(source, tmp_path / 'source')
  return source.params, {**NO_SIZES, 'model__preset': '',
                         'model__init_from': str(path)}


def check_init_from(tmp_path):
  params, fields = stored(tmp_path)
  assert equal(built(**fields).state.params, params)


def check_init_head(tmp_path):
  params, fields = stored(tmp_path)
  made = built(**fields, model__init_head=False).state.params
  assert equal(made['encoder'], params['encoder'])
  assert not equal(made['head'], params['head'])
  init_key, _ = jax.random.split(jax.random.key(3))
  assert equal(made['head'], qa.init_head(
      random_model.random_qa('independent').model, init_key)['head'])


def check_head(tmp_path):
  trainer = built(model__head='biased')
  params = arrays(trainer.state.params)
  bias = {k for k in params if k.startswith('head/') and k.endswith('bias')}
  assert bias and not bias & arrays(built().state.params).keys()


def check_objective(tmp_path):
  """The sum of two losses is twice their mean."""
  mean = losses(built())
  total = losses(built(objective='cross_entropy(reduction="sum")'))
  np.testing.assert_allclose(total, 2 * mean, rtol=1e-5)


# --- decoding, with scores from a table


EXAMPLES = lookup.make_examples()


def evaluated(tmp_path, eval_batch_size: int = 4, **decode):
  """Returns metrics and rows of nbest.jsonl of the lookup model."""
  settings = lookup.make_config(
      buckets=(), eval_batch_size=eval_batch_size, **decode)
  windows = input_pipeline.make_windows(settings, EXAMPLES, lookup.TOKENIZER)
  metrics = evaluator.Evaluator(
      lookup.Lookup(name=str(eval_batch_size)), windows, settings).evaluate(
          lookup.PARAMS, output=tmp_path)
  return metrics, predictions.read_n_best(tmp_path / predictions.N_BEST)


def check_max_answer_length(tmp_path):
  for longest in (2, 6):
    _, rows = evaluated(tmp_path, max_answer_length=longest, n_best=500)
    words = [len(a['text'].split()) for row in rows.values()
             for a in row['answers']]
    assert max(words) == longest


def check_n_best(tmp_path):
  for count in (3, 7):
    _, rows = evaluated(tmp_path, n_best=count)
    for e in EXAMPLES:
      words = len(e.context.split())
      spans = sum(min(4, words - i) for i in range(words))
      assert len(rows[e.id]['answers']) == min(count, spans)


def check_whole_words(tmp_path):
  question, context = random_model.QUESTION, 'Mirabuilt the Ospreyin Oslo.'
  every, whole = (
      [(c['start'], c['end']) for c in random_model.random_qa(
          'independent', n_best=500, whole_words=chosen).answer(
              question, context).n_best] for chosen in (False, True))
  cuts_a_word = lambda i: context[max(i - 1, 0):i + 1].isalpha() and i > 0
  expected = [s for s in every if not any(map(cuts_a_word, s))]
  assert whole == expected and 0 < len(whole) < len(every)


def check_search(tmp_path):
  exact, inexact = (evaluated(tmp_path, search=s) for s in (
      'two_stage', 'top_k(k=1)'))
  best = {e.id: max((
      lookup.PARAMS['start'][lookup.TOKENIZER.index[a]]
      + lookup.PARAMS['end'][lookup.TOKENIZER.index[b]]
      for i, a in enumerate(e.context.split())
      for b in e.context.split()[i:i + 4]), default=None) for e in EXAMPLES}
  first = lambda rows, e: (rows[e]['answers'] or [{'score': None}])[0]['score']
  assert {e: first(exact[1], e) for e in best} == best
  assert any(first(inexact[1], e) != s for e, s in best.items())
  assert inexact[0]['decode_regret_share'] > 0
  assert 'decode_regret_share' not in exact[0]


def check_null_rule(tmp_path):
  for rule in ('min_null', 'classifier'):
    settings = lookup.make_config(null_rule=rule)
    windows = input_pipeline.make_windows(settings, EXAMPLES, lookup.TOKENIZER)
    answers = decode_lib.answer_questions(
        lookup.Lookup(null_field=True), lookup.PARAMS, windows, settings)
    first = answers.ptr[:-1]
    some = first < answers.ptr[1:]
    expected = answers.null_score - np.append(answers.score, 0)[first] * (
        rule == 'min_null')
    assert some.sum() > 3
    np.testing.assert_allclose(answers.na_score[some], expected[some])


def check_null_threshold(tmp_path):
  for threshold in (-2.0, 3.0):
    evaluated(tmp_path, null_threshold=threshold)
    na = predictions.read_na_probs(tmp_path / predictions.NA_PROBS)
    texts = predictions.read_predictions(tmp_path / predictions.PREDICTIONS)
    assert {k for k, s in na.items() if s > threshold} | {'q1'} == {
        k for k, text in texts.items() if not text}  # q1 has no context
  assert len(set(na.values())) > 3


def check_merge(tmp_path):
  for merge in ('none', 'surface_form'):
    _, rows = evaluated(tmp_path, merge=merge, n_best=50)
    texts = [[a['text'] for a in row['answers']] for row in rows.values()]
    twice = any(len(set(t)) < len(t) for t in texts)
    assert twice == (merge == 'none')


# --- data


def check_train(tmp_path):
  for spec in ('synthetic(size=36)', 'synthetic(seed=5, size=20)'):
    made = built(data__train=spec).windows.examples
    assert [e.context for e in made] == [
        e.context for e in sources.load_examples(spec)]


def check_eval(tmp_path):
  for spec in ('synthetic(seed=1, size=12)', 'synthetic(seed=8, size=10)'):
    made = built(data__eval=spec).evaluator.windows.examples
    assert [e.question for e in made] == [
        e.question for e in sources.load_examples(spec)]
  assert built(data__eval='').evaluator is None


def windows_of(**changes):
  """Cuts a context of 200 tokens with a question of 30."""
  example = Example('0', ' '.join('q' * 30), ' '.join('a' * 200))
  return input_pipeline.make_windows(
      config(**changes), [example], lookup.TOKENIZER)


def check_windows(**changes) -> None:
  data = {**tiny.FIELDS['data'], **changes}
  room = data['max_length'] - data['max_question_length'] - 3
  step = room - data['window_overlap']
  begin = [0]
  while begin[-1] + room < 200:
    begin.append(begin[-1] + step)
  made = windows_of(**{f'data__{k}': v for k, v in changes.items()})
  assert made.begin.tolist() == begin
  assert made.context_offset.tolist() == (
      [data['max_question_length'] + 2] * len(begin))
  assert made.total_lengths.max() == data['max_length']
  assert made.begin.tolist() != windows_of().begin.tolist()


def check_max_length(tmp_path):
  check_windows(max_length=50)


def check_window_overlap(tmp_path):
  check_windows(window_overlap=20)


def check_max_question_length(tmp_path):
  check_windows(max_question_length=25)


def check_lowercase(tmp_path):
  examples = [Example('0', 'ÉTÉ', 'ÉTÉ ÉTÉ')]
  for lowercase, expected in ((True, 'ete'), (False, 'ÉTÉ')):
    made = input_pipeline.load_tokenizer(
        config(data__lowercase=lowercase), None, examples)
    text = ''.join(made.vocab[i].removeprefix('##') for i in made.encode(
        ['ÉTÉ']).ids)
    assert text == expected


def check_vocab(tmp_path):
  made = tokenizer_lib.train_tokenizer(['Mira built it'], vocab_size=120)
  made.save(tmp_path)
  trained = built(data__vocab=str(tmp_path))
  assert trained.windows.tokenizer.vocab == made.vocab
  assert built().windows.tokenizer.vocab != made.vocab


def check_vocab_size(tmp_path):
  for size in (150, 250):
    trainer = built(data__vocab_size=size)
    assert len(trainer.windows.tokenizer.vocab) == size
  letters = [Example('0', 'Who?', ''.join(map(chr, range(0x4e00, 0x4e80))))]
  small = config(data__vocab_size=100, data__cache='none')
  made, note = input_pipeline.load_windows(
      small, letters, input_pipeline.vocabulary_source(small, None))
  entries = len(made.tokenizer.vocab)
  assert entries >= 2 * 0x80
  assert f'vocabulary has {entries} entries, above data.vocab_size' in note


def check_buckets(tmp_path):
  trainer = built(data__buckets=[40, 52])
  seen = set()
  for _ in range(trainer.batches.steps_per_epoch):
    length, rows = trainer.batches.next_rows()
    longest = trainer.batches.lengths_of(rows['window']).max()
    assert length == min(b for b in (40, 52, 64) if b >= longest)
    seen.add(length)
  assert len(seen) > 1 and built().batches.next_rows()[0] == 64
  for length, platform, lengths in (
      (384, 'cpu', (384,)), (384, 'gpu', (128, 192, 320, 384)),
      (512, 'tpu', (128, 256, 384, 512)), (80, 'gpu', (64, 80)),
      (40, 'gpu', (40,))):
    assert config_lib.buckets(config(
        data__max_length=length, data__packing=False), platform) == lengths
  explicit = config(data__buckets=[16], data__packing=False)
  assert config_lib.buckets(explicit, 'gpu') == (16,)


def check_packing(tmp_path):
  padded = first_batch(built(data__max_length=128))
  packed = first_batch(built(data__max_length=128, data__packing=True))
  assert 'segment_ids' not in padded and packed['segment_ids'].max() > 1
  assert (packed['segment_ids'] > 0).sum() == padded['attention_mask'].sum()
  stream = built(data__max_length=128, data__packing='rows').batches
  rows, tokens, lengths = set(), 0, stream.windows.total_lengths
  for _ in range(stream.steps_per_epoch):
    batch = stream.gather(*stream.next_rows())
    rows.add(batch['token_ids'].shape)
    tokens += (batch['segment_ids'] > 0).sum()
  assert len(rows) == 1 and tokens == lengths[stream.indices].sum()
  for given, platform, resolved in (
      ('auto', 'cpu', False), ('auto', 'gpu', 'rows'), ('auto', 'tpu', 'rows'),
      ('auto', '', False), (True, 'gpu', True), ('True', 'cpu', True),
      ('False', 'gpu', False), ('rows', 'cpu', 'rows')):
    assert config_lib.packing(
        config(data__packing=given), platform) is resolved
  assert config_lib.packing(config(model__attention='cudnn'), 'gpu') is False


def check_windows_without_answer(tmp_path):
  text = ' '.join(lookup.LETTERS)
  examples = [Example('0', 'a', text, (GoldAnswer('b', 2),)),
              Example('1', 'a', text, impossible=True)]
  made = input_pipeline.make_windows(
      config(data__max_length=26, data__window_overlap=3), examples,
      lookup.TOKENIZER)
  holds = [made.example_of[n] == 1 or bool(made.begin[n] <= 1)
           for n in range(len(made))]
  assert made.train_indices('drop').tolist() == np.flatnonzero(holds).tolist()
  assert made.train_indices('cls').tolist() == list(range(len(made)))
  spec = {'data__train': 'synthetic(size=36)', 'data__max_length': 40}
  for rule in ('cls', 'drop'):
    trainer = built(**spec, data__windows_without_answer=rule)
    assert trainer.batches.indices.tolist() == (
        trainer.windows.train_indices(rule).tolist())
  assert len(trainer.batches.indices) < len(trainer.windows)


def check_cache(tmp_path):
  assert not [*tmp_path.iterdir()]
  for where, files in ((str(tmp_path), 1), ('none', 0)):
    before = len([*tmp_path.rglob('*')])
    settings = config(data__cache=where)
    _, note = input_pipeline.load_windows(
        settings, 'synthetic(seed=77, size=9)', cache.LearnedVocabulary(
            200, True))
    assert (len([*tmp_path.rglob('*')]) > before) == files
    assert 'made' in note
  _, note = input_pipeline.load_windows(
      config(data__cache=str(tmp_path)), 'synthetic(seed=77, size=9)',
      cache.LearnedVocabulary(200, True))
  assert 'from the cache' in note


# --- the length of training and its regular work


def check_batch_size(tmp_path):
  trainer = built(train__batch_size=6)
  assert len(first_batch(trainer)['row']) == 6
  assert trainer.batches.steps_per_epoch == math.ceil(
      len(trainer.batches.indices) / 6)


def check_eval_batch_size(tmp_path):
  for size in (3, 5):
    evaluated(tmp_path, eval_batch_size=size)
    assert (str(size), (size, 20)) in lookup.TRACED
  for size, packing, platform, rows in (
      (0, False, 'cpu', 8), (0, True, 'cpu', 64), (0, 'auto', 'cpu', 8),
      (0, 'auto', 'gpu', 256), (0, False, 'tpu', 256), (7, 'auto', 'gpu', 7)):
    assert input_pipeline.eval_batch_size(config(
        train__eval_batch_size=size, data__packing=packing), 2,
                                          platform) == rows


def check_num_epochs(tmp_path):
  trainer = built(train__num_steps=0, train__num_epochs=2.5)
  count = len(trainer.batches.indices)
  assert trainer.num_steps == math.ceil(2.5 * math.ceil(count / 8))
  whole = built(train__num_steps=0, train__num_epochs=0.28,
                train__batch_size=2, data__train='synthetic(size=43)')
  assert whole.batches.steps_per_epoch == 25 and 0.28 * 25 > 7
  assert whole.num_steps == 7


def check_num_steps(tmp_path):
  trainer = built(train__num_steps=5)
  assert trainer.num_steps == 5 and trainer.schedule(5) == 0
  assert trainer.schedule(4) > 0


def scans(jaxpr) -> Iterator[int]:
  """Yields the lengths of all scans of a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'scan':
      yield equation.params['length']
  for inner in jax.extend.core.subjaxprs(jaxpr):
    yield from scans(inner)


def check_grad_accumulation(tmp_path):
  """The update is equal, but the program is a loop over so many parts."""
  for count in (2, 4):
    trainer = built(train__grad_accumulation=count)
    batch = trainer.batches.gather(*trainer.batches.next_rows())
    program = jax.make_jaxpr(trainer.step)(trainer.state, batch)
    assert count in scans(program.jaxpr)
    rows = {(8 // count, 64)}
    assert rows & {v.aval.shape for e in program.jaxpr.eqns
                   if e.primitive.name == 'scan'
                   for v in e.params['jaxpr'].jaxpr.invars}


def check_updates_per_dispatch(tmp_path):
  for given, platform, one_shape, count in (
      (0, 'cpu', True, 1), (0, 'gpu', True, 4), (0, 'tpu', False, 1),
      (1, 'gpu', True, 1), (3, 'cpu', False, 3)):
    assert trainer_lib.updates_per_dispatch(
        config(train__updates_per_dispatch=given), platform, one_shape) == count
  trainer = built(train__updates_per_dispatch=3)
  length, rows = trainer.batches.next_alike(2)
  state, values = trainer.parallel.step(jax.device_put(
      trainer.state, trainer.parallel.state_sharding(trainer.state)),
                                        trainer.place(length, *rows))
  assert int(state.step) == 2 and values['loss'].shape == (3,)
  assert jax.device_get(values['loss']).astype(bool).tolist() == [
      True, True, False]


@functools.lru_cache
def regular_work() -> dict[str, Any]:
  """Returns the steps of the evaluations, checkpoints and rows of a run."""
  saved, limits = [], []
  save, make_dog = manager.Checkpoints.save, watchdog.Watchdog

  def saving(self, step, **items):
    saved.append(step)
    return save(self, step, **items)

  def limiting(seconds, where):
    limits.append(seconds)
    return make_dog(seconds, where)

  settings = config(
      train__num_steps=11, train__eval_every_steps=4, train__log_every_steps=3,
      train__checkpoint_every_steps=5, train__step_timeout_seconds=123.0)
  with (mock.patch.object(manager.Checkpoints, 'save', saving),
        mock.patch.object(train.watchdog, 'Watchdog', limiting)):
    workdir = pathlib.Path(cache.cache_directory('auto')) / 'regular_work'
    train.train(settings, workdir)
  rows = runs.rows_of(workdir)
  return {'saved': saved, 'limits': limits, **{
      split: [r['step'] for r in rows if r['split'] == split]
      for split in ('train', 'eval')}}


def check_eval_every_steps(tmp_path):
  assert regular_work()['eval'] == [4, 8, 11]


def check_checkpoint_every_steps(tmp_path):
  assert {5, 10, 11} <= {*regular_work()['saved']} <= {4, 5, 8, 10, 11}


def check_log_every_steps(tmp_path):
  assert regular_work()['train'] == [3, 6, 9, 11]  # the last step as well


def check_step_timeout_seconds(tmp_path):
  assert regular_work()['limits'] == [123.0]


def check_max_skipped(tmp_path):
  for most in (0, 4):
    log = metrics_log.MetricsLog(tmp_path, 0)
    meter = checkpointing.step_metrics(
        built(train__max_skipped=most), log, metrics_log.Costs(), {}, None)
    with pytest.raises(errors.UserError, match='skipped in a row'):
      for step in range(1, 9):
        meter.add_batch(np.arange(2), np.ones(2))
        meter.add_steps([(step, {'loss': np.nan, 'grad_norm': 1.0,
                                 'skipped': 1.0})])
    log.close()
    assert step == most + 1


# --- the optimizer


PARAMS = {'encoder/embeddings/word/embedding': np.float32([1.0, -2.0]),
          'encoder/layer_0/mlp/kernel': np.float32([0.5, 3.0]),
          'encoder/layer_0/mlp/bias': np.float32([2.0, 1.0]),
          'head/start/kernel': np.float32([-1.0, 1.5])}
BASE = dict(learning_rate=0.1, warmup_fraction=0.25, schedule='linear',
            weight_decay=0.5, clip_norm=1.0, skip_norm=0.0, layer_decay=1.0,
            bias_correction=True, eps=1e-8)


def gradients() -> list[dict[str, np.ndarray]]:
  rng = np.random.default_rng(0)
  return [{k: np.float32(length * rng.normal(size=2)) for k in PARAMS}
          for length in (1.0, 0.03, 5.0, 0.5)]


def stepped(fields: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns the parameters after four train steps with `gradients`."""
  settings = config(train__num_steps=8, **{
      f'optim__{k}': v for k, v in fields.items()})

  def loss_fn(params, rows, key):
    del key
    flat = traverse_util.flatten_dict(params, sep='/')
    return {'loss': sum(rows[k] @ x for k, x in flat.items())}

  counts = dict(num_steps=8, num_layers=1)
  step = jax.jit(trainer_lib.build_step(settings, loss_fn, **counts))
  params = traverse_util.unflatten_dict(
      {k: jnp.asarray(x) for k, x in PARAMS.items()}, sep='/')
  _, optimizer = trainer_lib.build_optimizer(settings.optim, **counts)
  state = step_lib.TrainState(
      step=jnp.zeros((), jnp.int32), params=params,
      opt_state=optimizer.init(params),
      key_data=jax.random.key_data(jax.random.key(0)))
  for grads in gradients():
    state, _ = step(state, {
        **{k: g[None] for k, g in grads.items()},
        'row': np.zeros(1, np.int32), 'weight': np.ones(1, np.float32)})
  return arrays(state.params)


def by_hand(fields: dict[str, Any]) -> dict[str, np.ndarray]:
  """Computes `stepped` in float64, without the gradients that are skipped."""
  fields = dict(fields)
  limit = fields.pop('skip_norm') or math.inf
  rates = adamw.learning_rates(
      fields.pop('schedule'), peak=fields.pop('learning_rate'), num_steps=8,
      warmup_fraction=fields.pop('warmup_fraction'))
  used = [n for n, grads in enumerate(gradients()) if math.sqrt(sum(
      (np.float64(g)**2).sum() for g in grads.values())) <= limit]
  return adamw.train(
      PARAMS, [gradients()[n] for n in used], [rates[n] for n in used],
      num_layers=1, **fields)


def check_optim(**change) -> None:
  made, expected = (f({**BASE, **change}) for f in (stepped, by_hand))
  before = by_hand(BASE)
  for name, value in made.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)
  assert max(np.abs(before[k] - expected[k]).max() for k in before) > 1e-2


OPTIM = dict(
    learning_rate=0.3, warmup_fraction=0.5, schedule='cosine', weight_decay=0.0,
    clip_norm=0.2, skip_norm=5.0, layer_decay=0.5, bias_correction=False,
    eps=0.1)


def check_freeze_encoder(tmp_path):
  """The head makes the updates of a model that has nothing but the head."""
  fields = dict(model__head='mlp', optim__learning_rate=0.1,
                optim__warmup_fraction=0.0, optim__schedule='constant',
                optim__clip_norm=0.01)
  frozen, free = built(**fields, optim__freeze_encoder=True), built(**fields)
  batch, grads = first_batch(frozen), []
  encoder, step = frozen.state.params['encoder'], jax.jit(frozen.step)
  states = [frozen.state]
  gradient = jax.jit(jax.grad(lambda head, rows, key: free.loss_fn(
      {'encoder': encoder, 'head': head}, rows, key)['loss'].mean()))
  for t in range(2):
    state = states[-1]
    rows = {**batch, 'step': np.full_like(batch['step'], t)}
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), t)
    grads.append(gradient(state.params['head'], rows, key))
    state, values = step(state, rows)
    assert values['grad_norm'] == pytest.approx(
        float(optax.tree.norm(grads[-1])), rel=1e-5)
    states.append(state)
  expected = adamw.train(
      arrays({'head': frozen.state.params['head']}),
      [arrays({'head': g}) for g in grads], [0.1, 0.1], weight_decay=0.01,
      clip_norm=0.01, layer_decay=1.0, num_layers=1, bias_correction=True,
      eps=1e-8)
  assert equal(states[-1].params['encoder'], encoder)
  for name, value in arrays({'head': states[-1].params['head']}).items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=1e-6)
  flops = [jax.jit(t.step).lower(t.state, batch).cost_analysis()['flops']
           for t in (frozen, free)]
  assert flops[0] < 0.65 * flops[1]  # no gradient of the encoder
  sizes = [sum(x.size for x in jax.tree.leaves(t.state.opt_state))
           for t in (frozen, free)]
  assert sizes[0] < 0.1 * sizes[1]  # no moments of the encoder



# --- devices and types


def check_mode(tmp_path):
  made = {mode: built(parallel__mode=mode, parallel__num_devices=0)
          for mode in ('pmap', 'mesh', 'jit')}
  assert {m: len(t.devices) for m, t in made.items()} == {
      'pmap': 8, 'mesh': 8, 'jit': 1}
  assert {m: t.parallel.mesh.axis_names for m, t in made.items()} == {
      'pmap': ('data',), 'mesh': ('data', 'fsdp'), 'jit': ('data',)}


def check_num_devices(tmp_path):
  for count, expected in ((4, 4), (0, 8)):
    trainer = built(parallel__num_devices=count)
    length, rows = trainer.batches.next_rows()
    batch = trainer.place(length, rows)
    assert len(batch['row'].sharding.device_set) == expected


def check_mesh(tmp_path):
  for axes, parts in (({'data': 2, 'fsdp': 1}, 1), ({'data': 1, 'fsdp': 2}, 2)):
    trainer = built(parallel__mode='mesh', parallel__mesh=axes)
    state = jax.device_put(
        trainer.state, trainer.parallel.state_sharding(trainer.state))
    kernel = state.params['encoder']['layer_0']['mlp']['output']['kernel']
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


def check_compute_dtype(tmp_path):
  off = {'model__dropout': 0.0, 'model__attention_dropout': 0.0}
  exact, rounded = (built(**off, precision__compute_dtype=t)
                    for t in ('float32', 'bfloat16'))
  a, b = losses(exact), losses(rounded, params=exact.state.params)
  assert 1e-6 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
  types = lambda trainer: str(jax.make_jaxpr(trainer.loss_fn)(
      trainer.state.params, first_batch(trainer), jax.random.key(0)))
  assert 'bf16' in types(rounded) and 'bf16' not in types(exact)
  assert {x.dtype for x in jax.tree.leaves(rounded.state.params)} == {
      jnp.dtype('float32')}
  for name, platform, dtype, tf32 in (
      ('tf32', 'gpu', 'float32', True), ('float32', 'gpu', 'float32', False),
      ('auto', 'cpu', 'float32', False), ('auto', 'gpu', 'bfloat16', False),
      ('auto', 'tpu', 'bfloat16', False), ('auto', None, 'float32', False)):
    model = build.build_model(
        config(precision__compute_dtype=name), exact.model.config,
        platform)
    assert (model.compute_dtype, model.tf32) == (dtype, tf32), name


def check_deterministic(tmp_path):
  """The step has XLA's flag in every mode, and no other value on a CPU.

  Mode pmap is then another program, jit of shard_map, with other roundings.
  """
  moments = []
  for mode, chosen in (('jit', True), ('mesh', True), ('pmap', True),
                       ('pmap', False)):
    with mock.patch.object(jax, 'jit', wraps=jax.jit) as jit:
      trainer = built(parallel__mode=mode, parallel__num_devices=1,
                      precision__deterministic=chosen)
      state = jax.device_put(
          trainer.state, trainer.parallel.state_sharding(trainer.state))
      batch = trainer.place(*trainer.batches.shapes(1)[0])
      if mode == 'pmap':
        moments.append(trainer.parallel.step(state, batch)[0].params)
      else:
        trainer.parallel.lower(state, batch)
    options = [call.kwargs['compiler_options'] for call in jit.call_args_list
               if call.kwargs.get('compiler_options')]
    assert options == [{'xla_gpu_deterministic_ops': True}] * chosen, mode
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-7), *moments)


CHECKS: dict[str, Callable[[pathlib.Path], None]] = {
    'seed': check_seed,
    'model.encoder': check_encoder,
    'model.preset': check_preset,
    'model.hidden_size': check_hidden_size,
    'model.num_layers': check_num_layers,
    'model.num_heads': check_num_heads,
    'model.mlp_size': check_mlp_size,
    'model.dropout': check_dropout,
    'model.attention_dropout': check_attention_dropout,
    'model.attention': check_attention,
    'model.initializer_range': check_initializer_range,
    'model.position_base': check_position_base,
    'model.equal_query_key': check_equal_query_key,
    'model.init_from': check_init_from,
    'model.init_head': check_init_head,
    'model.head': check_head,
    'objective': check_objective,
    'decode.max_answer_length': check_max_answer_length,
    'decode.n_best': check_n_best,
    'decode.whole_words': check_whole_words,
    'decode.search': check_search,
    'decode.null_rule': check_null_rule,
    'decode.null_threshold': check_null_threshold,
    'decode.merge': check_merge,
    'data.train': check_train,
    'data.eval': check_eval,
    'data.max_length': check_max_length,
    'data.window_overlap': check_window_overlap,
    'data.max_question_length': check_max_question_length,
    'data.lowercase': check_lowercase,
    'data.vocab': check_vocab,
    'data.vocab_size': check_vocab_size,
    'data.buckets': check_buckets,
    'data.packing': check_packing,
    'data.windows_without_answer': check_windows_without_answer,
    'data.cache': check_cache,
    'train.batch_size': check_batch_size,
    'train.eval_batch_size': check_eval_batch_size,
    'train.num_epochs': check_num_epochs,
    'train.num_steps': check_num_steps,
    'train.grad_accumulation': check_grad_accumulation,
    'train.updates_per_dispatch': check_updates_per_dispatch,
    'train.eval_every_steps': check_eval_every_steps,
    'train.checkpoint_every_steps': check_checkpoint_every_steps,
    'train.log_every_steps': check_log_every_steps,
    'train.max_skipped': check_max_skipped,
    'train.step_timeout_seconds': check_step_timeout_seconds,
    **{f'optim.{name}': lambda _, change={name: value}: check_optim(**change)
       for name, value in OPTIM.items()},
    'optim.freeze_encoder': check_freeze_encoder,
    'parallel.mode': check_mode,
    'parallel.num_devices': check_num_devices,
    'parallel.mesh': check_mesh,
    'precision.compute_dtype': check_compute_dtype,
    'precision.deterministic': check_deterministic,
}


def test_every_field_of_the_config_has_a_check():
  assert CHECKS.keys() == {*paths()}


@pytest.mark.parametrize('path', sorted(CHECKS))
def test_a_field_acts_as_computed_by_hand(path, tmp_path):
  CHECKS[path](tmp_path)
