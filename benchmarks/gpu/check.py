r"""Checks qa_jax on a machine with a GPU, and measures it there.

  python -m benchmarks.gpu.check --output=runs/gpu_check [--seconds=480]
  TINY=1 JAX_PLATFORMS=cpu python -m benchmarks.gpu.check --output=DIR

The second command rehearses everything on a CPU with small sizes. Stages are
processes with a time limit, so that one that fails or hangs does not stop the
others. OUTPUT/results.jsonl has the results as they come, and the table at the
end goes to OUTPUT/table.md. The exit code is 1 if a check failed. The stage
`peer` needs requirements-peers.txt.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from benchmarks.gpu import results as results_lib

# Stage → its largest share of the time, in the order in which they run.
SHARES = {'device': 0.1, 'searches': 0.1, 'attentions': 0.3, 'update': 0.25,
          'repeat': 0.2, 'speed': 0.5, 'peer': 0.25}
# Two processes of `peer` share a card. In `speed`, XLA would compile each
# product in some thirty forms more.
ENVIRONMENT = {'peer': {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
               'speed': {'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=false'}}


def run_stage(stage: str, results: results_lib.Results) -> None:
  """Runs one stage in this process."""
  if stage in ('repeat', 'peer'):
    results.attempt(stage, {'repeat': repeat, 'peer': peer}[stage],
                    results.directory)
    return
  from benchmarks.gpu import numerics
  from benchmarks.gpu import steps
  module = numerics if hasattr(numerics, stage) else steps
  vars(module)[stage](results)


def repeat(directory: pathlib.Path) -> dict[str, object]:
  """Trains twice with precision.deterministic and compares the losses."""
  losses = []
  for number in (1, 2):
    workdir = directory / f'repeat{number}'
    subprocess.run(
        [sys.executable, '-m', 'experiments.train', f'--workdir={workdir}',
         '--config=configs/quickstart.py', '--config.data.eval=',
         '--config.data.train=synthetic(size=200)',
         '--config.train.num_epochs=0.0', '--config.train.num_steps=20',
         '--config.train.log_every_steps=1', '--config.parallel.num_devices=1',
         '--config.precision.deterministic=True'], check=True)
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    losses.append([json.loads(line).get('loss') for line in lines])
  return dict(rows=len(losses[0]), ok=losses[0] == losses[1] != [])


def peer(directory: pathlib.Path) -> dict[str, object]:
  """Measures training beside torch + transformers, after a comparison."""
  output = directory / 'peer.json'
  code = subprocess.run(
      [sys.executable, '-m', 'experiments.benchmark', '--suite=train',
       '--encoders=base', f'--output={output}',
       *['--quick'] * results_lib.TINY], check=False).returncode
  return dict(file=str(output), exit_code=code, ok=code == 0)


def run_all(output: pathlib.Path, stages: list[str], seconds: float) -> int:
  """Runs the stages as processes and writes the table; returns exit code."""
  output.mkdir(parents=True, exist_ok=True)
  path = output / 'results.jsonl'
  path.write_text('')
  end = time.monotonic() + seconds
  for stage in stages:
    limit = max(min(SHARES[stage] * seconds, end - time.monotonic()), 0)
    print(f'== {stage}: at most {limit:.0f} s', flush=True)
    problem = ''
    try:
      code = subprocess.run(
          [sys.executable, '-m', 'benchmarks.gpu.check', f'--stages={stage}',
           f'--output={output}', f'--seconds={0.9 * limit}', '--inside'],
          env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '2',
               **({} if results_lib.TINY else ENVIRONMENT.get(stage, {}))},
          timeout=limit, check=False).returncode
      problem = f'exit code {code}' if code else ''
    except subprocess.TimeoutExpired:
      problem = f'ended after {limit:.0f} s'
    if problem:
      results_lib.Results(output, stage, 0).record(
          'stage', ok=False, error=problem)
  text, failed = results_lib.table(path.read_text().splitlines())
  (output / 'table.md').write_text(text)
  print(text, end='')
  return int(failed > 0)


def main() -> int:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  add = parser.add_argument
  add('--output', type=pathlib.Path, required=True)
  add('--seconds', type=float, default=480)
  add('--stages', default=','.join(SHARES), help='default: %(default)s')
  add('--inside', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  stages = args.stages.split(',')
  if unknown := sorted(set(stages) - set(SHARES)):
    parser.error(f'unknown stages {", ".join(unknown)}')
  if args.inside:
    run_stage(stages[0], results_lib.Results(
        args.output, stages[0], args.seconds))
    return 0
  return run_all(args.output, stages, args.seconds)


if __name__ == '__main__':
  sys.exit(main())
