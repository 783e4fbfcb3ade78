"""The checkpoints of a run: parameters, optimizer state and data position.

Checkpoint k holds the state before train step k and the data position of step
k, so a resumed run repeats the undisturbed run bit for bit.

A manifest with checksums is written when orbax has finished a checkpoint. A
checkpoint that does not match its manifest is damaged, and so is a checkpoint
without a manifest if another checkpoint has one.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import logging
import math
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from qa_jax import errors
from qa_jax.checkpoints import manifest
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import processes

UNFINISHED = '*.orbax-checkpoint-tmp'


class Checkpoints:
  """The directory `checkpoints/` of a run, with the latest two and the best.

  A writer removes unfinished checkpoints of a killed process and renames
  damaged ones to STEP.damaged when it opens the directory. A reader
  (`read_only`) changes nothing, because a run may be writing meanwhile. If the
  writer is several processes, all of them make each call together, and the
  first process does the work outside orbax.
  """

  def __init__(self, directory: pathlib.Path, *, best_metric: str = 'f1',
               read_only: bool = False):
    self._directory, self._metric = directory.resolve(), best_metric
    # On a CPU the next step overwrites the arrays that a save is still reading.
    self._overlapping = jax.default_backend() != 'cpu'
    self._sealer = futures.ThreadPoolExecutor(1)
    self._sealing: futures.Future[None] | None = None
    self._manager = None if read_only else self._open()

  def _open(self) -> ocp.CheckpointManager:
    if processes.is_first_process():
      self._tidy()
    processes.wait_for_all('checkpoints')
    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=self._score, n=1,
                          keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManager(
        self._directory, options=ocp.CheckpointManagerOptions(
            best_fn=self._score, best_mode='max', preservation_policy=(
                policies.AnyPreservationPolicy([policies.LatestN(2), best])),
            enable_async_checkpointing=self._overlapping))

  def _score(self, metrics: dict[str, float]) -> float:
    value = metrics.get(self._metric, -math.inf)
    return value if math.isfinite(value) else -math.inf

  def _tidy(self) -> None:
    for path in self._directory.glob(UNFINISHED):
      shutil.rmtree(path)
    faults = {step: self.damage(step) for step in self.steps}
    for step, fault in faults.items():
      if fault:
        aside = self._directory / f'{step}.damaged'
        shutil.rmtree(aside, ignore_errors=True)
        self._path(step).rename(aside)
        console.say(
            f'checkpoint {step} is damaged, and set aside as {aside}: {fault}')

  @property
  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints, in ascending order."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir()
                  if path.name.isdigit())

  @property
  def latest(self) -> int | None:
    """Returns the last step that has a checkpoint."""
    return max(self.steps, default=None)

  @property
  def best(self) -> int | None:
    """Returns the last step with the best metric, None if no step has it.

    Raises:
      UserError: a file with metrics is damaged.
    """
    scores = {}
    for step in self.steps:
      self._check(step, within='metrics/')
      scores[step] = self._score(self.metrics(step))
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    return None if best is None or math.isinf(scores[best]) else best

  def metrics(self, step: int) -> dict[str, float]:
    """Reads the metrics of a checkpoint, {} if it was saved without."""
    path = self._path(step) / 'metrics' / 'metrics'
    return files.read_object(path) if path.is_file() else {}

  def damage(self, step: int, *, within: str = '') -> str:
    """Returns the first fault of a checkpoint's files, '' for none.

    Only files whose path begins with `within` are read. Runs of early versions
    have no manifest at all, and their checkpoints count as undamaged.
    """
    if not any((self._path(s) / manifest.NAME).is_file() for s in self.steps):
      return ''
    return manifest.find_damage(self._path(step), within=within)

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _whole(self) -> str:
    whole = [str(step) for step in self.steps if not self.damage(step)]
    return ', '.join(whole) or 'none'

  def _check(self, step: int, *, within: str = '') -> None:
    if fault := self.damage(step, within=within):
      raise errors.UserError(f'{self._path(step) / fault}; '
                             f'checkpoints that are whole: {self._whole()}')

  def save(self, step: int, *, params: Any, optimizer: Any,
           meta: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes the checkpoint of a step.

    An existing checkpoint of this step is replaced only if it has no metrics
    and `metrics` has some. On accelerators the save overlaps with training.

    Raises:
      UserError: the checkpoint cannot be written: no space, no permission, ….
        If the save overlaps with training, the next `save`, `finish` or `close`
        raises the error.
    """
    self.finish()
    metrics = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    exists = step in self.steps
    exists, better = processes.broadcast_from_first(
        [exists, exists and bool(metrics) and not self.metrics(step)])
    if exists and not better:
      return
    if exists:
      self._manager.delete(step)
    with self._failing(step):
      self._manager.save(step, metrics=metrics, args=ocp.args.Composite(
          params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta),
          optimizer=ocp.args.StandardSave(optimizer)))
    self._sealing = self._sealer.submit(self._seal, step)
    if not self._overlapping:
      self.finish()
      processes.wait_for_all('sealed')

  def _seal(self, step: int) -> None:
    with self._failing(step):
      self._manager.wait_until_finished()
      if processes.is_first_process():
        manifest.write_manifest(self._path(step))

  def finish(self) -> None:
    """Waits until the last save has ended, and raises its error if any."""
    if self._sealing:
      sealing, self._sealing = self._sealing, None
      sealing.result()

  @contextlib.contextmanager
  def _failing(self, step: int) -> Iterator[None]:
    """Turns a file-system error into a UserError and frees the partial files.

    Meanwhile it filters absl's logger, which is shared by the whole process,
    because orbax logs the traceback of each of its threads there.
    """
    orbax = logging.getLogger('absl')
    quiet = lambda record: 'raised an exception' not in record.getMessage()
    orbax.addFilter(quiet)
    try:
      yield
    except (OSError, ValueError) as e:  # tensorstore raises a ValueError.
      code = re.search(r"os_error_code='(\d+)'", str(e))
      if not (code or isinstance(e, OSError)):
        raise
      reason = os.strerror(int(code[1])) if code else e.strerror
      for path in self._directory.glob(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
      raise errors.UserError(
          f'{self._directory}: checkpoint {step} cannot be written: {reason}; '
          f'{self._whole()} before it are whole, and the same command goes on '
          'from there') from None
    finally:
      orbax.removeFilter(quiet)

  def restore_params(self, step: int, template: Any) -> Any:
    """Reads parameters like `template`; a damaged file is a UserError."""
    return self._read(step, params=ocp.args.StandardRestore(template)).params

  def restore(self, step: int, *, params: Any, optimizer: Any
              ) -> tuple[Any, Any, dict[str, Any]]:
    """Reads (params, optimizer, meta) of a step; see `restore_params`."""
    out = self._read(step, params=ocp.args.StandardRestore(params),
                     optimizer=ocp.args.StandardRestore(optimizer),
                     meta=ocp.args.JsonRestore())
    return out.params, out.optimizer, out.meta

  def _read(self, step: int, **items: Any) -> Any:
    self._check(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      return reader.restore(
          self._path(step), args=ocp.args.Composite(**items))

  def resolve(self, which: str) -> int:
    """Returns the step that 'best', 'last' or a number names.

    'best' is the last step if no checkpoint has the metric.

    Raises:
      UserError: there is no checkpoint or none of this step, or the metrics
        that decide on 'best' are damaged.
    """
    if not self.steps:
      raise errors.UserError(
          f'{self._directory} holds no checkpoint; train first')
    if which in ('best', 'last'):
      best = self.best if which == 'best' else None
      return self.latest if best is None else best
    if which.isdigit() and int(which) in self.steps:
      return int(which)
    raise errors.UserError(
        f'checkpoint {which!r} is not best, last or one of '
        f'{", ".join(map(str, self.steps))}')

  def close(self) -> None:
    """Waits for the last save, as `finish` does, and releases orbax."""
    try:
      self.finish()
    finally:
      self._sealer.shutdown()
      if self._manager:
        self._manager.close()
