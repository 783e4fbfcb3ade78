"""Profiles of train steps."""

import pathlib
from typing import Any

import jax

from qa_jax import errors
from qa_jax.runtime import console as console_lib
from qa_jax.runtime import processes


def steps_to_profile(steps: range, start: int, end: int) -> range:
  """Returns those of `steps` that the run makes, which are start … end - 1.

  Raises:
    UserError: the run makes none of `steps`.
  """
  chosen = range(max(steps.start, start), min(steps.stop, end))
  if steps and not chosen:
    raise errors.UserError(
        f'--profile_steps={steps.start}:{steps.stop}: this run makes steps '
        f'{start} … {end - 1}; choose some of them')
  return chosen


class Profiler:
  """A recorder of a range of steps, for TensorBoard or Perfetto.

  With several processes, only the first records. The others have the range too,
  because all must divide the steps into equal dispatches.
  """

  def __init__(self, directory: pathlib.Path, steps: range):
    self._directory, self._steps, self._on = directory, steps, False

  def is_boundary(self, step: int) -> bool:
    """Returns whether the profile starts or ends before this step."""
    return step in (self._steps.start, self._steps.stop)

  def before(self, step: int | None, state: Any) -> None:
    """Starts or ends the profile before a step, or after the last (None)."""
    if self._on != (step in self._steps):
      self._on = not self._on
      if not processes.is_first_process():
        return
      jax.block_until_ready(state)  # the profile leaves out the earlier steps
      if self._on:
        jax.profiler.start_trace(self._directory)
      else:
        self._write(f'profile of {len(self._steps)} step'
                    f'{"s" * (len(self._steps) > 1)}')

  def close(self) -> None:
    """Writes a profile that a signal or an error has cut short."""
    if self._on and processes.is_first_process():
      self._write('profile that was cut short')
    self._on = False

  def _write(self, name: str) -> None:
    jax.profiler.stop_trace()
    console_lib.say(f'{name} in {self._directory}')
