"""The benchmark's rules: turns, medians, refusal of unequal outputs."""

import contextlib
import json
import math
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from benchmarks import cores
from benchmarks import harness
from benchmarks import session as session_lib
from benchmarks import suites
from benchmarks.suites import forward
from benchmarks.suites import population
from benchmarks.suites import startup
from benchmarks.suites import train
from qa_jax import errors
from tests.common import commands


def contender(side, name, seconds, order, group='') -> harness.Contender:
  times = iter(seconds)

  def run() -> float:
    order.append(name)
    return next(times)

  return harness.Contender(side, name, run, items=12.0, group=group)


def row(ours=2.0, peer=4.0, **fields) -> harness.Row:
  return harness.Row(
      'search', 'spans', harness.Timing('ours', 'a', (ours,), 12),
      harness.Timing('peer', 'b', (peer,), 12), **fields)


def test_contenders_take_turns_and_the_median_counts(capsys):
  order = []
  a = contender('ours', 'a', (1, 9, 2), order)
  b = contender('peer', 'b', (4, 4, 7), order)
  harness.interleave([a, b], 3)
  assert order == ['a', 'b'] * 3
  assert (a.timing.median, b.timing.median) == (2, 4)
  assert a.timing.items_per_second == 6
  assert capsys.readouterr().err.splitlines()[:2] == [
      'ours, a: 12 windows in 1 s', 'peer, b: 12 windows in 4 s']


def test_finalists_are_the_best_of_each_side_and_group_after_a_warm_run():
  order = []
  field = [contender('ours', 'slow', (8, 5), order),
           contender('ours', 'fast', (9, 3, 8, 6), order),
           contender('peer', 'peer', (9, 4, 8, 2), order),
           contender('peer', 'half', (9, 6, 8, 7), order, group='bfloat16')]
  finalists = harness.compete(field, rounds=1)
  # 'slow' was faster in its one run than 'fast' in the round that counts.
  assert [c.name for c in finalists] == ['fast', 'peer', 'half']
  assert order == [name for name in (
      'slow', 'fast', 'peer', 'half', 'fast', 'peer', 'half') for _ in range(2)]
  assert [c.seconds for c in field] == [[5], [6], [2], [7]]


def test_ratio_gate_and_goal():
  assert row().ratio == 2
  assert row(gate=1.5, goal=3).verdict == 'gate met'
  assert row(gate=1.5, goal=2).verdict == 'goal met'
  assert row(gate=4, goal=5).verdict == 'gate missed by 50 %'


@pytest.mark.parametrize('difference', [0.2, math.nan, math.inf])
def test_outputs_that_differ_refuse_the_row(difference):
  refused = row(checks=(harness.Check('loss', 0.0, 0.1),
                        harness.Check('norm', difference, 0.1)))
  assert refused.ratio is None
  assert refused.verdict.startswith('refused (norm: ')


@pytest.mark.slow
def test_without_the_peer_ours_is_measured_alone(tmp_path):
  output = tmp_path / 'bench.json'
  result = commands.command(
      'benchmark', '--quick', '--suite=input', f'--output={output}')
  assert result.code == 0, result.err
  assert 'gathered buckets' in result.out
  record = json.loads(output.read_text())
  assert {'argv', 'ours', 'hardware', 'seed', 'suites'} <= set(record)


def test_an_encoder_that_kills_its_worker_leaves_the_others_measured(
    tmp_path, monkeypatch):
  def run(session, encoder, ours, peer, out):
    if encoder == 'base':
      raise harness.WorkerError('ours ended with exit code -9')
    out.rows.append(row())

  monkeypatch.setattr(train, '_run', run)
  monkeypatch.setattr(session_lib.Session, 'sides', lambda *_, **__: (
      contextlib.nullcontext((None, None))))
  found = train.run(session_lib.Session(
      session_lib.TINY, tmp_path, encoders=('base', 'minilm_l6'))).rows
  assert found[0].verdict == 'left out: ours ended with exit code -9'
  assert found[1] == row()
  result = commands.command('benchmark', '--suite=train', '--quick')
  assert result.code == 1 and 'spans' in result.out
  assert result.err.endswith(
      'left out: train BERT-base: ours ended with exit code -9\n')


@pytest.mark.parametrize('dtypes', [['float32'], ['bfloat16'], [
    'float32', 'bfloat16']])
def test_both_sides_are_compared_in_the_dtypes_of_the_session(
    tmp_path, dtypes):
  class Peer:
    call = staticmethod(lambda _: ['float32 pad 384', 'bfloat16 pad 384'])

  session = session_lib.Session(session_lib.TINY, tmp_path, dtypes=dtypes)
  ours = train.variants(session, replicas=2)
  theirs = train.peer_variants(session, Peer())
  assert {way['precision__compute_dtype'] for way in ours.values()} == {
      train.dtype_of(name) for name in theirs} == set(dtypes)


def test_a_worker_killed_while_the_other_works_is_a_line_with_its_exit_code():
  """The system, short of memory, may well choose the one that waits."""
  worker = harness.Worker([sys.executable, '-c', (
      'import os, signal\nprint(\'{"about": {}}\', flush=True)\n'
      'os.kill(os.getpid(), signal.SIGKILL)')], threads=1)
  worker._process.wait()
  with (pytest.raises(harness.WorkerError, match='ended with exit code -9'),
        worker):
    worker.call('run')


@pytest.mark.slow
def test_a_suite_that_fails_leaves_the_others_measured(monkeypatch):
  def measure(session):
    session.worker('ours', 'search').close()
    return session_lib.Outcome(rows=[row()])

  def fail(session):
    raise harness.WorkerError('ours ended with exit code -9')

  for name, suite in (('search', measure), ('input', fail),
                      ('features', measure)):
    monkeypatch.setitem(suites.SUITES, name, suite)
  result = commands.command(
      'benchmark', '--suite=search,input,features', '--quick')
  assert result.code == 1 and result.out.count('spans') == 2
  assert result.err.endswith(
      'left out: suite input: ours ended with exit code -9\n')


@pytest.mark.slow
@pytest.mark.parametrize('error, code', [
    (errors.UserError('No space left on device'), 1), (KeyboardInterrupt, 130)])
def test_a_benchmark_that_ends_early_prints_the_suites_before(
    monkeypatch, error, code):
  def measure(session):
    session.worker('ours', 'search').close()
    return session_lib.Outcome(rows=[row()])

  monkeypatch.setitem(suites.SUITES, 'search', measure)
  monkeypatch.setitem(suites.SUITES, 'input', mock.Mock(side_effect=error))
  result = commands.command('benchmark', '--suite=search,input', '--quick')
  assert result.code == code and 'spans' in result.out
  assert result.err.splitlines()[-1].startswith('error: ')


@pytest.mark.slow
def test_outputs_that_differ_are_exit_code_1(monkeypatch):
  def differ(session):
    session.worker('ours', 'search').close()
    return session_lib.Outcome(rows=[row(checks=(
        harness.Check('loss', 0.2, 0.1),))])

  monkeypatch.setitem(suites.SUITES, 'search', differ)
  result = commands.command('benchmark', '--suite=search', '--quick')
  assert result.code == 1 and 'refused (loss: 0.2 > 0.1)' in result.out
  assert 'search spans: refused' in result.err


def test_a_peer_without_a_row_of_ours_is_not_said_to_be_missing():
  peer = row().peer
  assert 'agrees' in harness.Row('train', 'a', None, peer).verdict
  assert 'not installed' in harness.Row('train', 'a', peer, None).verdict


def test_a_command_that_is_timed_gets_the_cores_of_a_side(tmp_path):
  file = tmp_path / 'cores'
  code = ('import os, sys\n'
          f'open({str(file)!r}, "w").write(str(os.sched_getaffinity(0)))\n'
          f'print({startup.COMPILED!r}, file=sys.stderr)\n'
          f'print({startup.FIRST_STEP + "loss 1"!r}, file=sys.stderr)\n')
  before = cores.available()
  startup.first_step([sys.executable, '-c', code], 1, {})
  assert file.read_text() == str({before[0]})
  assert cores.available() == before


def test_mistakes_in_the_flags_are_told(tmp_path):
  (tmp_path / 'cache_1').mkdir()  # of an earlier benchmark
  (tmp_path / 'file').touch()
  for flags, message in (
      (['--suite=serch'], "did you mean 'search'"),
      (['--suite=all,serch'], "did you mean 'search'"),
      (['--suite=train', '--encoders='], 'minilm_l6'),
      (['--suite=train', '--dtypes='], 'bfloat16'),
      (['--suite=train', '--dtypes=float3'], "did you mean 'float32'"),
      (['--suite=train', '--threads=4096'], 'cores to use'),
      (['--suite=startup', f'--scratch={tmp_path}'], 'not empty'),
      (['--suite=startup', f'--scratch={tmp_path}/file'], 'File exists')):
    assert message in commands.refusal('benchmark', *flags)


@pytest.mark.parametrize('module, argv', [
    ('both_ways', ['--run=none', '--data=none']),
    ('both_ways', ['--run=none', '--data=none', '--questions=0']),
    ('two_nodes', ['--workdir=benchmarks']),
    ('gpu.compile', ['--kernels=(']),
    ('gpu.check', ['--output=README.md/x']),
    ('gpu.check', ['--output=none', '--train=none.json', '--eval=none.json']),
    ('gpu.check', ['--output=none', '--model=none']),
    ('gpu.check', ['--output=none', '--peer_python=none'])])
def test_a_mistake_in_a_tool_is_its_last_line(module, argv):
  done = subprocess.run(
      [sys.executable, '-m', f'benchmarks.{module}', *argv], text=True,
      cwd=session_lib.ROOT, capture_output=True, check=False)
  assert done.returncode in (1, 2) and 'Traceback' not in done.stderr
  assert 'error: ' in done.stderr.splitlines()[-1]


def test_help_says_that_suites_are_names():
  result = commands.command('benchmark', '--help')
  assert '--suite=NAME[,NAME…]' in result.out and 'FILE' not in result.out


def test_every_way_of_a_population_begins_with_empty_caches(
    tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'warm'))
  found = []

  def run(command, *, env, **_):
    found.append({name: env[name] for name in (
        'JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME')})
    return subprocess.CompletedProcess(command, -9, stderr='a\nb\n')

  monkeypatch.setattr(subprocess, 'run', run)
  for way in ('one', 'two'):
    with pytest.raises(harness.WorkerError, match='exit code -9: b'):
      population._sweep(session_lib.Session(session_lib.TINY, tmp_path),
                        tmp_path / 'c.py', tmp_path / way, [])
  for name in found[0]:
    assert len({str(tmp_path / 'warm'), *(env[name] for env in found)}) == 3


def test_losses_are_compared_one_by_one_and_none_may_be_missing():
  a, b = np.float32([[4, 2], [1, 8]]), np.float32([[4, 1], [1, 8]])
  assert population.apart(a, a) == 0 and population.apart(a, b) == 1
  assert math.isnan(population.apart(a, a * np.nan))
  assert population.apart(a, a[:, :1]) == math.inf


@pytest.mark.parametrize(('start', 'end', 'longest', 'worse'), [
    (1, 3, 3, 0), (1, 3, 4, 0), (2, 3, 2, 0), (3, 3, 1, 0), (2, 3, 3, 4),
    (3, 3, 2, 1)])
def test_a_span_must_be_the_best_of_those_up_to_the_longest(
    start, end, longest, worse):
  logits = {'start': np.array([[0.0, 5, 1, 0]]),
            'end': np.array([[0.0, 2, 3, 9]])}
  masks = dict.fromkeys(
      ('start_mask', 'context_mask'), np.array([[False, True, True, True]]))
  spans = {'start': np.array([[start]]), 'end': np.array([[end]]),
           'score': logits['start'][:, [start]] + logits['end'][:, [end]],
           'valid': np.array([[True]]), 'null': np.zeros(1),
           'longest': np.array(longest)}
  checks = forward.compare_spans('a', spans, masks, logits, 1e-6)
  unit = np.std([0, 5, 1, 0, 0, 2, 3, 9])
  assert [c.difference for c in checks] == pytest.approx([0, worse / unit, 0])


@pytest.mark.parametrize('suite', [
    'train', 'forward', 'search', 'features', 'evaluate', 'input'])
def test_the_worker_of_the_peer_finds_every_module_but_the_peers(
    tmp_path, suite):
  """A missing file of ours must not be reported as a peer that is missing."""
  names = ('torch', 'torch.nn', 'torch.nn.functional', 'transformers')
  for name in ('torch', 'transformers'):  # any attribute is there
    (tmp_path / f'{name}.py').write_text(
        'import sys\nfrom unittest import mock\n'
        f'sys.modules.update(dict.fromkeys({names}, mock.MagicMock()))\n')
  done = subprocess.run(
      [sys.executable, session_lib.PEER, suite, '1'], input='', text=True,
      env={**os.environ, 'PYTHONPATH': str(tmp_path)}, capture_output=True,
      check=False)
  assert 'about' in json.loads(done.stdout), done.stdout + done.stderr
