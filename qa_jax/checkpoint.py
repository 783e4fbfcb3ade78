"""Checkpoints by orbax: parameters, optimizer, and the position in the data.

Checkpoint k is the state before step k together with a data position that has
not moved, so that a resumed run repeats the undisturbed one bit for bit. The
parameters are an item of their own: evaluation reads nothing else.
"""

import math
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from qa_jax import errors


class Checkpoints:
  """The `checkpoints/` of a run: the latest and the best are kept."""

  def __init__(self, directory: pathlib.Path, *, best_metric: str = 'f1'):
    def score(metrics: dict[str, float]) -> float:
      value = metrics.get(best_metric, -math.inf)
      return value if math.isfinite(value) else -math.inf

    policies = ocp.checkpoint_managers
    self._score = score
    self._manager = ocp.CheckpointManager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            best_fn=score, best_mode='max',
            preservation_policy=policies.AnyPreservationPolicy([
                policies.LatestN(2),
                policies.BestN(get_metric_fn=score, n=1,
                               keep_checkpoints_without_metrics=False)]),
            cleanup_tmp_directories=True,
            # On CPU the arrays would be read while the next step reuses them.
            enable_async_checkpointing=jax.default_backend() != 'cpu'))

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  @property
  def best(self) -> int | None:
    return self._manager.best_step()

  def save(self, step: int, *, params: Any, optimizer: Any,
           meta: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes step `step`; an existing one of that number is left alone."""
    if step in self.steps:
      return
    self._manager.save(
        step, metrics={k: float(v) for k, v in metrics.items()
                       if math.isfinite(v)},
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            meta=ocp.args.JsonSave(meta)))

  def restore_params(self, step: int, template: Any) -> Any:
    """The parameters of a step, placed as `template` (a tree of shapes)."""
    args = ocp.args.Composite(params=ocp.args.StandardRestore(template))
    return self._manager.restore(step, args=args).params

  def restore(self, step: int, *, params: Any,
              optimizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(params, optimizer, meta) of a step, placed as the templates say."""
    out = self._manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore(params),
        optimizer=ocp.args.StandardRestore(optimizer),
        meta=ocp.args.JsonRestore()))
    return out.params, out.optimizer, out.meta

  def resolve(self, which: str) -> int:
    """'best', 'last' or a number → a step that exists.

    Raises:
      UserError: no checkpoint at all, or not that one.
    """
    if not self.steps:
      raise errors.UserError(
          f'{self._manager.directory} holds no checkpoint; train first')
    if which in ('best', 'last'):
      return (self.best if which == 'best' else self.latest) or self.latest
    if which.isdigit() and int(which) in self.steps:
      return int(which)
    raise errors.UserError(
        f'checkpoint {which!r} is not best, last or one of '
        f'{", ".join(map(str, self.steps))}')

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()
