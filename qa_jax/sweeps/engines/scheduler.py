"""The order of trials: what may begin, what became of it, what is next.

An engine starts processes; here it is decided when, and for which trial. The
lock of a trial's log says whether somebody runs it.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fcntl
import pathlib
import signal
import time
from typing import Any, BinaryIO, Protocol

from qa_jax.io import files
from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps import study as study_lib
from qa_jax.sweeps.engines import progress

RETRIES = 2  # of a trial that died; a user's mistake would only come again
GRACE_SECONDS = 10.0  # between asking a trial to end and ending it
POLL_SECONDS = 0.1
LOG_MARK = 'sweep: '  # begins what is not the trial's own
MISTAKE = 'error: '  # begins the last line of a trial that need not try again

Command = Callable[[plan.Trial], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What an engine is told beside trials; each takes what concerns it."""

  environments: Sequence[Mapping[str, str]] = ({},)  # one a worker, here
  workers: int = 0  # trials side by side; 0: one a device, else one
  address: str = 'auto'  # of a Ray cluster
  # What submitit passes on to SLURM; cluster='local' rehearses without one.
  slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Where results are recorded, and who says that a trial need not go on.
  study: study_lib.Study = dataclasses.field(
      default_factory=study_lib.in_memory)


class Process(Protocol):
  """A trial that runs somewhere."""

  def poll(self) -> int | None:
    """Exit code, negative for a signal; None while it runs."""

  def end(self, force: bool) -> None:
    """Asks it to end, or ends it."""


@dataclasses.dataclass(frozen=True)
class Start:
  """A trial that is to begin."""

  worker: int
  trial: plan.Trial
  log: BinaryIO  # locked; who starts it closes it


def run_trials(queue: 'Queue', workers: int,
               start: Callable[[Sequence[Start]], Iterable[Process]],
          ) -> dict[str, str]:
  """Runs a queue, at most `workers` trials at once → {name: why it failed}.

  `start` gives the processes one by one: what has begun when it raises is
  ended here. A trial that dies is started again and resumes; one that ends
  with a message is not.
  """
  running: dict[int, _Running] = {}
  took: list[float] = []  # seconds, of those that have ended
  try:
    while queue.waiting or running:
      for worker, job in [*running.items()]:
        code = job.process.poll()
        if code is None:
          _prune(job, queue)
          continue
        del running[worker]
        queue.ended(job.trial, code, job.hopeless)
        took.append(time.monotonic() - job.began)
      starts = []
      for worker in range(workers):
        if worker not in running:
          trial, log = queue.next()
          if trial:
            starts.append(Start(worker, trial, log))
      for s, process in zip(starts, start(starts) if starts else (),
                            strict=True):
        running[s.worker] = _Running(s.trial, process)
      if queue.board.is_due:
        now = time.monotonic()
        rows = [
            progress.progress_row(j.trial, now - j.began)
            for j in running.values()
        ]
        queue.board.show(
            rows, progress.eta(rows, len(queue.waiting), workers, took))
      time.sleep(POLL_SECONDS)
  finally:
    stop([job.process for job in running.values()])
    queue.board.close()
  return queue.failed


@dataclasses.dataclass
class _Running:
  trial: plan.Trial
  process: Process
  began: float = dataclasses.field(default_factory=time.monotonic)
  hopeless: str = ''  # why it has been asked to end
  deadline: float = 0.0  # by when


def _prune(job: _Running, queue: 'Queue') -> None:
  if not job.hopeless:
    job.hopeless = queue.study.hopeless(job.trial)
    if job.hopeless:
      job.process.end(force=False)
      job.deadline = time.monotonic() + GRACE_SECONDS
  elif time.monotonic() > job.deadline:
    job.process.end(force=True)


def stop(processes: Sequence[Process]) -> None:
  """Asks processes to end, then ends them."""
  for force in (False, True):
    for process in processes:
      if process.poll() is None:
        process.end(force)
    deadline = time.monotonic() + GRACE_SECONDS
    while (any(process.poll() is None for process in processes)
           and time.monotonic() < deadline):
      time.sleep(POLL_SECONDS)


class Queue:
  """What became of the trials so far."""

  def __init__(self, trials: Sequence[plan.Trial], study: study_lib.Study):
    study.register(trials)
    self.study = study
    self.waiting = list(trials)
    self.failed: dict[str, str] = {}
    self.board = progress.Board(len(trials), sum(
        trial.metrics.is_file() for trial in trials))
    self._trials = {trial.name: trial for trial in trials}
    self._done: set[str] = set()
    self._pruned: set[str] = set()
    self._attempts: collections.Counter[str] = collections.Counter()
    self._locked: set[str] = set()

  def next(self) -> tuple[plan.Trial, BinaryIO] | tuple[None, None]:
    """A trial that can begin and its log, which is locked; or none."""
    for trial in [*self.waiting]:
      if trial.source and trial.source not in self._done:
        self._share_end(trial)
        continue
      log = lock_sweep(trial.log)
      if log is None:
        if trial.name not in self._locked:
          console.say(f'{trial.name}: waiting for the process that runs it')
        self._locked.add(trial.name)
        continue
      self.waiting.remove(trial)
      if self._is_over(trial):
        log.close()
        continue
      if trial.source and not trial.run.exists():
        plan.share_training(self._trials[trial.source], trial)
      self._attempts[trial.name] += 1
      self.study.begin(trial)
      return trial, log
    return None, None

  def _share_end(self, trial: plan.Trial) -> None:
    """Takes note of a trial that waits for a training in vain."""
    if trial.source in self.failed:
      self.waiting.remove(trial)
      self._fail(trial, f'{trial.source} failed, whose training it shares')
    elif trial.source in self._pruned:
      self.waiting.remove(trial)
      self._prune(trial, f'{trial.source} was, whose training it shares')

  def _is_over(self, trial: plan.Trial) -> bool:
    """Takes note of a trial that need not begin."""
    if trial.metrics.is_file():
      self._done.add(trial.name)
      self.study.complete(trial)
      return True
    if trial.pruned.is_file():
      self._pruned.add(trial.name)
      return True
    reason = self.study.superfluous(trial)
    if reason:
      self._prune(trial, reason)
    return bool(reason)

  def ended(self, trial: plan.Trial, code: int, hopeless: str) -> None:
    """Takes note of a trial whose process has ended, or was ended."""
    if trial.metrics.is_file():
      self._done.add(trial.name)
      self.study.complete(trial)
      found = files.read_object(trial.metrics)
      self._note(f'{trial.name}: EM {found["exact_match"]:.2f} '
                 f'F1 {found["f1"]:.2f}')
      return
    if hopeless:
      self._prune(trial, hopeless)
      return
    reason = _reason(trial.log, code)
    if reason.startswith(MISTAKE) or self._attempts[trial.name] > RETRIES:
      self._fail(trial, reason.removeprefix(MISTAKE))
    else:
      console.say(f'{trial.name}: {reason}; starting it again')
      self.waiting.insert(0, trial)

  def _fail(self, trial: plan.Trial, reason: str) -> None:
    self.failed[trial.name] = reason
    self.study.fail(trial, reason)
    self._note(f'{trial.name}: failed: {reason}')

  def _prune(self, trial: plan.Trial, reason: str) -> None:
    self._pruned.add(trial.name)
    self.study.prune(trial, reason)
    self._note(f'{trial.name}: pruned: {reason}')

  def _note(self, note: str) -> None:
    self.board.ended(
        len(self._done) + len(self.failed) + len(self._pruned), note)


def lock_sweep(path: pathlib.Path) -> BinaryIO | None:
  """The open log, which only its holders can open so; None if there is one.

  The lock belongs to the open file, which a trial inherits as its output: it
  lasts until both have ended, however they do.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  log = path.open('ab')
  try:
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    log.close()
    return None
  return log


def _reason(log: pathlib.Path, code: int) -> str:
  """Why a process ended so: a signal, or the last line that it wrote."""
  if code < 0:
    reason = f'died of signal {-code} ({signal.strsignal(-code)})'
    record_note(log, reason)
    return reason
  lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
  last = next((line for line in reversed(lines) if line.strip()), 'no log')
  return last.strip().removeprefix(LOG_MARK)[:300]


def record_note(log: pathlib.Path, text: str) -> None:
  """Adds a line to a trial's log that is not its own."""
  with log.open('a', encoding='utf-8') as file:
    file.write(f'{LOG_MARK}{text}\n')
