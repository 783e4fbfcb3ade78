"""The programs that XLA compiles within a block."""

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def listed() -> Iterator[list[str]]:
  """Gives the block a list that gets an item for each compiled program."""
  programs = []
  listen = lambda name, *_, **__: programs.append(name) if name.endswith(
      'backend_compile_duration') else None
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield programs
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
