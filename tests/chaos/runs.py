"""Runs that are killed, stopped or started twice, and how they resume."""

import hashlib
import pathlib
import random
import signal
import socket
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qa_jax.checkpoints import manager
from qa_jax.checkpoints import manifest
from tests.chaos import processes
from tests.chaos.processes import Child
from tests.common import runs

STEPS = 40
# Number of devices → changed fields, so that kills meet every kind of run.
RUNS: dict[int, dict[str, Any]] = {
    1: {'parallel': {'num_devices': 1, 'mode': 'jit'}},
    2: {'parallel': {'num_devices': 2}, 'data': {'packing': True},
        'train': {'grad_accumulation': 2}},
    4: {'parallel': {'num_devices': 4, 'mode': 'mesh',
                     'mesh': {'data': 2, 'fsdp': 2}},
        'data': {'buckets': [32, 48]}},
}


def fields_of(devices: int, **train: int) -> dict[str, Any]:
  fields = RUNS[devices]
  return {**fields, 'train': {
      'num_steps': STEPS, 'checkpoint_every_steps': 7, 'eval_every_steps': 20,
      **fields.get('train', {}), **train}}


def arrays_of(saved: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all arrays of a checkpoint by name, read by orbax alone."""
  by_name = {}
  for item in ('params', 'optimizer'):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(saved / item).item_metadata.tree
      arrays = reader.restore(saved / item, args=ocp.args.PyTreeRestore(
          restore_args=jax.tree.map(
              lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)))
    for path, value in jax.tree_util.tree_leaves_with_path(arrays):
      by_name[item + jax.tree_util.keystr(path)] = np.asarray(value)
  return by_name


def digest(workdir: pathlib.Path, step: int) -> str:
  """Returns the sha256 of all arrays of a checkpoint."""
  sums, saved = hashlib.sha256(), workdir / 'checkpoints' / str(step)
  for name, value in arrays_of(saved).items():
    sums.update(name.encode())
    sums.update(np.ascontiguousarray(value).tobytes())
  sums.update((saved / 'meta' / 'metadata').read_bytes())
  return sums.hexdigest()


def outcome(workdir: pathlib.Path,
            step: int = STEPS) -> tuple[list[dict[str, Any]], str]:
  """Returns all logged values except times, and the hash of the final state."""
  return runs.rows_of(workdir), digest(workdir, step)


class Pair:
  """An undisturbed run, and disturbed runs on as many devices to compare."""

  def __init__(self, directory: pathlib.Path, devices: int):
    self._directory, self._devices = directory, devices
    self._compiled = directory / 'compiled'
    self._count = 0
    workdir = directory / 'whole'
    directory.mkdir()
    assert self.run(workdir) == 0, 'the undisturbed run failed'
    self._expected = outcome(workdir)

  def run(self, workdir: pathlib.Path, fault: Any = None) -> int:
    with self.child(workdir, fault) as child:
      return child.wait()

  def child(self, workdir: pathlib.Path, fault: Any = None) -> Child:
    return Child(workdir.with_suffix('.log'), processes.train_run, workdir,
                 fields_of(self._devices), self._compiled, fault,
                 devices=self._devices)

  def disturbed(self) -> pathlib.Path:
    self._count += 1
    return self._directory / f'run{self._count}'

  def finish(self, workdir: pathlib.Path) -> None:
    """Runs the command again; asserts the outcome of the undisturbed run."""
    said = workdir.with_suffix('.log')
    assert self.run(workdir) == 0, said.read_text()
    rows, sha256 = outcome(workdir)
    assert rows == self._expected[0], workdir
    assert sha256 == self._expected[1], workdir


def resume(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R1: SIGKILL at a random moment, then the same command again."""
  draw = random.Random(seed)
  pairs: dict[int, Pair] = {}
  for n in range(count):
    devices = [*RUNS][n % len(RUNS)]
    if devices not in pairs:
      pairs[devices] = Pair(directory / f'on{devices}', devices)
    workdir = pairs[devices].disturbed()
    code = pairs[devices].run(workdir, (
        draw.randint(1, STEPS - 2), draw.uniform(0, 0.02), processes.KILL))
    assert code == -processes.KILL, code
    pairs[devices].finish(workdir)
  return (f'{count} runs of {STEPS} steps killed and resumed, on '
          f'{", ".join(map(str, pairs))} devices in turn: every logged value '
          'equal, sha256 of parameters, optimizer and position equal')


def stopped(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R6: SIGTERM at a random moment; the run saves, ends and resumes."""
  draw, slowest = random.Random(seed), 0.0
  pair = Pair(directory / 'on2', 2)
  for _ in range(count):
    workdir = pair.disturbed()
    step = draw.randint(1, STEPS - 3)
    with pair.child(workdir, (step, draw.uniform(0, 0.02),
                              signal.SIGTERM)) as child:
      log = workdir / 'metrics.jsonl'
      processes.wait_for(lambda log=log, step=step: log.is_file() and len(
          log.read_text().splitlines()) >= step - 2, child)
      began = time.monotonic()
      assert child.wait() == 128 + signal.SIGTERM, child.said
      slowest = max(slowest, time.monotonic() - began)
      assert 'stopped by SIGTERM' in child.said.splitlines()[-1]
    pair.finish(workdir)
  assert slowest < 10, slowest
  return (f'{count} of {count} runs saved at the next step and ended with 143, '
          f'the slowest {slowest:.1f} s after the step before; resumed to '
          'equal values and sha256. Two processes: test_processes.py')


def two_writers(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R5: two runs in one workdir; then the first one is killed."""
  del seed
  slowest = 0.0
  endless = fields_of(1, num_steps=10**6, checkpoint_every_steps=10**6,
                      eval_every_steps=0)
  endless['data'] = {'eval': ''}

  def begin(name: str) -> Child:
    return Child(directory / f'{name}.log', processes.train_run,
                 directory / 'run', endless, directory / 'compiled')

  log = directory / 'run' / 'metrics.jsonl'
  size = lambda: log.stat().st_size if log.is_file() else 0
  owner = begin('first')
  processes.wait_for(lambda: size() > 0, owner)
  for attempt in range(count):
    with begin(f'second{attempt}') as second:
      began = time.monotonic()
      assert second.wait() == 1
      slowest = max(slowest, time.monotonic() - began)
      line, = second.said.splitlines()
      assert (f'pid {owner.pid} on {socket.gethostname()} is writing this run'
              in line), line
    owner.kill()
    heir = begin(f'heir{attempt}')
    processes.wait_for(lambda heir=heir, owner=owner: (
        f'going on from pid {owner.pid}' in heir.said
        and 'batch shape' in heir.said), heir)
    owner = heir
  owner.kill()
  assert slowest < 5, slowest
  return (f'{count} of {count} second writers refused by pid and host, the '
          f'slowest after {slowest:.1f} s; {count} locks of the killed taken '
          'over')


def save_for_ever(directory: pathlib.Path, acknowledged: pathlib.Path) -> None:
  """Saves step after step and notes each completed save."""
  store = manager.Checkpoints(directory)
  step = store.latest or 0
  with acknowledged.open('a', encoding='utf-8') as file:
    while True:
      step += 1
      store.save(step, params={'w': np.full((64, 64), step, np.float32)},
                 optimizer={'step': np.asarray(step, np.int32)},
                 meta={'position': step}, metrics={'f1': float(step % 7)})
      file.write(f'{step}\n')
      file.flush()


def mid_save(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R2: SIGKILL while a process does nothing but save."""
  draw, saves, torn = random.Random(seed), directory / 'checkpoints', 0
  acknowledged = directory / 'acknowledged'
  acknowledged.touch()
  for _ in range(count):
    before = acknowledged.stat().st_size
    with Child(directory / 'log', save_for_ever, saves,
               acknowledged) as child:
      processes.wait_for(
          lambda before=before: acknowledged.stat().st_size > before, child)
      time.sleep(draw.uniform(0.05, 0.6))
    done = [int(n) for n in acknowledged.read_text().split('\n')[:-1]]
    torn += _check_saves(saves, done)
  return (f'{count} of {count} kills while saving, {torn} of them with a save '
          f'half done: the last finished of {done[-1]} steps was there, every '
          'value right, no leftover')


def _check_saves(saves: pathlib.Path, done: list[int]) -> bool:
  """Returns whether a save was torn; asserts that earlier saves are whole."""
  left = [*saves.glob(manager.UNFINISHED), *(
      p for p in saves.iterdir()
      if p.name.isdigit() and not (p / manifest.NAME).is_file())]
  store = manager.Checkpoints(saves)
  assert store.latest >= done[-1], (store.latest, done[-1])
  assert done[-1] in store.steps or store.latest > done[-1]
  # A save that was finished but not noted may be the best one.
  rank = lambda step: (step % 7, step)
  assert rank(store.best) >= max(map(rank, done)), (store.best, store.steps)
  shapes = {'w': jax.ShapeDtypeStruct(
      (64, 64), np.float32, sharding=jax.sharding.SingleDeviceSharding(
          jax.devices('cpu')[0]))}
  for step in store.steps:
    value = np.unique(store.restore_params(step, shapes)['w'])
    assert value.tolist() == [step], (step, value)
  store.close()
  assert all(p.name.isdigit() or p.name.endswith('.damaged')
             for p in saves.iterdir())
  return bool(left)


def run_ahead(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R12: many tiny steps on many devices of few cores."""
  del seed
  fields = {'parallel': {'num_devices': 8}, 'data': {'eval': ''},
            'train': {'num_steps': count, 'checkpoint_every_steps': 10**6,
                      'log_every_steps': 50}}
  with Child(directory / 'log', processes.train_run, directory / 'run', fields,
             directory / 'compiled', devices=8) as child:
    assert child.wait() == 0, child.said
  return f'{count} steps on 8 virtual devices: exit code 0'
