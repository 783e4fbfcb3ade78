"""Trials as jobs of a SLURM array, submitted by submitit.

submitit keeps pickles in WORKDIR/slurm: open no workdir that you don't trust.
"""

from collections.abc import Iterator, Sequence
import tempfile
from typing import Any

from qa_jax import errors
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import remote
from qa_jax.sweeps.engines import scheduler

# Parameters of several tasks a job: each would be the same trial.
ONE = ('nodes', 'tasks_per_node', 'slurm_nodes', 'slurm_ntasks',
       'slurm_ntasks_per_node')


class Work(remote.Work):
  """Submitted again when SLURM pre-empts it or its time is over."""

  def checkpoint(self) -> Any:
    """What submitit calls then; the run resumes from its last checkpoint."""
    import submitit
    return submitit.helpers.DelayedSubmission(self)


def check(setup: scheduler.Setup) -> None:
  """Refuses what submitit does; it needs an sbatch, or cluster=local.

  Raises:
    UserError: as said, or submitit is not installed.
  """
  try:
    import submitit  # noqa: F401
  except ImportError:
    raise errors.UserError(
        "--engine=slurm needs submitit: pip install -e '.[slurm]'") from None
  with tempfile.TemporaryDirectory() as folder:
    _executor(setup, folder)


def run(trials: Sequence[plan.Trial], command: scheduler.Command,
        setup: scheduler.Setup) -> dict[str, str]:
  """Runs trials → {name: why it failed}.

  All that can begin are one array, of which `setup.workers` run at a time (0:
  as many as there is room for). What ends this function cancels its jobs.
  """
  executor = _executor(setup, str(trials[0].workdir / 'slurm'))

  def start(starts: Sequence[scheduler.Start]) -> Iterator[Process]:
    for s in starts:
      s.log.close()  # the lock is for the job
    with executor.batch():
      jobs = [executor.submit(Work(
          command(s.trial), s.trial.log, s.trial.metrics)) for s in starts]
    for s, job in zip(starts, jobs, strict=True):
      yield Process(job, s.trial)

  return scheduler.run_trials(
      scheduler.Queue(trials, setup.study), len(trials), start)


def _executor(setup: scheduler.Setup, folder: str) -> Any:
  import submitit
  options = {'slurm_job_name': 'qa_jax', **setup.slurm}
  cluster = options.pop('cluster', 'slurm')
  for name in ONE:
    if options.get(name, 1) != 1:
      raise errors.UserError(
          f'--slurm: {name}={options[name]}, but a trial is one process; leave '
          'it out, or train a config with srun and --coordinator=auto')
  if setup.workers:
    options['slurm_array_parallelism'] = setup.workers
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(**options)
  except (RuntimeError, ValueError, NameError, TypeError,
          AssertionError) as e:
    reason = ' '.join(str(e).split())
    raise errors.UserError(f'--slurm: {reason[:300]}') from None
  return executor


class Process:
  """A job, wherever it waits or runs."""

  def __init__(self, job: Any, trial: plan.Trial):
    self._job, self._trial = job, trial
    self._code: int | None = None

  def poll(self) -> int | None:
    if self._code is None and self._job.done():
      # A job that was lost has an exception and no result.
      lost = self._job.exception()
      if lost is not None:
        scheduler.record_note(self._trial.log,
                              str(lost).strip().split('\n')[0])
      self._code = self._job.result() if lost is None else 1
    return self._code

  def end(self, force: bool) -> None:
    del force  # SLURM ends what does not end itself
    self._job.cancel(check=False)
