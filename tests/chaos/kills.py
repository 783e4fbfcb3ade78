"""Kills at every file operation of saves, runs and populations.

Python calls an audit hook before each file operation. The hook counts the
operations below a directory and kills the work at the n-th one, for n = 1, 2, …
until none is left. If the operation opens a file to write it, the work is also
killed with a part of the file written.

The files of arrays are not written by Python. They are complete before the
rename that gives a checkpoint its name; R2 kills while they are written.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import threading
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import manifest
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.training import population
from qa_jax.training import train
from tests.chaos import processes
from tests.chaos import runs
from tests.common import runs as runs_lib
from tests.common import tiny

CHANGES = {'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link',
           'os.symlink', 'os.truncate'}
# Positions of the directory descriptors among the arguments of the events.
DESCRIPTORS = {'os.remove': 1, 'os.rmdir': 1, 'os.mkdir': 2, 'os.rename': 2}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TORN = b'{"st'  # the part of a file that is written before the kill


class Killer:
  """An audit hook that kills the work at one operation below a directory.

  A kill is the signal SIGKILL or, `in_process`, an exception. After it, each
  further operation of the killed work raises the exception, so that no code
  tidies up. Threads that orbax has started may go on even when the main thread
  has ended the work.
  """

  def __init__(self, *, in_process: bool):
    self._in_process, self._thread = in_process, threading.local()
    self._dead: list[pathlib.Path] = []  # directories of killed work
    self.disarm()
    sys.addaudithook(self._hook)

  def arm(self, directory: pathlib.Path, number: int, torn: bool) -> None:
    """Kills at operation `number` from now on; number 0 only lists them."""
    self._directory, self._number, self._torn = directory, number, torn
    self.names: list[str] = []  # of the operations: event and path

  @property
  def dead(self) -> bool:
    return self._directory in self._dead

  def disarm(self) -> None:
    self._directory = None

  def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
    idle = (self._directory is None
            and threading.current_thread() is threading.main_thread())
    if idle or getattr(self._thread, 'inside', False):
      return
    opens = event == 'open' and arguments[2] & WRITING
    if not (opens or event in CHANGES):
      return
    self._thread.inside = True  # operations of the hook itself
    try:
      path = _absolute(event, arguments)
      if self._directory and path.is_relative_to(self._directory):
        self._count(event, path)
      if any(path.is_relative_to(directory) for directory in self._dead):
        raise runs_lib.Killed
    finally:
      self._thread.inside = False

  def _count(self, event: str, path: pathlib.Path) -> None:
    self.names.append(f'{event} {path.relative_to(self._directory)}')
    if len(self.names) == self._number:
      if self._torn:
        with contextlib.suppress(OSError), path.open('ab') as file:
          file.write(TORN)
      if not self._in_process:
        os.kill(os.getpid(), processes.KILL)
      self._dead.append(self._directory)


def _absolute(event: str, arguments: tuple[Any, ...]) -> pathlib.Path:
  """Returns the path of an operation, the root for a file descriptor."""
  if isinstance(arguments[0], int):
    return pathlib.Path('/')
  path = os.fsdecode(arguments[0])
  descriptor = arguments[DESCRIPTORS[event]] if event in DESCRIPTORS else -1
  if descriptor != -1 and not os.path.isabs(path):
    path = os.path.join(os.readlink(f'/proc/self/fd/{descriptor}'), path)
  return pathlib.Path(os.path.abspath(path))


@dataclasses.dataclass(frozen=True)
class Job:
  """Work in a directory that may be killed at any time and started again."""

  prepare: Callable[[pathlib.Path], None]  # fills the new directory
  work: Callable[[pathlib.Path], None]
  check: Callable[[pathlib.Path], None]  # asserts what holds after any kill
  outcome: Callable[[pathlib.Path], Any]  # of the finished work


# Does the work of a job in a directory, killed at an operation (0: none; torn).
# Returns the operations if there is no kill.
Attempt = Callable[[Job, pathlib.Path, int, bool], list[str]]


def enumerate_kills(job: Job, attempt: Attempt, directory: pathlib.Path,
                    most: int) -> int:
  """Kills the work at each operation and then finishes it.

  If there are more than `most` operations, the operations inside the temporary
  directories of orbax and inside superseded checkpoints are left out, because a
  writer removes these as a whole. At most `most` of the others are taken at
  equal distances. Returns the number of kills.
  """
  base, whole = directory / 'base', directory / 'whole'
  base.mkdir(parents=True)
  job.prepare(base)
  shutil.copytree(base, whole)
  names = attempt(job, whole, 0, False)
  expected = job.outcome(whole)
  points = [(number, torn) for number, name in enumerate(names, 1)
            for torn in ([False, True] if name.startswith('open ') else
                         [False])]
  if len(points) > most:
    points = [(number, torn) for number, torn in points if not any(
        inside in names[number - 1]
        for inside in ('-checkpoint-tmp/', f'{manager.REMOVED}/'))]
    points = points[::-(-len(points) // most)]
  for number, torn in points:
    name = f'{number}{"torn" * torn}'
    killed, after = directory / f'killed{name}', directory / f'after{name}'
    shutil.copytree(base, killed)
    try:
      attempt(job, killed, number, torn)
      killed.rename(after)  # away from threads of the killed work
      job.check(after)
      attempt(job, after, 0, False)
      assert job.outcome(after) == expected
      left = [p for p in after.rglob('checkpoints/**/*') if p.name.endswith((
          files.PARTIAL, manager.REMOVED, manifest.NEXT, '-tmp'))]
      assert not left, left
    except BaseException as e:
      e.add_note(f'killed at operation {number} of {len(names)}, '
                 f'{names[number - 1]}{", torn" * torn}: {after}')
      raise
    shutil.rmtree(after)
  return len(points)


def attempt_in_process(killer: Killer) -> Attempt:
  """Returns an attempt whose kills are exceptions."""
  def attempt(job: Job, directory: pathlib.Path, number: int,
              torn: bool) -> list[str]:
    killer.arm(directory, number, torn)
    try:
      job.work(directory)
    except runs_lib.Killed:
      assert killer.dead
    killer.disarm()
    return killer.names
  return attempt


def attempt_apart(job: Job, directory: pathlib.Path, number: int,
                  torn: bool) -> list[str]:
  """Does the work in a new process; its kill is the signal SIGKILL."""
  log = directory.with_suffix('.log')
  with processes.Child(log, _killed_work, job.work, directory, number,
                       torn) as child:
    code = child.wait()
    # Threads may change the order and number of operations.
    assert code == 0 or (number and code == -processes.KILL), child.said
  listed = directory.with_suffix('.json')
  return json.loads(listed.read_text()) if not number else []


def _killed_work(work: Callable[[pathlib.Path], None], directory: pathlib.Path,
                 number: int, torn: bool) -> None:
  killer = Killer(in_process=False)
  killer.arm(directory, number, torn)
  work(directory)
  killer.disarm()
  directory.with_suffix('.json').write_text(json.dumps(killer.names))


# Saves.

SHAPES = {'w': jax.ShapeDtypeStruct((2, 3), np.float32)}


def _save(store: manager.Checkpoints, step: int, **metrics: float) -> None:
  store.save(step, params={'w': np.full((2, 3), step, np.float32)},
             optimizer={'step': np.asarray(step, np.int32)},
             meta={'position': step}, metrics=metrics)


def _saves(*saves: tuple[int, dict[str, float]]
           ) -> Callable[[pathlib.Path], None]:
  def work(directory: pathlib.Path) -> None:
    with contextlib.closing(
        manager.Checkpoints(directory / 'checkpoints')) as store:
      for step, metrics in saves:
        _save(store, step, **metrics)
  return work


FOUR = ((1, {'f1': 90.0}), (2, {'f1': 50.0}), (4, {'f1': 60.0}),
        (6, {'f1': 70.0}))  # 1, the best, 4 and 6 stay


def _without_manifests(directory: pathlib.Path) -> None:
  _saves(*FOUR)(directory)
  for path in directory.rglob(manifest.NAME):
    path.unlink()


def _with_leftovers(directory: pathlib.Path) -> None:
  """Writes checkpoints beside all that killed processes leave."""
  _saves(*FOUR)(directory)
  store = directory / 'checkpoints'
  for name in ('8.orbax-checkpoint-tmp/params', f'2{manager.REMOVED}/meta',
               '6.damaged/params', '8/params'):
    (store / name).mkdir(parents=True)
    (store / name / 'd').write_text('half')
  with (store / '6' / 'meta' / 'metadata').open('a') as file:
    file.write(' ')
  (store / '4' / f'{manifest.NEXT}.7{files.PARTIAL}').write_text('half')
  (store / '4' / manifest.NEXT).write_text('half')


def _values(directory: pathlib.Path) -> dict[int, tuple[Any, Any]]:
  """Returns step → (value, metrics) of the checkpoints; all must be whole."""
  values = {}
  with contextlib.closing(manager.Checkpoints(
      directory / 'checkpoints', read_only=True)) as store:
    for step in store.steps:
      if fault := store.damage(step):
        assert step == 6 and fault.startswith('meta/metadata'), (step, fault)
        continue
      sharding = jax.sharding.SingleDeviceSharding(jax.devices('cpu')[0])
      value = np.unique(store.restore_params(step, jax.tree.map(
          lambda s, sharding=sharding: jax.ShapeDtypeStruct(
              s.shape, s.dtype, sharding=sharding), SHAPES))['w'])
      assert value.tolist() == [step], (step, value)
      values[step] = step, store.metrics(step)
  return values


def _check_saves(latest: int, best: float
                 ) -> Callable[[pathlib.Path], None]:
  """Returns a check that a reader has a step and a score at least as good."""
  def check(directory: pathlib.Path) -> None:
    values = _values(directory)
    if not latest and not values:
      return
    with contextlib.closing(manager.Checkpoints(
        directory / 'checkpoints', read_only=True)) as store:
      assert store.resolve('last') >= latest, values
      assert max(values) >= latest, values
      f1 = store.metrics(store.resolve('best')).get('f1', 0.0)
      assert f1 >= best, (f1, values)
  return check


BEST = 8, {'f1': 99.0}
SAVES = {
    'first': Job(lambda _: None, _saves((2, {'f1': 1.0})),
                 _check_saves(0, 0.0), _values),
    'best': Job(_saves(*FOUR), _saves(BEST), _check_saves(6, 90.0), _values),
    'metrics': Job(_saves(*FOUR, (8, {})), _saves(BEST),
                   _check_saves(8, 90.0), _values),
    'metrics of the only step': Job(
        _saves((8, {})), _saves(BEST), _check_saves(8, 0.0), _values),
    'no manifests': Job(
        _without_manifests, _saves(), _check_saves(6, 90.0), _values),
    'leftovers': Job(
        _with_leftovers, _saves(), _check_saves(4, 90.0), _values),
}


def saves(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R15: kills at the operations of saves and of opening the store."""
  del seed
  with processes.Child(directory / 'log', _kill_saves, directory,
                       count) as child:
    assert child.wait() == 0, child.said
  kills = json.loads((directory / 'kills.json').read_text())
  return (f'{sum(kills.values())} kills ({kills}): every checkpoint that a '
          'reader listed was whole, the best and the latest were there, and '
          'the same command ended as without a kill')


def _kill_saves(directory: pathlib.Path, count: int) -> None:
  attempt = attempt_in_process(Killer(in_process=True))
  (directory / 'kills.json').write_text(json.dumps({
      name: enumerate_kills(job, attempt, directory / name, count)
      for name, job in SAVES.items()}))


# Runs and populations.

STEPS = 6


def _train_run(directory: pathlib.Path) -> None:
  processes.use_cache(directory.parent.parent / 'compiled')
  train.train(tiny.config(
      train={'num_steps': STEPS, 'checkpoint_every_steps': 2,
             'eval_every_steps': 3}, parallel={'num_devices': 1}),
              directory / 'run')


def _population_configs() -> list[config_lib.Config]:
  """Returns configs of which the first fails at step 3."""
  return [tiny.config(
      seed=seed, optim={'learning_rate': rate, 'clip_norm': 0.0,
                        'warmup_fraction': 0.9},
      parallel={'num_devices': 1}, train={
          'num_steps': STEPS, 'max_skipped': 0, 'checkpoint_every_steps': 2})
          for seed, rate in ((1, 3e37), (2, 1e-2), (3, 2e-2))]


def _train_population(directory: pathlib.Path) -> None:
  processes.use_cache(directory.parent.parent / 'compiled')
  outcomes = population.train_members(_population_configs(), [
      directory / name for name in ('bad', 'run', 'other')])
  assert [isinstance(o, errors.UserError) for o in outcomes] == [
      True, False, False], outcomes


def _check_runs(directory: pathlib.Path) -> None:
  for path in directory.glob('*/checkpoints'):
    store = manager.Checkpoints(path, read_only=True)
    assert not any(map(store.damage, store.steps)), path
    if store.steps:
      assert store.resolve('best') and store.resolve('last')
    store.close()


def _outcome(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the logged values, scores and arrays of the runs that end well."""
  outcomes = {}
  for path in sorted(directory.glob('*/eval/*/metrics.json')):
    workdir = path.parents[2]
    evaluation = {p.name: p.read_text() for p in path.parent.iterdir()}
    outcomes[workdir.name] = evaluation, *runs.outcome(workdir, STEPS)
    assert RunDirectory(workdir).resolve_step('last') == STEPS
  return outcomes


def run(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R16: kills at the operations of a run."""
  return _kill(_train_run, directory, count)


def members(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R17: kills at the operations of a population with a failed member."""
  return _kill(_train_population, directory, count)


def _kill(work: Callable[[pathlib.Path], None], directory: pathlib.Path,
          count: int) -> str:
  kills = enumerate_kills(Job(lambda _: None, work, _check_runs, _outcome),
                          attempt_apart, directory / 'kills', count)
  return (f'{kills} kills: every checkpoint was whole, and the same command '
          'ended with equal values, scores and sha256')
