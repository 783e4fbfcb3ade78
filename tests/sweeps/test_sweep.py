"""Sweeps: the plan, what is refused before it starts, and the local engine.

The engine runs stand-ins for training: a process that says it has started, and
then does what the test asks for.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.sweeps import config_file
from qa_jax.sweeps import engines
from qa_jax.sweeps import grid
from qa_jax.sweeps import plan as plan_lib
from qa_jax.sweeps.engines import local as local_lib
from qa_jax.sweeps.engines import scheduler
from qa_jax.training import train
from tests.common import commands as commands_lib
from tests.common import sweeps
from tests.common import tiny

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = commands_lib.ROOT
SWEEPS = sorted((ROOT / 'configs').glob('sweep_*.py'))


def run(trials, *codes: str, workers: int = 2) -> dict[str, str]:
  """Runs trials that do what `codes` say, in turn."""
  code = {t.name: codes[i % len(codes)] for i, t in enumerate(trials)}
  return local_lib.run(trials, lambda t: sweeps.stand_in(t, code[t.name]),
                       scheduler.Setup([{}] * workers))


# The plan.


def test_trials_are_variants_times_seeds_seed_by_seed(tmp_path):
  trials = sweeps.plan(tmp_path, seeds=3)
  assert [(t.config.seed, t.config.objective) for t in trials
         ] == [(seed, v['objective']) for seed in (3, 4, 5) for v in sweeps.TWO]
  assert trials[1].name == 'objective-span_softmax.seed-3'
  assert trials[1].run == tmp_path / 'trials' / trials[1].name
  assert trials[1].overrides == {'objective': 'span_softmax', 'seed': 3}
  assert not any(t.source for t in trials)


def test_a_variant_may_set_its_seed(tmp_path):
  trials = sweeps.plan(tmp_path,
                       grid.product(
                           grid.over('objective',
                                     ['cross_entropy', 'span_softmax']),
                           grid.seeds(2)),
                       seeds=3)
  assert [(t.variant['objective'], t.config.seed) for t in trials
         ] == [('cross_entropy', 0), ('span_softmax', 0), ('cross_entropy', 1),
               ('span_softmax', 1)]


def test_grids_by_hand():
  a, b = grid.over('a', [1, 2]), grid.over('b', 'xy')
  assert grid.product(a, b) == [{
      'a': 1,
      'b': 'x'
  }, {
      'a': 1,
      'b': 'y'
  }, {
      'a': 2,
      'b': 'x'
  }, {
      'a': 2,
      'b': 'y'
  }]
  assert grid.together(a, b) == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  assert grid.chain(a, b, [{}]) == [{
      'a': 1
  }, {
      'a': 2
  }, {
      'b': 'x'
  }, {
      'b': 'y'
  }, {}]
  assert grid.product() == [{}]
  with pytest.raises(ValueError, match='a is varied twice'):
    grid.product(a, a)
  with pytest.raises(ValueError, match='shorter'):
    grid.together(a, b[:1])


@pytest.mark.parametrize('value', [
    '../../x', '/x', 'biaffine(rank=3)', 'a b;$(rm -rf)', '-x', 'é\n\0', '',
    'x' * 300, '{x,y}'
])
def test_names_are_plain_files_in_the_workdir(tmp_path, value):
  trial, other = sweeps.plan(tmp_path, ({
      'model.head': value
  }, {
      'model.head': value + ' '
  }))
  assert trial.name != other.name
  assert set(trial.name) <= set(
      'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-')
  assert len(trial.name) < 100 and trial.name[0].isalpha()
  assert trial.run.resolve().parent == tmp_path / 'trials'
  assert shlex.quote(trial.name) == trial.name


def test_trials_that_differ_in_decode_share_the_first_ones_training(tmp_path):
  trials = sweeps.plan(tmp_path, ({
      'decode.n_best': 4
  }, {
      'decode.search': 'argmax'
  }, *sweeps.TWO[1:], {
      **sweeps.TWO[1], 'decode.n_best': 3
  }),
                       seeds=2)
  names = [t.name for t in trials]
  assert [t.source for t in trials
         ] == ['', names[0], '', names[2], '', names[4], '', names[6]]


@pytest.mark.parametrize(
    ('variants', 'message'),
    [([], '0 variants of sweep() × 1 seeds: nothing to run'),
     ([{
         'modle.head': 'shared'
     }], "modle.head-shared: config has no field "
      "'modle'; did you mean 'model'"),
     ([{
         'model.haed': 'shared'
     }], "no field 'model.haed'; did you mean"),
     ([{
         'seed.x': 1
     }], "no field 'seed.x'"),
     ([{
         'seed': 'x'
     }], "default: config.seed='x', expected int"),
     ([{
         'seed': 1
     }, {
         'seed': 1
     }], 'default and default are the same config'),
     ([{
         'data.train': 'a.data.eval-b'
     }, {
         'data.train': 'a',
         'data.eval': 'b'
     }], 'would both be runs named data.train-a.data.eval-b.seed-3'),
     ([{
         'model': 'x'
     }], "config.model is 'x', expected fields"),
     ([{
         'train.batch_size': 'x'
     }], "batch_size='x', expected int"),
     ([*sweeps.TWO, sweeps.TWO[1]
      ], 'objective-span_softmax and objective-span_softmax are '
      'the same config'),
     ([{}, sweeps.TWO[0]
      ], 'default and objective-cross_entropy are the same config')])
def test_a_bad_variant_is_one_line(tmp_path, variants, message):
  with pytest.raises(errors.UserError) as caught:
    sweeps.plan(tmp_path, variants)
  assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(('variant', 'message'),
                         [({
                             'model.head': 'biafine'
                         }, "unknown head 'biafine'; did you mean"),
                          ({
                              'model.head': 'biaffine(rnk=3)'
                          }, "no argument 'rnk'"),
                          ({
                              'objective': 'joint'
                          }, 'Heads that fit: biaffine'),
                          ({
                              'objective': 'join'
                          }, "did you mean 'joint'"),
                          ({
                              'model.preset': 'bse'
                          }, "did you mean 'base'"),
                          ({
                              'model.num_heads': 3
                          }, 'not divisible by num_heads 3'),
                          ({
                              'model.init_from': '/no/where'
                          }, 'nor a hub id'),
                          ({
                              'decode.null_rule': 'classifier'
                          }, "null_rule='classifier' needs"),
                          ({
                              'decode.search': 'argmx'
                          }, "did you mean 'argmax'"),
                          ({
                              'train.batch_size': 9
                          }, 'batch_size 9 is not divisible by 2'),
                          ({
                              'parallel.num_devices': 4
                          }, 'num_devices=4, but a trial has 2'),
                          ({
                              'data.buckets': (0,)
                          }, 'data.buckets has 0'),
                          ({
                              'parallel.mode': 'pmapp'
                          }, "did you mean 'pmap'"),
                          ({
                              'parallel.mesh': {'fsdp': 2}
                          }, 'is only for parallel.mode=mesh'),
                          ({
                              'parallel.mode': 'mesh',
                              'parallel.mesh': {'data': 3}
                          }, 'does not multiply to 2 devices'),
                          ({
                              'parallel.mode': 'jit',
                              'parallel.num_devices': 2
                          }, "mode='jit' trains on one device"),
                          ({
                              'data.windows_without_answer': 'dropp'
                          }, 'choose cls or drop'),
                          ({
                              'data.window_overlap': 70
                          }, 'window_overlap 70 leaves no step'),
                          ({
                              'data.max_question_length': 0
                          }, 'max_question_length=0 must be at least 1'),
                          ({
                              'data.vocab': '/nowhere'
                          }, "data.vocab='/nowhere' is not a directory"),
                          ({
                              'optim.schedule': 'lineal'
                          }, "did you mean 'linear'"),
                          ({
                              'data.train': 'nowhere.json'
                          }, 'nowhere.json: No such file'),
                          ({
                              'data.eval': ''
                          }, 'config.data.eval is empty')])
def test_what_training_would_refuse_is_refused_first(tmp_path, variant,
                                                     message):
  trials = sweeps.plan(tmp_path, ({}, variant), seeds=2)
  with pytest.raises(errors.UserError) as caught:
    plan_lib.check_trials(trials, devices=2)
  assert message in str(caught.value) and '\n' not in str(caught.value)
  assert str(caught.value).startswith(f'{trials[1].name}: ')
  assert not list(tmp_path.iterdir())


def test_variants_with_seeds_of_their_own_are_checked(tmp_path):
  trials = sweeps.plan(tmp_path, ({'seed': 0}, {'seed': 1}, {
      'model.head': 'biafine', 'seed': 2}))
  with pytest.raises(errors.UserError, match='unknown head'):
    plan_lib.check_trials(trials)


def test_the_data_of_complete_trials_may_be_gone(tmp_path):
  trials = sweeps.plan(tmp_path, data={'train': f'{tmp_path}/gone.json'})
  sweeps.measure(trials[0], 1.0)
  files.write_json(trials[0].run / 'config.json', trials[0].config.to_dict())
  plan_lib.check_trials(trials[:1])
  with pytest.raises(errors.UserError) as caught:
    plan_lib.check_trials(trials)
  assert f'{trials[1].name}: {tmp_path}/gone.json: No' in str(caught.value)


def test_a_trial_of_another_config_is_refused(tmp_path):
  trials = sweeps.plan(tmp_path)
  files.write_json(trials[1].run / 'config.json', tiny.config().to_dict())
  with pytest.raises(errors.UserError,
                     match=r'objective +.cross_entropy. → .span_softmax.'):
    plan_lib.check_trials(trials)


@pytest.mark.parametrize('path', SWEEPS, ids=lambda p: p.stem)
def test_shipped_sweep_fits_together(tmp_path, path, monkeypatch):
  monkeypatch.chdir(ROOT)
  result = commands_lib.command('sweep', f'--config=configs/{path.name}:tiny',
                                f'--workdir={tmp_path}/x', '--seeds=2',
                                '--print')
  assert (result.code, result.err) == (0, '')
  assert result.out.count('.seed-0 ') == result.out.count('.seed-1 ') > 1
  assert not (tmp_path / 'x').exists()


# The local engine.


@pytest.mark.parametrize(('program', 'message'), [
    ('kill -9 $$', 'no device: exit code -9'),
    ('printf "a\\nb\\n" >&2; exit 1', 'no device: b')])
def test_a_failed_look_for_devices_is_one_line(
    tmp_path, monkeypatch, program, message):
  python = tmp_path / 'python'
  python.write_text(f'#!/bin/sh\n{program}\n')
  python.chmod(0o700)
  monkeypatch.setattr(sys, 'executable', str(python))
  with pytest.raises(errors.UserError, match=f'{message}$'):
    local_lib.list_devices(0)


def test_a_trial_is_run_once_and_not_again(tmp_path, capsys):
  trials = sweeps.plan(tmp_path, seeds=2)
  assert run(trials, 'finish()') == {}
  assert [sweeps.starts(t) for t in trials] == [1, 1, 1, 1]
  assert 'sweep 4/4  ' in capsys.readouterr().err
  assert run(trials, 'finish()') == {}
  assert [sweeps.starts(t) for t in trials] == [1, 1, 1, 1]


def test_progress_counts_trials_that_ended_in_an_earlier_sweep(
    tmp_path, capsys):
  trials = sweeps.plan(tmp_path, seeds=2)
  sweeps.measure(trials[2], 50.0)
  files.write_json(trials[3].pruned, {'reason': ''})
  run(trials, 'finish()', workers=1)
  shown = re.findall(r'sweep (\d)/4  obj', capsys.readouterr().err)
  assert shown == ['3', '4']


def test_a_trial_that_dies_is_started_again(tmp_path, capsys):
  trials = sweeps.plan(tmp_path)
  assert run(trials, 'finish() if attempt == 3 else die()', 'finish()') == {}
  assert [sweeps.starts(t) for t in trials] == [3, 1]
  assert capsys.readouterr().err.count('died of signal 9 (Killed); star') == 2


@pytest.mark.parametrize(
    ('code', 'reason', 'attempts'),
    [('die()', 'died of signal 9 (Killed)', 3),
     ('print("step 1"); raise ValueError("no luck")', 'ValueError: no luck', 3),
     ('sys.exit("error: no such head")', 'no such head', 1),
     ('print("error: full disk\\nRuntimeError: a thread"); sys.exit(1)',
      'full disk', 1),
     ('print("done?")', 'done?', 3)])
def test_the_others_go_on_after_a_failure(tmp_path, code, reason, attempts):
  trials = sweeps.plan(tmp_path, seeds=2)
  failed = run(trials, code, 'finish()', 'finish()', 'finish()', workers=1)
  assert failed == {trials[0].name: reason}
  assert [sweeps.starts(t) for t in trials] == [attempts, 1, 1, 1]
  assert reason in trials[0].log.read_text()
  assert run(trials, 'finish()') == {}
  assert [sweeps.starts(t) for t in trials] == [attempts + 1, 1, 1, 1]


def test_a_mistake_of_an_earlier_start_is_not_the_reason(tmp_path):
  trials = sweeps.plan(tmp_path)[:1]
  run(trials, 'sys.exit("error: old")')
  assert run(trials, 'raise ValueError("new")') == {
      trials[0].name: 'ValueError: new'}


def test_the_reason_of_an_error_in_a_traced_function_is_that_error(tmp_path):
  trials = sweeps.plan(tmp_path)[:1]
  code = 'import jax\njax.jit(lambda x: x[0][1])(([],))'
  command = lambda t: [sys.executable, '-c', code]
  assert local_lib.run(trials, command, scheduler.Setup()) == {
      trials[0].name: 'IndexError: list index out of range'}


def test_workers_have_cores_and_devices_of_their_own(tmp_path):
  cores = os.sched_getaffinity(0)
  trials = sweeps.plan(tmp_path)
  code = ('time.sleep(0.2)\nprint(*os.sched_getaffinity(0), '
          'os.environ["CUDA_VISIBLE_DEVICES"])\nfinish()')
  local_lib.run(trials, lambda t: sweeps.stand_in(t, code),
                scheduler.Setup([{
                    'CUDA_VISIBLE_DEVICES': n
                } for n in 'ab']))
  said = [t.log.read_text().split('\n')[-2].split() for t in trials]
  assert [s.pop() for s in said] == ['a', 'b']
  if len(cores) > 1:
    assert not set(said[0]) & set(said[1])
    assert {int(c) for s in said for c in s} == cores


def test_a_trial_whose_source_failed_fails_too(tmp_path):
  trials = sweeps.plan(tmp_path, ({}, {
      'decode.search': 'argmax'
  }, sweeps.TWO[1]))
  failed = run(trials, 'sys.exit("error: bad")', 'finish()', 'finish()')
  assert failed[trials[0].name] == 'bad'
  assert failed[trials[1].name] == (
      f'{trials[0].name} failed, whose training it shares')
  assert [sweeps.starts(t) for t in trials] == [1, 0, 1]


@pytest.mark.parametrize('deaf', [
    False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_end_with_the_engine(tmp_path, monkeypatch, deaf):
  monkeypatch.setattr(scheduler, 'GRACE_SECONDS', 0.3)
  trials = sweeps.plan(tmp_path)
  code = ('signal.signal(signal.SIGTERM, signal.SIG_IGN)\n' * deaf +
          'started.with_suffix(".up").touch()\ntime.sleep(60)')

  def command(trial):
    if trial is trials[0]:
      return sweeps.stand_in(trial, code)
    while not sweeps.started(trials[0]).with_suffix('.up').exists():
      time.sleep(0.02)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    local_lib.run(trials, command, scheduler.Setup([{}, {}]))
  with pytest.raises(ProcessLookupError):
    os.kill(int(sweeps.started(trials[0]).read_text()), 0)
  assert run(trials, 'finish()') == {}


DRIVER = '''
import pathlib, sys
from tests.common import sweeps
from tests.sweeps import test_sweep
test_sweep.run(sweeps.plan(pathlib.Path(sys.argv[1])), sys.argv[2])
'''


@pytest.mark.slow
def test_a_sweep_that_was_killed_is_waited_for(tmp_path, capsys):
  trials = sweeps.plan(tmp_path)
  slow = 'time.sleep(2)\nfinish()'
  driver = subprocess.Popen([sys.executable, '-c', DRIVER,
                             str(tmp_path), slow],
                            cwd=ROOT,
                            stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while not all(sweeps.starts(t) for t in trials):
    assert driver.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  driver.send_signal(signal.SIGKILL)
  driver.wait()
  assert not any(t.metrics.exists() for t in trials)
  assert run(trials, 'finish()') == {}
  said = capsys.readouterr().err
  assert 'waiting for the process that runs it' in said
  assert f'sweep 2/2  {trials[-1].name}: EM 50.00 F1 60.00' in said
  assert [sweeps.starts(t) for t in trials] == [1, 1]


@pytest.mark.parametrize(('arguments', 'visible', 'count'),
                         [(('cpu', 1, 0, ''), [None], 1),
                          (('cpu', 1, 3, ''), [None] * 3, 1),
                          (('gpu', 4, 0, ''), ['0', '1', '2', '3'], 1),
                          (('gpu', 8, 2, ''), ['0,1,2,3', '4,5,6,7'], 4),
                          (('gpu', 3, 2, '5,6,GPU-7f'), ['5', '6'], 1),
                          (('gpu', 8, 1, ''), [None], 8),
                          (('tpu', 4, 0, ''), [None], 4)])
def test_devices_are_shared_out(arguments, visible, count):
  devices = local_lib.share_devices(*arguments)
  assert [e.get('CUDA_VISIBLE_DEVICES') for e in devices.environments
         ] == visible
  assert devices.count == count


@pytest.mark.parametrize(('platform', 'most'), [('gpu', 4), ('tpu', 1)])
def test_more_workers_than_devices_are_refused(platform, most):
  with pytest.raises(errors.UserError, match=f'4 {platform}.* most {most}$'):
    local_lib.share_devices(platform, 4, 5, '')


# Trials that share a training.


def test_a_shared_training_gives_what_its_own_would(tmp_path):
  change = {'decode.search': 'argmax', 'decode.null_rule': 'never'}
  fields = {'train': {'num_steps': 2}, 'parallel': {'num_devices': 1}}
  source, trial = sweeps.plan(tmp_path, ({}, change), **fields)
  alone = sweeps.plan(tmp_path / 'alone', (change,), **fields)[0]
  train.train(source.config, source.run)
  plan_lib.share_training(source, trial)
  assert not trial.metrics.exists()
  shared = train.train(trial.config, trial.run)
  assert not (trial.run / 'metrics.jsonl').exists()  # it has not trained
  assert not any(path.is_symlink() for path in trial.run.rglob('*'))
  assert shared == train.train(alone.config, alone.run)
  assert shared != files.read_object(source.metrics)
  predictions = [
      t.metrics.with_name('predictions.json').read_bytes()
      for t in (trial, alone, source)
  ]
  assert predictions[0] == predictions[1] != predictions[2]
  assert RunDirectory(trial.run).read_config() == trial.config
  assert files.read_object(trial.run / 'run.json')['trained_in'] == source.name
  assert 'trained_in' not in files.read_object(source.run / 'run.json')


# The command.


@pytest.mark.slow
def test_sweep_trains_evaluates_and_repeats_nothing(sweep_config, tmp_path):
  argv = ('sweep', f'--config={sweep_config}', f'--workdir={tmp_path}/x',
          '--seeds=1', '--config.seed=8', '--workers=1')
  result = commands_lib.command(*argv)
  assert result.code == 0, result
  assert result.out.startswith('2 trials are complete')
  trials = files.read_object(tmp_path / 'x' / 'sweep.json')['trials']
  assert [t.rpartition('.')[2] for t in trials] == ['seed-8'] * 2
  for name in trials:
    assert len(
        list((tmp_path / 'x' / 'trials' /
              name).glob('eval/*/predictions.json'))) == 1
  before = commands_lib.files_of(tmp_path / 'x')
  assert commands_lib.command(*argv).out == result.out
  assert commands_lib.files_of(tmp_path / 'x') == before
  report = commands_lib.command('report', f'--workdir={tmp_path}/x')
  assert report.code == 0
  assert re.search(r'\nToo few seeds .* is that of search=top_k\(k=2\), ',
                   report.out)


def test_print_gives_commands_and_runs_nothing(sweep_config, tmp_path):
  result = commands_lib.command('sweep', f'--config={sweep_config}',
                                f'--workdir={tmp_path}/a b', '--seeds=2',
                                '--config.model.head=mlp(hidden_size=2)',
                                '--print')
  assert (result.code, result.err) == (0, '')
  *commands, rest = result.out.splitlines()
  assert [shlex.split(c)[1:] for c in commands] == [[
      '-m', 'experiments.train', f'--config={sweep_config}',
      f'--workdir={tmp_path}/a b/trials/decode.search-two_stage.seed-{seed}',
      '--config.model.head=mlp(hidden_size=2)',
      '--config.decode.search=two_stage', f'--config.seed={seed}'
  ] for seed in (3, 4)]
  assert rest.startswith('# Then, without --print') and '2 trials' in rest
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('argv', 'message'),
    [(['--engine=rai'], "--engine=rai; did you mean 'ray'"),
     (['--sampler=tpee'], "--sampler=tpee; did you mean 'tpe'"),
     (['--sampler=tpe'], '--print: the variants of --sampler=tpe are not'),
     (['--trials=0'], '--trials=0 must be at least 1'),
     (['--trials=7'], '--trials is only for --sampler=random or tpe, not grid'),
     (['--slurm=timeout_min=240'], '--slurm is only for --engine=slurm, not'),
     (['--address=local'], '--address is only for --engine=ray, not local'),
     (['--pruner=halfing'], "did you mean 'halving'"),
     (['--pruner=halving'], 'set config.train.eval_every_steps'),
     (['--pruner=wilcoxon'], '3 seeds cannot tell'),
     (['--seeds=0'], '--seeds=0 must be at least 1'),
     (['--workers=-1'], '--workers=-1 must be at least 0'),
     (['--workdir='], '--workdir is needed'),
     (['--config.decode.search=argmax'], '--config.decode.search: '),
     (['--config.objective=joint'], 'Heads that fit: biaffine')])
def test_mistake_is_one_line(sweep_config, tmp_path, argv, message):
  assert message in commands_lib.refusal('sweep', f'--config={sweep_config}',
                                         f'--workdir={tmp_path}/x', '--print',
                                         *argv)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('code', 'message'),
    [('def sweep(): yield 3', 'sweep() yields 3, expected overrides'),
     ('def sweep(): yield {1: 2}', 'sweep() yields {1: 2}, expected overrides'),
     ('def sweep(): return 1 / 0', 'sweep(): ZeroDivisionError: division'),
     ('def sweep(x): pass', 'sweep(): TypeError: sweep() missing 1'),
     ('def sweep(): return []', '0 variants of sweep() × 3 seeds: nothing')])
def test_bad_sweep_function_is_one_line(sweep_config, tmp_path, code, message):
  path = tmp_path / 'bad.py'
  path.write_text(sweep_config.read_text() + code)
  assert message in commands_lib.refusal('sweep', f'--config={path}',
                                         f'--workdir={tmp_path}/x')


@pytest.mark.parametrize(('variant', 'heads'), [
    ('', ['mlp', 'fixed']), ('shared', ['shared', 'fixed'])])
def test_a_function_with_a_variant_gets_that_of_the_file(
    tmp_path, variant, heads):
  found = []
  for i, code in enumerate(
      ('def sweep(variant="mlp"): yield {"model.head": variant}',
       'def sweep(): yield {"model.head": "fixed"}')):
    path = tmp_path / f'{i}.py'
    path.write_text(code)
    found += config_file.grid_variants(str(path), (), False, variant)
  assert [row['model.head'] for row in found] == heads


def test_numbers_of_numpy_become_those_of_python(tmp_path):
  path = tmp_path / 'rates.py'
  path.write_text("""import numpy as np
def sweep():
  for rate in np.geomspace(1e-5, 1e-3, 3):
    yield {'optim.learning_rate': rate, 'data.buckets': tuple(np.array([8]))}
def search_space():
  return {'optim.learning_rate': (np.float64(1e-5), 1e-3, 'log'),
          'train.batch_size': list(np.array([8, 16]))}
""")
  variants = config_file.grid_variants(str(path), (), False)
  assert [repr([*v.values()]) for v in variants] == [
      f'[{rate}, (8,)]' for rate in ('1e-05', '0.0001', '0.001')]
  space = config_file.call(str(path), 'search_space', 'tpe')
  assert repr(space) == ("{'optim.learning_rate': (1e-05, 0.001, 'log'), "
                         "'train.batch_size': [8, 16]}")


def test_only_takes_the_variants_that_match(sweep_config, tmp_path):
  argv = ('sweep', f'--config={sweep_config}', '--seeds=1', '--print',
          f'--workdir={tmp_path}/x')
  result = commands_lib.command(*argv, '--only=top_k')
  command, = result.out.splitlines()
  assert '--config.decode.search=top_k' in shlex.split(command)[-2]
  for pattern, message in (
      ('biaffine', 'matches none of the variants decode.search-two_stage, '),
      ('(', 'is no regular expression: ')):
    assert message in commands_lib.refusal(*argv, f'--only={pattern}')
  assert '--only=x: it selects variants of sweep()' in commands_lib.refusal(
      *(a for a in argv if a != '--print'), '--only=x', '--sampler=random')


def test_only_adds_to_an_earlier_plan_in_the_order_of_the_sweep(tmp_path):
  trials = plan_lib.plan_trials(tiny.config(), [{}, {'model.head': 'mlp'}], 1,
                                tmp_path)
  names = [t.name for t in trials]
  plan_lib.write_plan(tmp_path, trials[1:], None)
  plan_lib.write_plan(tmp_path, trials[:1], None, whole=names)
  assert files.read_object(tmp_path / 'sweep.json')['trials'] == names
  plan_lib.write_plan(tmp_path, trials[1:], None)
  assert files.read_object(tmp_path / 'sweep.json')['trials'] == [
      trials[1].name]


def test_a_sweep_that_is_ended_says_how_to_go_on(
    tmp_path, monkeypatch, capfd):
  def engine(trials, command, setup):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

  monkeypatch.setitem(engines.ENGINES, 'local', engine)
  path = sweeps.write_config(tmp_path / 'one.py', '')
  before = signal.getsignal(signal.SIGTERM)
  try:
    result = commands_lib.command('sweep', f'--config={path}', '--workers=1',
                                  f'--workdir={tmp_path}/x')
  finally:
    signal.signal(signal.SIGTERM, before)
  assert result.code == 143
  assert 'stopped by SIGTERM; the same command goes' in capfd.readouterr().err


def test_trials_that_leave_the_plan_are_said(tmp_path, monkeypatch):
  def engine(trials, command, setup):
    for trial in trials:
      files.write_json(trial.run / 'config.json', trial.config.to_dict())
      sweeps.measure(trial, 10.0)
    return {}

  monkeypatch.setitem(engines.ENGINES, 'local', engine)
  path = sweeps.write_config(tmp_path / 'heads.py', '''
def sweep():
  return [{}, {'model.head': 'shared'}]
''')
  argv = ('sweep', f'--config={path}', f'--workdir={tmp_path}/x', '--workers=1')
  whole = commands_lib.command(*argv, '--seeds=3')
  assert whole.code == 0 and 'earlier trials' not in whole.err
  fewer = commands_lib.command(*argv, '--config.seed=5', '--seeds=2')
  assert ('4 earlier trials, such as default.seed-3, are not of this command; '
          f'they stay in {tmp_path}/x/trials') in fewer.err
  again = commands_lib.command(*argv, '--seeds=4')
  assert 'earlier trials' not in again.err
  assert len(files.read_object(tmp_path / 'x' / 'sweep.json')['trials']) == 8


def test_config_without_a_sweep_is_one_variant(sweep_config, tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text(sweep_config.read_text().partition('def sweep')[0])
  result = commands_lib.command('sweep', f'--config={path}', '--print',
                                f'--workdir={tmp_path}/x')
  assert [c.split('/')[-1].split()[0] for c in result.out.splitlines()
         ] == ['default.seed-3', 'default.seed-4', 'default.seed-5']
