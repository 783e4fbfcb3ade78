"""Runs the commands: parses flags, prints one-line errors, sets exit codes.

Exit code 0 means success, 1 a mistake in data or config, 2 a mistake in the
flags, and 124 that a train step hung. 128 + n means that signal n ended the
command after training saved: 130 Ctrl-C, 143 SIGTERM, 140 SIGUSR2, which SLURM
sends before it pre-empts a job. 141 means that the reader of the output has
closed its pipe.

This file loads no jax. The commands import what they use in `main`, so that
--help and mistakes in the flags are answered at once.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import io
import os
import re
import shlex
import sys
import textwrap
import threading
import traceback
from typing import Any, get_type_hints

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from qa_jax import config as config_lib
from qa_jax import config_comments
from qa_jax import errors
from qa_jax import registry
from qa_jax.runtime import signals

CONFIGS = ('config', 'suite')  # flags that name a config file
PROCESSES = ('coordinator', 'num_processes', 'process_index')
WINDOWS = ('max_length', 'window_overlap')  # fields of config.data
DECODE = 'decode.'  # prefix of the flags of config.decode
HELP = {'--help', '-h', '-help', '--helpshort', '--helpfull'}
COLUMNS = 80  # of a line of help
TEXT_COLUMN = 28  # where the texts of flags and fields begin
FLAG_OF = {int: flags.DEFINE_integer, float: flags.DEFINE_float,
           bool: flags.DEFINE_bool, str: flags.DEFINE_string}
# Files that read a config file, and are none.
NOT_A_CONFIG = re.compile(
    r'^<|[/\\](absl|ml_collections)[/\\]|[/\\]experiments[/\\]cli\.py$')


def run(main: Callable[[], None], *, config: bool = False,
        several: bool = False, model: bool = False, calibrated: bool = True,
        required: Sequence[str] = (),
        aliases: Mapping[str, str] | None = None) -> None:
  """Runs a command and prints a UserError as one line on stderr.

  Args:
    main: the command, without arguments.
    config: adds the flag --config.
    several: adds the flags that place this process among several processes;
      `join` reads them.
    model: adds the flags that `load_model` reads: the checkpoint, the decoding
      and the windows of a trained model.
    calibrated: whether `model` adds --calibrated.
    required: flags that must have a value.
    aliases: older name → name of a flag.
  """
  module = sys.modules['__main__']
  prepare_streams()
  logging.set_verbosity(logging.ERROR)  # quiet until main runs
  common: list[str] = []
  if config:
    # Fields that the file leaves out are accepted; config.check names typos.
    config_flags.DEFINE_config_file(
        'config', None, 'Config file; --config.a.b=v overrides a field.',
        lock_config=False, accept_new_attributes=True)
    common.append('config')
  opens_runs = 'workdir' in flags.FLAGS
  if opens_runs:
    flags.DEFINE_list('allow_code', [],
                      'Packages whose code a stored run may import.')
    common.append('allow_code')
  if several:
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, or auto.')
    flags.DEFINE_integer('num_processes', None, 'Number of processes.')
    flags.DEFINE_integer('process_index', None, 'Index of this process from 0.')
    common += PROCESSES
  if model:
    common += _define_model_flags(calibrated) + _define_decoding_flags()
  aliases = aliases or {}
  for name, original in aliases.items():
    flags.DEFINE_alias(name, original)

  def parse(argv: list[str]) -> list[str]:
    known = sorted({
        *(f.name for f in flags.FLAGS.get_key_flags_for_module(module)),
        *common} - {*aliases})
    if HELP & {*argv[1:]}:
      defaults = _given_config(argv) if config else None
      print(_help(module, known, required, aliases, defaults))
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
      _fail(f'unknown flag --{e.flagname}'
            f'{_similar_flags(e.flagname, known, config)}', 2)
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
      for name in required:
        check_required(name)
      if opens_runs:
        registry.allow_code(flags.FLAGS.allow_code)
      main()
    except errors.UserError as e:
      _fail(str(e), 1)
    except KeyboardInterrupt:
      _fail('interrupted', 130)
    except Exception as e:
      if not (message := _out_of_memory(e) or _long_name(e)
              or _bad_environment(e)):
        raise
      _fail(message, 1)

  try:
    with quiet_pipes():
      app.run(_one_of_several(guarded) if several else guarded,
              flags_parser=parse)
  except SystemExit as e:
    if any(t.name.startswith('compile') for t in threading.enumerate()):
      # Python would wait for XLA without a word, and abort at a second Ctrl-C.
      end_now(e.code or 0)
    raise


def end_now(code: int) -> None:
  """Ends the process without waiting for its threads."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(code)


def _out_of_memory(e: Exception) -> str:
  """Returns a line with the remedy if memory is too small, else ''."""
  # That of a device is a RuntimeError of XLA, with its status in the text.
  if not (isinstance(e, MemoryError) or (
      isinstance(e, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(e))):
    return ''
  return (f'out of memory: {" ".join(str(e).split())[:300].rstrip(".")}; lower '
          'train.batch_size or raise train.grad_accumulation, or lower '
          'train.eval_batch_size, data.max_length or the sizes of the model')


def _long_name(e: Exception) -> str:
  """Returns a line if a name is longer than any file's can be, else ''."""
  if isinstance(e, OSError) and e.errno == errno.ENAMETOOLONG:
    return f'{e.filename}: {e.strerror}'
  return ''


def _bad_environment(e: Exception) -> str:
  """Returns what is wrong with a variable that jax reads when it starts, or ''.

  Such are JAX_PLATFORMS and JAX_NUM_CPU_DEVICES.
  """
  place = traceback.extract_tb(e.__traceback__)[-1].filename
  if not re.search(r'[/\\]jax[/\\]_src[/\\](config|xla_bridge)\.py$', place):
    return ''
  text = ' '.join(str(e).split()) or 'it knows no such device here'
  named = re.search(r'jax_[a-z_]+', text, re.IGNORECASE)
  names = {'JAX_PLATFORMS', 'JAX_NUM_CPU_DEVICES', *(
      [named[0].upper()] if named else [])}
  given = [f'{name}={os.environ[name]}' for name in sorted(names)
           if name in os.environ]
  return f'jax does not start{" with " * bool(given)}{", ".join(given)}: {text}'


def _similar_flags(name: str, known: Sequence[str], config: bool) -> str:
  """Returns a hint at the flags that the user may have meant.

  Most likely are those of the same field, with or without its groups.
  """
  fields = [f'config.{path}' for path in config_lib.paths() if config]
  ending = '.' + name.removeprefix('config.')
  same = [flag for flag in (*known, *fields) if f'.{flag}'.endswith(ending)]
  if same:
    return f'; did you mean {" or ".join(repr(flag) for flag in same)}?'
  hint = errors.did_you_mean(name, [*known, *fields])
  return hint if 'did you mean' in hint else errors.did_you_mean(
      name.split('.')[0], known)


def prepare_streams() -> None:
  """Makes stdout and stderr escape the characters that a terminal lacks.

  One that the caller has closed takes text and drops it.
  """
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115
    elif isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


@contextlib.contextmanager
def quiet_pipes() -> Iterator[None]:
  """Ends the process with code 141 if the reader of its output has gone.

  Without it, `COMMAND | head -1` ends with a traceback.
  """
  try:
    try:
      yield
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Python flushes both streams again at exit.
    with open(os.devnull, 'w', encoding='utf-8') as nowhere:
      for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(io.UnsupportedOperation):  # not a file
          os.dup2(nowhere.fileno(), stream.fileno())
    sys.exit(141)  # 128 + SIGPIPE


def _define_model_flags(calibrated: bool) -> list[str]:
  """Defines the flags that choose among the files of a run."""
  flags.DEFINE_string(
      'checkpoint', 'best', 'Checkpoint of a run: best, last or a step.')
  names = ['checkpoint']
  if calibrated:
    flags.DEFINE_bool(
        'calibrated', True, 'Use the calibration.json of the run; '
        '--nocalibrated leaves it out.')
    names.append('calibrated')
  return names


def _define_decoding_flags() -> list[str]:
  """Defines the flags of decoding and windows and returns their names.

  The flags --decode.FIELD are those of config.decode. Their default is the
  value of the run, so the flags have none.
  """
  names = []
  for group, prefix, wanted in ((config_lib.Decode, DECODE, None),
                                (config_lib.Data, '', WINDOWS)):
    for name, kind in get_type_hints(group).items():
      if wanted is None or name in wanted:
        path = f'{group.__name__.lower()}.{name}'
        FLAG_OF[kind](prefix + name, None, config_comments.phrase(path))
        names.append(prefix + name)
  return names


def decoding() -> dict[str, Any]:
  """Returns the fields of decoding and windows that the command line sets."""
  names = [f'{DECODE}{name}' for name in get_type_hints(config_lib.Decode)]
  return {name.removeprefix(DECODE): flags.FLAGS[name].value
          for name in (*names, *WINDOWS)
          if flags.FLAGS[name].value is not None}


def options() -> dict[str, Any]:
  """Returns the options of `predict.load` that the command line changes."""
  changed = decoding()
  if (checkpoint := flags.FLAGS['checkpoint'].value) != 'best':
    changed['checkpoint'] = checkpoint
  if not flags.FLAGS['calibrated'].value:
    changed['calibrated'] = False
  return changed


def evaluation_label() -> str:
  """Returns the end of the folder's name of an evaluation with these flags."""
  from qa_jax.checkpoints import run_directory
  return run_directory.evaluation_label(options())


def listed(n_best: flags.FlagHolder) -> int:
  """Returns the number of candidates to list: --n_best, or --decode.n_best.

  Raises:
    UserError: both are given and differ, or the number is out of bounds.
  """
  decoded = flags.FLAGS[f'{DECODE}n_best'].value
  if n_best.present and decoded not in (None, n_best.value):
    raise errors.UserError(
        f'--{n_best.name}={n_best.value} and --{DECODE}n_best={decoded} '
        'contradict each other; give one of them')
  count = n_best.value if decoded is None else decoded
  least, most = config_lib.BOUNDS['decode.n_best']
  errors.require(least <= count <= most,
                 f'n_best={count} must be in {least} … {most}')
  return count


def load_model(workdir: str, **defaults: Any) -> Any:
  """Loads the model of --workdir, decoded as the flags say; a predict.QA.

  `defaults` hold for the fields of decoding that no flag sets.
  """
  from qa_jax.inference import predict
  return predict.load(workdir, **{**defaults, **options()})


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
  given = flags.FLAGS['config']
  check_required('config')
  checked = config_lib.check_config(
      _one_length(fields_of(given.value, 'config'), given))
  allow_code_of(checked)
  return checked


def allow_code_of(given: config_lib.Config) -> None:
  """Allows the packages that a config of the user names.

  The config is code already, so a stored run may name them, too.
  """
  for spec in config_lib.spec_strings(given).values():
    registry.allow_code(registry.imported_modules(spec))


def workdir_flags(workdir: object, *configs: config_lib.Config) -> str:
  """Returns the flags that open a run with these configs, for a shell."""
  packages = {
      module.partition('.')[0] for given in configs
      for spec in config_lib.spec_strings(given).values()
      for module in registry.imported_modules(spec)}
  allowed = [f'--allow_code={",".join(sorted(packages))}'] if packages else []
  return shlex.join([f'--workdir={workdir}', *allowed])


# The two fields that set the length of training.
LENGTHS = ('train.num_epochs', 'train.num_steps')


def _one_length(fields: dict[str, Any], given: Any) -> dict[str, Any]:
  """Returns `fields` with the length of training of the command line alone.

  `given` is the flag --config. If it sets one of LENGTHS, this field replaces
  the other one of the config file.
  """
  overrides = given.override_values
  for new, old in (LENGTHS, LENGTHS[::-1]):
    group, name = old.split('.')
    before = (fields.get(group) or {}).get(name)
    if overrides.get(new) and old not in overrides and before:
      # Of several processes, which have not met yet, the first says it.
      if not ('process_index' in flags.FLAGS and flags.FLAGS.process_index):
        print(f'--config.{new}={overrides[new]} replaces config.{old}={before} '
              f'of {given.config_filename}', file=sys.stderr)
      return config_lib.override(fields, {old: 0})
  return fields


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


def assignments(items: Sequence[str], mistake: str) -> dict[str, object]:
  """Parses [NAME=VALUE, …]; values are Python literals if possible.

  Raises:
    UserError: an item has no name or no value; the message is `mistake`, with
      the item in its braces.
  """
  values: dict[str, object] = {}
  for item in items:
    name, equals, text = item.partition('=')
    errors.require(name and equals, mistake.format(item))
    try:
      values[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      values[name] = text
  return values


def check_required(name: str, none: Sequence[object] = (None, '', [])) -> None:
  """Raises a UserError with the meaning of a flag whose value is in `none`."""
  flag = flags.FLAGS[name]
  # A file whose get_config() returns nothing was given; `fields_of` refuses it.
  if flag.value in none and not (name in CONFIGS and flag.present):
    meaning = flag.help.split('. ')[0].rstrip('.')
    raise errors.UserError(f'--{name} is needed ({meaning}); see --help')


def _given_config(argv: Sequence[str]) -> config_lib.Config | None:
  """Returns the config of a command line that asks for help, if it has one."""
  arguments = [a for a in argv if a not in HELP]
  if not any(a.lstrip('-').startswith('config') for a in arguments[1:]):
    return None
  try:
    flags.FLAGS(arguments, known_only=True)
    return config()
  except errors.UserError as e:
    _fail(str(e), 1)
  except Exception as e:  # a config file is code: it may raise anything
    _fail(_reason(e), 2)


def _help(module, names: Sequence[str], required: Sequence[str],
          aliases: Mapping[str, str], given: config_lib.Config | None) -> str:
  """Returns the text of --help.

  `names` are the flags of the command, and `given` is the config of the command
  line, whose values are then shown as defaults.
  """
  own = [n for n in names if not n.startswith(DECODE) and n not in WINDOWS]
  lines = [(module.__doc__ or '').strip(), '', 'Flags [default]:',
           *(_flag_help(name, name in required) for name in own)]
  if len(own) < len(names):
    lines += ['', 'Decoding [default: that of the run]:',
              *(_flag_help(name) for name in names if name not in own)]
  if aliases:
    lines += ['', _entry('Older names', ', '.join(
        f'--{old} is --{new}' for old, new in aliases.items()))]
  if 'config' in names:
    of = f'of {flags.FLAGS["config"].config_filename}' if given else 'defaults'
    lines += ['', f'Config fields, --config.FIELD=VALUE [{of}]:']
    lines += _fields(given or config_lib.Config(), '')
  return '\n'.join(lines)


def _flag_help(name: str, required: bool = False) -> str:
  """Returns the lines of help on a flag."""
  f = flags.FLAGS[name]
  again = isinstance(f, flags.MultiFlag)  # absl's help repeats this
  several = isinstance(f.parser, flags.ListParser)
  kind = ('' if f.boolean else '=NAME[,NAME…]' if several
          else '=FILE[:arg]' if name in CONFIGS else '=STRING' if again
          else f'={f.flag_type().upper()}')
  shown = (','.join(f.default) if several and f.default else
           None if again or several else f.default)
  default = '' if shown in (None, '') else f' [{shown}]'
  text = f.help.partition(';\n')[0]
  return _entry(f'--{name}{kind}', text + default + ' (required)' * required)


def _entry(name: str, text: str) -> str:
  """Returns a name and its text as wrapped columns."""
  first = f'  {name}'.ljust(TEXT_COLUMN)
  indent = ' ' * TEXT_COLUMN
  lines = textwrap.wrap(text, COLUMNS, initial_indent=indent,
                        subsequent_indent=indent, break_long_words=False,
                        break_on_hyphens=False)
  if len(name) + 4 > TEXT_COLUMN:  # the text begins on a line of its own
    return '\n'.join([first.rstrip(), *lines])
  return '\n'.join([first + lines[0].lstrip(), *lines[1:]])


def _fields(group: object, path: str) -> list[str]:
  """Returns the lines of help on the config fields of a group."""
  plain, nested = [], []
  for name in get_type_hints(type(group)):
    value = getattr(group, name)
    if dataclasses.is_dataclass(value):
      nested += _fields(value, f'{path}{name}.')
    else:
      plain.append(_entry(f'{path}{name}', (
          f'{config_comments.phrase(path + name)} [{value!r}]')))
  return [*plain, *nested]


def _field_in_a_value() -> str:
  """Returns what is wrong with a flag like --config.model.head.form, or ''."""
  for argument in sys.argv[1:]:
    name = argument.split('=')[0].lstrip('-').removeprefix('config.')
    for path in config_lib.paths():
      if name.startswith(f'{path}.'):
        return (f'config.{name}: config.{path} is a value and has no fields; '
                "arguments stand in brackets behind a component's name, as in "
                '--config.model.head=\'conditional(form="electra")\'')
  return ''


# What Python says of a value → the type that was expected.
WRONG_TYPES = {
    r"invalid literal for int\(\) with base 10: .*": 'an integer',
    r'could not convert string to float: .*': 'a number',
    r"\('Non-boolean argument to boolean flag', .*\)": 'true or false'}


def _reason(e: BaseException) -> str:
  """Returns one line: the message of a bad flag, or the cause and its place."""
  if isinstance(e, flags.Error) and 'parsing config file' not in str(e):
    text = ' '.join(str(e).split())
    for pattern, kind in WRONG_TYPES.items():
      text = re.sub(pattern, f'expected {kind}', text)
    return text
  frames = traceback.extract_tb(e.__traceback__)
  while e.__cause__ or e.__context__:
    e = e.__cause__ or e.__context__
    frames += traceback.extract_tb(e.__traceback__)
  if isinstance(e, errors.UserError):
    return str(e)
  flag = 'suite' if 'suite' in flags.FLAGS else 'config'
  if isinstance(e, OSError):
    return f'--{flag}: {str(e).splitlines()[-1].strip()}'
  places = [f'{frame.filename}:{frame.lineno}' for frame in frames
            if not NOT_A_CONFIG.search(frame.filename)]
  where = places[-1] if places else f'--{flag}'
  if not places:
    if isinstance(e, KeyError) and flag == 'suite':
      return f'--suite has no group {e.args[0]!r}; add it to the suite file'
    if re.match(r'get_config\(\) takes 0 positional arguments', str(e)):
      return (f'--{flag}: the file has no variants: leave out the colon and '
              'the name behind it')
    if str(e).endswith("has no attribute 'get_config'"):
      return f'--{flag}: the file has no function get_config()'
    if inner := _field_in_a_value():
      return inner
    if isinstance(e, KeyError):
      hint = errors.did_you_mean(e.args[0], get_type_hints(config_lib.Config))
      return f'config has no field {e.args[0]!r}{hint}'
  return f'{where}: {type(e).__name__}: {" ".join(str(e).split())}'


def _fail(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(code)


def scores_line(metrics: Mapping[str, float]) -> str:
  """Returns EM and F1 of an evaluation as one line."""
  parts = [f'EM {metrics["exact_match"]:.2f}', f'F1 {metrics["f1"]:.2f}']
  if 'has_answer_f1' in metrics:
    parts.append(f'HasAns {metrics["has_answer_exact_match"]:.2f} / '
                 f'{metrics["has_answer_f1"]:.2f}')
  if 'no_answer_exact_match' in metrics:
    parts.append(f'NoAns {metrics["no_answer_exact_match"]:.2f}')
  return '  '.join(parts) + f'  on {metrics["total"]:.0f} questions'


def print_metrics(metrics: dict[str, float]) -> None:
  """Prints one line `name value` for each metric on stdout.

  A best threshold that answers no question is printed as `never answer`.
  """
  from qa_jax.metrics import squad
  for name, value in metrics.items():
    score = name.removeprefix('best_').removesuffix('_threshold')
    if name == f'best_{score}_threshold' and squad.answers_nothing(
        metrics, score):
      value = 'never answer'
    print(f'{name:28} {value:.4f}' if isinstance(value, float)
          else f'{name:28} {value}')
