"""Checkpoints by orbax: parameters, optimizer, and the position in the data.

Checkpoint k is the state before step k together with a data position that has
not moved, so that a resumed run repeats the undisturbed one bit for bit. The
parameters are an item of their own: evaluation reads nothing else.

A manifest vouches for each, written when orbax is done. One that is not what
its manifest says, or has none where others have, is as good as none.
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
  """The `checkpoints/` of a run: the latest two and the best are kept.

  Who writes them removes what a killed process left, and sets damaged ones
  aside; who only reads them (`read_only`) changes nothing, for a run may be
  writing. There is one writer at a time: lock.py. It may be several processes,
  which make each call together: then the first does what orbax doesn't.
  """

  def __init__(self, directory: pathlib.Path, *, best_metric: str = 'f1',
               read_only: bool = False):
    self._directory, self._metric = directory.resolve(), best_metric
    # On CPU the arrays would be read while the next step reuses them.
    self._overlapping = jax.default_backend() != 'cpu'
    self._sealer = futures.ThreadPoolExecutor(1)
    self._sealing: futures.Future[None] | None = None
    self._manager = None if read_only else self._open()

  def _open(self) -> ocp.CheckpointManager:
    if processes.is_first_process():
      self._tidy()
    processes.wait_for_all('checkpoints')
    policies = ocp.checkpoint_managers
    return ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            best_fn=self._score, best_mode='max',
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(2),
                policies.BestN(get_metric_fn=self._score, n=1,
                               keep_checkpoints_without_metrics=False)]),
            enable_async_checkpointing=self._overlapping))

  def _score(self, metrics: dict[str, float]) -> float:
    value = metrics.get(self._metric, -math.inf)
    return value if math.isfinite(value) else -math.inf

  def _tidy(self) -> None:
    for path in self._directory.glob(UNFINISHED):
      shutil.rmtree(path)
    damaged = {step: self.damage(step) for step in self.steps}
    for step, fault in damaged.items():
      if fault:
        aside = self._directory / f'{step}.damaged'
        shutil.rmtree(aside, ignore_errors=True)
        (self._directory / str(step)).rename(aside)
        console.say(f'checkpoint {step} is damaged, and set aside as {aside}: '
                    f'{fault}')

  @property
  def steps(self) -> list[int]:
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir()
                  if path.name.isdigit())

  @property
  def latest(self) -> int | None:
    return max(self.steps, default=None)

  @property
  def best(self) -> int | None:
    """The latest of those with the best metric; None without one.

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
    """What a step was saved with."""
    path = self._directory / str(step) / 'metrics' / 'metrics'
    return files.read_object(path) if path.is_file() else {}

  def damage(self, step: int, *, within: str = '') -> str:
    """What is wrong with the files of a step, or ''.

    Runs older than manifests have none, and are taken on trust.
    """
    if not any((self._directory / str(other) / manifest.NAME).is_file()
               for other in self.steps):
      return ''
    return manifest.find_damage(self._directory / str(step), within=within)

  def _check(self, step: int, *, within: str = '') -> None:
    fault = self.damage(step, within=within)
    if fault:
      whole = [str(s) for s in self.steps if not self.damage(s)]
      raise errors.UserError(
          f'{self._directory / str(step) / fault}; '
          f'checkpoints that are whole: {", ".join(whole) or "none"}')

  def save(self, step: int, *, params: Any, optimizer: Any,
           meta: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes step `step`; an existing one of that number is left alone, unless
    it lacks the metrics that there are now.

    Raises:
      UserError: no space, no permission, …; the steps before are whole. Where
        saving overlaps with training, the next call or `close` says so.
    """
    self.finish()
    metrics = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    held = step in self.steps
    held, better = processes.broadcast_from_first(
        [held, held and bool(metrics) and not self.metrics(step)])
    if held and not better:
      return
    if held:
      self._manager.delete(step)
    with self._failing(step):
      self._manager.save(
          step, metrics=metrics, args=ocp.args.Composite(
              params=ocp.args.StandardSave(params),
              optimizer=ocp.args.StandardSave(optimizer),
              meta=ocp.args.JsonSave(meta)))
    self._sealing = self._sealer.submit(self._seal, step)
    if not self._overlapping:
      self.finish()
      processes.wait_for_all('sealed')

  def _seal(self, step: int) -> None:
    with self._failing(step):
      self._manager.wait_until_finished()
      if processes.is_first_process():
        manifest.write_manifest(self._directory / str(step))

  def finish(self) -> None:
    """Waits until what was saved is whole, or raises what `save` would."""
    if self._sealing:
      sealing, self._sealing = self._sealing, None
      sealing.result()

  @contextlib.contextmanager
  def _failing(self, step: int) -> Iterator[None]:
    """Makes an error of the file system one line, and its leftovers room."""
    orbax = logging.getLogger('absl')  # it logs the traceback of each thread
    orbax.addFilter(_no_tracebacks)
    try:
      yield
    except (OSError, ValueError) as e:  # the latter: tensorstore's
      code = re.search(r"os_error_code='(\d+)'", str(e))
      if not (code or isinstance(e, OSError)):
        raise
      reason = os.strerror(int(code[1])) if code else e.strerror
      for path in self._directory.glob(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
      whole = [str(s) for s in self.steps if not self.damage(s)]
      raise errors.UserError(
          f'{self._directory}: checkpoint {step} cannot be written: {reason}; '
          f'{", ".join(whole) or "none"} before it are whole, and the same '
          'command goes on from there') from None
    finally:
      orbax.removeFilter(_no_tracebacks)

  def restore_params(self, step: int, template: Any) -> Any:
    """The parameters of a step, placed as `template` (a tree of shapes).

    Raises:
      UserError: a file of it is damaged.
    """
    return self._read(
        step, params=ocp.args.StandardRestore(template)).params

  def restore(self, step: int, *, params: Any,
              optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(params, optimizer, meta) of a step, placed as the templates say."""
    out = self._read(step, params=ocp.args.StandardRestore(params),
                     optimizer=ocp.args.StandardRestore(optimizer),
                     meta=ocp.args.JsonRestore())
    return out.params, out.optimizer, out.meta

  def _read(self, step: int, **items: Any) -> Any:
    self._check(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
      return reader.restore(self._directory / str(step),
                            args=ocp.args.Composite(**items))

  def resolve(self, which: str) -> int:
    """'best', 'last' or a number → a step that exists.

    Raises:
      UserError: no checkpoint at all, or not that one; or damaged metrics, of
        which 'best' depends.
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
    try:
      self.finish()
    finally:
      self._sealer.shutdown()
      if self._manager:
        self._manager.close()


def _no_tracebacks(record: logging.LogRecord) -> bool:
  return 'raised an exception' not in record.getMessage()
