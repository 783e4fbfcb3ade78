"""The engine that runs trials as jobs of a SLURM array, through submitit.

submitit writes pickles to WORKDIR/slurm. Do not use a workdir that you do not
trust, because loading a pickle can run code.
"""

from collections.abc import Iterator, Sequence
import tempfile
from typing import Any

from qa_jax import errors
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import remote
from qa_jax.sweeps.engines import scheduler

# Parameters that give a job several tasks, which would all run one trial.
ONE = ('nodes', 'tasks_per_node', 'slurm_nodes', 'slurm_ntasks',
       'slurm_ntasks_per_node')


class Work(remote.Work):
  """A task that is submitted again after preemption or a timeout."""

  def checkpoint(self) -> Any:
    """Returns the submission that resumes from the last checkpoint."""
    import submitit
    return submitit.helpers.DelayedSubmission(self)


def check(setup: scheduler.Setup) -> None:
  """Checks the options of --slurm and that jobs can be submitted.

  Raises:
    UserError: submitit is not installed or refuses an option, or there is
      neither sbatch nor cluster=local.
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
  """Runs trials; returns the names of failed trials with the reasons.

  All trials that can begin form one array, of which `setup.workers` run at a
  time (0: no limit). An exception cancels all jobs.
  """
  executor = _executor(setup, str(trials[0].workdir / 'slurm'))

  def start(starts: Sequence[scheduler.Start]) -> Iterator[Process]:
    with executor.batch():
      for s in starts:
        s.log.close()  # frees the lock for the job
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
    raise errors.UserError(f'--engine=slurm: {reason[:300]}') from None
  return executor


class Process:
  """A job that waits or runs."""

  def __init__(self, job: Any, trial: plan.Trial):
    self._job, self._trial = job, trial
    self._code: int | None = None

  def poll(self) -> int | None:
    if self._code is None and self._job.done():
      lost = self._job.exception()  # a lost job has no result
      if lost:
        scheduler.record_note(self._trial.log,
                              str(lost).strip().split('\n')[0])
      self._code = 1 if lost else self._job.result()
    return self._code

  def end(self, force: bool) -> None:
    del force  # SLURM kills a job that does not end
    self._job.cancel(check=False)
