"""Commands of experiments/, run in this process."""

import contextlib
import dataclasses
import io
import pathlib
import runpy
import sys
from unittest import mock

from absl import app  # noqa: F401  its flags must be there before a command's
from absl import flags

from experiments import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import ml_collections
def get_config():
  return ml_collections.ConfigDict({fields!r})
"""


@dataclasses.dataclass(frozen=True)
class Result:
  code: int
  out: str
  err: str


def command(name: str, *argv: object) -> Result:
  """Runs `python -m experiments.NAME ARGV…` in this process."""
  known = set(flags.FLAGS)
  out, err = io.StringIO(), io.StringIO()
  for module in (f'experiments.{name}', 'config_config'):
    sys.modules.pop(module, None)
  try:
    with (mock.patch.object(sys, 'argv', [name, *map(str, argv)]),
          mock.patch.object(cli, 'end_now'),  # this process goes on
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
      runpy.run_module(f'experiments.{name}', run_name='__main__',
                       alter_sys=True)
    raise AssertionError('a command ends with an exit code')
  except SystemExit as e:
    return Result(e.code or 0, out.getvalue(), err.getvalue())
  finally:
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - known)
    flags.FLAGS.unparse_flags()


def refusal(name: str, *argv: object, code: int = 1) -> str:
  """Returns the one line on stderr of a command that must fail."""
  result = command(name, *argv)
  assert result.code == code, result
  assert result.err.startswith('error: ') and result.err.endswith('\n')
  assert result.err.count('\n') == 1 and not result.out, result
  return result.err


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
  return {str(p.relative_to(directory)): p.read_bytes()
          for p in directory.rglob('*') if p.is_file()}
