"""Stages of the GPU check that are commands: runs, a sweep, and the peer.

This process leaves the GPU to the commands that it starts.
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks import session as session_lib
from benchmarks.gpu import cases
from benchmarks.gpu import results as results_lib
from benchmarks.suites import train as train_suite
from qa_jax.checkpoints.run_directory import RunDirectory

TINY = results_lib.TINY
# Goals on an H100, see docs/gpu.md.
RATIO, FINETUNE_SECONDS, ABLATION_SECONDS = 2.0, 15.0, 600.0
# Questions of the SQuAD subset of RESULTS.md.
TRAIN_QUESTIONS, EVAL_QUESTIONS = 5444, 2805
SEEDS = 2 if TINY else 5
# The variants of configs/sweep_heads.py that repeat a head are left out.
ONE_A_HEAD = (
    '^(?!.*(independent.*span_softmax|electra|length_prior.*biaffine))')
TWO_HEADS = 'independent.*cross_entropy|trilinear'
ROUNDS = 3


def _run(module: str, *flags: str, timeout: float | None = None) -> float:
  """Runs a command of the project, for `timeout` seconds; returns its seconds.

  Raises:
    RuntimeError: it failed, or was ended; its last line is the reason.
  """
  began, last_line = time.monotonic(), ''
  with subprocess.Popen([sys.executable, '-m', module, *flags], text=True,
                        stderr=subprocess.PIPE) as process:
    timer = threading.Timer(timeout or threading.TIMEOUT_MAX, process.kill)
    timer.start()
    for line in process.stderr:
      sys.stderr.write(line)
      last_line = line.strip() or last_line
    timer.cancel()
  seconds = time.monotonic() - began
  if process.returncode:
    raise RuntimeError(f'{module}: exit code {process.returncode} after '
                       f'{seconds:.0f} s: {last_line}')
  return seconds


def repeat(results: results_lib.Results) -> None:
  """Trains twice with precision.deterministic and compares the losses."""
  results.attempt('repeat', _repeat, results.scratch)


def _repeat(directory: pathlib.Path) -> dict[str, Any]:
  losses = []
  for number in (1, 2):
    workdir = directory / f'repeat{number}'
    _run('experiments.train', f'--workdir={workdir}',
         '--config=configs/quickstart.py', '--config.data.eval=',
         '--config.data.train=synthetic(size=200)',
         '--config.train.num_epochs=0.0', '--config.train.num_steps=20',
         '--config.train.log_every_steps=1', '--config.parallel.num_devices=1',
         '--config.precision.deterministic=True')
    losses.append([row.get('loss')
                   for row in RunDirectory(workdir).read_metrics()])
  return dict(rows=len(losses[0]), ok=losses[0] == losses[1] != [])


def _fields(results: results_lib.Results) -> list[str]:
  """Returns flags for the data and the encoder of a config in configs/."""
  given = results.given
  if TINY:
    return ['--config.data.train=synthetic(size=200)',
            '--config.data.eval=synthetic(seed=1, size=40, split="eval")',
            '--config.train.num_epochs=0.0', '--config.train.num_steps=8']
  fields = {'data.train': given.train or session_lib.generated(TRAIN_QUESTIONS),
            'data.eval': given.eval or session_lib.generated(EVAL_QUESTIONS),
            'model.init_from': given.model}
  if not given.model:
    fields['data.vocab'] = cases.vocabulary(
        results.scratch / 'vocabulary', cases.VOCABULARY)
  return [f'--config.{name}={value}' for name, value in fields.items()]


def finetune(results: results_lib.Results) -> None:
  """Measures a fine-tuning of MiniLM of two epochs, with its evaluation.

  It runs twice. The second run finds its windows and compiled programs in
  caches; reading them counts.
  """
  for number, what in ((1, 'and compilation'), (2, 'after compilation')):
    results.attempt(f'MiniLM-L6, two epochs, evaluation {what}', _finetune,
                    results, number)


def _finetune(results: results_lib.Results, number: int) -> dict[str, Any]:
  workdir = results.scratch / f'finetune{number}'
  command = _run(
      'experiments.train', f'--workdir={workdir}',
      f'--config=configs/squad2.py:{"tiny" if TINY else "minilm_l6"}',
      *_fields(results))
  rows = RunDirectory(workdir).read_metrics()
  trained = [row for row in rows if row['split'] == 'train']
  seconds = sum(row['device_seconds'] for row in rows)
  scores = {k: rows[-1][k] for k in ('has_answer_f1', 'f1')
            if results.given.train and k in rows[-1]}
  return {'updates': trained[-1]['step'], 'seconds': seconds,
          'command_s': command,
          'windows_per_s': trained[-1]['examples_per_second'], **scores,
          **(results_lib.reached(seconds, FINETUNE_SECONDS, most=True)
             if number == 2 else {})}


def ablation(results: results_lib.Results) -> None:
  """Measures a sweep of thirteen heads with five seeds, and makes its report.

  The report has the trials that were complete when the time was over.
  """
  workdir, began = results.scratch / 'ablation', time.monotonic()

  def sweep() -> dict[str, Any]:
    seconds = _run(
        'experiments.sweep', f'--workdir={workdir}', '--engine=population',
        f'--config=configs/sweep_heads.py:{"tiny" if TINY else "minilm_l6"}',
        f'--seeds={SEEDS}', f'--only={TWO_HEADS if TINY else ONE_A_HEAD}',
        *_fields(results), timeout=max(results.seconds_left - 30, 1))
    return {'seconds': seconds, **results_lib.reached(
        seconds, ABLATION_SECONDS, most=True)}

  def report() -> dict[str, Any]:
    _run('experiments.report', f'--workdir={workdir}',
         f'--output={workdir}/report')
    shutil.copy(workdir / 'report' / 'report.md',
                results.directory / 'ablation.md')
    trials = [*(workdir / 'trials').iterdir()]
    return {'trials': len(trials), 'complete': sum(
        any(trial.rglob('metrics.json')) for trial in trials),
            'seconds': time.monotonic() - began}

  results.attempt(f'heads, {SEEDS} seeds, two epochs', sweep)
  results.attempt('the table with tests', report)


def peer(results: results_lib.Results) -> None:
  """Measures updates of BERT-base beside torch + transformers.

  Both start from equal weights and train on windows of SQuAD's lengths, qa_jax
  in packed rows and torch in groups of equal length, with SDPA and the fused
  AdamW. Loss and gradient are compared first, without dropout. The seconds
  contain the work of the host.
  """
  session = session_lib.Session(
      sizes=session_lib.TINY if TINY else session_lib.FULL,
      scratch=results.scratch / 'peer', threads=os.cpu_count() or 1,
      peer_python=results.given.peer_python)
  session.scratch.mkdir()
  with session.sides('train') as (ours, torch):
    if torch is None:
      results.record('torch', left_out='torch or transformers is not installed')
    else:
      _race(results, session, ours, torch)


def _race(results: results_lib.Results, session: session_lib.Session,
          ours: harness.Worker, torch: harness.Worker) -> None:
  batch, steps = (4, 2) if TINY else (32, 20)
  folder, sample = session.scratch / 'start', session.scratch / 'sample'
  for directory in (folder, sample):
    directory.mkdir()
  # The defaults of a GPU, in their resolved form for the sake of a rehearsal.
  fields = {'model__preset': 'tiny' if TINY else 'base',
            'data__vocab': cases.vocabulary(
                results.scratch / 'vocabulary', cases.VOCABULARY),
            'data__packing': 'rows', 'precision__compute_dtype': 'bfloat16',
            'train__batch_size': batch}
  data = session.write_examples('sample', batch // 2)
  ours.call('prepare', target=str(folder), config=session.config(**fields))
  fields |= {'model__preset': '', 'model__init_from': str(folder)}
  still = session.config(
      **fields, data__train=data, model__dropout=0.0,
      model__attention_dropout=0.0)
  ours.call('prepare', target=str(sample), config=still)
  torch.call('build', folder=str(folder))
  agree = results.attempt('loss and gradient as torch', _compare, ours, torch,
                          sample, still)
  built = ours.call('build', name='rows', steps=steps,
                    config=session.config(**fields))
  run_ours = lambda: built['windows'] / ours.call('run', name='rows')
  results.attempt('qa_jax, packed rows', lambda: {
      'windows_per_s': statistics.median(run_ours() for _ in range(ROUNDS))})

  def race(name: str) -> dict[str, Any]:
    plan = torch.call('plan', name=name, steps=steps, batch_size=batch,
                      windows=str(folder / 'windows.npz'))
    torch.call('run', name=name)  # compiles for other lengths
    rates = [(plan['windows'] / torch.call('run', name=name), run_ours())
             for _ in range(ROUNDS)]
    theirs, own = map(statistics.median, zip(*rates, strict=True))
    return {'windows_per_s': theirs, 'qa_jax': own, 'ratio': own / theirs,
            # Unequal work has times, but no verdict.
            **(results_lib.reached(own / theirs, RATIO) if agree else {})}

  for name in torch.call('variants'):
    if name.startswith('bfloat16 length-grouped'):
      results.attempt(f'torch {name}', race, name)


def _compare(ours: harness.Worker, torch: harness.Worker, folder: pathlib.Path,
             config: dict[str, Any]) -> dict[str, Any]:
  """Compares an update of all windows in `folder` with that of torch."""
  windows = dict(np.load(folder / 'windows.npz'))
  width, length = windows['token_ids'].shape[1], windows['length']
  np.savez(folder / 'batch.npz', **windows, weight=np.ones(len(length)),
           attention_mask=np.arange(width) < length[:, None])
  found = ours.call('compare', target=str(folder / 'packed.npz'), config=config)
  expected = torch.call('compare_context', batch=str(folder / 'batch.npz'))
  apart = {name: abs(found[name] / expected[name] - 1)
           for name in ('loss', 'grad_norm')}
  return {**apart, 'ok': harness.largest(apart.values())
          <= train_suite.TOLERANCE['bfloat16']}
