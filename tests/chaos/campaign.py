"""Runs a parser on many inputs, within bounds of time and memory.

An input fails if it raises anything but the documented error, or takes more
than a second of processor time. The campaign fails if the process has grown by
MOST_MEBIBYTES at the end.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import pathlib
import resource
import signal
from typing import Any
import warnings

from qa_jax import errors
from qa_jax.serving import service as service_lib
from tests.chaos import inputs

SECONDS = 1.0  # of processor time for one input
MOST_MEBIBYTES = 256
LINE = errors.MAX_CHARACTERS + 10

class Hang(BaseException):
  """An input took more processor time than allowed."""


def campaign(pool: inputs.Pool, call: Callable[[Any], Any],
             count: int) -> str:
  """Calls the parser with `count` inputs and counts the outcomes."""
  refused, longest, before = 0, 0.0, _peak()
  for n in range(count):
    value = pool.next()
    line = ''
    try:
      with limited() as spent:
        try:
          call(value)
        except (errors.UserError, service_lib.RefusedError) as e:
          refused, line = refused + 1, str(e)
      assert '\n' not in line and len(line) < LINE, line[:3000]
    except BaseException as e:
      e.add_note(f'input {n} of this seed: {value!r:.3000}')
      raise
    longest = max(longest, spent())
    pool.note(value, line)
  grown = _peak() - before
  assert grown < MOST_MEBIBYTES, grown
  return (f'{count} inputs: {count - refused} taken, {refused} refused in one '
          f'line, {pool.different} different ones, no other error; at most '
          f'{longest:.2f} s of the processor and {grown:.0f} MiB more')


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], float]]:
  """Raises Hang after SECONDS of processor time; yields the seconds spent."""
  def hang(*_: object) -> None:
    raise Hang
  before = signal.signal(signal.SIGVTALRM, hang)
  signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
  left = [SECONDS]
  try:
    yield lambda: SECONDS - left[0]
  finally:
    left[0] = signal.setitimer(signal.ITIMER_VIRTUAL, 0)[0]
    signal.signal(signal.SIGVTALRM, before)


def _peak() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def parser(seeds: Sequence[Any] = (),
           fresh: Callable[[inputs.Draw], Any] | None = None) -> Callable:
  """Makes a fault program of a function prepare(directory) → call."""
  def program(prepare: Callable) -> Callable[[pathlib.Path, int, int], str]:
    @functools.wraps(prepare)
    def run(directory: pathlib.Path, count: int, seed: int) -> str:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore', SyntaxWarning)  # of 1in, as Python's
        return campaign(inputs.Pool(seeds, fresh, seed), prepare(directory),
                        count)
    return run
  return program
