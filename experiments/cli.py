"""Runs the commands: parses flags, prints one-line errors, sets exit codes.

Exit code 0 means success, 1 a mistake in data or config, 2 a mistake in the
flags, and 124 that a train step hung. 128 + n means that signal n ended the
command after training saved: 130 Ctrl-C, 143 SIGTERM, 140 SIGUSR2, which SLURM
sends before it pre-empts a job.
"""

from collections.abc import Callable
import dataclasses
import io
import re
import sys
import textwrap
import traceback
from typing import get_type_hints

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry
from qa_jax.metrics import squad
from qa_jax.runtime import signals

CONFIGS = ('config', 'suite')  # flags that name a config file
OPENS_RUNS = {'workdir', 'source', 'members'}  # flags that name stored runs
PROCESSES = ('coordinator', 'num_processes', 'process_index')


def run(main: Callable[[], None], *, config: bool = False,
        several: bool = False) -> None:
  """Runs a command and prints a UserError as one line on stderr.

  `config` adds the flag --config. `several` adds the flags that place this
  process among several processes; `join` reads them.
  """
  module = sys.modules['__main__']
  for stream in (sys.stdout, sys.stderr):
    # A terminal may lack the characters of an answer; they are shown escaped.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  logging.set_verbosity(logging.ERROR)  # quiet until main runs
  if config:
    # Fields that the file leaves out are accepted; config.check names typos.
    config_flags.DEFINE_config_file(
        'config', None, 'Config file; --config.a.b=v overrides a field.',
        lock_config=False, accept_new_attributes=True)

  opens_runs = OPENS_RUNS & {
      f.name for f in flags.FLAGS.get_key_flags_for_module(module)}
  if opens_runs:
    flags.DEFINE_list('allow_code', [],
                      'Packages whose code a stored run may import.')
  if several:
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, or auto.')
    flags.DEFINE_integer('num_processes', None, 'Number of processes.')
    flags.DEFINE_integer('process_index', None, 'Index of this process from 0.')

  def parse(argv: list[str]) -> list[str]:
    known = sorted(
        [f.name for f in flags.FLAGS.get_key_flags_for_module(module)]
        + ['config'] * config + ['allow_code'] * bool(opens_runs)
        + [*PROCESSES] * several)
    if {'--help', '-h', '-help', '--helpshort'} & set(argv[1:]):
      print(_help(module, known))
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
      hint = errors.did_you_mean(e.flagname.split('.')[0], known)
      _fail(f'unknown flag --{e.flagname}{hint}', 2)
    except Exception as e:  # a config file is code: it may raise anything
      _fail(_reason(e), 2)
    if len(rest) > 1:
      hint = errors.did_you_mean(rest[1].lstrip('-').split('=')[0], known)
      _fail(f'unexpected argument {rest[1]!r}{hint}', 2)
    return rest

  def guarded(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax reports every step at INFO
    try:
      if opens_runs:
        registry.allow_code(flags.FLAGS.allow_code)
      main()
    except errors.UserError as e:
      _fail(str(e), 1)
    except KeyboardInterrupt:
      _fail('interrupted', 130)

  app.run(_one_of_several(guarded) if several else guarded, flags_parser=parse)


def _one_of_several(main: Callable[[list[str]], None]
                    ) -> Callable[[list[str]], None]:
  """Wraps `main` so that a failure ends the process at once.

  The other processes of the run would otherwise wait for this one.
  """
  def run(argv: list[str]) -> None:
    try:
      main(argv)
    except BaseException as e:
      # All processes have agreed to stop, so a normal shutdown is safe.
      if flags.FLAGS.coordinator is None or isinstance(e, signals.Stopped):
        raise
      from qa_jax.runtime import processes  # scoring a file takes no jax
      processes.leave_processes(e, e.code if isinstance(e, SystemExit) else 1)
      raise
  return run


def join() -> None:
  """Joins the processes that the flags name; call it before jax is used."""
  given = [name for name in PROCESSES if flags.FLAGS[name].value is not None]
  if not given:
    return
  coordinator, *rest = (flags.FLAGS[name].value for name in PROCESSES)
  if coordinator is None:
    raise errors.UserError(f'--{given[0]} goes with --coordinator=HOST:PORT')
  if coordinator == 'auto' and len(given) > 1:
    raise errors.UserError(
        f'--{given[1]}: --coordinator=auto finds it; leave it out')
  from qa_jax.runtime import processes
  processes.join_processes(coordinator, *rest)


def config() -> config_lib.Config:
  """Returns the checked config of --config and its overrides."""
  given = flags.FLAGS.config
  required(config=given)
  checked = config_lib.check_config(fields_of(given, 'config'))
  allow_code_of(checked)
  return checked


def allow_code_of(given: config_lib.Config) -> None:
  """Allows the packages that a config of the user names.

  The config is code already, so a stored run may name them, too.
  """
  for spec in config_lib.spec_strings(given).values():
    registry.allow_code(registry.imported_modules(spec))


def fields_of(given: object, flag: str) -> dict[str, object]:
  """Returns the fields of the config file that a flag named."""
  try:
    return given.to_dict()
  except OSError as e:  # the config file is read only when it is used
    raise errors.UserError(_reason(e).replace('--config', f'--{flag}')
                           ) from None
  except AttributeError:
    raise errors.UserError(
        f'--{flag}: get_config() gives a {type(given).__name__}, expected an '
        'ml_collections.ConfigDict') from None


def required(**values: object) -> None:
  """Raises a UserError naming the first flag that has no value."""
  for name, value in values.items():
    if value is None or value == '':
      raise errors.UserError(f'--{name} is needed; see --help')


def _help(module, names: list[str]) -> str:
  lines = [(module.__doc__ or '').strip(), '', 'Flags [default]:']
  for f in (flags.FLAGS[name] for name in names):
    again = isinstance(f, flags.MultiFlag)  # absl's help repeats this
    several = isinstance(f.default, list) and not again
    kind = ('' if f.boolean else '=FILE[:arg]' if f.name in CONFIGS
            else '=A,B' if several else '=STRING' if again
            else f'={f.flag_type().upper()}')
    shown = (','.join(f.default) if several else None if again else f.default)
    default = '' if shown is None else f' [{shown}]'
    text = f.help.partition(';\n')[0]
    lines.append(f'  --{f.name + kind:19} {text}{default}')
  if 'config' in names:
    lines += ['', 'Config fields, --config.FIELD=VALUE, with their defaults:',
              *_fields(config_lib.Config(), '')]
  return '\n'.join(lines)


def _fields(group: object, path: str) -> list[str]:
  """Returns one paragraph of help for each group of config fields."""
  plain, nested = [], []
  for name in get_type_hints(type(group)):
    value = getattr(group, name)
    if dataclasses.is_dataclass(value):
      nested += _fields(value, f'{path}{name}.')
    else:
      plain.append(f'{path}{name}={value!r}'.replace(' ', ''))
  return [textwrap.fill(' '.join(plain), 78, initial_indent='  ',
                        subsequent_indent='  '), *nested]


def _reason(e: BaseException) -> str:
  """Returns one line: the message of a bad flag, or the cause and its place."""
  if isinstance(e, flags.Error) and 'parsing config file' not in str(e):
    return ' '.join(str(e).split())
  while e.__cause__ or e.__context__:
    e = e.__cause__ or e.__context__
  if isinstance(e, OSError):
    return f'--config: {str(e).splitlines()[-1].strip()}'
  place = traceback.extract_tb(e.__traceback__)[-1]
  where = f'{place.filename}:{place.lineno}'
  if re.search(r'^<|[/\\](absl|ml_collections)[/\\]', place.filename):
    where = '--config'  # not in the config file
    if isinstance(e, KeyError) and 'suite' in flags.FLAGS:
      return f'--suite has no group {e.args[0]!r}'
    if isinstance(e, KeyError):
      hint = errors.did_you_mean(e.args[0], get_type_hints(config_lib.Config))
      return f'config has no field {e.args[0]!r}{hint}'
  return f'{where}: {type(e).__name__}: {" ".join(str(e).split())}'


def _fail(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def print_metrics(metrics: dict[str, float]) -> None:
  """Prints one line `name value` for each metric on stdout.

  A best threshold that answers no question is printed as `never answer`.
  """
  for name, value in metrics.items():
    score = name.removeprefix('best_').removesuffix('_threshold')
    if name == f'best_{score}_threshold' and squad.answers_nothing(
        metrics, score):
      value = 'never answer'
    print(f'{name:28} {value:.4f}' if isinstance(value, float)
          else f'{name:28} {value}')
