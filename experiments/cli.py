"""What every command shares: flags, one-line errors, exit codes.

Exit codes: 0 done, 1 a mistake in data or config, 2 a mistake in the flags.
"""

from collections.abc import Callable
import sys

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from qa_jax import errors


def run(main: Callable[[], None], *, config: bool = False) -> None:
  """Runs a command; a UserError becomes one line on stderr."""
  if config:
    config_flags.DEFINE_config_file(
        'config', None, 'Config file, FILE[:arg]; --config.a.b=v overrides.',
        lock_config=True)
  module = sys.modules['__main__']

  def parse(argv: list[str]) -> list[str]:
    if any(a in ('--help', '-h', '-help', '--helpshort') for a in argv[1:]):
      print(_help(module, config))
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError,
            OSError, ImportError, SyntaxError, NameError) as e:
      _fail(_first_line(e), 2)
    if len(rest) > 1:
      hint = errors.did_you_mean(rest[1].lstrip('-'), _own_flags(module))
      _fail(f'unexpected argument {rest[1]!r}{hint}', 2)
    return rest

  def guarded(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax tells all it does
    try:
      main()
    except errors.UserError as e:
      _fail(str(e), 1)
    except KeyboardInterrupt:
      _fail('interrupted', 130)

  app.run(guarded, flags_parser=parse)


def required(**values: object) -> None:
  """Raises a UserError naming the first flag that has no value."""
  for name, value in values.items():
    if value is None or value == '':
      raise errors.UserError(f'--{name} is needed; see --help')


def _own_flags(module) -> list[str]:
  return [f.name for f in flags.FLAGS.get_key_flags_for_module(module)]


def _help(module, config: bool) -> str:
  lines = [(module.__doc__ or '').strip(), '', 'Flags:']
  if config:
    lines.append('  --config=FILE[:arg]  config file; --config.a.b=v overrides '
                 'a field')
  for f in sorted(flags.FLAGS.get_key_flags_for_module(module),
                  key=lambda f: f.name):
    default = '' if f.default in (None, '') else f' [{f.default}]'
    lines.append(f'  --{f.name:18} {f.help}{default}')
  return '\n'.join(lines)


def _first_line(e: BaseException) -> str:
  text = str(e.args[0] if e.args and isinstance(e.args[0], str) else e)
  return f'flags: {" ".join(text.split())[:400]}'


def _fail(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def print_metrics(metrics: dict[str, float]) -> None:
  """One `name value` line each, on stdout."""
  for name, value in metrics.items():
    print(f'{name:28} {value:.4f}' if isinstance(value, float)
          else f'{name:28} {value}')
