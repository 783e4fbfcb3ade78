"""Studies: the trials that Optuna stores, proposes and prunes."""

import itertools
import json
import pathlib
import sqlite3
import subprocess
import sys

import optuna
from optuna.trial import TrialState
import pytest
import sqlalchemy

from qa_jax import errors
from qa_jax.io import files
from qa_jax.sweeps import engines
from qa_jax.sweeps import plan
from qa_jax.sweeps import pruners
from qa_jax.sweeps import samplers
from qa_jax.sweeps import study as study_lib
from qa_jax.sweeps.engines import local
from qa_jax.sweeps.engines import scheduler
from tests.common import commands
from tests.common import sweeps
from tests.common import tiny

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

SPACE = {'optim.learning_rate': (1e-4, 1e-1, 'log'), 'decode.n_best': (2, 9),
         'model.head': ['independent', 'shared'], 'model.dropout': (0.0, 0.5)}


def open_study(workdir: pathlib.Path, **options) -> study_lib.Study:
  return study_lib.open_study(workdir, **options)


@pytest.mark.parametrize('name', ['a?b', 'a%20b', 'a#b', 'ä b'])
def test_the_study_is_in_the_directory_of_any_name(tmp_path, name):
  open_study(tmp_path / name)
  assert [path.name for path in tmp_path.iterdir()] == [name]
  assert (tmp_path / name / 'study.db').is_file()


def test_a_row_has_overrides_evaluations_and_the_final_score(tmp_path):
  trials = sweeps.plan(tmp_path, seeds=2)
  sweeps.measure(trials[0], 10.0, 30.0, 20.0)
  sweeps.measure(trials[1], 5.0, final=False)
  study = open_study(tmp_path)
  study.register(trials)
  study.begin(trials[1])
  study.reason_to_end(trials[1])
  study.fail(trials[2], 'no luck')
  assert (tmp_path / 'study.db').is_file()
  rows = sweeps.rows(open_study(tmp_path))
  assert [rows[t.name].state for t in trials] == [
      TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL,
      TrialState.WAITING]
  first, second, third, _ = (rows[t.name] for t in trials)
  assert first.value == 20.0
  assert first.intermediate_values == {10: 10.0, 20: 30.0, 30: 20.0}
  assert json.loads(first.user_attrs['overrides']) == sweeps.TWO[0]
  assert first.user_attrs['seed'] == 3
  assert second.intermediate_values == {10: 5.0}
  assert third.user_attrs['reason'] == 'no luck'


def test_the_engine_tells_the_study(tmp_path):
  trials = sweeps.plan(tmp_path, seeds=2)
  study = open_study(tmp_path)
  codes = {trials[2].name: 'sys.exit("error: bad")'}
  command = lambda t: sweeps.stand_in(t, codes.get(t.name, 'finish()'))
  setup = scheduler.Setup([{}, {}], study=study)
  assert local.run(trials, command, setup) == {trials[2].name: 'bad'}
  rows = sweeps.rows(study)
  assert [rows[t.name].value for t in trials] == [60.0, 60.0, None, 60.0]
  assert rows[trials[2].name].state == TrialState.FAIL
  codes.clear()
  assert local.run(trials, command, setup) == {}
  assert [r.state.name for r in study.optuna.get_trials()] == [
      'COMPLETE', 'COMPLETE', 'FAIL', 'COMPLETE', 'COMPLETE']


def test_a_lost_study_is_made_anew_from_the_runs(tmp_path):
  trials = sweeps.plan(tmp_path, seeds=2)
  for i, trial in enumerate(trials):
    sweeps.measure(trial, 1.0 * i)
  study = open_study(tmp_path)
  study.register(trials)
  before = {name: (r.value, r.intermediate_values)
            for name, r in sweeps.rows(study).items()}
  (tmp_path / 'study.db').unlink()
  study = open_study(tmp_path)
  study.register(trials)
  assert {name: (r.value, r.intermediate_values)
          for name, r in sweeps.rows(study).items()} == before
  study.register(trials)
  assert len(study.optuna.get_trials()) == len(trials)


def test_a_complete_trial_has_all_values_whatever_the_pruner(tmp_path):
  trials = sweeps.plan(tmp_path, [{}, {'decode.n_best': 3}])
  sweeps.measure(trials[0], 50.0, 60.0, 70.0)
  sweeps.measure(trials[1], 20.0, 30.0, 40.0)  # halving would have ended it
  for _ in range(2):  # anew, and with its finished rows
    study = open_study(tmp_path, pruner='halving', eval_every_steps=10)
    study.register(trials)
    row = sweeps.rows(study)[trials[1].name]
    assert (row.state, row.value) == (TrialState.COMPLETE, 40.0)
    assert row.intermediate_values == {10: 20.0, 20: 30.0, 30: 40.0}


def test_a_run_that_is_gone_gets_a_new_row(tmp_path):
  trials = sweeps.plan(tmp_path)
  sweeps.measure(trials[0], 1.0)
  study = open_study(tmp_path)
  study.register(trials)
  trials[0].metrics.unlink()
  study.register(trials)
  assert sweeps.rows(study)[trials[0].name].state == TrialState.WAITING


# Samplers.


def draw(workdir, sampler, count, size, space=SPACE, seed=3, score=None,
         on_disk=False, check=lambda varied: None):
  """All variants, each measured when its round is over."""
  parsed = samplers.parse_space(space)
  config = tiny.config(seed=seed)
  study = (open_study(workdir, space=parsed) if on_disk
           else study_lib.in_memory())
  for variants in samplers.propose_rounds(study,
                                          parsed,
                                          sampler,
                                          config=config,
                                          variants=plan.drawn_variants(workdir),
                                          count=count,
                                          size=size,
                                          check=check):
    trials = plan.plan_trials(config, variants, 1, workdir)
    plan.write_plan(workdir, trials, variants)
    study.register(trials)
    for trial in trials:
      if score and not trial.metrics.is_file():
        sweeps.measure(trial, score(trial.config))
    study.settle(trials, {})
    yield variants


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_variants_are_within_the_space_and_all_different(tmp_path, sampler):
  *_, variants = draw(tmp_path, sampler, 12, 5, score=lambda c: 1.0)
  assert variants[0] == {} and len(variants) == 13
  assert len({json.dumps(v) for v in variants}) == 13
  for v in variants[1:]:
    assert v.keys() == SPACE.keys()
    assert 1e-4 <= v['optim.learning_rate'] <= 1e-1
    assert type(v['decode.n_best']) is int and 2 <= v['decode.n_best'] <= 9
    assert v['model.head'] in SPACE['model.head']
    assert float(f'{v["model.dropout"]:.4g}') == v['model.dropout']
  rates = [v['optim.learning_rate'] for v in variants[1:]]
  assert min(rates) < 1e-2 and sum(r < 10**-2.5 for r in rates) > 2  # log


@pytest.mark.parametrize('sampler', samplers.SAMPLERS)
def test_a_sweep_that_stopped_draws_what_it_would_have_drawn(
    tmp_path, sampler):
  score = lambda c: 100 * c.model.dropout
  *_, whole = draw(tmp_path / 'a', sampler, 15, 6, score=score,
                   on_disk=True)
  parts = draw(tmp_path / 'b', sampler, 15, 6, score=score,
               on_disk=True)
  assert [len(next(parts)) for _ in range(2)] == [7, 13]
  parts.close()
  *_, resumed = draw(tmp_path / 'b', sampler, 15, 6, score=score,
                     on_disk=True)
  assert resumed == whole


def test_a_draw_is_not_stored_with_the_row_of_a_trial_that_waits(tmp_path):
  """The sweep stops before its second seed and goes on with one seed."""
  study = open_study(tmp_path, space=samplers.parse_space(SPACE))
  study.register(sweeps.plan(tmp_path, [{}], seeds=2))
  *_, variants = draw(tmp_path, 'random', 2, 2, on_disk=True,
                      score=lambda c: 1.0)
  rows = sweeps.rows(open_study(tmp_path))
  for trial in sweeps.plan(tmp_path, [{}], seeds=2):
    assert rows[trial.name].params == {}
    assert rows[trial.name].user_attrs['overrides'] == '{}'
  assert len(rows) == 4 and len(variants) == 3


def test_tpe_finds_what_random_does_not(tmp_path):
  """On a smooth score of one field, with as many trials."""
  space = {'model.dropout': (0.0, 0.9)}
  score = lambda c: 100 - 1000 * (c.model.dropout - 0.7)**2
  near = {}
  for sampler in samplers.SAMPLERS:
    *_, variants = draw(
        tmp_path / sampler, sampler, 24, 2, space, score=score)
    near[sampler] = sum(abs(v['model.dropout'] - 0.7) < 0.1
                        for v in variants[1:])
  assert near['tpe'] > 8 > near['random']


def test_a_small_space_is_drawn_once(tmp_path):
  *_, variants = draw(tmp_path, 'random', 9, 9, {
      'model.head': ['independent', 'shared', 'mlp']})
  # The default has head independent: it is not drawn again.
  assert sorted(v.get('model.head', '') for v in variants) == [
      '', 'mlp', 'shared']


def test_draws_that_training_refuses_are_said_and_replaced(tmp_path, capsys):
  space = {'model.head': ['independent', 'biaffine', 'mlp_span'],
           'objective': ['cross_entropy', 'joint', 'beam_search']}
  check = lambda varied: plan.check_parts(varied, 2)
  *_, variants = draw(tmp_path, 'random', 99, 99, space, check=check)
  fits = set()
  for head, objective in itertools.product(*space.values()):
    try:
      check(tiny.config(model={'head': head}, objective=objective))
      fits.add((head, objective))
    except errors.UserError:
      pass
  default = tiny.config()
  fits -= {(default.model.head, default.objective)}
  assert 0 < len(fits) < 8
  drawn = [(v['model.head'], v['objective']) for v in variants[1:]]
  assert sorted(drawn) == sorted(fits)
  said = capsys.readouterr().err
  assert ('draws another variant instead of model.head-biaffine.objective-'
          'cross_entropy: ') in said
  assert said.count('instead of model.head-biaffine.objective-cross_') == 1
  assert f'the search ends with {len(fits)} instead of --trials=99' in said


def test_a_space_without_a_legal_draw_is_one_line(tmp_path):
  space = {'model.head': ['independent', 'biafine']}
  with pytest.raises(errors.UserError, match='every draw is refused: '):
    [*draw(tmp_path, 'random', 3, 3, space,
           check=lambda varied: plan.check_parts(varied, 2))]
  with pytest.raises(errors.UserError, match=r'no field .model\.haed.'):
    [*draw(tmp_path, 'random', 3, 3, {'model.haed': ['shared']})]


def test_other_choices_are_refused_and_narrower_ranges_go_on(tmp_path):
  space = {'model.head': ['mlp', 'shared'], 'model.dropout': (0.0, 0.9)}
  score = lambda c: 100 * c.model.dropout
  [*draw(tmp_path, 'tpe', 14, 5, space, score=score, on_disk=True)]
  for changed, message in (
      ({**space, 'model.head': ['mlp', 'biaffine']}, "('mlp', 'shared')"),
      ({**space, 'model.dropout': (0.1, 0.9, 'log')}, 'model.dropout is ')):
    with pytest.raises(errors.UserError) as caught:
      next(draw(tmp_path, 'tpe', 16, 5, changed, on_disk=True))
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert 'began with' in str(caught.value)
  (tmp_path / 'study.db').unlink()
  *_, variants = draw(tmp_path, 'tpe', 18, 5, {
      **space, 'model.dropout': (0.85, 0.9)}, score=score, on_disk=True)
  assert len(variants) == 19
  assert all(v['model.dropout'] >= 0.85 for v in variants[15:])
  assert any(v['model.dropout'] < 0.85 for v in variants[1:15])


@pytest.mark.parametrize(('space', 'message'), [
    ({}, 'expected fields with choices'),
    ([1], 'expected fields with choices'),
    ({'a': 3}, 'a: 3, expected a list of choices'),
    ({'a': []}, r'a: \[\], expected'),
    ({'a': [(1, 2)]}, 'expected a list of choices'),
    ({'a': (1,)}, 'expected a list of choices'),
    ({'a': (2, 1)}, 'low < high'),
    ({'a': (0.0, 1.0, 'log')}, '0 < low'),
    ({'a': (1.0, 2.0, 'lag')}, "(low, high, 'log')"),
    ({'a': (1.0, float('inf'))}, 'expected'),
    ({'a': ('x', 'y')}, 'expected'),
    ({'seed': [1, 2]}, 'seed is not searched; leave it out, --seeds=N')])
def test_a_bad_space_is_one_line(space, message):
  with pytest.raises(errors.UserError) as caught:
    samplers.parse_space(space)
  assert message.replace('\\', '') in str(caught.value)
  assert '\n' not in str(caught.value)


# Pruners.


def test_halving_keeps_the_better_half_at_every_rung(tmp_path):
  """By hand. At step 10: 50 is alone and stays, 60 is the better of two, 40
  goes; 70 is the best of four, 65 among the best two of five. At step 20
  (rung two): 61 is alone and stays, 60 goes."""
  variants = [{'decode.n_best': n} for n in (3, 5, 6, 7, 8)]
  trials = sweeps.plan(tmp_path, [{}, *variants])
  study = open_study(tmp_path, pruner='halving', eval_every_steps=10)
  study.register(trials)
  said = []
  for trial, score in zip(trials[1:], (50.0, 60.0, 40.0, 70.0, 65.0),
                          strict=True):
    sweeps.measure(trial, score, final=False)
    said.append(study.reason_to_end(trial))
  assert [bool(s) for s in said] == [False, False, True, False, False]
  assert said[2] == ('F1 40.00 at step 10 is not in the better half of the '
                     'trials that came so far')
  sweeps.measure(trials[5], 65.0, 61.0, final=False)
  assert study.reason_to_end(trials[5]) == ''
  sweeps.measure(trials[2], 60.0, 60.0, final=False)
  assert 'F1 60.00 at step 20' in study.reason_to_end(trials[2])
  sweeps.measure(trials[0], 1.0, final=False)
  assert study.reason_to_end(trials[0]) == ''  # the default is compared with
  # Not a trial that is complete, whatever its evaluations were.
  assert sweeps.rows(study)[trials[4].name].state == TrialState.WAITING


def test_the_score_of_a_pruned_trial_is_its_last_one(tmp_path):
  trial, *_ = trials = sweeps.plan(tmp_path, seeds=2)
  sweeps.measure(trial, 30.0, 20.0, final=False)
  study = open_study(tmp_path)
  study.register(trials)
  study.begin(trial)
  study.reason_to_end(trial)
  study.prune(trial, 'too low')
  row = sweeps.rows(study)[trial.name]
  assert (row.state, row.value) == (TrialState.PRUNED, 20.0)


def test_a_pruned_trial_ends_and_is_not_started_again(tmp_path, capsys):
  variants = [{}, {'decode.n_best': 3, 'optim.eps': 1e-6}, {'optim.eps': 1e-6}]
  trials = sweeps.plan(tmp_path, variants)
  assert trials[2].source == trials[1].name
  sweeps.measure(trials[0], 50.0)
  study = open_study(tmp_path, pruner='halving', eval_every_steps=10)
  command = lambda t: sweeps.stand_in(t, sweeps.SLOW.replace('SCORE', '20.0'))
  setup = scheduler.Setup([{}], study=study)
  assert local.run(trials, command, setup) == {}
  said = capsys.readouterr().err
  assert f'{trials[1].name}: pruned: F1 20.00 at step 10 is not' in said
  assert f'{trials[2].name}: pruned: {trials[1].name} was, whose' in said
  assert [sweeps.starts(t) for t in trials] == [0, 1, 0]
  assert files.read_object(trials[1].pruned)['reason'].startswith('F1 20.00')
  rows = sweeps.rows(study)
  assert [rows[t.name].state for t in trials[1:]] == [TrialState.PRUNED] * 2
  assert rows[trials[1].name].value == 20.0
  # Also by a sweep that prunes nothing, and with a study that was lost.
  (tmp_path / 'study.db').unlink()
  again = open_study(tmp_path)
  assert local.run(trials, command, scheduler.Setup([{}], study=again)) == {}
  assert [sweeps.starts(t) for t in trials] == [0, 1, 0]
  assert sweeps.rows(again)[trials[1].name].state == TrialState.PRUNED


def test_wilcoxon_by_hand():
  """Worse on all of n seeds: p = 2^-n, below 0.1 from n = 4 on."""
  best = {s: 50.0 + s for s in range(6)}
  low = {s: 10.0 + s * s for s in range(6)}
  worse = lambda n, shift: {s: 50.0 + s - shift - 0.1 * s for s in range(n)}
  assert not pruners.worse_over_seeds(worse(3, 5), [low, best])
  assert pruners.worse_over_seeds(worse(4, 5), [low, best]) == (
      'worse than the best variant on 4 seeds (Wilcoxon, p < 0.1)')
  assert not pruners.worse_over_seeds(worse(4, -5), [low, best])
  assert not pruners.worse_over_seeds({**worse(4, 5), 0: 70.0}, [low, best])
  assert not pruners.worse_over_seeds(worse(4, 5), [{0: 90.0}, low])
  assert not pruners.worse_over_seeds({}, [best])


def test_wilcoxon_spares_seeds(tmp_path):
  trials = sweeps.plan(tmp_path, [
      {}, {'optim.eps': 1e-6}, {'optim.eps': 1e-7}], seeds=6)
  score = {'': 50.0, '1e-06': 40.0, '1e-07': 51.0}
  code = ('metrics.parent.mkdir(parents=True)\nmetrics.write_text('
          '\'{"exact_match": 1.0, "f1": SCORE}\')')
  command = lambda t: sweeps.stand_in(t, code.replace('SCORE', str(
      score[str(t.variant.get('optim.eps', ''))] + 0.1 * t.config.seed)))
  study = open_study(tmp_path, pruner='wilcoxon')
  assert local.run(trials, command, scheduler.Setup([{}], study=study)) == {}
  pruned = [t for t in trials if t.pruned.is_file()]
  # The default is never pruned, though it is worse on all seeds too.
  assert [(t.variant, t.config.seed) for t in pruned] == [
      ({'optim.eps': 1e-6}, 7), ({'optim.eps': 1e-6}, 8)]
  assert sum(t.metrics.is_file() for t in trials) == 16


# The command.


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> pathlib.Path:
  return sweeps.write_config(
      tmp_path_factory.mktemp('configs') / 'tiny_space.py', '''
def search_space():
  return {'decode.n_best': (2, 9)}
''')


def test_random_search_by_the_command(config, tmp_path, monkeypatch):
  ran = []

  def engine(trials, command, setup):
    for trial in trials:
      if not trial.metrics.is_file():
        ran.append(command(trial))
        files.write_json(trial.run / 'config.json', trial.config.to_dict())
        sweeps.measure(trial, 10.0)
    return {}

  monkeypatch.setitem(engines.ENGINES, 'local', engine)
  argv = ('sweep', f'--config={config}', f'--workdir={tmp_path}/x',
          '--seeds=2', '--workers=1', '--sampler=random', '--trials=2')
  result = commands.command(*argv)
  assert result.code == 0, result
  assert result.out.startswith('6 trials are complete')
  drawn = files.read_object(tmp_path / 'x' / 'sweep.json')['drawn']
  assert drawn[0] == {} and len(drawn) == 3
  assert [c[5:] for c in ran] == [
      [f'--config.{k}={x}' for k, x in {**v, 'seed': seed}.items()]
      for seed in (3, 4) for v in drawn]
  states = [r.state for r in sweeps.rows(open_study(tmp_path / 'x')).values()]
  assert states == [TrialState.COMPLETE] * 6
  before = commands.files_of(tmp_path / 'x' / 'trials')
  again = commands.command(*argv)
  assert again.out == result.out, again
  assert commands.files_of(tmp_path / 'x' / 'trials') == before
  assert len(ran) == 6
  # As a grid, or with a value for all, it would be another sweep.
  config.with_name('both.py').write_text(config.read_text() + '''
def sweep(): return [{}]
''')
  assert 'is the search of another --sampler' in commands.refusal(
      'sweep', f'--config={config.with_name("both.py")}', *argv[2:5])
  assert (f'--config.decode.n_best: {config} varies it; leave it to '
          'search_space()') in commands.refusal(*argv,
                                                '--config.decode.n_best=4')
  assert files.read_object(tmp_path / 'x' / 'sweep.json')['drawn'] == drawn


@pytest.mark.parametrize(('sampler', 'workers', 'seeds', 'size'), [
    ('random', 2, 2, 5), ('tpe', 2, 2, 1), ('tpe', 3, 2, 2), ('tpe', 1, 3, 1)])
def test_a_round_keeps_all_workers_busy(
    config, tmp_path, monkeypatch, sampler, workers, seeds, size):
  sizes = []
  monkeypatch.setattr(samplers, 'propose_rounds', lambda *_, **options: (
      sizes.append(options['size']), iter([[{}]]))[1])
  monkeypatch.setitem(engines.ENGINES, 'local', lambda *_: {})
  commands.command(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/x', '--trials=5',
      f'--workers={workers}', f'--sampler={sampler}', f'--seeds={seeds}')
  assert sizes == [size]


def test_a_sampler_leaves_the_plan_of_a_grid_as_it_is(config, tmp_path):
  plan = '{"trials": ["seed-0"]}'
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'sweep.json').write_text(plan)
  assert 'is a sweep of --sampler=grid' in commands.refusal(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/x',
      '--sampler=tpe', '--seeds=1')
  assert (tmp_path / 'x' / 'sweep.json').read_text() == plan


def test_a_storage_that_is_no_url_is_one_line(config, tmp_path):
  assert 'expected sqlite:///FILE' in commands.refusal(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/x',
      '--sampler=tpe', '--seeds=1', '--storage=foo')


def test_a_config_without_a_space_or_a_sweep_is_one_line(config, tmp_path):
  flags = (f'--workdir={tmp_path}/x', '--seeds=1')
  assert 'has no sweep(), which --sampler=grid needs' in commands.refusal(
      'sweep', f'--config={config}', *flags)
  other = tmp_path / 'other.py'
  other.write_text(config.read_text().partition('def search')[0])
  assert 'has no search_space(), which --sampler=tpe' in commands.refusal(
      'sweep', f'--config={other}', '--sampler=tpe', *flags)


def broken(path: pathlib.Path):
  path.write_text('not a database, but long enough to be one' * 100)


def locked(path: pathlib.Path):
  connection = sqlite3.connect(path, isolation_level=None)
  connection.execute('BEGIN EXCLUSIVE')
  return connection


@pytest.mark.parametrize(('spoil', 'message'), [
    (broken, 'study.db: no study can be read or written there: file is not a '
     'database'),
    (locked, 'study.db: no study can be read or written there: database is '
     'locked')])
def test_a_bad_study_file_is_one_line(tmp_path, monkeypatch, spoil, message):
  monkeypatch.setattr(study_lib, 'LOCK_SECONDS', 0.1)
  kept = spoil(tmp_path / 'study.db')
  with pytest.raises(errors.UserError) as caught:
    open_study(tmp_path)
  assert message in str(caught.value) and '\n' not in str(caught.value)
  del kept


@pytest.mark.parametrize(('url', 'message'), [
    ('nonsense', '--storage: Could not parse'),
    ('nosuch://host/x', 'plugin'),
    ('sqlite:////no/where/x.db', 'unable to open database file')])
def test_a_bad_storage_is_one_line(tmp_path, url, message):
  with pytest.raises(errors.UserError) as caught:
    open_study(tmp_path, url=url)
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_tables_that_another_process_has_just_made_are_used(
    tmp_path, monkeypatch):
  calls = []

  class Racing(optuna.storages.RDBStorage):

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      calls.append(args)
      if len(calls) == 1:  # these tables are those of the other process
        raise sqlalchemy.exc.OperationalError(
            'CREATE', {}, Exception('table trials already exists'))

  monkeypatch.setattr(optuna.storages, 'RDBStorage', Racing)
  study = open_study(tmp_path)
  assert len(calls) == 2 and not study.optuna.get_trials()


def test_a_full_disk_is_the_reason(tmp_path):
  study = open_study(tmp_path)
  full = sqlalchemy.exc.OperationalError(
      'INSERT', {}, sqlite3.OperationalError('database or disk is full'))
  with pytest.raises(errors.UserError) as caught, study.guard():
    raise optuna.exceptions.StorageInternalError('An exception is') from full
  assert ('database or disk is full; what has been trained is safe: free some '
          'space') in str(caught.value)


def test_a_password_is_not_told(tmp_path):
  with pytest.raises(errors.UserError) as caught:
    open_study(tmp_path, url='postgresql://me:secret@127.0.0.1:1/x')
  assert 'secret' not in str(caught.value)


def test_two_sweeps_of_one_name_do_not_share_a_study(tmp_path):
  url = f'sqlite:///{tmp_path}/shared.db'
  open_study(tmp_path / 'a' / 'heads', url=url)
  open_study(tmp_path / 'a' / 'heads', url=url)
  open_study(tmp_path / 'b' / 'objectives', url=url)
  with pytest.raises(errors.UserError, match=(
      r"'heads', that of \S+/a/heads; choose another name\. A sweep that was "
      'moved from there goes on once its directory is renamed')):
    open_study(tmp_path / 'b' / 'heads', url=url)


def test_a_moved_and_renamed_sweep_goes_on_in_a_shared_database(tmp_path):
  url = f'sqlite:///{tmp_path}/shared.db'
  trials = sweeps.plan(tmp_path / 'heads', seeds=2)
  sweeps.measure(trials[0], 1.0, 2.0)
  open_study(tmp_path / 'heads', url=url).register(trials)
  moved = (tmp_path / 'heads').rename(tmp_path / 'heads-2')
  study = open_study(moved, url=url)
  study.register(sweeps.plan(moved, seeds=2))
  rows = sweeps.rows(study)
  assert rows.keys() == {t.name for t in trials}
  assert rows[trials[0].name].value == 2.0
  assert rows[trials[1].name].state == TrialState.WAITING


DRIVER = '''
import pathlib, sys
from tests.sweeps import test_study
test_study.drive(pathlib.Path(sys.argv[1]))
'''


def drive(workdir: pathlib.Path) -> dict[str, str]:
  trials = sweeps.plan(workdir, seeds=3)
  return local.run(
      trials, lambda t: sweeps.stand_in(t, 'time.sleep(0.3)\nfinish()'),
      scheduler.Setup([{}], study=open_study(workdir)))


def test_a_driver_that_was_killed_loses_and_repeats_nothing(tmp_path):
  trials = sweeps.plan(tmp_path, seeds=3)
  driver = subprocess.Popen(
      [sys.executable, '-c', DRIVER, str(tmp_path)], cwd=commands.ROOT,
      stderr=subprocess.PIPE, text=True)
  for line in driver.stderr:
    if line.startswith('sweep 2/6'):
      break
  driver.kill()
  driver.wait()
  driver.stderr.close()
  assert 2 <= sum(t.metrics.exists() for t in trials) < 6
  assert drive(tmp_path) == {}
  assert [sweeps.starts(t) for t in trials] == [1] * 6
  states = [r.state for r in open_study(tmp_path).optuna.get_trials()]
  assert states == [TrialState.COMPLETE] * 6
