"""The one error a user's mistake raises, and the hint of near names."""

from collections.abc import Iterable
import difflib

MAX_NAMES = 30
MAX_CHARACTERS = 4000  # of a message, whatever name or value it repeats


class UserError(ValueError):
  """A mistake of the user's: commands print it as one line and exit with 1.

  The message names what is wrong, where, the value, the bound and the fix.
  """

  def __init__(self, message: str):
    half = MAX_CHARACTERS // 2
    super().__init__(message if len(message) <= MAX_CHARACTERS
                     else f'{message[:half]} … {message[-half:]}')


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """'; did you mean …?' with near names, else the first names there are."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  if near:
    return f'; did you mean {" or ".join(repr(n) for n in near)}?'
  more = ', …' * (len(known) > MAX_NAMES)
  return f'; known: {", ".join(known[:MAX_NAMES])}{more}'
