"""Two worker processes that are timed in turn, A/B/A/B.

torch and jax in one process compete for threads and memory. Each side is
therefore a process of its own, which answers JSON lines on stdin with JSON
lines on stdout, and only one of the two works at any time. Arrays are passed
as .npz files.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
from typing import Any

from qa_jax import errors
from qa_jax.runtime import console
from qa_jax.runtime import settings

# Both sides get this allocator, so that both pay alike for page faults.
ALLOCATOR = {name: str(value) for name, (_, value) in settings.MALLOC.items()}
THREADS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'RAYON_NUM_THREADS',
           'OPENBLAS_NUM_THREADS')


class WorkerError(RuntimeError):
  """A call that failed on one side; the other side may go on."""


class PeerMissing(RuntimeError):
  """The peer's packages are not installed."""


def environment(threads: int) -> dict[str, str]:
  """Returns the environment of both sides: one allocator, one thread count."""
  return {**os.environ, **ALLOCATOR, 'TOKENIZERS_PARALLELISM': 'true',
          **dict.fromkeys(THREADS, str(threads))}


class Worker:
  """A worker process that runs one call after another."""

  def __init__(self, command: Sequence[str], *, threads: int,
               extra: Mapping[str, str] | None = None):
    self._name = ' '.join(command[:3])
    try:
      self._process = subprocess.Popen(
          [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
          env={**environment(threads), **(extra or {})})
    except OSError as e:
      raise errors.UserError(
          f'{command[0]}: cannot be started: {e.strerror}') from None
    try:
      hello = self._read()
      if 'missing' in hello:
        raise PeerMissing(hello['missing'])
    except BaseException:
      self.close()
      raise
    self.about: dict[str, Any] = hello['about']

  def call(self, name: str, /, **arguments: Any) -> Any:
    """Runs one call of the suite and blocks until it is done.

    Raises:
      UserError: the worker of qa_jax reports a mistake of the user.
      WorkerError: anything else went wrong in the worker.
    """
    with contextlib.suppress(BrokenPipeError):  # killed: `_read` says so
      self._process.stdin.write(
          json.dumps({'call': name, 'arguments': arguments}) + '\n')
      self._process.stdin.flush()
    reply = self._read()
    if 'user_error' in reply:
      raise errors.UserError(reply['user_error'])
    if 'error' in reply:
      raise WorkerError(reply['error'])
    return reply['result']

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):  # the call to a killed worker
      self._process.stdin.close()  # a worker stops when its stdin ends
    self._process.wait()
    self._process.stdout.close()

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise WorkerError(f'{self._name} ended with exit code '
                        f'{self._process.wait()}')
    return json.loads(line)


@dataclasses.dataclass(frozen=True)
class Timing:
  """Times of one contender, run repeatedly over the same work."""

  side: str  # 'ours' or 'peer'
  name: str
  seconds: tuple[float, ...]  # of a run
  items: float  # examples, windows, … done in a run
  tokens: float = 0.0  # real tokens in a run, padding never; 0: none
  unit: str = 'windows'

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  @property
  def items_per_second(self) -> float:
    return self.items / self.median

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.median


@dataclasses.dataclass(frozen=True)
class Check:
  """The difference of two outputs that should be equal."""

  what: str
  difference: float
  tolerance: float

  @property
  def passed(self) -> bool:  # false for NaN
    return self.difference <= self.tolerance

  def __str__(self) -> str:
    sign = '<=' if self.passed else '>'
    return f'{self.what}: {self.difference:.2g} {sign} {self.tolerance:g}'


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: qa_jax beside a peer."""

  suite: str
  what: str
  ours: Timing | None  # None: left out, or every variant was refused
  peer: Timing | None  # None: the peer is not installed
  gate: float = 0.0  # target ratio; 0: no target
  goal: float = 0.0
  checks: tuple[Check, ...] = ()
  against: str = ''  # the peer's name, if it was not timed
  note: str = ''

  @property
  def refused(self) -> bool:
    return not all(c.passed for c in self.checks)

  @property
  def ratio(self) -> float | None:
    """Returns the speed of qa_jax over that of the peer, for equal work."""
    if self.refused or self.ours is None or self.peer is None:
      return None
    return self.ours.items_per_second / self.peer.items_per_second

  @property
  def verdict(self) -> str:
    if self.refused:
      worst = next(c for c in self.checks if not c.passed)
      return f'refused ({worst})'
    if self.ratio is None:
      return self.note or ('peer: not installed' if self.ours else
                           'no variant of ours agrees with the peer')
    if not self.gate:
      return ''
    if self.ratio < self.gate:
      return f'gate missed by {100 * (1 - self.ratio / self.gate):.0f} %'
    return 'goal met' if self.ratio >= self.goal else 'gate met'


@dataclasses.dataclass
class Contender:
  """One way to do the work, which can be run any number of times."""

  side: str
  name: str
  run: Callable[[], float]  # → seconds
  items: float
  tokens: float = 0.0
  unit: str = 'windows'
  group: str = ''  # the best of each group of a side is a finalist
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def timing(self) -> Timing:
    return Timing(self.side, self.name, tuple(self.seconds), self.items,
                  self.tokens, self.unit)


def interleave(contenders: Sequence[Contender], rounds: int, *,
               warm: bool = False) -> None:
  """Runs the contenders in turn, `rounds` times.

  A drift of the machine's speed then affects all of them alike. If `warm`, each
  runs twice in its turn, and the second run is timed: a process that waited for
  the others is slower at first.
  """
  for _ in range(rounds):
    for contender in contenders:
      if warm:
        contender.run()
      contender.seconds.append(contender.run())
      console.say(
          f'{contender.side}, {contender.name}: {contender.items:g} '
          f'{contender.unit} in {contender.seconds[-1]:.3g} s')


def fastest(contenders: Sequence[Contender]) -> Contender:
  """Returns the contender with the most items per second."""
  return max(contenders, key=lambda c: c.timing.items_per_second)


def compete(contenders: Sequence[Contender], rounds: int,
            always: Sequence[str] = ()) -> list[Contender]:
  """Times and returns the best of each side and group, and those in `always`.

  One round of all contenders picks the best; then `rounds` interleaved rounds
  are timed. The times of that first round are dropped. Every contender has run
  before, so that no compilation is timed. Only finalists can be compared:
  the one time of another contender may be a lucky one.
  """
  interleave(contenders, 1, warm=True)
  finalists = [c for c in contenders if c.name in always or c is fastest(
      [other for other in contenders
       if (other.side, other.group) == (c.side, c.group)])]
  for finalist in finalists:
    finalist.seconds.clear()
  interleave(finalists, rounds, warm=True)
  return finalists


def largest(values: Any) -> float:
  """Returns the largest number: NaN if any is NaN, 0 if there is none."""
  values = [float(v) for v in values]
  return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
