"""The GPU benchmark: kernels of compiled programs, budgets, and the check."""

import contextlib
import importlib
import json
import math
import os
import pathlib
import re
import select
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from benchmarks.gpu import cases
from benchmarks.gpu import check
from benchmarks.gpu import h100
from benchmarks.gpu import hlo
from benchmarks.gpu import numerics
from benchmarks.gpu import results
from benchmarks.gpu import runs
from benchmarks.gpu import steps
from configs import sweep_heads
from qa_jax import errors
from qa_jax import heads
from qa_jax.models.encoders import ENCODERS

ROOT = pathlib.Path(__file__).resolve().parents[2]
# jax 0.11 announces the end of Pallas through Triton.
pytestmark = pytest.mark.filterwarnings(
    'ignore:The Pallas Triton:DeprecationWarning')
TEXT = '''HloModule step

%fused (p.1: bf16[8,16], p.2: bf16[16,4]) -> f32[8,4] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %p.2 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}
}

%add (p.3: f32[64,4], p.4: f32[8,4]) -> f32[64,4] {
  %p.3 = f32[64,4]{1,0} parameter(0)
  ROOT %s.1 = f32[64,4]{1,0} scatter(%p.3, %p.4)
}

%graph (p.5: f32[8,4]) -> f32[8,4] {
  %p.5 = f32[8,4]{1,0} parameter(0)
  ROOT %copy.1 = f32[8,4]{1,0} copy(%p.5)
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], t: f32[64,4]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %t = f32[64,4]{1,0} parameter(2)
  %y = f32[8,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, \
metadata={op_name="jit(step)/jvp(mlp/output)"}
  %g = f32[64,4]{1,0} fusion(%t, %y), kind=kInput, calls=%add, \
metadata={op_name="jit(step)/transpose(jvp(embeddings))"}
  %c = (f32[8,4]{1,0}, s8[32]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", \
backend_config={"lhs_contracting_dimensions":["1"]}
  ROOT %z = f32[8,4]{1,0} call(%y), to_apply=%graph
}
'''


def test_bytes_and_flops_of_kernels_are_those_of_their_shapes():
  product, scatter, library, copy = hlo.read_kernels(TEXT)
  flops = 2 * 8 * 16 * 4
  operands = 2 * (8 * 16 + 16 * 4)
  assert (product.kind, product.bytes, product.flops, product.part) == (
      'product', operands + 4 * 8 * 4, flops, 'mlp forward')
  assert (scatter.kind, scatter.bytes, scatter.flops, scatter.part) == (
      'scatter', 4 * (64 * 4 * 2 + 8 * 4), 0, 'embeddings backward')
  assert (library.kind, library.bytes, library.flops) == (
      'product', operands + 4 * 8 * 4 + 32, flops)
  assert (copy.kind, copy.bytes) == ('copy', 2 * 4 * 8 * 4)
  assert hlo.table([product, copy])[-1].split()[:2] == ['all', '2']


def test_a_kernel_takes_as_long_as_memory_or_arithmetic():
  slow = lambda moved, flops: hlo.Kernel('', '', moved, flops, '').seconds
  assert slow(3_000_000_000_000, 1) == 1
  assert slow(1, 650e12) == 1


def test_flops_of_an_update_are_those_of_its_products():
  # mini: 4 layers, hidden size 256, MLP 1,024; windows of 10 and 30 tokens.
  dense = 2 * 40 * 256 * (256 * 4 + 2 * 1024)
  scores = 2 * 2 * 256 * (10**2 + 30**2)
  assert cases.flops('mini', [10, 30]) == 3 * 4 * (dense + scores)


def test_failed_checks_lead_the_table_and_are_counted():
  rows = [{'stage': 's', 'name': 'a', 'ms': 0.123456},
          {'stage': 's', 'name': 'b', 'ok': True},
          {'stage': 's', 'name': 'c', 'ok': False, 'error': 'x|y'}]
  text, failed = results.table(map(json.dumps, rows))
  assert failed == 1
  assert text.splitlines()[2:] == [
      '| s | c | FAILED | error x/y |', '| s | b | passed |  |',
      '| s | a | measured | ms 0.1235 |']


def test_a_stage_that_raises_or_has_no_time_is_a_failed_check(tmp_path):
  stage = results.Results(tmp_path, 's', 60)
  assert not stage.attempt('bad', lambda: 1 / 0)
  assert stage.attempt('good', lambda: dict(ok=True))
  assert not stage.attempt('wrong', lambda: dict(ok=False))
  assert stage.attempt('measured', lambda: dict(ms=1.0))
  results.Results(tmp_path, 's', -1).attempt('late', lambda: dict(ok=True))
  rows = [json.loads(line) for line in
          (tmp_path / 'results.jsonl').read_text().splitlines()]
  assert [row.get('ok') for row in rows] == [False, True, False, None, False]
  assert 'ZeroDivisionError' in rows[0]['error']


def test_a_gradient_or_norm_that_is_nan_is_a_failed_check(tmp_path):
  """The largest number by Python is the first one if the others are NaN."""
  ones, nans = np.ones(4), np.full(4, np.nan)
  assert not numerics._compare(
      lambda: (ones, ones, nans), (ones, ones, ones), 1e-3)['ok']
  np.savez(tmp_path / 'windows.npz', token_ids=np.zeros((2, 3)),
           length=np.array([3, 2]))
  ours, torch = (mock.Mock(call=lambda *_, norm=norm, **__: {
      'loss': 1.0, 'grad_norm': norm}) for norm in (math.nan, 1.0))
  assert not runs._compare(ours, torch, tmp_path, {})['ok']
  assert runs._compare(torch, torch, tmp_path, {})['ok']


def test_a_rehearsal_has_no_verdict_on_a_goal(monkeypatch):
  assert results.reached(3, 2) == {'goal': 2, 'ok': True}
  assert results.reached(3, 2, most=True) == {'goal': 2, 'ok': False}
  monkeypatch.setattr(results, 'TINY', True)
  assert results.reached(1, 2) == {'goal': 2}


def test_what_a_stage_started_ends_with_it(tmp_path):
  """Otherwise it would keep the GPU's memory from the next stages."""
  pid = tmp_path / 'pid'
  sleep = 'import time; time.sleep(60)'
  stage = ('import subprocess, sys, time\n'
           f'process = subprocess.Popen([sys.executable, "-c", "{sleep}"])\n'
           f'open({str(pid)!r}, "w").write(str(process.pid))\n')
  for rest, problem in (('time.sleep(60)', 'ended after 2 s'),
                        ('sys.exit(3)', 'exit code 3')):
    assert check.run_limited(
        [sys.executable, '-c', stage + rest], 2, {**os.environ}) == problem
    assert has_ended(int(pid.read_text()))


def has_ended(pid: int) -> bool:
  """Waits ten seconds for the end of a process."""
  with contextlib.suppress(ProcessLookupError):
    return bool(select.select([os.pidfd_open(pid)], [], [], 10)[0])
  return True


def test_a_check_that_is_ended_ends_its_stage(tmp_path):
  """As by `timeout`, which signals only the process group of the check."""
  stage = ('import os, time\n'
           f'os.symlink(str(os.getpid()), {str(tmp_path / "pid")!r})\n'
           'time.sleep(60)')
  check_of_it = (
      'import os, sys\nfrom benchmarks.gpu import check\n'
      'check.run_all = lambda *_: check.run_limited('
      f'[sys.executable, "-c", {stage!r}], 60, {{**os.environ}})\n'
      'sys.exit(check.main())')
  with subprocess.Popen([sys.executable, '-c', check_of_it, '--output=none'],
                        stdout=subprocess.PIPE, cwd=ROOT) as process:
    while not (tmp_path / 'pid').is_symlink():
      assert process.poll() is None
      time.sleep(0.05)
    process.terminate()
    assert process.wait() == 143
  assert has_ended(int(os.readlink(tmp_path / 'pid')))


def test_the_reason_of_a_stage_or_command_that_failed_is_a_result(
    tmp_path, monkeypatch):
  def peer(results):
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(runs, 'peer', peer)
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\necho starts >&2\necho error: no room >&2\n'
                    'exit 1\n')
  python.chmod(0o700)
  monkeypatch.setattr(runs.sys, 'executable', str(python))
  check.run_stage('peer', results.Results(tmp_path, 'peer', 60))
  check.run_stage('finetune', results.Results(tmp_path, 'finetune', 60))
  stage, *commands = map(json.loads, (
      tmp_path / 'results.jsonl').read_text().splitlines())
  assert (stage['name'], stage['ok']) == ('stage', False)
  assert 'RESOURCE_EXHAUSTED' in stage['error']
  assert len(commands) == 2 and all(
      row['error'].endswith('error: no room') for row in commands)


def test_results_of_an_earlier_check_are_kept(tmp_path, monkeypatch):
  (tmp_path / 'results.jsonl').write_text('{}\n')
  monkeypatch.setattr(sys, 'argv', ['check', f'--output={tmp_path}'])
  with pytest.raises(SystemExit, match='2'):
    check.main()
  assert (tmp_path / 'results.jsonl').read_text() == '{}\n'


def run_stages(monkeypatch, output, stages, *, seconds=100.0, device=True):
  """Runs stages that record one row each; returns the limits and the rows."""
  limits = {}

  def stage(command, limit, environment):
    name = command[3].partition('=')[2]
    if name == 'device':
      results.Results(output, name, 1).record('device', ok=device)
    limits[name] = limit, (output / 'table.md').is_file()
    return 'exit code 1' if name == 'speed' else ''

  monkeypatch.setattr(check, 'run_limited', stage)
  code = check.run_all(output, stages, seconds, results.Given())
  rows = [json.loads(line) for line in
          (output / 'results.jsonl').read_text().splitlines()]
  return code, limits, rows


def test_a_stage_follows_one_that_failed_and_finds_the_table(
    tmp_path, monkeypatch):
  code, limits, rows = run_stages(
      monkeypatch, tmp_path, ['device', 'speed', 'repeat'])
  assert [*limits] == ['device', 'speed', 'repeat'] and code == 1
  assert limits['device'] == (pytest.approx(10, abs=1), False)
  # 30, and the 10 that `device` left.
  assert limits['speed'][0] == pytest.approx(40, abs=1)
  assert limits['repeat'][1]
  assert rows[-1] == {'stage': 'speed', 'name': 'stage', 'ok': False,
                      'error': 'exit code 1'}
  assert '| speed | stage | FAILED |' in (tmp_path / 'table.md').read_text()


def test_no_stage_follows_where_jax_finds_no_gpu(tmp_path, monkeypatch):
  code, limits, _ = run_stages(
      monkeypatch, tmp_path, ['device', 'repeat'], device=False)
  assert [*limits] == ['device'] and code == 1


def test_every_check_looks_for_the_gpu_first(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(check, 'run_all', lambda _, stages, *__: asked.append(
      stages))
  monkeypatch.setattr(check.signal, 'signal', lambda *_: None)
  for stages in ('ablation', 'repeat,device'):
    monkeypatch.setattr(sys, 'argv', [
        'check', f'--output={tmp_path}', f'--stages={stages}'])
    check.main()
  assert asked == [['device', 'ablation'], ['device', 'repeat']]


def test_a_utilisation_has_the_peak_of_its_card():
  assert steps.peak_of('NVIDIA A100-SXM4-80GB') == 312e12
  assert steps.peak_of('NVIDIA H100 80GB HBM3') == 989e12
  assert steps.peak_of('NVIDIA H100 PCIe') == 756e12
  assert steps.peak_of('cpu') == math.inf


def test_a_stage_without_time_is_a_failed_check(tmp_path, monkeypatch):
  code, limits, rows = run_stages(
      monkeypatch, tmp_path, ['device'], seconds=5)
  assert not limits and code == 1
  assert rows[-1]['error'] == 'no time left'


def test_every_stage_is_a_function_of_its_module():
  for name, stage in check.STAGES.items():
    module = importlib.import_module(f'benchmarks.gpu.{stage.module}')
    assert callable(getattr(module, name))
  assert set(check.DEFAULT) == set(check.STAGES) - {'ablation'}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize('stages', [
    'device,searches,attentions', 'update', 'speed,repeat', 'finetune,peer',
    'ablation'])
def test_the_check_is_rehearsed_on_a_cpu(tmp_path, stages):
  done = subprocess.run(
      [sys.executable, '-m', 'benchmarks.gpu.check', f'--output={tmp_path}',
       '--seconds=3000', f'--stages={stages}'], cwd=ROOT, text=True,
      env={**os.environ, 'TINY': '1', 'JAX_PLATFORMS': 'cpu'},
      capture_output=True, check=False)
  table = (tmp_path / 'table.md').read_text()
  assert done.returncode == 0, done.stdout + done.stderr
  for stage in stages.split(','):
    assert f'\n| {stage} | ' in table
  assert 'FAILED' not in table


def test_one_variant_of_every_head_is_in_the_ablation():
  names = [f'{v["model.head"]}, {v["objective"]}' for v in sweep_heads.sweep()]
  used = [name for name in names if re.search(runs.ONE_A_HEAD, name)]
  assert len(used) == len(heads.HEADS)
  assert {re.match(r'\w+', name)[0] for name in used} == {*heads.HEADS}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return cases.config(
      tmp_path_factory.mktemp('gpu'), preset='tiny', batch=4, length=64,
      questions=40, vocab_size=2500)


def plugin_is_missing() -> bool:
  try:
    h100.device()
  except errors.UserError:
    return True
  return False


def test_a_missing_plugin_is_one_line_with_the_extra(monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError('no cuda\nmore')
  monkeypatch.setattr(h100.topologies, 'get_topology_desc', fail)
  with pytest.raises(errors.UserError, match='gpu-compile') as e:
    h100.device()
  assert '\n' not in str(e.value)


# The numbers of jax 0.11.2 and a margin of a tenth: BUDGET is to notice a step
# that launches more kernels, moves more bytes or holds more arrays.
BUDGET = {'kernels': 240, 'megabytes': 240, 'temporary megabytes': 10.2}


# The goals for BERT-base with its defaults: 32 windows of SQuAD's lengths,
# bfloat16, dropout of 0.1.
GOALS = {'megabytes': 18e3, 'temporary megabytes': 2.2 * 1024 * 1.048576,
         'milliseconds': 10}


def measure(config) -> dict[str, float]:
  """Compiles the step of a config and returns the numbers of budgets."""
  program, _ = h100.compile_step(config, {'xla_gpu_enable_triton_gemm': False})
  kernels = hlo.read_kernels(program.as_text())
  return {'kernels': len(kernels),
          'megabytes': sum(k.bytes for k in kernels) / 1e6,
          'milliseconds': 1e3 * sum(k.seconds for k in kernels),
          'temporary megabytes':
              program.memory_analysis().temp_size_in_bytes / 1e6}


@pytest.mark.slow
@pytest.mark.skipif("plugin_is_missing()", reason='needs [gpu-compile]')
def test_the_default_step_of_bert_base_reaches_the_goals(tmp_path):
  measured = measure(cases.config(
      tmp_path, preset='base', batch=32, length=384, dtype='auto',
      packing='auto'))
  assert not {k: measured[k] for k, goal in GOALS.items()
              if measured[k] > goal}


@pytest.mark.slow
@pytest.mark.skipif("plugin_is_missing()", reason='needs [gpu-compile]')
@pytest.mark.parametrize('name', ENCODERS)
def test_the_step_of_every_encoder_compiles_for_a_gpu(tmp_path, name):
  measured = measure(cases.config(
      tmp_path, preset='tiny', batch=4, length=64, questions=40,
      vocab_size=2500, packing='auto', model__encoder=name))
  assert measured['kernels'] > 100


@pytest.mark.skipif("plugin_is_missing()", reason='needs [gpu-compile]')
@pytest.mark.slow
def test_a_population_of_several_updates_is_one_loop_on_a_gpu(tmp_path):
  program, batch = h100.compile_step(cases.config(
      tmp_path, preset='tiny', batch=4, length=64, questions=40,
      vocab_size=2500, packing='rows', train__updates_per_dispatch=4),
                                     members=3)
  assert batch['token_ids'].shape[1] == 4
  # A loop for each member would start kernels three times as often.
  assert program.as_text().count(' while(') == 1
  assert len(hlo.read_kernels(program.as_text())) < BUDGET['kernels']


@pytest.mark.skipif("plugin_is_missing()", reason='needs [gpu-compile]')
def test_the_default_step_stays_within_its_budgets(config):
  measured = measure(config)
  assert not {k: measured[k] for k, most in BUDGET.items()
              if measured[k] > most}
