"""The engine that trains a population of trials as one program.

The members of a population are computed from the plan and recorded in run.json.
A sweep that was killed continues with the recorded members.
"""

from collections.abc import Sequence
import traceback
from typing import BinaryIO

from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import scheduler
from qa_jax.training import population
from qa_jax.training import train


def groups(trials: Sequence[plan.Trial]) -> list[list[plan.Trial]]:
  """Returns the populations that still train, as lists of trials.

  The run.json of any member records the population of a trial. A failed trial
  is retried alone.
  """
  training = [t for t in trials if not t.source]
  recorded: dict[str, tuple[str, ...]] = {}
  for trial in training:
    run = RunDirectory(trial.run)
    if run.record_file.is_file():
      record = run.read_record()
      names = tuple(record.get('population', [trial.name]))
      recorded |= dict.fromkeys(names, names)
  members: dict[object, list[plan.Trial]] = {}
  for trial in training:
    key = trial.name if _failed(trial) else (
        recorded.get(trial.name) or population.member_key(trial.config))
    members.setdefault(key, []).append(trial)
  return [group for group in members.values()
          if not all(t.metrics.is_file() for t in group)]


def _failed(trial: plan.Trial) -> bool:
  return not trial.metrics.is_file() and plan.last_words(
      trial.log).startswith(plan.MISTAKE)


def run(trials: Sequence[plan.Trial], command: scheduler.Command,
        setup: scheduler.Setup) -> dict[str, str]:
  """Trains one population after another on all devices.

  Returns the names of failed trials with the reasons. A population of one, and
  a trial that shares a training and only evaluates, are ordinary runs.
  """
  del command  # no process is started
  setup.study.register(trials)
  trials = [t for t in trials if not t.pruned.is_file()]
  failed: dict[str, str] = {}
  by_name = {trial.name: trial for trial in trials}
  for group in groups(trials):
    setup.check_signals()
    failed |= _run_group(group)
  for trial in trials:
    if not trial.source or trial.metrics.is_file():
      continue
    source = by_name.get(trial.source)
    if not source or not source.metrics.is_file():
      failed[trial.name] = f'{trial.source} failed, whose training it shares'
      continue
    if not trial.run.exists():
      plan.share_training(source, trial)
    setup.check_signals()
    failed |= _run_group([trial])
  setup.check_signals()
  return failed


def _run_group(group: Sequence[plan.Trial]) -> dict[str, str]:
  names = ', '.join(trial.name for trial in group)
  opened: list[BinaryIO] = []
  try:
    for trial in group:
      log = scheduler.lock_log(trial.log)
      if log is None:
        return {t.name: f'another process runs {trial.name}' for t in group}
      opened.append(log)
      log.write(f'{plan.LOG_MARK}as one program: {names}\n'.encode())
    try:
      outcomes = _outcomes(group)
    except errors.UserError as e:  # no member is to blame
      return {t.name: str(e) for t in group}
    failed = {}
    for trial, log, outcome in zip(group, opened, outcomes, strict=True):
      if isinstance(outcome, errors.UserError):
        failed[trial.name] = str(outcome)
        reason = ' '.join(str(outcome).split())
        log.write(f'{plan.MISTAKE}{reason}\n'.encode())
    return failed
  finally:
    for log in opened:
      log.close()


def _outcomes(group: Sequence[plan.Trial]) -> list[object]:
  """Returns the metrics of each trial, or the UserError that ended it.

  Any other exception becomes one, so that the other populations are trained.

  Raises:
    UserError: a population is refused as a whole.
  """
  try:
    if len(group) == 1:
      console.say(f'{group[0].name}: alone, not in a population')
      return [train.train(group[0].config, group[0].run)]
    console.say(f'population of {len(group)}: {group[0].name} …')
    return population.train_members(
        [t.config for t in group], [t.run for t in group])
  except errors.UserError as e:
    if len(group) > 1:
      raise
    return [e]
  except Exception as e:  # a device or a head of one's own may raise anything
    traceback.print_exc()
    return [errors.UserError(f'{type(e).__name__}: {e}')] * len(group)
