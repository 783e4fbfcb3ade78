"""Two worker processes in turn, A/B/A/B, and what was measured of them.

torch and jax in one process fight over threads and memory. So each side is a
process of its own that answers JSON lines on stdin with JSON lines on stdout,
and only one of the two is at work at any time. Arrays travel as .npz files.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
import os
import statistics
import subprocess
from typing import Any

from qa_jax import errors
from qa_jax.runtime import settings

# Of both sides: XLA:CPU and torch pay for the same page faults.
ALLOCATOR = {name: str(value) for name, (_, value) in settings.MALLOC.items()}
THREADS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'RAYON_NUM_THREADS',
           'OPENBLAS_NUM_THREADS')


class WorkerError(RuntimeError):
  """A call that failed on one side; the other may go on."""


class PeerMissing(RuntimeError):
  """The peer's packages are not installed."""


def environment(threads: int) -> dict[str, str]:
  """What both sides run under: one allocator, one number of threads."""
  return {**os.environ, **ALLOCATOR, 'TOKENIZERS_PARALLELISM': 'true',
          **dict.fromkeys(THREADS, str(threads))}


class Worker:
  """A process that does as it is told, one call after another."""

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
    """Runs one call of the suite; blocks until it is done.

    Raises:
      UserError: a mistake of the user's, told by our side.
      WorkerError: anything else that went wrong there.
    """
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
    self._process.stdin.close()  # the end of its input is the end of its work
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
  """Repeated runs of one contender, each over the same work."""

  side: str  # 'ours' or 'peer'
  name: str
  seconds: tuple[float, ...]  # of a run
  items: float  # examples, windows, … done in a run
  tokens: float = 0.0  # real tokens in a run, padding never; 0: none
  unit: str = 'examples'

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
  """How far two outputs that should be equal are apart."""

  what: str
  difference: float
  tolerance: float

  @property
  def passed(self) -> bool:  # NaN does not
    return self.difference <= self.tolerance

  def __str__(self) -> str:
    sign = '<=' if self.passed else '>'
    return f'{self.what}: {self.difference:.2g} {sign} {self.tolerance:g}'


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table: ours beside a peer's."""

  suite: str
  what: str
  ours: Timing | None
  peer: Timing | None  # None: not installed, or refused
  gate: float = 0.0  # ratios wanted; 0: none
  goal: float = 0.0
  checks: tuple[Check, ...] = ()
  against: str = ''  # what the peer is, if there is no timing of it
  note: str = ''

  @property
  def refused(self) -> bool:
    return not all(c.passed for c in self.checks)

  @property
  def ratio(self) -> float | None:
    """How many times as fast as the peer, for the same number of items."""
    if self.refused or self.ours is None or self.peer is None:
      return None
    return self.ours.items_per_second / self.peer.items_per_second

  @property
  def verdict(self) -> str:
    if self.refused:
      worst = next(c for c in self.checks if not c.passed)
      return f'refused ({worst})'
    if self.ratio is None:
      return self.note or 'peer: not installed'
    if not self.gate:
      return ''
    if self.ratio < self.gate:
      return f'gate missed by {100 * (1 - self.ratio / self.gate):.0f} %'
    return 'goal met' if self.ratio >= self.goal else 'gate met'


@dataclasses.dataclass
class Contender:
  """Something that can be run again and again for the same work."""

  side: str
  name: str
  run: Callable[[], float]  # → seconds
  items: float
  tokens: float = 0.0
  unit: str = 'examples'
  seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def timing(self) -> Timing:
    return Timing(self.side, self.name, tuple(self.seconds), self.items,
                  self.tokens, self.unit)


def interleave(contenders: Sequence[Contender], rounds: int) -> None:
  """Runs them in turn, `rounds` times over: drifts of the machine hit all."""
  for _ in range(rounds):
    for contender in contenders:
      contender.seconds.append(contender.run())


def fastest(contenders: Sequence[Contender]) -> Contender:
  """The one with the most items a second."""
  return max(contenders, key=lambda c: c.timing.items_per_second)


def compete(contenders: Sequence[Contender], rounds: int,
            always: Sequence[str] = ()) -> None:
  """One round of all, then `rounds` of the best of each side and `always`.

  Each has run before, so that no compilation is timed. The heats of the
  finalists are dropped: all their times are of interleaved rounds.
  """
  interleave(contenders, 1)
  finalists = [c for c in contenders if c.name in always or c is fastest(
      [other for other in contenders if other.side == c.side])]
  for finalist in finalists:
    finalist.seconds.clear()
  interleave(finalists, rounds)


def largest(values: Any) -> float:
  """The largest of numbers, NaN if any is; 0 of none."""
  values = [float(v) for v in values]
  return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
