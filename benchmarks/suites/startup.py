"""Suite startup: seconds from process start to the first completed step.

Runs `experiments.train` as a user does, with all buckets of the config. On a
CPU the first step begins when the program of its bucket is ready. The cold run
has empty caches; the warm run has the caches that the cold run left.
"""

from collections.abc import Mapping
import math
import os
import pathlib
import subprocess
import sys
import time

from benchmarks import cores
from benchmarks import harness
from benchmarks.session import ROOT
from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import search
from qa_jax.checkpoints.run_directory import RunDirectory

STEPS = 100  # enough questions to meet each bucket
FIRST_STEP = f'train 1/{STEPS} '  # the beginning of the progress line of step 1
# A ratio to the cold run is no target: a faster cold run would make it worse.
GOAL_SECONDS = 8.0  # from the start to the first step with warm caches
COMPILED = 'compiled in '  # the beginning of the line when all buckets are


def cache_environment(folder: pathlib.Path) -> dict[str, str]:
  """Returns environment variables that put every cache under `folder`."""
  return {'XDG_CACHE_HOME': str(folder),
          'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}


def run(session: Session) -> Outcome:
  """Times cold and warm runs in turn."""
  out, losses = Outcome(), {'empty': [], 'warm': []}
  cpu: dict[str, list[float]] = {'empty': [], 'warm': []}
  count = 0

  def start(which: str) -> float:
    nonlocal count
    count += which == 'empty'  # the warm run uses the caches of the cold run
    workdir = session.scratch / f'startup_{count}_{which}'
    seconds, cpu_seconds = first_step(
        command(session, workdir), session.threads,
        cache_environment(session.scratch / f'cache_{count}'))
    cpu[which].append(cpu_seconds)
    losses[which].append(RunDirectory(workdir).read_metrics()[0]['loss'])
    return seconds

  contenders = [harness.Contender(
      'ours', f'{which} caches', lambda which=which: start(which), 1,
      unit='starts') for which in ('empty', 'warm')]
  harness.interleave(contenders, session.fewer_rounds)
  empty, warm = (c.timing for c in contenders)
  out.timings += [empty, warm]
  least = {which: min(values) for which, values in cpu.items()}
  out.notes.append(
      f'startup: first step after {warm.median:.1f} s with warm caches, '
      f'{empty.median:.1f} s with empty ones; at least '
      f'{least["warm"]:.1f} and {least["empty"]:.1f} CPU-seconds, with those '
      'of the programs that compile meanwhile; goal with warm caches: '
      f'{GOAL_SECONDS:.0f} s')
  check = harness.Check('loss of the first step', harness.largest(
      abs(a - b) for a, b in zip(*losses.values(), strict=True)), 0)
  out.rows.append(harness.Row(
      'startup', 'process start → first step', warm, empty, checks=(check,),
      against='without cache'))
  return out


def command(session: Session, workdir: pathlib.Path) -> list[str]:
  """Returns the command of a run that is ended after its first step."""
  fields = {
      'model.init_from': session.encoder,
      'data.train': session.source(), 'data.eval': '', 'seed': session.seed,
      **{key.replace('__', '.'): value
         for key, value in search.vocabulary(session).items()},
      'train.num_epochs': 0.0, 'train.num_steps': STEPS,
      'train.log_every_steps': 1, 'parallel.num_devices': 1,
      **session.overrides}
  config = ROOT / 'configs' / 'squad2.py'
  return [sys.executable, '-m', 'experiments.train',
          f'--config={config}:{session.encoders[0]}', f'--workdir={workdir}',
          *(f'--config.{key}={value}' for key, value in fields.items())]


def first_step(command: list[str], threads: int, caches: Mapping[str, str]
               ) -> tuple[float, float]:
  """Returns the seconds and CPU-seconds until the command reports step 1.

  The command is ended when all buckets are compiled too.

  Raises:
    WorkerError: the command ended before; its last output is the reason.
  """
  began, last_line = time.perf_counter(), ''
  first: tuple[float, float] | None = None
  is_compiled = is_ended = False
  with cores.limited(threads), subprocess.Popen(
      command, env=harness.environment(threads) | caches, text=True,
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
    for line in process.stderr:
      last_line = line.strip() or last_line
      is_compiled |= line.startswith(COMPILED)
      if line.startswith(FIRST_STEP) and 'loss' in line and not first:
        first = time.perf_counter() - began, _cpu_seconds(process.pid)
      if first and is_compiled and not is_ended:
        process.terminate()
        is_ended = True
  if not first:
    raise harness.WorkerError(f'experiments.train: {last_line}')
  return first


def _cpu_seconds(pid: int) -> float:
  """Returns the CPU-seconds of a process, NaN where there is no /proc."""
  try:
    text = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
  except OSError:
    return math.nan
  user, system = text.rpartition(')')[2].split()[11:13]
  return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
