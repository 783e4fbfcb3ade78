"""Compilation of several programs in threads, while other work goes on."""

from collections.abc import Callable, Hashable, Mapping
from concurrent import futures
import threading
import time

import jax

from qa_jax import errors
from qa_jax.runtime import processes

# XLA compiles one program with several threads, but not all of its passes.
THREADS = 4
POLL_SECONDS = 0.1  # between two looks at a signal while a program is awaited

Lower = Callable[[], jax.stages.Lowered]


def may_overlap() -> bool:
  """Returns whether programs may be compiled while others run.

  For an accelerator XLA times kernels on the device to choose among them, and
  needs memory for that. Programs that run meanwhile would change the choice,
  and so the rounding. With several processes XLA also waits for the choices of
  the others, which may wait for this process in a collective.
  """
  return jax.default_backend() == 'cpu' and not processes.is_multi_process()


class Compilation:
  """Programs that threads compile, as far as possible in a given order.

  `lower` maps the key of a program to a function that traces and lowers it, in
  the order of compilation. Tracing holds Python's lock, so one program is
  traced at a time. XLA compiles up to THREADS programs at once. `name` is the
  noun of an error message. The thread of the last program calls `report` with
  the seconds that all took.

  A call of the jitted function with the same shapes then compiles nothing, as
  jax 0.10 keeps what `lower().compile()` made.
  """

  def __init__(self, name: str, lower: Mapping[Hashable, Lower],
               report: Callable[[float], None] | None = None):
    self._name, self._report, self._missing = name, report, len(lower)
    self._tracing, self._counting = threading.Lock(), threading.Lock()
    self._began = time.perf_counter()
    self._pool = futures.ThreadPoolExecutor(THREADS, 'compile')
    self._programs = {key: self._pool.submit(self._compile, function)
                      for key, function in lower.items()}

  def _compile(self, lower: Lower) -> None:
    with self._tracing:
      lowered = lower()
    lowered.compile()
    with self._counting:
      self._missing -= 1
      last = not self._missing
    if last and self._report:
      self._report(time.perf_counter() - self._began)

  def __enter__(self) -> 'Compilation':
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    """Drops the programs that have not begun, and waits for the others.

    After an exception, such as that of a signal, it does not wait, so that a
    checkpoint is not late, and reports nothing. Python waits for the threads
    when it ends.
    """
    if kind:
      self._report = None
    self._pool.shutdown(wait=kind is None, cancel_futures=True)

  def is_done(self) -> bool:
    """Returns whether all programs are ready.

    Raises:
      UserError: XLA cannot compile one of them.
    """
    for key, program in self._programs.items():
      if program.done():
        self._check(key)
    return all(program.done() for program in self._programs.values())

  def is_ready(self, key: Hashable) -> bool:
    """Returns whether a program is ready; an unknown one is not awaited."""
    return key not in self._programs or self._programs[key].done()

  def wait(self, key: Hashable,
           is_cancelled: Callable[[], object] = lambda: False) -> None:
    """Waits until a program is ready, or `is_cancelled` returns true.

    Raises:
      UserError: XLA cannot compile it.
    """
    while not (self.is_ready(key) or is_cancelled()):
      futures.wait([self._programs[key]], POLL_SECONDS)
    if key in self._programs and self.is_ready(key):
      self._check(key)

  def wait_for_all(self) -> None:
    """Waits until all programs are ready; raises what `wait` raises."""
    for key in self._programs:
      self.wait(key)

  def _check(self, key: Hashable) -> None:
    error = self._programs[key].exception()
    if isinstance(error, jax.errors.JaxRuntimeError):
      raise errors.UserError(
          f'{self._name} {key} cannot be compiled: '
          f'{" ".join(str(error).split())}') from None
    if error:  # a mistake in the code of the program
      raise error
