"""Tests of spec strings that import constructors, and of stored ones."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import qa_jax
from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import heads
from qa_jax import objectives
from qa_jax import registry
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.span_scores import SpanScores
from qa_jax.sweeps import engines
from qa_jax.training import train
from tests.common import commands
from tests.common import random_model
from tests.common import runs
from tests.common import sweeps
from tests.common import tiny

reads_a_config = pytest.mark.filterwarnings('ignore:the load_module')
SOURCE = '''
import dataclasses
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from qa_jax import heads, objectives, decoding
from qa_jax.data import Example
from qa_jax.models.encoders import bert
from qa_jax.span_scores import SpanScores
open(__file__ + '.ran', 'w').close()

class Doubled(nn.Module):
  factor: float = 2.0
  @nn.compact
  def __call__(self, inputs):
    scores = heads.HEADS['independent'](name='inner')(inputs)
    return SpanScores(self.factor * scores.start, self.factor * scores.end)

class Wrong(nn.Module):
  shape: str = 'tuple'
  def __call__(self, inputs):
    x = inputs.hidden
    return (x, x) if self.shape == 'tuple' else SpanScores(x, x)

class Usual(nn.Module):
  kind: str
  @nn.compact
  def __call__(self, inputs):
    x = inputs.hidden
    if self.kind == 'last_four':
      x = jnp.concatenate([inputs.layers[-n] for n in range(1, 5)], axis=-1)
    if self.kind == 'attention':
      x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(12)(x))
    scores = nn.Dense(2)(x)
    return SpanScores(scores[..., 0], scores[..., 1])

class Failing(nn.Module):
  late: bool = False
  def __post_init__(self):
    if not self.late:
      raise ValueError('of two\\nlines')
    super().__post_init__()
  def __call__(self, inputs):
    return inputs.hidden @ inputs.hidden

class Odd(nn.Module):
  kind: str
  @nn.compact
  def __call__(self, inputs):
    x = inputs.hidden
    start, end = (nn.Dense(1, name=n)(x)[..., 0] for n in ('start', 'end'))
    scores = SpanScores(start, end)
    if self.kind == 'parameter':
      start += self.param('p', nn.initializers.zeros, (1, x.shape[1]))
    if self.kind == 'dropout':
      start = nn.Dropout(0.5, deterministic=inputs.gold_start is None)(start)
    if self.kind == 'statistics':
      start = nn.BatchNorm(use_running_average=False)(start)
    return SpanScores(start, end, **{
        'table': lambda: {'pair': start[:, :, None] + end[:, None]},
        'flat': lambda: {'pair': start},
        'turned': lambda: {'pair': jnp.zeros((len(x), 30, x.shape[1]))},
        'nulls': lambda: {'null': start},
        'column': lambda: {'null': end[:, :1]},
        'outer': lambda: {'boundary': start},
        'inner': lambda: {'boundary': SpanScores(start[:, 0], end)},
        'band': lambda: {'pair': jnp.zeros((*start.shape, 30)),
                         'null': start[:, 0], 'boundary': scores},
    }.get(self.kind, dict)())

def faulty(kind: str):
  base = objectives.OBJECTIVES['cross_entropy']()
  change = {
      'needs': {'needs': frozenset({'pairs'})},
      'mean': {'loss': lambda s, b: base.loss(s, b).mean()},
      'raises': {'loss': lambda s, b: base.loss(s, b) + None},
      'transposed': {'loss': lambda s, b: s.start.sum(axis=0)},
      'weight': {'loss': lambda s, b: base.loss(s, b) * b['weight']},
      'group': {'loss': lambda s, b: base.loss(s, b) * b['group']},
      'whole': {'loss': lambda s, b: base.loss(s, b) * b['group'],
                'needs_whole_questions': True}}
  return dataclasses.replace(base, **change[kind])

def every_pair(windows, length):
  i, j = np.divmod(np.arange((length + 2)**2), length + 2)
  score = np.where((i + j) % 7 == 6, np.nan, (3.0 * i + 5.0 * j) % 11.0)
  return {name: np.tile(x, (windows, 1)) for name, x in dict(
      start=i - 1, end=j - 1, score=score, valid=(i + 2 * j) % 9 > 0).items()
          } | {'null_score': np.full(windows, 7.0)}

def faulty_search(kind: str):
  def find(scores, start_mask, end_mask, *, max_answer_length, n_best):
    spans = decoding.two_stage(
        scores, start_mask, end_mask, max_answer_length=max_answer_length,
        n_best=n_best)
    change = {
        'tuple': lambda: (spans.start, spans.end),
        'fewer': lambda: jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x,
                                      spans),
        'float': lambda: spans.replace(start=spans.start * 1.0),
        'null': lambda: spans.replace(null_score=None),
        'raises': lambda: scores.starts,
        'every': lambda: spans.replace(**every_pair(*scores.start.shape))}
    return change[kind]()
  return {'signature': lambda scores, mask: None, 'number': 3}.get(kind, find)

def faulty_rule(kind: str):
  needs = {'needs': {'normalizer'}, 'right': {'normaliser'}}.get(kind, ())
  return decoding.NullRule({
      'windows': lambda w: w.null, 'column': lambda w: w.best[w.first][:, None],
      'nan': lambda w: w.null[w.first] * np.nan,
      'inf': lambda w: np.where(w.first > 0, np.inf, 0.0),
      'nothing': lambda w: None, 'needs': lambda w: w.best[w.first],
      'whole': lambda w: w.first,
      'raises': lambda w: w.normaliser[w.first],
      'right': lambda w: w.normaliser[w.first]}[kind], frozenset(needs))

@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide(bert.BertConfig):
  PRESETS = {'nano': dict(hidden_size=24, num_layers=1, num_heads=3,
                          mlp_size=40)}

def wide(**sizes): return Wide(**sizes)

class Vectors(nn.Module):
  size: int
  kind: str
  @nn.compact
  def __call__(self, ids, types, mask, keys=None):
    x = nn.Embed(9, self.size)(ids)
    return {'array': lambda: x, 'ids': lambda: (ids,),
            'raises': lambda: types.nothing}.get(self.kind, lambda: [x, x])()

@dataclasses.dataclass(frozen=True, kw_only=True)
class Strange(bert.BertConfig):
  kind: str
  def build(self, *options):
    return Vectors(self.hidden_size, self.kind)

def loss(**options): return objectives.OBJECTIVES['cross_entropy'](**options)
def rule(): return decoding.NullRule(lambda w: -w.best[w.first])
def search(): return decoding.SEARCHES['banded']()
def rows(n: int = 2): return [Example(str(i), 'q', 'a b') for i in range(n)]
def nothing(): return None
def bad_search(): return lambda *args, **options: {}
def texts(): return ['a']
def early(): return {}['key']
def late(): yield Example('1', 'q', 'a b'); raise OSError('no disk')
NUMBER = 3
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A module outside of qa_jax; the file that shows that it was imported."""
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(registry, '_allowed', set())
  (tmp_path / 'my_project.py').write_text(SOURCE)
  (tmp_path / 'my_faults.py').write_text('import json\n{}["x"]\n')
  (tmp_path / 'my_syntax.py').write_text('def :\n')
  yield tmp_path / 'my_project.py.ran'
  sys.modules.pop('my_project', None)


def test_every_kind_of_constructor_may_be_imported(package):
  objective = build.check_objective('my_project:loss(reduction="sum")',
                                    'my_project:Doubled(factor=3.0)')
  assert not objective.needs
  assert len(sources.load_examples('my_project:rows(n=3)')) == 3
  assert null_rules.find_rule('my_project:rule').needs == frozenset()
  config = tiny.config(
      model={'head': 'length_prior(base="my_project:Doubled")'},
      decode={'search': 'my_project:search', 'null_rule': 'my_project:rule'})
  build.check_decode(
      config.decode,
      build.build_model(config, random_model.random_qa('shared').model.config
                        ).head, objective)


def test_an_imported_encoder_has_its_own_presets(package):
  def sizes(encoder, preset):
    fields = {'hidden_size': 0, 'num_layers': 0, 'num_heads': 0, 'mlp_size': 0}
    return build.encoder_config(tiny.config(model={
        'encoder': encoder, 'preset': preset, **fields}), 50, None)

  wide = sizes('my_project:Wide', 'nano')
  assert (wide.hidden_size, wide.num_heads, wide.mlp_size) == (24, 3, 40)
  with pytest.raises(errors.UserError, match=r"preset 'tiny'.*known: nano"):
    sizes('my_project:Wide', 'tiny')
  assert sizes('my_project:wide', 'tiny').hidden_size == 128


@pytest.mark.parametrize(('kind', 'message'), [
    ('array', r'returns \w+ of shapes \[.*expected a tuple.* = \(2, 8, 24\)'),
    ('ids', r'returns tuple of shapes \[\(2, 8\)\], expected'),
    ('raises', r"fails at .*my_project.py:\d+: AttributeError: .*nothing")])
def test_a_faulty_encoder_is_one_line_before_the_data(
    package, kind, message):
  def model(kind):
    config = tiny.config(model={
        'encoder': f'my_project:Strange(kind="{kind}")', 'hidden_size': 24,
        'num_heads': 3})
    return build.build_model(config, build.encoder_config(config, 0, None))

  with pytest.raises(errors.UserError, match=message) as e:
    model(kind)
  assert '\n' not in str(e.value) and 'my_project:Strange' in str(e.value)
  model('list')


@pytest.mark.parametrize(('spec', 'message'), [
    ('my_project:Wrong', "head 'my_project:Wrong' returns tuple, expected"),
    ('my_project:Wrong(shape="3d")', r'start scores of shape \(2, 8, 768\)'),
    ('my_project:nothing', "'my_project:nothing' returns NoneType, expected"),
    ('my_project:Doubled(factr=1.0)', "no argument 'factr'; did you mean"),
    ('my_project:Doubled(factor="x")', "factor='x', expected float"),
    ('my_project:Missing', "has no attribute 'Missing'"),
    ('my_project:NUMBER', 'is no function or class'),
    ('no_such_project.heads:A', 'No module named .*PYTHONPATH'),
    ('my_project:Failing', r"head 'my_project:Failing' fails at .*project.py:"
     r'\d+: ValueError: of two lines$'),
    ('my_project:Failing(late=True)', r'fails at .*project.py:\d+: TypeError'),
    ('length_prior(base="my_project:Failing(late=True)")',
     r"head 'my_project:Failing' fails at .*project.py:\d+: TypeError"),
    ('my_faults:A', r"'my_faults:A' fails at .*my_faults.py:2: KeyError: 'x'"),
    ('my_syntax:A', r'SyntaxError: .*my_syntax.py, line 1'),
    ('my_project:', 'not of the form'), (':A', 'not of the form'),
    ('my_project:A.b', 'not of the form')])
def test_a_wrong_constructor_is_one_line(package, spec, message):
  with pytest.raises(errors.UserError, match=message) as e:
    build.check_objective('cross_entropy', spec)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['last_four', 'attention'])
def test_a_head_of_several_layers_or_attention_heads_is_accepted(
    package, kind):
  build.check_objective('cross_entropy', f'my_project:Usual(kind="{kind}")')


@pytest.mark.parametrize(('kind', 'message'), [
    ('table', r'8 pair scores a token in windows of 8 tokens, but 16 in .* of '
     '16; pair, .* is indexed by start and end - start, and .* depend on L'),
    ('flat', r'pair scores of shape \(2, 8\) .* expected .* = \(2, 8, W\)'),
    ('turned', r'pair scores of shape \(2, 30, 8\) .* = \(2, 8, W\)'),
    ('nulls', r'null scores of shape \(2, 8\) .* expected \[B\] = \(2,\)'),
    ('column', r'null scores of shape \(2, 1\) .* expected \[B\] = \(2,\)'),
    ('outer', 'boundary scores of type .*, expected qa_jax.heads.SpanScores'),
    ('inner', r'boundary start scores of shape \(2,\) .* \[B, L\] = \(2, 8\)'),
    ('parameter', 'a parameter whose shape depends on the length of a window'),
    ('dropout', 'draws random numbers, but heads get no key: .*model.dropout'),
    ('statistics', 'has variables that are no parameters')])
def test_a_faulty_head_is_one_line_before_training(package, kind, message):
  with pytest.raises(errors.UserError, match=message) as e:
    build.check_objective('compound', f'my_project:Odd(kind="{kind}")')
  assert '\n' not in str(e.value) and "head 'my_project:Odd'" in str(e.value)
  build.check_objective('compound', 'my_project:Odd(kind="band")')


@pytest.mark.parametrize(('kind', 'message'), [
    ('needs', "needs='pairs'; did you mean 'pair'"),
    ('raises', r'fails at .*my_project.py:\d+: TypeError: '),
    ('mean', r'returns a loss of shape \(\) for 2 windows, expected one loss'),
    ('transposed', r'a loss of shape \(8,\) for 2 windows'),
    ('weight', r"reads batch\['weight'\], but a loss gets context_mask, "),
    ('group', r"reads batch\['group'\].*; group needs needs_whole_questions")])
def test_a_faulty_objective_is_one_line(package, kind, message):
  spec = f'my_project:faulty(kind="{kind}")'
  with pytest.raises(errors.UserError, match=message) as e:
    build.check_objective(spec, 'independent')
  assert '\n' not in str(e.value) and spec in str(e.value)
  build.check_objective('my_project:faulty(kind="whole")', 'independent')


def test_a_base_that_is_no_objective_is_refused_by_its_name(package):
  with pytest.raises(errors.UserError, match="project:nothing' returns None"):
    build.check_objective('answerability(base="my_project:nothing")',
                          'answerability')


def check_decode(**decode):
  build.check_decode(
      config_lib.Decode(**decode), heads.HEADS['independent'](),
      objectives.OBJECTIVES['cross_entropy'](), length=64)


@pytest.mark.parametrize(('kind', 'message'), [
    ('tuple', 'returns tuple, expected qa_jax.decoding.Spans'),
    ('fewer', r'start of shape \(2, 1\) .*expected \[B, n_best\] = \(2, 20\)'),
    ('float', r'returns start of shape \(2, 20\) and type float32, .*integer'),
    ('null', r'returns null_score of shape None .* \[B\] = \(2,\)'),
    ('raises', r"fails at .*my_project.py:\d+: AttributeError: .*'starts'"),
    ('signature', "fails.*TypeError: .*unexpected keyword argument"),
    ('number', 'returns int, expected Callable')])
def test_a_faulty_search_is_one_line_before_training(package, kind, message):
  spec = f'my_project:faulty_search(kind="{kind}")'
  with pytest.raises(errors.UserError, match=message) as e:
    check_decode(search=spec)
  assert '\n' not in str(e.value) and 'my_project:faulty_search' in str(e.value)


@pytest.mark.parametrize(('kind', 'message'), [
    ('windows', r'shape \(3,\) .* for 2 questions with 3 windows, expected'),
    ('column', r'shape \(2, 1\)'), ('nothing', r'shape \(\) and type object'),
    ('nan', 'returns NaN or infinity for 2 of 2 questions'),
    ('inf', 'returns NaN or infinity for 1 of 2 questions'),
    ('needs', "needs='normalizer'; did you mean 'normaliser'"),
    ('raises', r"fails at .*my_project.py:\d+: TypeError: 'NoneType'")])
def test_a_faulty_null_rule_is_one_line_before_training(package, kind, message):
  spec = f'my_project:faulty_rule(kind="{kind}")'
  with pytest.raises(errors.UserError, match=message) as e:
    check_decode(null_rule=spec)
  assert '\n' not in str(e.value) and spec in str(e.value)
  check_decode(null_rule='my_project:faulty_rule(kind="right")')


def test_no_answer_scores_of_an_imported_rule_become_float64(package):
  scores = null_rules.no_answer_scores(
      'my_project:faulty_rule(kind="whole")', null_rules.WindowScores(
          np.zeros(3), np.zeros(3), np.array([0, 2])))
  assert scores.tolist() == [0, 2] and scores.dtype == np.float64


@pytest.mark.parametrize('kind', ['windows', 'nan'])
def test_a_null_rule_without_one_number_a_question_gives_no_answers(
    package, kind):
  qa = random_model.random_qa('shared')
  wrong = dataclasses.replace(qa, config=dataclasses.replace(
      qa.config, decode=dataclasses.replace(
          qa.config.decode,
          null_rule=f'my_project:faulty_rule(kind="{kind}")')))
  context = ' '.join([random_model.CONTEXT] * 9)  # of several windows
  with pytest.raises(errors.UserError, match=r'null rule .my_project:faulty_'):
    wrong.answer('Who?', context)


def test_each_rule_of_a_legal_span_holds_for_an_imported_search(package):
  scores = SpanScores(jnp.zeros((2, 9)), jnp.zeros((2, 9)))
  start_mask = np.arange(9) % 4 != np.array([[0], [3]])
  end_mask = np.arange(9) % 5 != np.array([[2], [4]])
  spans = search.find_search('my_project:faulty_search(kind="every")')(
      scores, start_mask, end_mask, max_answer_length=4, n_best=121)
  for row in range(2):
    # The pair at slot 11 · i + j is the span (i - 1, j - 1).
    legal = [(-((3 * i + 5 * j) % 11), i - 1, j - 1)
             for i in range(11) for j in range(11)
             if (i + j) % 7 != 6 and (i + 2 * j) % 9 > 0
             and 0 <= i - 1 <= j - 1 < 9 and j - i < 4
             and start_mask[row, i - 1] and end_mask[row, j - 1]]
    expected = np.array(sorted(legal))  # of equal scores the first slot
    count = len(expected)
    assert count > 5 and spans.valid[row].sum() == count
    np.testing.assert_array_equal(np.stack([
        -spans.score[row], spans.start[row], spans.end[row]], axis=1)[:count],
                                  expected)
  assert spans.null_score.tolist() == [7.0, 7.0]  # of the search


@pytest.mark.parametrize(('spec', 'message'), [
    ('my_project:texts', 'returns str, expected a list of qa_jax.data.Example'),
    ('my_project:nothing', 'returns NoneType, expected a list'),
    ('my_project:early', r"early' fails at .*project.py:\d+: KeyError: 'key'"),
    ('my_project:late', r'late. fails at .*project.py:\d+: OSError: no disk')])
def test_a_source_returns_examples(package, spec, message):
  with pytest.raises(errors.UserError, match=message):
    sources.load_examples(spec)


@pytest.fixture
def run(package, tmp_path):
  qa = random_model.random_qa.__wrapped__('my_project:Doubled')
  directory = random_model.write_run(qa, tmp_path / 'run')
  sys.modules.pop('my_project')
  package.unlink()
  return directory


def test_a_stored_run_runs_code_of_allowed_packages_only(run, package):
  for allowed in ((), ('my',), ('my_project.heads',), ('other',)):
    with pytest.raises(errors.UserError,
                       match=r'would run code of my_project.*--allow_code=m'):
      qa_jax.load(run, allow_code=allowed)
    assert not package.exists()
  qa = qa_jax.load(run, allow_code=('my_project',))
  assert package.exists()
  assert np.isfinite(qa.answer('Who?', random_model.CONTEXT).score)
  for allowed in ('my_project', 5):
    with pytest.raises(errors.UserError, match='expected a tuple of packages'):
      qa_jax.load(run, allow_code=allowed)


@pytest.mark.parametrize(('field', 'spec'), [
    ('model.head', 'compound(base="length_prior(base=\'my_project:Wrong\')")'),
    ('objective', 'answerability(base="\\x6dy_project:loss")'),
    ('decode.search', ' my_project:search()'),
    ('decode.null_rule', 'my_project:rule'),
    ('data.train', 'synthetic(size=8) + my_project:rows()'),
    ('data.train', 'a(b.json + my_project:rows()'),  # "(" of a file name
    ('data.train', 'synthetic(size=8)(+my_project:rows'),
    ('data.eval', 'articles(of="a.json + my_project:rows")')])
def test_code_in_any_stored_field_is_refused(package, tmp_path, field, spec):
  fields = config_lib.override(tiny.config().to_dict(), {field: spec})
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(errors.UserError, match=rf'config\.{field}.*allow_code'):
    RunDirectory(tmp_path).read_config()
  config = RunDirectory(tmp_path).read_config(('my_project',))
  assert config.to_dict() == fields
  RunDirectory(tmp_path).check_config(config)  # resuming compares fields only
  assert not package.exists()


def test_paths_with_colons_are_no_code():
  for part in ('C:/data/a.json', 'tfds(name="squad/v1.1:3.0.0")',
               's3://b/train.json'):
    registry.check_code('x', {'data.train': part})


def test_a_command_opens_a_run_with_the_flag(run, package):
  asked = '--question=Who?', '--context=Mira built it.'
  message = commands.refusal('predict', f'--workdir={run}', *asked)
  assert '--allow_code=my_project' in message
  assert not package.exists()
  result = commands.command('predict', f'--workdir={run}', *asked,
                            '--allow_code=other,my_project')
  assert (result.code, package.exists()) == (0, True)
  message = commands.refusal('predict', f'--workdir={run}', *asked,
                             '--allow_code=a-b')
  assert 'is no name of a package' in message


def test_a_search_that_returns_no_spans_is_named(package):
  qa = random_model.random_qa('shared')
  wrong = dataclasses.replace(qa, config=dataclasses.replace(
      qa.config, decode=dataclasses.replace(
          qa.config.decode, search='my_project:bad_search')))
  with pytest.raises(errors.UserError, match=r'bad_search.* returns dict, exp'):
    wrong.answer('Who?', random_model.CONTEXT)


@pytest.fixture
def sweep(package, tmp_path, monkeypatch):
  """Runs a sweep in tmp_path/sweep that ends before its trials train."""
  monkeypatch.setitem(engines.ENGINES, 'local', lambda *_: {})
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))

  def run_sweep(functions: str, *argv: str) -> commands.Result:
    sys.modules.pop('my_project', None)
    package.unlink(missing_ok=True)
    path = sweeps.write_config(tmp_path / 'space.py', functions)
    return commands.command('sweep', f'--config={path}', '--seeds=1',
                            f'--workdir={tmp_path}/sweep', *argv)
  return run_sweep


@reads_a_config
@pytest.mark.parametrize(('functions', 'argv'), [
    ('def sweep(): return [{}, {"model.head": "my_project:Doubled"}]', []),
    ('def search_space(): return {"model.head": ["my_project:Doubled"]}',
     ['--sampler=random', '--trials=1'])])
def test_a_sweep_admits_the_code_that_its_file_names(
    sweep, package, functions, argv):
  result = sweep(functions, *argv)
  assert (result.code, package.exists()) == (0, True), result.err
  assert result.out.endswith(' --allow_code=my_project\n')  # of the report


@reads_a_config
def test_a_sweep_asks_before_it_runs_code_of_stored_variants(
    sweep, package, tmp_path):
  """sweep.json is data: its variants may name code that no config names."""
  (tmp_path / 'sweep').mkdir()
  (tmp_path / 'sweep' / 'sweep.json').write_text(json.dumps({
      'trials': [], 'drawn': [{}, {'model.head': 'my_project:Doubled'}]}))
  given = ('def search_space(): return {"optim.learning_rate": (1e-4, 1e-3)}',
           '--sampler=random', '--trials=1')
  result = sweep(*given)
  assert result.code == 1 and '--allow_code=my_project' in result.err
  assert not package.exists()
  result = sweep(*given, '--allow_code=my_project')
  assert (result.code, package.exists()) == (0, True), result.err


@pytest.mark.slow
@reads_a_config
def test_a_run_with_an_imported_head_trains_resumes_and_is_asked(
    package, tmp_path):
  config = tiny.config(model={'head': 'my_project:Doubled'},
                       train={'num_steps': 4}, parallel={'num_devices': 1})
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  train.train(config, whole)
  runs.train_until_killed(config, cut, 3)
  assert manager.Checkpoints(RunDirectory(cut).checkpoints,
                             read_only=True).latest == 2
  registry._allowed.clear()
  path = tmp_path / 'imported.py'
  path.write_text(commands.CONFIG.format(fields=config.to_dict()))
  result = commands.command('train', f'--config={path}', f'--workdir={cut}')
  assert result.code == 0, result.err  # the config is its permission
  assert 'resum' in result.err
  assert f'--workdir={cut} --allow_code=my_project ' in result.out
  registry._allowed.clear()
  asked = f'--workdir={cut}', '--question=Who?', '--context=Mira built it.'
  assert '--allow_code=my_project' in commands.refusal('predict', *asked)
  assert commands.command('predict', *asked,
                          '--allow_code=my_project').code == 0
  ours, undisturbed = runs.state_of(cut, 4), runs.state_of(whole, 4)
  assert ours.keys() == undisturbed.keys()
  for name, value in undisturbed.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)
