"""A population: runs that differ only in seed and rates, as one program.

The program is pmap over devices of vmap over members. Each member has its
parameters, batches and dropout, and writes an ordinary run directory. A member
has the losses of a single run of its config, to rounding.

The batches of one step are padded to the longest member's batch. Padding
changes no loss, and dropout uses the length that a member's batch has alone.

Glossary of shapes: D devices, M members per device.
"""

import collections
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import operator
import pathlib
import time
from typing import Any

import jax
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import lock
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from qa_jax.runtime import processes
from qa_jax.runtime import settings
from qa_jax.runtime import signals
from qa_jax.runtime import watchdog
from qa_jax.training import checkpointing
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import parallel
from qa_jax.training import step as step_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib

MEMBERS = 'members'  # axis of the members of a device, for collectives
# Fields of config.optim in which members may differ: arguments of the program.
RATES = ('learning_rate', 'weight_decay')


@dataclasses.dataclass(frozen=True)
class VectorizedStep:
  """The step of all members, and the placement of their arrays on devices.

  A tree of all members has leading axes [D, M]. If D·M is larger than the
  number of members, the last member fills the rest.
  """
  # (states, rates, batches) → (states, metrics); donates the states
  step: parallel.Step
  place: Callable[[Sequence[Any]], Any]  # one host tree per member → devices
  take: Callable[[Any], list[Any]]  # devices → one host tree per member


def vectorize_step(step: parallel.Step, *, members: int,
                   devices: Sequence[jax.Device]) -> VectorizedStep:
  """Builds pmap over devices of vmap over members of step(state, rates, batch).

  Every array of a batch is padded with zeros to the size of the longest.
  """
  devices = list(devices[:members])
  members_per_device = -(-members // len(devices))
  split = jax.sharding.NamedSharding(
      devices_lib.make_mesh(devices, {'data': len(devices)}),
      parallel.P('data'))

  def stack(*leaves: np.ndarray) -> np.ndarray:
    shape = np.max([np.shape(x) for x in leaves], axis=0).astype(int)
    out = np.zeros((len(devices) * members_per_device, *shape),
                   np.asarray(leaves[0]).dtype)
    for i in range(len(out)):
      leaf = leaves[min(i, members - 1)]
      out[(i, *(slice(n) for n in np.shape(leaf)))] = leaf
    return out.reshape(len(devices), members_per_device, *shape)  # [D, M, …]

  def take(tree: Any) -> list[Any]:
    flat = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(tree))
    return [jax.tree.map(operator.itemgetter((i, ...)), flat)
            for i in range(members)]

  return VectorizedStep(
      jax.pmap(jax.vmap(step, axis_name=MEMBERS), axis_name='data',
               donate_argnums=0, devices=devices),
      lambda trees: jax.device_put(jax.tree.map(stack, *trees), split), take)


def member_step(trainer: trainer_lib.Trainer) -> parallel.Step:
  """Returns (state, rates, stack of batches) → (state, metrics) of a member.

  It makes one update for each batch of the stack. A single update is a stack of
  one, so that every number of updates a dispatch gives equal results.
  """
  several = step_lib.several_updates(trainer.step)

  def step(state, rates, batches):
    # All members make equally many updates. With a number for each member, the
    # loop would choose between the old and the new state of every member.
    count = jax.lax.pmax(batches[step_lib.COUNT], MEMBERS)
    return several(state, {**batches, step_lib.COUNT: count}, rates=rates)

  return step


def member_key(config: config_lib.Config) -> str:
  """Returns a key that is equal for configs that one population can train.

  In mode 'mesh' a run may need several devices, so that only equal configs have
  equal keys.
  """
  return config_lib.key(config, without=() if config.parallel.mode == 'mesh'
                        else ('seed', *(f'optim.{name}' for name in RATES)))


def check_deterministic(config: config_lib.Config) -> None:
  """Refuses precision.deterministic, which no population has.

  Raises:
    UserError: the field is True.
  """
  if config.precision.deterministic:
    raise errors.UserError(
        'config.precision.deterministic=True holds for runs alone, not in a '
        'population; choose --engine=local or precision.deterministic=False')


@dataclasses.dataclass(eq=False)  # equal only to itself
class _Member:
  """One run of the population, with its open files and its outcome."""

  trainer: trainer_lib.Trainer
  workdir: pathlib.Path
  store: manager.Checkpoints
  meter: metrics_log_lib.StepMetrics | None = None
  checkpointer: checkpointing.Checkpointer | None = None
  outcome: dict[str, float] | errors.UserError | None = None

  @property
  def failed(self) -> bool:
    return isinstance(self.outcome, errors.UserError)

  @property
  def newest_steps(self) -> set[int]:
    """Returns the steps of the newest two checkpoints, 0 if there are fewer.

    A kill between the saves of two members leaves them one checkpoint apart.
    """
    return {*sorted({0, *self.store.steps})[-2:]}

  def is_complete(self) -> bool:
    """Returns whether the newest checkpoint completes the run."""
    return checkpointing.make_schedule(self.trainer).is_complete(
        self.store, self.store.latest or 0)

  def begin(self, step: int, costs: metrics_log_lib.Costs,
            requests: signals.StopRequests, open_things: contextlib.ExitStack
            ) -> step_lib.TrainState:
    """Opens the log and returns the host state of checkpoint `step`.

    A member that has failed returns its initial state and only takes its place
    in the program, which thus stays the program of the undisturbed population.
    """
    if self.failed:
      self.trainer.batches.skip(step)
      return jax.device_get(self.trainer.state)
    state, counts, position = checkpointing.restore_state(
        self.trainer, self.store, step)
    self.trainer.batches.seek(position)
    if checkpointing.make_schedule(self.trainer).is_complete(self.store, step):
      self.outcome = checkpointing.final_metrics(
          self.trainer, self.workdir, state.params)
    log = metrics_log_lib.MetricsLog(self.workdir, step)
    open_things.callback(log.close)
    self.meter = checkpointing.step_metrics(self.trainer, log, costs, counts)
    self.checkpointer = checkpointing.build_checkpointer(
        self.trainer, self.store, self.workdir, requests, self.meter,
        start=step)
    # The states of all members at once might not fit on one device.
    return jax.device_get(state)

  def next_batches(self, count: int) -> list[dict[str, np.ndarray]]:
    """Returns `count` host batches, with the lengths that dropout uses."""
    trainer, batches = self.trainer, []
    for _ in range(count):
      length, rows = trainer.batches.next_rows()
      if not self.failed:
        self.meter.add_batch(
            rows['window'], trainer.batches.lengths_of(rows['window']))
      batch = trainer.batches.gather(length, rows)
      if len(trainer.buckets) > 1 and not trainer.batches.packing:
        batch['dropout_lengths'] = np.full(len(rows['row']), length, np.int32)
      batches.append(batch)
    return batches

  def read(self, steps: Sequence[int], values: dict[str, np.ndarray]) -> None:
    """Logs the steps of a dispatch; the values have a leading axis of steps.

    Too many skipped updates end only this member.

    They are recorded, so that the other members do not wait for this one if the
    population is killed and started again.
    """
    if self.failed:
      return
    try:
      self.meter.add_steps([
          (step, {name: value[k] for name, value in values.items()})
          for k, step in enumerate(steps)])
    except errors.UserError as e:
      self.outcome = e
      console.say(f'{self.workdir}: {e}')
      if self.meter.skipped[1] > self.trainer.config.train.max_skipped:
        files.write_json(RunDirectory(self.workdir).failure_file,
                         {'step': self.meter.step, 'error': str(e)})

  def evaluate_and_save(self, step: int, state: step_lib.TrainState) -> str:
    """Evaluates and saves this member; returns a line for the user."""
    try:
      note = self.checkpointer.evaluate_and_save(step, jax.device_put(
          state, self.trainer.parallel.state_sharding(state)))
    except errors.UserError as e:
      self.outcome = e
      return str(e)
    if self.checkpointer.is_complete(step):
      self.outcome = self.checkpointer.metrics
    return note

  def stop_message(self, step: int) -> str:
    """Returns the line for the user when a signal stops the population."""
    try:
      if not self.failed:
        return self.checkpointer.stop_message(step)
    except errors.UserError as e:
      self.outcome = e
    return f'{self.workdir}: {self.outcome}'


@dataclasses.dataclass(frozen=True)
class _PopulationProgram:
  """The steps of all members; a `train.Program`."""

  members: Sequence[_Member]  # those that have failed take part without effect
  vectorized: VectorizedStep
  rates: Any  # learning rate and weight decay of each member, on the devices
  progress: console.Progress
  most_at_once: int
  compiled: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)

  def is_due(self, step: int) -> bool:
    return any(not m.failed and m.checkpointer.is_due(step)
               for m in self.members)

  def evaluate_and_save(self, step: int, states: Any) -> None:
    # One member after another, each on all devices.
    began = time.perf_counter()
    for member, state in zip(
        self.members, self.vectorized.take(states), strict=True):
      if not member.failed and member.checkpointer.is_due(step):
        note = member.evaluate_and_save(step, state)
        if note:
          self.progress.note(f'{member.workdir.name}: {note}')
    self._leave_out(time.perf_counter() - began)

  def _leave_out(self, seconds: float) -> None:
    for member in self.members:
      if not member.failed:
        member.meter.leave_out(seconds)

  def is_complete(self, step: int) -> bool:
    return all(m.failed or m.checkpointer.is_complete(step)
               for m in self.members)

  def has_failed(self) -> bool:
    return all(m.failed for m in self.members)

  def stop_message(self, step: int) -> str:
    return '\n'.join(m.stop_message(step) for m in self.members)

  def is_compiling(self) -> bool:
    return False  # The first step of a shape compiles it.

  def wait_for_program(self) -> None:
    pass

  def dispatch(self, step: int, states: Any) -> tuple[Any, Any, int]:
    most = next((n for n in range(1, self.most_at_once)
                 if self.is_due(step + n)), self.most_at_once)
    # Batches of one shape in every member are padded alike.
    count = min(m.trainer.batches.count_alike(most) for m in self.members)
    batches = [m.next_batches(count) for m in self.members]
    placed = self.vectorized.place(
        [step_lib.stack_batches(some, self.most_at_once) for some in batches])
    shapes = tuple(x.shape for x in jax.tree.leaves(placed))
    began = time.perf_counter()
    states, values = self.vectorized.step(states, self.rates, placed)
    if shapes not in self.compiled:  # the call returned after the compilation
      self.compiled.add(shapes)
      self._leave_out(time.perf_counter() - began)
    return states, values, count

  def read(self, done: list[tuple[range, Any]]) -> None:
    for steps, values in done:
      rows = self.vectorized.take(values)
      for member, row in zip(self.members, rows, strict=True):
        member.read(steps, row)
      self.progress.update(steps[-1])
      # A member that had failed before the start has no meter.
      meters = [m.meter for m in self.members if not m.failed]
      if meters and any(map(meters[0].is_due, steps)):
        losses = [meter.mean_loss for meter in meters]
        self.progress.note(f'loss {min(losses):.4f} … {max(losses):.4f}')


def train_members(
    configs: Sequence[config_lib.Config], workdirs: Sequence[pathlib.Path],
    ) -> list[dict[str, float] | errors.UserError]:
  """Trains or resumes a population.

  Returns the final metrics of each member, or the error that ended it. The
  members go on from the newest step of which every member has a checkpoint, so
  that a population that was killed repeats the undisturbed one bit for bit. A
  member without a checkpoint of this step, which is damaged, goes on from its
  newest one in a program of its own. A member that failed before the kill is
  tried again only if all others are complete. run.json of each member names all
  members.

  Raises:
    UserError: a config or the data has a mistake, the configs are not one
      population, their states need more than the memory, or a workdir belongs
      to another config or process.
    Stopped: a signal asked for it. The runs are saved.
  """
  if processes.is_multi_process():
    raise errors.UserError(
        f'a population trains in one process, not in {jax.process_count()}; '
        'give each its own configs')
  check_deterministic(configs[0])
  if len({member_key(config) for config in configs}) != 1:
    raise errors.UserError(
        'a population differs in seed, optim.learning_rate and '
        'optim.weight_decay alone; parallel.mode is pmap or jit')
  settled = []
  for config, workdir in zip(configs, workdirs, strict=True):
    directory = RunDirectory(workdir)
    directory.check_config(config)
    lock.check_unlocked(workdir)
    settled.append(directory.settle(config, jax.default_backend()))
  if len({member_key(config) for config in settled}) != 1:
    raise errors.UserError(
        'the runs of a population began on different platforms, so that their '
        'data.packing or data.buckets differ; choose --engine=local')
  first = trainer_lib.build_trainer(settled[0])
  for note in first.notes:
    console.say(note)
  check_memory(first.state, len(configs), first.devices)
  members = []
  with contextlib.ExitStack() as open_things:
    for config, own, workdir in zip(configs, settled, workdirs, strict=True):
      trainer = trainer_lib.with_seed_and_rates(first, own)
      trainer = dataclasses.replace(
          trainer, state=jax.device_get(trainer.state))
      members.append(_Member(trainer, workdir, checkpointing.open_run(
          trainer, config, workdir, open_things,
          {'population': [other.name for other in workdirs]})))
    first = None  # frees its state on the device
    requests = open_things.enter_context(signals.StopRequests())
    dog = open_things.enter_context(watchdog.Watchdog(
        configs[0].train.step_timeout_seconds, str(workdirs[0].parent)))
    # If questions are grouped, the number of steps in an epoch depends on the
    # seed, but one program has one learning-rate schedule.
    _read_failures(members)
    for num_steps in sorted({m.trainer.num_steps for m in members}):
      for start, group in _group_by_start(
          [m for m in members if m.trainer.num_steps == num_steps]):
        _train(group, start, requests, dog)
    return [member.outcome for member in members]


def _read_failures(members: Sequence[_Member]) -> None:
  """Sets the outcome of members whose failure is recorded.

  If all other members are complete, the records are removed, and the members
  that failed try again from their newest checkpoints.
  """
  records = {id(m): RunDirectory(m.workdir).failure_file for m in members
             if RunDirectory(m.workdir).failure_file.is_file()}
  retry = all(id(m) in records or m.is_complete() for m in members)
  for member in members:
    if retry and id(member) in records:
      records[id(member)].unlink()
    elif id(member) in records:
      record = files.read_object(records[id(member)])
      member.outcome = errors.UserError(str(record.get('error')))
      console.say(f'{member.workdir}: failed at step {record.get("step")}; '
                  'the others go on')


def _group_by_start(
    members: Sequence[_Member]) -> list[tuple[int, list[_Member]]]:
  """Returns (step, members) of members that can go on from a common step.

  The step is one of the newest two of each member, so that none repeats more
  than the steps between two checkpoints. Members that have failed are in the
  first group. Without any other member there is no group.
  """
  groups: list[tuple[int, list[_Member]]] = []
  failed = [m for m in members if m.failed]
  rest = [m for m in members if not m.failed]
  while rest:
    counts = collections.Counter(s for m in rest for s in m.newest_steps)
    start = max(counts, key=lambda step: (counts[step], step))
    group = [m for m in members if (m in failed and not groups)
             or (m in rest and start in m.newest_steps)]
    groups.append((start, group))
    rest = [m for m in rest if m not in group]
  return groups


def check_memory(state: step_lib.TrainState, members: int,
                 devices: Sequence[jax.Device]) -> None:
  """Checks that states and gradients fit on the devices; a CPU has no limit.

  Raises:
    UserError: they need more memory than a device has.
  """
  members_per_device = -(-members // min(members, len(devices)))
  size = members_per_device * sum(
      x.nbytes for x in jax.tree.leaves((state, state.params))) / 2**20
  limit = devices_lib.memory_bytes(devices[0]) / 2**20
  if size > limit:
    raise errors.UserError(
        f'{members} members on {len(devices)} devices: {members_per_device} of '
        f'one take at least {size:.0f} MiB, more than its {limit:.0f} MiB; '
        'sweep fewer seeds or rates, or use --engine=local')


def _train(members: Sequence[_Member], start: int,
           requests: signals.StopRequests, dog: watchdog.Watchdog) -> None:
  """Trains members that have an equal number of steps from step `start` on."""
  first = members[0].trainer
  with contextlib.ExitStack() as open_things:
    states = [member.begin(start, open_things.enter_context(
        metrics_log_lib.Costs(share=1 / len(members))), requests, open_things)
              for member in members]
    # A member that has failed or is complete only takes its place.
    left = sum(member.outcome is None for member in members)
    if not left:
      return
    console.say(f'{left} run' + 's' * (left > 1) + ' as one program'
                + f', {first.dispatch} updates a dispatch' * (
                    first.dispatch > 1)
                + f', from step {start}; each batch shape is compiled at its '
                f'first step{settings.cache_note()}')
    vectorized = vectorize_step(
        member_step(first), members=len(members), devices=first.devices)
    rates = vectorized.place([
        {name: np.float32(getattr(m.trainer.config.optim, name))
         for name in RATES} for m in members])
    progress = console.Progress('population', first.num_steps, start)
    open_things.callback(progress.close)
    train.run_loop(
        _PopulationProgram(members, vectorized, rates, progress,
                           first.dispatch),
        vectorized.place(states), start=start, num_steps=first.num_steps,
        requests=requests, dog=dog)
