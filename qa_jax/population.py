"""A population: runs that differ in seed and rates alone, as one program.

pmap over devices of vmap over members. Each member has parameters, batches and
dropout of its own, and leaves an ordinary run directory: its losses are those
of its config trained alone, to rounding.

A batch is padded to the longest of its step's members. Padding changes nothing,
and dropout is told the length that a member's rows have alone.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from qa_jax import checkpoint
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import keeper as keeper_lib
from qa_jax import lock
from qa_jax import logs
from qa_jax import meter as meter_lib
from qa_jax import parallel
from qa_jax import processes
from qa_jax import stop
from qa_jax import train
from qa_jax import update
from qa_jax import watchdog

# What members may differ in: arguments of the program, not part of it.
RATES = ('learning_rate', 'weight_decay')


def kind(config: config_lib.Config) -> str:
  """Equal for configs that can be members of one population.

  In mode 'mesh' a run may need several devices.
  """
  if config.parallel.mode == 'mesh':
    return json.dumps(config.to_dict(), sort_keys=True)
  common = dataclasses.replace(config, seed=0, optim=dataclasses.replace(
      config.optim, **dict.fromkeys(RATES, 0.0)))
  return json.dumps(common.to_dict(), sort_keys=True)


@dataclasses.dataclass
class _Member:
  """A run of the population, and what is open for it."""

  trainer: train.Trainer
  workdir: pathlib.Path
  store: checkpoint.Checkpoints
  log: logs.MetricsLog | None = None
  meter: meter_lib.Meter | None = None
  keeper: keeper_lib.Keeper | None = None
  costs: logs.Costs | None = None
  outcome: dict[str, float] | errors.UserError | None = None

  @property
  def failed(self) -> bool:
    return isinstance(self.outcome, errors.UserError)

  def begin(self, step: int, costs: logs.Costs,
            requests: stop.Requests) -> None:
    """Puts the state of checkpoint `step` on the host; 0: as it begins."""
    # Of all members at once, states might not fit a device.
    keeper_lib.restore(self.trainer, self.store, step or None)
    if keeper_lib.complete(self.trainer, self.store, step):
      self.outcome = keeper_lib.final_metrics(self.trainer, self.workdir)
    self.trainer.state = jax.device_get(self.trainer.state)
    self.log = logs.MetricsLog(self.workdir, step)
    self.costs = costs
    self.meter = keeper_lib.meter_of(self.trainer, self.log, costs)
    self.keeper = keeper_lib.Keeper(
        self.trainer, self.store, self.log, costs, self.workdir, requests,
        self.meter)

  def read(self, step: int, values: dict[str, np.ndarray]) -> None:
    """Logs a step; losses that are not finite end this member alone."""
    if not self.failed:
      try:
        self.meter.add([(step, values)])
      except errors.UserError as e:
        self.outcome = e
        logs.say(f'{self.workdir}: {e}')

  def keep(self, step: int, state: update.TrainState) -> str:
    """Evaluates and saves, as keeper_lib.Keeper does."""
    try:
      note = self.keeper.keep(step, jax.device_put(
          state, self.trainer.parallel.state_sharding(state)))
    except errors.UserError as e:
      self.outcome = e
      return str(e)
    if self.keeper.complete(step):
      self.outcome = self.keeper.metrics
    return note

  def close(self) -> None:
    self.store.close()
    if self.log:
      self.log.close()
      self.costs.close()


def run(configs: Sequence[config_lib.Config], workdirs: Sequence[pathlib.Path],
        argv: list[str] | None = None,
        ) -> list[dict[str, float] | errors.UserError]:
  """Trains all, or resumes them; final metrics, or why a member has none.

  They go on from the newest step of which every member has a checkpoint, so
  that a population that was killed repeats the undisturbed one bit for bit.
  run.json of each names them all.

  Raises:
    UserError: a bad config or data, configs of several kinds, more of them than
      memory, or another config or process in one of `workdirs`.
    stop.Stopped: a signal asked for it; what there was is saved.
  """
  if processes.several():
    raise errors.UserError(
        f'a population trains in one process, not in {jax.process_count()}; '
        'give each its own configs')
  if len({kind(config) for config in configs}) != 1:
    raise errors.UserError(
        'a population differs in seed, optim.learning_rate and '
        'optim.weight_decay alone; parallel.mode is pmap or jit')
  for config, workdir in zip(configs, workdirs, strict=True):
    config_lib.check_workdir(config, workdir)
    lock.check(workdir)
  first = train.Trainer(configs[0])
  check_fit(first.state, len(configs), first.devices)
  members = []
  with contextlib.ExitStack() as open_things:
    for config, workdir in zip(configs, workdirs, strict=True):
      trainer = train.Trainer(config, like=first)
      trainer.state = jax.device_get(trainer.state)
      keeper_lib.write_run(trainer, workdir, argv or [], {
          'population': [other.name for other in workdirs]})
      keeper_lib.take(workdir, open_things)
      members.append(_Member(
          trainer, workdir, checkpoint.Checkpoints(workdir / 'checkpoints')))
      open_things.callback(members[-1].close)
    requests = open_things.enter_context(stop.Requests())
    dog = open_things.enter_context(watchdog.Watchdog(
        configs[0].train.step_timeout_seconds, str(workdirs[0].parent)))
    # Where questions are grouped, an epoch's steps depend on the seed.
    for num_steps in sorted({m.trainer.num_steps for m in members}):
      _train([m for m in members if m.trainer.num_steps == num_steps],
             requests, dog)
    return [member.outcome for member in members]


def check_fit(state: update.TrainState, members: int,
              devices: Sequence[jax.Device]) -> None:
  """Raises a UserError if members are sure to take more memory than a device
  says it has: their states and gradients alone; on CPU it says nothing."""
  each = -(-members // min(members, len(devices)))
  size = each * sum(
      x.nbytes for x in jax.tree.leaves((state, state.params))) / 2**20
  limit = (devices[0].memory_stats() or {}).get(
      'bytes_limit', math.inf) / 2**20
  if size > limit:
    raise errors.UserError(
        f'{members} members on {len(devices)} devices: {each} of one take at '
        f'least {size:.0f} MiB, more than its {limit:.0f} MiB; sweep fewer '
        'seeds or rates, or use --engine=local')


def _train(members: Sequence[_Member], requests: stop.Requests,
           dog: watchdog.Watchdog) -> None:
  """Evaluate → checkpoint → next batch → step, as train.py does."""
  first = members[0].trainer
  start = max(set.intersection(*({0, *m.store.steps} for m in members)))
  for member in members:
    member.begin(start, logs.Costs(share=1 / len(members)), requests)
  if all(member.outcome is not None for member in members):
    return
  logs.say(f'{len(members)} runs as one program, from step {start}')
  program = parallel.population(
      lambda state, rates, batch: first.step(state, batch, rates=rates),
      members=len(members), devices=first.devices)
  rates = program.place([
      {name: np.float32(getattr(m.trainer.config.optim, name))
       for name in RATES} for m in members])
  states = program.place([m.trainer.state for m in members])
  ahead = parallel.RunAhead(train.run_ahead(), dog.waiting)
  progress = logs.Progress('population', first.num_steps, start)
  try:
    for step in range(start, first.num_steps + 1):
      due = [m for m in members if m.keeper.due(step, start)]
      if due:
        _read(members, program, progress, ahead.drain())
        _keep(members, due, program, progress, step, states)
      if requests.signal and not all(
          m.failed or m.keeper.complete(step) for m in members):
        logs.say('\n'.join(m.keeper.farewell(step) for m in members))
        raise requests.stopped()
      if step == first.num_steps or all(m.failed for m in members):
        return
      states, values = program.step(states, rates, program.place(
          [_batch(m) for m in members]))
      _read(members, program, progress, ahead.push(step + 1, values))
  finally:
    progress.close()


def _batch(member: _Member) -> dict[str, np.ndarray]:
  trainer = member.trainer
  length, rows = trainer.batches.next_rows()
  member.meter.batch(
      rows['window'], trainer.batches.lengths_of(rows['window']))
  batch = trainer.batches.gather(length, rows)
  if len(trainer.buckets) > 1 and not trainer.config.data.packing:
    batch['dropout_lengths'] = np.full(len(rows['row']), length, np.int32)
  return batch


def _read(members: Sequence[_Member], program: parallel.Population,
          progress: logs.Progress, done: list[tuple[int, Any]]) -> None:
  """Logs the steps that are `done`."""
  every = members[0].trainer.config.train.log_every_steps
  for step, values in done:
    values = program.take(values)
    for member, own in zip(members, values, strict=True):
      member.read(step, own)
    progress.update(step)
    losses = [float(own['loss']) for member, own in zip(
        members, values, strict=True) if not member.failed]
    if step % every == 0 and losses:
      progress.note(f'loss {min(losses):.4f} … {max(losses):.4f}')


def _keep(members: Sequence[_Member], due: Sequence[_Member],
          program: parallel.Population, progress: logs.Progress, step: int,
          states: Any) -> None:
  """Evaluates and saves those `due`, one after another on all devices."""
  for member, state in zip(members, program.take(states), strict=True):
    if member in due and not member.failed:
      note = member.keep(step, state)
      if note:
        progress.note(f'{member.workdir.name}: {note}')
