"""A profile of some train steps."""

import pathlib
from typing import Any

import jax

from qa_jax import errors
from qa_jax.runtime import console as console_lib


def check_profile_steps(steps: range, start: int, end: int) -> None:
  """Raises a UserError unless some of the steps to trace will be made."""
  if steps and (steps.start >= end or steps.stop <= start):
    raise errors.UserError(
        f'--profile_steps={steps.start}:{steps.stop}: this run makes steps '
        f'{start} … {end - 1}; choose some of them')


class Profiler:
  """A profile of some steps, for TensorBoard or Perfetto."""

  def __init__(self, directory: pathlib.Path, steps: range):
    self._directory, self._steps, self._on = directory, steps, False

  def before(self, step: int | None, state: Any) -> None:
    """To be called before each step, and with None after the last; `state` is
    what all steps before made."""
    if self._on != (step in self._steps):
      jax.block_until_ready(state)
      if self._on:
        jax.profiler.stop_trace()
        console_lib.say(
            f'profile of {len(self._steps)} steps in {self._directory}')
      else:
        jax.profiler.start_trace(self._directory)
      self._on = not self._on
