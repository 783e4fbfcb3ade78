"""A full disk, simulated by a small tmpfs; the process must be root."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.training import metrics_log
from tests.chaos import damage
from tests.chaos import processes
from tests.chaos import runs
from tests.common import random_model
from tests.common import runs as runs_lib


@contextlib.contextmanager
def small(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Mounts a file system of 3 MiB."""
  directory.mkdir()
  mounted = shutil.which('mount') and not subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(directory)],
      capture_output=True, check=False).returncode
  if not mounted:
    pytest.skip('no tmpfs can be mounted here: that takes root')
  try:
    yield directory
  finally:
    subprocess.run(['umount', '-l', str(directory)], check=True)


def fill(directory: pathlib.Path) -> pathlib.Path:
  """Writes a file that takes all free space."""
  path = directory / 'ballast'
  with contextlib.suppress(OSError), path.open('wb', buffering=0) as file:
    while file.write(bytes(4096)):
      pass
  return path


def full(directory: pathlib.Path, count: int, seed: int) -> str:
  """Runs R4: the disk fills while a run saves, logs, evaluates, predicts."""
  del seed
  compiled = directory / 'compiled'
  for n in range(count):
    with small(directory / f'disk{n}') as disk:
      _save(disk / 'run', compiled)
      _log(disk)
      _predict(disk)
  return (f'{count} of {count} disks that filled up while a run saved: one '
          'line, exit code 1, no leftover, the last checkpoint whole, resumed '
          'to equal values when there was room; metrics.jsonl and '
          'predictions: one line, nothing half-written')


def _save(workdir: pathlib.Path, compiled: pathlib.Path) -> None:
  fields = runs.fields_of(1, num_steps=12, checkpoint_every_steps=2,
                          log_every_steps=4, eval_every_steps=0)
  log = compiled.parent / f'{workdir.parent.name}.log'
  begin = lambda where: processes.Child(
      log, processes.train_run, where, fields, compiled)
  saved = lambda: [p for p in (workdir / 'checkpoints').glob('[0-9]*')
                   if p.name.isdigit() and (p / 'MANIFEST.sha256').is_file()]
  with begin(workdir) as child:
    processes.wait_for(lambda: bool(saved()), child)
    ballast = fill(workdir.parent)
    code, lines = child.wait(), child.said.splitlines()
  assert code == 1, child.said
  assert 'No space left on device' in lines[-1], lines
  assert sum(line.startswith('error: ') for line in lines) == 1, lines
  assert 'Traceback' not in child.said
  assert not [*workdir.rglob('*.partial')]
  assert not [*(workdir / 'checkpoints').glob(manager.UNFINISHED)]
  reader = manager.Checkpoints(workdir / 'checkpoints', read_only=True)
  assert reader.latest and not reader.damage(reader.latest)
  reader.close()
  ballast.unlink()
  with begin(workdir) as child:
    assert child.wait() == 0, child.said
  whole = compiled.parent / 'whole'
  if not whole.exists():
    with begin(whole) as child:
      assert child.wait() == 0, child.said
  assert runs_lib.rows_of(workdir) == runs_lib.rows_of(whole)
  assert runs.digest(workdir, 12) == runs.digest(whole, 12)


def _log(disk: pathlib.Path) -> None:
  log = metrics_log.MetricsLog(disk, 0)
  log.write(1, 'train', {'loss': 1.0})
  ballast = fill(disk)
  def write() -> None:
    for step in range(2, 1000):
      log.write(step, 'train', {'loss': 1.0})
  assert damage.refused(write, disk / 'metrics.jsonl')
  log.close()
  ballast.unlink()
  log = metrics_log.MetricsLog(disk, 2)
  log.write(3, 'train', {})
  log.close()
  steps = [row['step'] for row in RunDirectory(disk).read_metrics()]
  assert steps in ([1, 3], [1, 2, 3]), steps


def _predict(disk: pathlib.Path) -> None:
  run = random_model.write_run(
      random_model.random_qa('independent'), disk.parent / f'{disk.name}.run')
  rows = disk.parent / 'in.jsonl'
  rows.write_text('{"question": "Who?", "context": "Mira."}\n' * 40)
  ballast, output = fill(disk), disk / 'out.jsonl'
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.predict', f'--workdir={run}',
       f'--input={rows}', f'--output={output}'], capture_output=True, text=True,
      check=False, cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 1, done.stderr
  assert f'{output}: cannot be written: No space' in done.stderr, done.stderr
  assert 'Traceback' not in done.stderr
  assert not [*disk.glob('out.jsonl*')]
  ballast.unlink()
