"""The queue of trials, and the loop that runs it with an engine's processes.

A trial goes through these steps:

1. It waits in the queue. A trial that shares the training of another trial
   waits until that one is complete, and fails or is pruned with it.
2. The queue locks its log file. The lock shows that a process runs the trial;
   if another sweep holds it, the trial goes on waiting.
3. A complete or pruned trial is not started. The study may prune it here.
4. The engine starts its process, which inherits the lock.
5. While it runs, the study reads its evaluations and may ask it to end: it gets
   SIGTERM and, after GRACE_SECONDS, SIGKILL.
6. When the process has ended, the trial is complete if it has metrics.json. It
   has failed if its log has a message to the user. Otherwise it died: it is
   started again, at most RETRIES times, from its last checkpoint.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fcntl
import pathlib
import signal
import time
from typing import Any, BinaryIO, Protocol

from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps import study as study_lib
from qa_jax.sweeps.engines import progress

RETRIES = 2  # of a trial that died; a user's mistake is not retried
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
POLL_SECONDS = 0.1

Command = Callable[[plan.Trial], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Setup:
  """The options of engines; every engine reads those that concern it."""

  environments: Sequence[Mapping[str, str]] = ({},)  # one a local worker
  workers: int = 0  # trials side by side on Ray or SLURM; 0: the most
  address: str = 'auto'  # of a Ray cluster
  # Parameters of submitit; cluster='local' runs jobs here without SLURM.
  slurm: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # The study records results and decides which trials stop early.
  study: study_lib.Study = dataclasses.field(
      default_factory=study_lib.in_memory)
  # Raises the SystemExit of a signal that came in a run of this process.
  check_signals: Callable[[], None] = lambda: None


class Process(Protocol):
  """The process of a trial, here or on another machine."""

  def poll(self) -> int | None:
    """Returns the exit code, negative for a signal; None while it runs."""

  def is_queued(self) -> bool:
    """Returns whether the process waits elsewhere and has not begun."""

  def end(self, force: bool) -> None:
    """Asks the process to end, or kills it if `force`."""


@dataclasses.dataclass(frozen=True)
class Start:
  """A trial to start on a worker."""

  worker: int
  trial: plan.Trial
  log: BinaryIO  # locked; the engine closes it


def run_trials(
    queue: 'Queue', workers: int,
    start: Callable[[Sequence[Start]], Iterable[Process]]) -> dict[str, str]:
  """Runs the trials of a queue, at most `workers` at once.

  Returns the names of failed trials with the reasons. `start` yields processes
  one by one, so that the started ones are ended here if it raises.
  """
  running: dict[int, _Running] = {}
  took: list[float] = []  # seconds of the complete trials
  try:
    while queue.waiting or running:
      for worker, job in [*running.items()]:
        code = job.process.poll()
        if code is None:
          _prune(job, queue)
        else:
          del running[worker]
          queue.ended(job.trial, code, job.hopeless)
          if job.trial.metrics.is_file():
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
        _show(queue, running.values(), workers, took)
      time.sleep(POLL_SECONDS)
  finally:
    if running:
      console.say('ending the trials that run; they save their states')
    stop([job.process for job in running.values()])
    queue.board.close()
  return queue.failed


@dataclasses.dataclass
class _Running:
  trial: plan.Trial
  process: Process
  began: float = dataclasses.field(default_factory=time.monotonic)
  hopeless: str = ''  # the reason why it was asked to end
  deadline: float = 0.0  # when it is killed


def _show(queue: 'Queue', running: Iterable[_Running], workers: int,
          took: Sequence[float]) -> None:
  """Shows the trials that run; those that another queue holds only wait."""
  now, rows, queued = time.monotonic(), [], 0
  for job in running:
    if job.process.is_queued():
      queued, job.began = queued + 1, now
    else:
      rows.append(progress.progress_row(job.trial, now - job.began))
  queue.board.show(rows, queued, progress.eta(
      rows, len(queue.waiting) + queued, workers, took))


def _prune(job: _Running, queue: 'Queue') -> None:
  if not job.hopeless:
    job.hopeless = queue.study.reason_to_end(job.trial)
    if job.hopeless:
      job.process.end(force=False)
      job.deadline = time.monotonic() + GRACE_SECONDS
  elif time.monotonic() > job.deadline:
    job.process.end(force=True)


def stop(processes: Sequence[Process]) -> None:
  """Asks processes to end, and kills those that still run."""
  for force in (False, True):
    for process in processes:
      if process.poll() is None:
        process.end(force)
    deadline = time.monotonic() + GRACE_SECONDS
    while (any(process.poll() is None for process in processes)
           and time.monotonic() < deadline):
      time.sleep(POLL_SECONDS)


class Queue:
  """The waiting trials of a sweep and the outcomes of the others."""

  def __init__(self, trials: Sequence[plan.Trial], study: study_lib.Study):
    study.register(trials)
    self.study = study
    self.waiting = list(trials)
    self.failed: dict[str, str] = {}
    self._trials = {trial.name: trial for trial in trials}
    self._locked: set[str] = set()  # names, as in the two sets below
    self._done = {t.name for t in trials if t.metrics.is_file()}
    self._pruned = {t.name for t in trials if t.is_pruned}
    self.board = progress.Board(
        len(trials), len(self._done) + len(self._pruned))
    self._attempts: collections.Counter[str] = collections.Counter()

  def next(self) -> tuple[plan.Trial, BinaryIO] | tuple[None, None]:
    """Returns a trial that can begin and its locked log, or (None, None)."""
    for trial in [*self.waiting]:
      if trial.source in self.failed:
        self.waiting.remove(trial)
        self._fail(trial, f'{trial.source} failed, whose training it shares')
        continue
      if trial.source in self._pruned:
        self.waiting.remove(trial)
        self._prune(trial, f'{trial.source} was, whose training it shares')
        continue
      if trial.source and trial.source not in self._done:
        continue
      log = lock_log(trial.log)
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

  def _is_over(self, trial: plan.Trial) -> bool:
    """Returns whether a trial need not begin, and records its outcome."""
    if trial.metrics.is_file():
      known = trial.name in self._done
      self._complete(trial)
      if not known:  # another process completed it
        self._note_scores(trial)
      return True
    if trial.pruned.is_file():
      self._pruned.add(trial.name)
      return True
    reason = self.study.reason_to_skip(trial)
    if reason:
      self._prune(trial, reason)
    return bool(reason)

  def ended(self, trial: plan.Trial, code: int, hopeless: str) -> None:
    """Records the outcome of a trial whose process has ended."""
    if trial.metrics.is_file():
      self._complete(trial)
      self._note_scores(trial)
      return
    if hopeless:
      self._prune(trial, hopeless)
      return
    reason = _reason(trial.log, code)
    if reason.startswith(plan.MISTAKE) or self._attempts[trial.name] > RETRIES:
      self._fail(trial, reason.removeprefix(plan.MISTAKE))
    else:
      console.say(f'{trial.name}: {reason}; starting it again')
      self.waiting.insert(0, trial)

  def _complete(self, trial: plan.Trial) -> None:
    self._done.add(trial.name)
    self.study.complete(trial)

  def _note_scores(self, trial: plan.Trial) -> None:
    metrics = trial.read_metrics()
    self._note(f'{trial.name}: EM {metrics["exact_match"]:.2f} '
               f'F1 {metrics["f1"]:.2f}')

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


def lock_log(path: pathlib.Path) -> BinaryIO | None:
  """Opens and locks a log; returns None if another process holds the lock.

  The lock lasts until this process and those that inherit the file close it.
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
  """Returns why a process ended: a signal, a mistake, or its last line."""
  if code < 0:
    reason = f'died of signal {-code} ({signal.strsignal(-code)})'
    record_note(log, reason)
    return reason
  return plan.last_words(log) or 'no log'


def record_note(log: pathlib.Path, text: str) -> None:
  """Adds a line of the sweep to the log of a trial."""
  with log.open('a', encoding='utf-8') as file:
    file.write(f'{plan.LOG_MARK}{text}\n')
