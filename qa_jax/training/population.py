"""A population: runs that differ in seed and rates alone, as one program.

pmap over devices of vmap over members. Each member has parameters, batches and
dropout of its own, and leaves an ordinary run directory: its losses are those
of its config trained alone, to rounding.

A batch is padded to the longest of its step's members. Padding changes nothing,
and dropout is told the length that a member's rows have alone.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import json
import math
import operator
import pathlib
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.runtime import watchdog
from qa_jax.training import checkpointing as checkpointing_lib
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib

# What members may differ in: arguments of the program, not part of it.
RATES = ('learning_rate', 'weight_decay')


@dataclasses.dataclass(frozen=True)
class Population:
  """How members, each with a state of its own, run on devices.

  A tree of them has leading axes [D devices, m members of one]; the last
  member stands in for those that are missing.
  """

  # (states, rates, batches) → (states, metrics); donates the states
  step: parallel.Step
  place: Callable[[Sequence[Any]], Any]  # a host tree a member → on devices
  take: Callable[[Any], list[Any]]  # back to a host tree a member


def population(step: parallel.Step, *, members: int,
               devices: Sequence[jax.Device]) -> Population:
  """pmap over devices of vmap over members of step(state, rates, batch).

  Batches may differ in shape: zeros make every array as long as the longest
  member's.
  """
  devices = list(devices[:members])
  each = -(-members // len(devices))
  split = jax.sharding.NamedSharding(
      devices_lib.make_mesh(devices, {'data': len(devices)}),
      parallel.P('data'))

  def stack(*leaves: np.ndarray) -> np.ndarray:
    shape = np.max([np.shape(x) for x in leaves], axis=0).astype(int)
    out = np.zeros((len(devices) * each, *shape), np.asarray(leaves[0]).dtype)
    for i in range(len(out)):
      leaf = leaves[min(i, members - 1)]
      out[(i, *(slice(n) for n in np.shape(leaf)))] = leaf
    return out.reshape(len(devices), each, *shape)

  def take(tree: Any) -> list[Any]:
    flat = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree))
    return [jax.tree.map(operator.itemgetter((i, ...)), flat)
            for i in range(members)]

  return Population(
      jax.pmap(jax.vmap(step), axis_name='data', donate_argnums=0,
               devices=devices),
      lambda trees: jax.device_put(jax.tree.map(stack, *trees), split), take)


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

  trainer: trainer_lib.Trainer
  workdir: pathlib.Path
  store: manager.Checkpoints
  log: metrics_log_lib.MetricsLog | None = None
  meter: metrics_log_lib.StepMetrics | None = None
  keeper: checkpointing_lib.Checkpointer | None = None
  costs: metrics_log_lib.Costs | None = None
  outcome: dict[str, float] | errors.UserError | None = None

  @property
  def failed(self) -> bool:
    return isinstance(self.outcome, errors.UserError)

  def begin(self, step: int, costs: metrics_log_lib.Costs,
            requests: signals.StopRequests) -> None:
    """Puts the state of checkpoint `step` on the host; 0: as it begins."""
    # Of all members at once, states might not fit a device.
    trainer_lib.restore_state(self.trainer, self.store, step or None)
    if checkpointing_lib.is_complete(self.trainer, self.store, step):
      self.outcome = checkpointing_lib.final_metrics(self.trainer, self.workdir)
    self.trainer.state = jax.device_get(self.trainer.state)
    self.log = metrics_log_lib.MetricsLog(self.workdir, step)
    self.costs = costs
    self.meter = checkpointing_lib.step_metrics(self.trainer, self.log, costs)
    self.keeper = checkpointing_lib.Checkpointer(
        self.trainer, self.store, self.log, costs, self.workdir, requests,
        self.meter)

  def read(self, step: int, values: dict[str, np.ndarray]) -> None:
    """Logs a step; losses that are not finite end this member alone."""
    if not self.failed:
      try:
        self.meter.add([(step, values)])
      except errors.UserError as e:
        self.outcome = e
        console.say(f'{self.workdir}: {e}')

  def keep(self, step: int, state: step_lib.TrainState) -> str:
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
  if processes.is_multi_process():
    raise errors.UserError(
        f'a population trains in one process, not in {jax.process_count()}; '
        'give each its own configs')
  if len({kind(config) for config in configs}) != 1:
    raise errors.UserError(
        'a population differs in seed, optim.learning_rate and '
        'optim.weight_decay alone; parallel.mode is pmap or jit')
  for config, workdir in zip(configs, workdirs, strict=True):
    RunDirectory(workdir).check_config(config)
    lock.check_unlocked(workdir)
  first = trainer_lib.Trainer(configs[0])
  check_fit(first.state, len(configs), first.devices)
  members = []
  with contextlib.ExitStack() as open_things:
    for config, workdir in zip(configs, workdirs, strict=True):
      trainer = trainer_lib.Trainer(config, like=first)
      trainer.state = jax.device_get(trainer.state)
      checkpointing_lib.write_run(trainer, workdir, argv or [], {
          'population': [other.name for other in workdirs]})
      checkpointing_lib.hold_run(workdir, open_things)
      members.append(_Member(
          trainer, workdir, manager.Checkpoints(workdir / 'checkpoints')))
      open_things.callback(members[-1].close)
    requests = open_things.enter_context(signals.StopRequests())
    dog = open_things.enter_context(watchdog.Watchdog(
        configs[0].train.step_timeout_seconds, str(workdirs[0].parent)))
    # Where questions are grouped, an epoch's steps depend on the seed.
    for num_steps in sorted({m.trainer.num_steps for m in members}):
      _train([m for m in members if m.trainer.num_steps == num_steps],
             requests, dog)
    return [member.outcome for member in members]


def check_fit(state: step_lib.TrainState, members: int,
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


def _train(members: Sequence[_Member], requests: signals.StopRequests,
           dog: watchdog.Watchdog) -> None:
  """Evaluate → checkpoint → next batch → step, as train.py does."""
  first = members[0].trainer
  start = max(set.intersection(*({0, *m.store.steps} for m in members)))
  for member in members:
    member.begin(start, metrics_log_lib.Costs(share=1 / len(members)), requests)
  if all(member.outcome is not None for member in members):
    return
  console.say(f'{len(members)} runs as one program, from step {start}')
  program = population(
      lambda state, rates, batch: first.step(state, batch, rates=rates),
      members=len(members), devices=first.devices)
  rates = program.place([
      {name: np.float32(getattr(m.trainer.config.optim, name))
       for name in RATES} for m in members])
  states = program.place([m.trainer.state for m in members])
  ahead = devices_lib.RunAhead(train.run_ahead(), dog.waiting)
  progress = console.Progress('population', first.num_steps, start)
  try:
    for step in range(start, first.num_steps + 1):
      due = [m for m in members if m.keeper.due(step, start)]
      if due:
        _read(members, program, progress, ahead.drain())
        _keep(members, due, program, progress, step, states)
      if requests.signal and not all(
          m.failed or m.keeper.complete(step) for m in members):
        console.say('\n'.join(m.keeper.farewell(step) for m in members))
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


def _read(members: Sequence[_Member], program: Population,
          progress: console.Progress, done: list[tuple[int, Any]]) -> None:
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
          program: Population, progress: console.Progress, step: int,
          states: Any) -> None:
  """Evaluates and saves those `due`, one after another on all devices."""
  for member, state in zip(members, program.take(states), strict=True):
    if member in due and not member.failed:
      note = member.keep(step, state)
      if note:
        progress.note(f'{member.workdir.name}: {note}')
