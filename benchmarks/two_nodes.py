"""Checks a sweep on a Ray cluster of two nodes against one in this process.

  python -m benchmarks.two_nodes --workdir=runs/two_nodes [--steps=40]

The trials are heads × seeds of configs/quickstart.py, a few steps each. Both
nodes run on this machine, each with one core and an address of its own. Ends
with a table, and with exit code 0 if both nodes had trials and every trial has
the metrics of the `local` engine and, up to rounding, of `population`. Takes
some minutes on two cores.
"""

import argparse
from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time

from qa_jax.io import files

ROOT = pathlib.Path(__file__).resolve().parent.parent
RAY = pathlib.Path(sys.executable).with_name('ray')
START_SECONDS = 180.0
CONFIG = '''
import runpy

get_config = runpy.run_path({quickstart!r})['get_config']

def sweep():
  yield {{}}
  yield {{'model.head': 'biaffine', 'objective': 'joint'}}
'''
SMALLER = {
    'data.train': 'synthetic(seed=0, size=1000, paraphrases=1, repeats=0.0)',
    'data.eval': ('synthetic(seed=1, size=100, paraphrases=1, repeats=0.0, '
                  'split="eval")'),
    'parallel.num_devices': 1}
TOLERANCE = 1e-4  # tolerance of a population's metrics, in percentage points


def environment() -> dict[str, str]:
  """Returns the environment with one token, as all nodes of a cluster need."""
  return {**os.environ, 'RAY_AUTH_MODE': 'token', 'JAX_PLATFORMS': 'cpu',
          'RAY_AUTH_TOKEN': secrets.token_hex(32), 'PYTHONPATH': str(ROOT),
          'RAY_USAGE_STATS_ENABLED': '0'}


@contextlib.contextmanager
def cluster(logs: pathlib.Path, env: dict[str, str]) -> Iterator[str]:
  """Starts a cluster of two nodes and yields its address."""
  with socket.create_server(('', 0)) as server:
    address = f'localhost:{server.getsockname()[1]}'
  nodes: list[subprocess.Popen] = []
  with tempfile.TemporaryDirectory(  # the path of a socket must be short
      prefix='ray_', ignore_cleanup_errors=True) as scratch:
    try:
      for name, options in (
          ('first', ['--head', f'--port={address.split(":")[1]}',
                     '--include-dashboard=false', f'--temp-dir={scratch}']),
          ('second', [f'--address={address}',
                      '--node-ip-address=127.0.0.2'])):
        log_file = logs / f'{name}.log'
        with log_file.open('w') as log:
          nodes.append(subprocess.Popen(
              [RAY, 'start', '--block', '--num-cpus=1', *options],
              env=env, stdout=log, stderr=log, start_new_session=True))
        deadline = time.monotonic() + START_SECONDS
        while 'Ray runtime started' not in log_file.read_text():
          if nodes[-1].poll() is not None or time.monotonic() > deadline:
            sys.exit(f'error: the {name} node did not start; see {log_file}')
          time.sleep(0.5)
      yield address
    finally:
      for node in reversed(nodes):
        node.terminate()  # with --block it ends its processes
      for node in nodes:
        with contextlib.suppress(ProcessLookupError):
          node.wait()
          os.killpg(node.pid, signal.SIGKILL)


def sweep(config: pathlib.Path, workdir: pathlib.Path, steps: int,
          env: dict[str, str], *flags: str) -> dict[str, dict[str, float]]:
  """Runs a sweep and returns trial → metrics."""
  fields = {**SMALLER, 'train.num_steps': steps,
            'train.eval_every_steps': steps}
  subprocess.run(
      [sys.executable, '-m', 'experiments.sweep', f'--config={config}',
       f'--workdir={workdir}', '--seeds=2', *flags,
       *(f'--config.{key}={value}' for key, value in fields.items())],
      cwd=ROOT, env=env, check=True)
  return {run.name: files.read_object(next(run.glob('eval/*/metrics.json')))
          for run in sorted((workdir / 'trials').iterdir())}


def nodes_of(workdir: pathlib.Path) -> dict[str, str]:
  """Returns trial → address of its node, from the log of the trial."""
  return {log.stem: re.search(r'^sweep: on (\S+)$', log.read_text(), re.M)[1]
          for log in sorted((workdir / 'logs').iterdir())}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=int, default=40)
  arguments = parser.parse_args()
  workdir, steps = arguments.workdir.absolute(), arguments.steps
  if workdir.exists():
    parser.error(f'{workdir} exists already; choose a new directory')
  if not RAY.is_file():
    parser.error(f'{RAY} is not there; install ray')
  workdir.mkdir(parents=True)
  config = workdir / 'heads.py'
  config.write_text(CONFIG.format(
      quickstart=str(ROOT / 'configs' / 'quickstart.py')))
  env = environment()
  with cluster(workdir, env) as address:
    on_ray = sweep(config, workdir / 'ray', steps, env, '--engine=ray',
                   f'--address={address}')
  here = sweep(config, workdir / 'local', steps, env, '--workers=2')
  as_one = sweep(config, workdir / 'population', steps, env,
                 '--engine=population')
  nodes = nodes_of(workdir / 'ray')
  print('\n| trial | node | F1 on ray | local | population |\n'
        '|---|---|---|---|---|')
  for name, metrics in on_ray.items():
    print(f'| {name} | {nodes[name]} | {metrics["f1"]:.4f} | '
          f'{here[name]["f1"]:.4f} | {as_one[name]["f1"]:.4f} |')
  if len({*nodes.values()}) != 2:
    sys.exit('error: one node had all trials')
  if on_ray != here:
    sys.exit('error: ray and local differ')
  if here.keys() != as_one.keys() or any(
      not abs(value - as_one[name][key]) <= TOLERANCE  # NaN, too
      for name, metrics in here.items() for key, value in metrics.items()):
    sys.exit('error: population and local differ')


if __name__ == '__main__':
  # Ends the nodes, which are sessions of their own.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  try:
    main()
  except subprocess.CalledProcessError as e:  # it has said why
    sys.exit(f'error: a sweep ended with exit code {e.returncode}')
