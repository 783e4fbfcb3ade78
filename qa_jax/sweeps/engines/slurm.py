"""The engine that runs trials as jobs of a SLURM array, through submitit.

submitit writes pickles to WORKDIR/slurm. Do not use a workdir that you do not
trust, because loading a pickle can run code.
"""

from collections.abc import Iterator, Sequence
import contextlib
import io
import re
import shutil
import tempfile
from typing import Any

from qa_jax import errors
from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import remote
from qa_jax.sweeps.engines import scheduler

# Parameters that give a job several tasks, which would all run one trial.
ONE = ('nodes', 'tasks_per_node', 'slurm_nodes', 'slurm_ntasks',
       'slurm_ntasks_per_node')
# The time limits of a job in minutes, without which submitit asks for 5.
LIMITS = ('timeout_min', 'slurm_time')
DEFAULT_MINUTES = 24 * 60


class Work(remote.Work):
  """A task that is submitted again after preemption or a timeout."""

  def __call__(self) -> int:
    import submitit
    job = submitit.JobEnvironment()
    return super().__call__(f'job {job.job_id} on {job.hostname}')

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

  Raises:
    UserError: SLURM refuses the jobs.
  """
  import submitit
  executor = _executor(setup, str(trials[0].workdir / 'slurm'), len(trials))
  if not any(name in setup.slurm for name in LIMITS):
    console.say_once(f'each job may take {DEFAULT_MINUTES // 60} hours; '
                     '--slurm=timeout_min=MINUTES sets another limit')

  def start(starts: Sequence[scheduler.Start]) -> Iterator[Process]:
    sizes = [s.log.tell() for s in starts]
    for s in starts:
      s.log.close()  # frees the lock for the job
    try:
      # submitit also prints what it raises.
      with contextlib.redirect_stderr(io.StringIO()), executor.batch():
        jobs = [executor.submit(Work(
            command(s.trial), s.trial.log, s.trial.metrics)) for s in starts]
    except (submitit.core.utils.UncompletedJobError,
            submitit.core.utils.FailedSubmissionError) as e:
      reason = ' '.join(str(e).split())
      raise errors.UserError(
          f'--engine=slurm: sbatch refused {len(starts)} trials: '
          f'{reason[:300]}; change --slurm, or run fewer at a time with '
          '--only') from None
    ids = ', '.join(dict.fromkeys(job.job_id.split('_')[0] for job in jobs))
    console.say(f'submitted job {ids}: {starts[0].trial.name}'
                + f' and {len(starts) - 1} more' * (len(starts) > 1))
    for s, job, size in zip(starts, jobs, sizes, strict=True):
      yield Process(job, s.trial, size)

  return scheduler.run_trials(
      scheduler.Queue(trials, setup.study), len(trials), start)


def _executor(setup: scheduler.Setup, folder: str, trials: int = 1) -> Any:
  import submitit
  options = {'slurm_job_name': 'qa_jax',
             'slurm_array_parallelism': setup.workers or trials, **setup.slurm}
  cluster = options.pop('cluster', 'slurm')
  if cluster == 'slurm' and not shutil.which('sbatch'):
    raise errors.UserError(
        '--engine=slurm: this machine has no sbatch; start the sweep on a '
        'login node of SLURM, or rehearse it here with --slurm=cluster=local')
  for name in ONE:
    if options.get(name, 1) != 1:
      raise errors.UserError(
          f'--slurm: {name}={options[name]}, but a trial is one process; leave '
          'it out, or train a config with srun and --coordinator=auto')
  for name in LIMITS:
    if type(options.get(name, 1)) is not int:
      raise errors.UserError(f'--slurm: {name}={options[name]}: give minutes, '
                             'such as timeout_min=240')
  if not any(name in options for name in LIMITS):
    options['timeout_min'] = DEFAULT_MINUTES
  try:
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(**options)
  except (RuntimeError, ValueError, NameError, TypeError,
          AssertionError) as e:
    # submitit adds lists of all its parameters.
    reason = str(e).split('\n')[0].split(' Valid arguments')[0].rstrip('.')
    if isinstance(e, NameError):  # an unknown name
      reason += ('; options of sbatch begin with slurm_, such as '
                 'slurm_partition=gpu')
    raise errors.UserError(f'--engine=slurm: {reason[:300]}') from None
  return executor


class Process(remote.Process):
  """A job that waits or runs."""

  def __init__(self, job: Any, trial: plan.Trial, size: int):
    super().__init__(trial, size)
    self._job = job

  def poll(self) -> int | None:
    if self._code is None and self._job.done():
      lost = self._job.exception()  # a lost job has no result
      if lost:
        scheduler.record_note(self._trial.log, f'{_reason(str(lost))}; see '
                              f'{self._job.paths.stderr}')
      self._code = 1 if lost else self._job.result()
    return self._code

  def end(self, force: bool) -> None:
    del force  # SLURM kills a job that does not end
    self._job.cancel(check=False)


def _reason(text: str) -> str:
  """Returns the line of an error of submitit that says why a job was lost."""
  parts = re.split('-{20,}', text)
  if len(parts) > 1:  # the traceback of the job
    return parts[1].strip().split('\n')[-1]
  return ' '.join(text.strip().split('\n')[:2])
