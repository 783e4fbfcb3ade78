r"""Checks qa_jax on a machine with a GPU, and measures it there.

  python -m benchmarks.gpu.check --output=runs/gpu_check [--seconds=480]
  python -m benchmarks.gpu.check --output=runs/gpu_heads \
      --stages=ablation --seconds=600
  TINY=1 JAX_PLATFORMS=cpu python -m benchmarks.gpu.check --output=DIR

The last command rehearses the check on a CPU with small sizes. Stages are
processes with a time limit, most important first, so that one that fails or
hangs does not stop the others. OUTPUT/results.jsonl has the results as they
come, and OUTPUT/table.md is written after every stage. The exit code is 1 if a
check failed. Nothing is read from a network. Without --train, --eval and
--model the texts are generated and the weights random. The stage `peer` needs
torch and transformers.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from benchmarks.gpu import results as results_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Stage:
  """A function of a module in this package that takes the results."""

  module: str
  share: float  # largest share of the time
  environment: dict[str, str] = dataclasses.field(default_factory=dict)


# Without this flag, XLA would compile each product in some thirty more forms.
FAST = {'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=false'}
# A rehearsal spends its time on compilation.
REHEARSAL = {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
# The stages in the order in which they run. Two processes of `peer` share a
# card. The ablation runs only if it is named.
STAGES = {
    'device': Stage('numerics', 0.1),
    'update': Stage('steps', 0.2, FAST),
    'speed': Stage('steps', 0.3, FAST),
    'peer': Stage('runs', 0.3, {
        **FAST, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}),
    'finetune': Stage('runs', 0.25, FAST),
    'attentions': Stage('numerics', 0.2),
    'repeat': Stage('runs', 0.2),
    'searches': Stage('numerics', 0.1),
    'ablation': Stage('runs', 1.0, FAST)}
DEFAULT = [name for name in STAGES if name != 'ablation']
LEAST_SECONDS = 3.0  # a stage with less time is left out


def run_stage(name: str, results: results_lib.Results) -> None:
  """Runs one stage in this process and records the error that ends it."""
  try:
    module = importlib.import_module(f'benchmarks.gpu.{STAGES[name].module}')
    vars(module)[name](results)
  except Exception as e:  # such as out of memory
    traceback.print_exc()
    results.fail('stage', e)


def packages() -> dict[str, object]:
  """Returns versions, and the requirements that are not installed."""
  def version(name: str) -> str:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return ''

  lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
  needed = [re.match(r'[\w.-]+', line)[0] for line in lines
            if line and not line.startswith('#')]
  return {'missing': ', '.join(n for n in needed if not version(n)) or 'none',
          **{name: version(name) or 'none' for name in (
              'jax', 'jax-cuda13-plugin', 'jax-cuda12-plugin', 'flax', 'torch',
              'transformers')}}


def run_limited(command: list[str], seconds: float,
                environment: dict[str, str]) -> str:
  """Runs a command and ends it, with all that it started, after `seconds`.

  Returns its problem, or '' if there is none.
  """
  # The processes of a stage are a group: one that went on would keep the memory
  # of the GPU, and change the times of the next stages.
  process = subprocess.Popen(command, env=environment, process_group=0)
  try:
    code = process.wait(timeout=seconds)
    return f'exit code {code}' if code else ''
  except subprocess.TimeoutExpired:
    return f'ended after {seconds:.0f} s'
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(output: pathlib.Path, stages: list[str], seconds: float,
            given: results_lib.Given) -> int:
  """Runs the stages as processes and writes the table; returns exit code."""
  output.mkdir(parents=True, exist_ok=True)
  path = output / results_lib.FILE
  end, spare, text, failed = time.monotonic() + seconds, 0.0, '', 0
  results_lib.Results(output, 'packages', 0).record('packages', **packages())
  with tempfile.TemporaryDirectory(prefix='gpu_check_') as scratch:
    for name in stages:
      stage = STAGES[name]
      results = results_lib.Results(output, name, seconds)
      # A stage also gets what the stages before it left of their shares.
      began, most = time.monotonic(), stage.share * seconds + spare
      limit = min(most, end - began)
      if limit < LEAST_SECONDS:
        results.record('stage', ok=False, error='no time left')
      else:
        print(f'== {name}: at most {limit:.0f} s', flush=True)
        problem = run_limited(
            [sys.executable, '-m', 'benchmarks.gpu.check', f'--stages={name}',
             f'--output={output}', f'--seconds={0.9 * limit}',
             f'--inside={scratch}', *given.flags], limit, {
                 # Two stages, or two processes of one, share a program.
                 'JAX_COMPILATION_CACHE_DIR': f'{scratch}/compiled',
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
                 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
                 'XDG_CACHE_HOME': f'{scratch}/cache', **os.environ,
                 'TF_CPP_MIN_LOG_LEVEL': '2',
                 **(REHEARSAL if results_lib.TINY else stage.environment)})
        if problem:
          results.record('stage', ok=False, error=problem)
      spare = max(most - (time.monotonic() - began), 0)
      lines = path.read_text().splitlines()
      text, failed = results_lib.table(lines)
      (output / 'table.md').write_text(text)
      if any(row['name'] == 'device' and row.get('ok') is False
             for row in map(json.loads, lines)):
        print('jax finds no GPU here, so the other stages are left out')
        break
  print(text, end='')
  return int(failed > 0)


def check_data(parser: argparse.ArgumentParser, *specs: str) -> None:
  """Ends the check if a data SPEC names what there is not."""
  # Not above: the check names packages that are missing.
  from qa_jax import errors
  from qa_jax.data import sources
  try:
    for spec in specs:
      sources.check_spec(spec)
  except errors.UserError as e:
    parser.error(str(e))


def main() -> int:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--output', type=pathlib.Path, required=True)
  add('--seconds', type=float, default=480)
  add('--stages', default=','.join(DEFAULT), help='default: %(default)s')
  add('--train', default='', help='data SPEC of finetune and ablation')
  add('--eval', default='', help='data SPEC of finetune and ablation')
  add('--model', default='', help='MiniLM-L6 checkpoint of these two')
  add('--peer_python', default=sys.executable,
      help='interpreter that has torch and transformers')
  add('--inside', type=pathlib.Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  stages = args.stages.split(',')
  if unknown := sorted(set(stages) - set(STAGES)):
    parser.error(f'unknown stages {", ".join(unknown)}; choose of '
                 f'{", ".join(STAGES)}')
  if bool(args.train) != bool(args.eval):
    parser.error('--train and --eval need each other; give both or none')
  given = results_lib.Given(args.train, args.eval, args.model, args.peer_python)
  if args.inside:
    run_stage(stages[0], results_lib.Results(
        args.output, stages[0], args.seconds, args.inside, given))
    return 0
  if not results_lib.TINY:  # `device` notices that JAX fell back to the CPU
    stages = ['device', *(s for s in stages if s != 'device')]
  # Checked now, because the stages that read these come after minutes.
  if args.train:
    check_data(parser, args.train, args.eval)
  if args.model and not pathlib.Path(args.model).is_dir():
    parser.error(f'--model={args.model} is not a directory')
  if not shutil.which(args.peer_python):
    parser.error(f'--peer_python={args.peer_python} is not a program')
  if (args.output / results_lib.FILE).exists():
    parser.error(f'{args.output} has results already; choose a new directory')
  # Ends the stage that runs, too, which is a process group of its own.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  try:
    return run_all(args.output, stages, args.seconds, given)
  except OSError as e:  # such as a full disk
    sys.exit(f'error: {args.output}: {e.strerror or e}')


if __name__ == '__main__':
  sys.exit(main())
