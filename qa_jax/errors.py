"""The error class for mistakes of the user, and checks that raise it."""

from collections.abc import Collection, Iterable, Iterator
import contextlib
import difflib
import traceback

MAX_NAMES = 30  # listed in a message
MAX_CHARACTERS = 4000  # of a message, however long the values in it are


class UserError(ValueError):
  """A mistake of the user; commands print it as one line and exit with 1.

  The message says what is wrong, where, the value, the bound and the fix.
  """

  def __init__(self, message: str):
    half = MAX_CHARACTERS // 2
    super().__init__(message if len(message) <= MAX_CHARACTERS
                     else f'{message[:half]} … {message[-half:]}')


class NotFiniteError(UserError):
  """Scores that are not finite, of a training that diverged or of damage."""


@contextlib.contextmanager
def naming(part: str, modules: Iterable[str]) -> Iterator[None]:
  """Turns an error in a user's code into a UserError that names the `part`.

  The message has the last line that ran in the packages of the `modules`, which
  hold this code. Without modules the error is left alone.
  """
  packages = {module.partition('.')[0] for module in modules}
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    if not packages:
      raise
    place = ''
    for frame, line in traceback.walk_tb(e.__traceback__):
      if frame.f_globals.get('__name__', '').partition('.')[0] in packages:
        place = f' at {frame.f_code.co_filename}:{line}'
    raise UserError(f'{part} fails{place}: {type(e).__name__}: '
                    f'{" ".join(str(e).split())}') from e


def did_you_mean(name: str, known: Iterable[str],
                 hidden: Iterable[str] = ()) -> str:
  """Returns '; did you mean …?' with similar names, else '; known: …'.

  `hidden` are names that are suggested but not listed.
  """
  known = sorted(known)
  near = difflib.get_close_matches(name, sorted({*known, *hidden}), n=3,
                                   cutoff=0.5)
  if near:
    return f'; did you mean {" or ".join(repr(n) for n in near)}?'
  more = ', …' * (len(known) > MAX_NAMES)
  return f'; known: {", ".join(known[:MAX_NAMES])}{more}'


def require(condition: bool, message: str) -> None:
  """Raises a UserError with `message` unless `condition` is true."""
  if not condition:
    raise UserError(message)


def host_reason(e: Exception) -> str:
  """Returns why a host cannot be reached, also if its name is no name."""
  return getattr(e, 'strerror', None) or str(e)


def check_at_least(least: int, owner: str, **values: int) -> None:
  """Raises a UserError if one of the named `values` is below `least`."""
  for name, value in values.items():
    require(value >= least, f'{owner}: {name}={value} must be at least {least}')


def check_choice(owner: str, name: str, value: str,
                 known: Collection[str]) -> None:
  """Raises a UserError with similar names unless `value` is in `known`."""
  if value not in known:  # similar names are slow to find
    raise UserError(f'{owner}: {name}={value!r}{did_you_mean(value, known)}')


def check_known(what: str, name: str, table: Collection[str]) -> None:
  """Raises a UserError with similar names if `table` has no entry `name`."""
  if name not in table:
    raise UserError(f'unknown {what} {name!r}{did_you_mean(name, table)}')
