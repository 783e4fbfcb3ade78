"""The checkpoints of a run: parameters, optimizer state and data position.

Checkpoint k holds the state before train step k and the data position of step
k, so a resumed run repeats the undisturbed run bit for bit.

A manifest with checksums seals a checkpoint when orbax has finished it and its
files were read back. A checkpoint that does not match its manifest is damaged.
A checkpoint without a manifest is unfinished if another checkpoint has one, and
of an early version if none has. Earlier checkpoints are removed only after the
new one is sealed.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
from typing import TYPE_CHECKING, Any

import jax

from qa_jax import errors
from qa_jax.checkpoints import manifest
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import processes

if TYPE_CHECKING:  # orbax takes a third of a second to load
  import orbax.checkpoint as ocp

UNFINISHED = '*.orbax-checkpoint-tmp'
REMOVED = '.removed'  # suffix of a checkpoint while its files are deleted
ITEMS = ('params', 'optimizer', 'meta')  # folders of every checkpoint
METRICS = 'metrics'  # folder of a checkpoint with metrics, and its file


class Checkpoints:
  """The directory `checkpoints/` of a run, with the latest two and the best.

  When a writer opens the directory, it completes what a killed process left of
  a save or removes it, seals the checkpoints of a run without manifests, and
  renames damaged and unfinished checkpoints to STEP.damaged. A reader
  (`read_only`) changes nothing, because a run may be writing meanwhile. If the
  writer is several processes, all of them make each call together, and the
  first process does the work outside orbax.
  """

  def __init__(self, directory: pathlib.Path, *, read_only: bool = False):
    self._directory, self._read_only = directory.resolve(), read_only
    # On a CPU the next step overwrites the arrays that a save is still reading.
    self._overlapping = jax.default_backend() != 'cpu'
    self._sealer = futures.ThreadPoolExecutor(1)
    self._sealing: futures.Future[None] | None = None
    self._closing = contextlib.ExitStack()  # of the writer, if one is built
    if not read_only:
      self._open()

  def _open(self) -> None:
    if processes.is_first_process():
      try:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tidy()
      except OSError as e:
        raise errors.UserError(
            f'{e.filename}: cannot be used for checkpoints: {e.strerror}; move '
            'it away or change its permissions') from None
    processes.wait_for_all('checkpoints')

  @functools.cached_property
  def _writer(self) -> 'ocp.Checkpointer':
    """Builds the writer at the first save: a run starts without orbax."""
    import orbax.checkpoint as ocp
    kind = ocp.AsyncCheckpointer if self._overlapping else ocp.Checkpointer
    writer = kind(ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(),
        optimizer=ocp.StandardCheckpointHandler(),
        meta=ocp.JsonCheckpointHandler(),
        **{METRICS: ocp.JsonCheckpointHandler(METRICS)}))
    self._closing.callback(writer.close)
    return writer

  def _score(self, metrics: dict[str, float]) -> float:
    value = metrics.get('f1', -math.inf)
    return value if math.isfinite(value) else -math.inf

  def _tidy(self) -> None:
    for pattern in (UNFINISHED, f'*{REMOVED}'):
      for path in self._directory.glob(pattern):
        shutil.rmtree(path)
    for path in self._directory.glob(f'[0-9]*/**/*{files.PARTIAL}'):
      path.unlink()
    manifest.complete_manifests([
        self.path(step) for step in self._finished_by_orbax()
        if not self._missing_item(step)])
    for step in self._finished_by_orbax():
      if fault := self.damage(step):
        aside = self._directory / f'{step}.damaged'
        shutil.rmtree(aside, ignore_errors=True)
        self.path(step).rename(aside)
        console.say(
            f'checkpoint {step} is damaged, and set aside as {aside}: {fault}')
    self._remove_superseded()  # a killed save may have left one

  def _finished_by_orbax(self) -> list[int]:
    """Returns the steps of all checkpoint directories, sealed or not."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir()
                  if path.name.isdecimal())

  @property
  def steps(self) -> list[int]:
    """Returns the steps of the sealed checkpoints, in ascending order.

    A directory without a manifest or without one of ITEMS is left out. But a
    reader returns all steps of a run of an early version, without any manifest.
    """
    steps = self._finished_by_orbax()
    if self._read_only and not self._has_manifests():
      return steps
    return [step for step in steps if manifest.is_sealed(self.path(step))
            and not self._missing_item(step)]

  def _has_manifests(self) -> bool:
    return any((self.path(step) / manifest.NAME).is_file()
               for step in self._finished_by_orbax())

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
      self._check(step, within=f'{METRICS}/')
      scores[step] = self._score(self.metrics(step))
    best = max(scores, key=lambda step: (scores[step], step), default=None)
    return None if best is None or math.isinf(scores[best]) else best

  def metrics(self, step: int) -> dict[str, float]:
    """Reads the metrics of a checkpoint, {} if it was saved without."""
    path = self.path(step) / METRICS / METRICS
    return files.read_object(path) if path.is_file() else {}

  def damage(self, step: int, *, within: str = '') -> str:
    """Returns the first fault of a checkpoint's files, '' for none.

    Only files whose path begins with `within` are read. A reader trusts the
    files of a run of an early version, which has no manifest.
    """
    if missing := self._missing_item(step):
      return missing
    if self._read_only and not self._has_manifests():
      return ''
    return manifest.find_damage(self.path(step), within=within)

  def _missing_item(self, step: int) -> str:
    """Returns 'ITEM: missing' of the first item that was not saved, or ''."""
    return next((f'{item}: missing' for item in ITEMS
                 if not (self.path(step) / item).is_dir()), '')

  def path(self, step: int) -> pathlib.Path:
    """Returns the directory of a checkpoint."""
    return self._directory / str(step)

  def _whole(self) -> str:
    whole = [str(step) for step in self.steps if not self.damage(step)]
    return ', '.join(whole) or 'none'

  def _check(self, step: int, *, within: str = '') -> None:
    if fault := self.damage(step, within=within):
      raise errors.UserError(f'{self.path(step) / fault}; '
                             f'checkpoints that are whole: {self._whole()}')

  def save(self, step: int, *, params: Any, optimizer: Any,
           meta: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes the checkpoint of a step.

    If the checkpoint exists, only `metrics` are added, if it has none yet. On
    accelerators the save overlaps with training, and the checkpoint is in
    `steps` as soon as `finish` has returned.

    Raises:
      UserError: the checkpoint cannot be written: no space, no permission, ….
        If the save overlaps with training, the next `save`, `finish` or `close`
        raises the error.
    """
    import orbax.checkpoint as ocp
    self.finish()
    metrics = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    exists = step in self.steps
    exists, better = processes.broadcast_from_first(
        [exists, exists and bool(metrics) and not self.metrics(step)])
    if exists and not better:
      return
    if exists:
      seal = lambda: self._add_metrics(step, metrics)
    else:
      seal = lambda: self._seal(step, meta, metrics)
      items = {'params': ocp.args.StandardSave(params),
               'optimizer': ocp.args.StandardSave(optimizer),
               'meta': ocp.args.JsonSave(meta)}
      if metrics:
        items[METRICS] = ocp.args.JsonSave(metrics)
      with self._failing(step):
        self._writer.save(self.path(step), args=ocp.args.Composite(**items))
    self._sealing = self._sealer.submit(seal)
    if not self._overlapping:
      self.finish()
      processes.wait_for_all('sealed')

  def _seal(self, step: int, meta: dict[str, Any],
            metrics: dict[str, float]) -> None:
    """Reads a new checkpoint back, seals it and removes superseded ones."""
    with self._failing(step):
      if self._overlapping:
        self._writer.wait_until_finished()
      if not processes.is_first_process():
        return
      if (self._missing_item(step) or self.metrics(step) != metrics
          or files.read_object(self.path(step) / 'meta' / 'metadata')
          != json.loads(json.dumps(meta))):
        raise errors.UserError(
            f'{self.path(step)}: orbax did not save what it was given; '
            f'checkpoints that are whole: {self._whole()}')
      manifest.write_manifest(self.path(step))
      self._remove_superseded()

  def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    with self._failing(step):
      if processes.is_first_process():
        manifest.add_file(self.path(step), f'{METRICS}/{METRICS}',
                          json.dumps(metrics))
        self._remove_superseded()

  def _remove_superseded(self) -> None:
    """Removes all sealed checkpoints but the latest two and the best.

    A checkpoint is renamed first, so that a kill never leaves a part of it
    under its name. While metrics are damaged, the best is unknown, and nothing
    is removed.
    """
    try:
      best = self.best
    except errors.UserError as e:
      console.say(f'no checkpoint is removed: {e}')
      return
    for step in self.steps[:-2]:
      if step != best:
        removed = self._directory / f'{step}{REMOVED}'
        self.path(step).rename(removed)
        shutil.rmtree(removed)

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
    return self._read(step, params=template).params

  def restore(self, step: int, *, params: Any, optimizer: Any
              ) -> tuple[Any, Any, dict[str, Any]]:
    """Reads (params, optimizer, meta) of a step; see `restore_params`."""
    out = self._read(step, meta=True, params=params, optimizer=optimizer)
    return out.params, out.optimizer, out.meta

  def _read(self, step: int, *, meta: bool = False, **templates: Any) -> Any:
    """Reads items like `templates`, and the item `meta` if asked for."""
    import orbax.checkpoint as ocp
    self._check(step)
    items = {name: ocp.args.StandardRestore(template)
             for name, template in templates.items()}
    if meta:
      items['meta'] = ocp.args.JsonRestore()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      return reader.restore(
          self.path(step), args=ocp.args.Composite(**items))

  def resolve(self, which: str) -> int:
    """Returns the step that 'best', 'last' or a number names.

    'best' is the last step if no checkpoint has the metric.

    Raises:
      UserError: there is no checkpoint or none of this step, or the metrics
        that decide on 'best' are damaged.
    """
    steps = self.steps
    if not steps:
      raise errors.UserError(
          f'{self._directory} holds no checkpoint; train first')
    if which in ('best', 'last'):
      for step in sorted({*self._finished_by_orbax()} - {*steps}):
        console.say(
            f'{self.path(step)} is no whole checkpoint and left out: '
            f'{self._missing_item(step) or manifest.NAME + ": missing"}')
      best = self.best if which == 'best' else None
      return steps[-1] if best is None else best
    if which.isdecimal() and int(which) in self._finished_by_orbax():
      return int(which)
    raise errors.UserError(
        f'checkpoint {which!r} is not best, last or one of '
        f'{", ".join(map(str, steps))}')

  def close(self) -> None:
    """Waits for the last save, as `finish` does, and releases orbax."""
    try:
      self.finish()
    finally:
      self._sealer.shutdown()
      self._closing.close()
