"""The engine that runs trials as tasks of a Ray cluster.

The machines of the cluster share a file system. Ray is imported inside
functions, so that other engines do not need it. It reads these environment
variables, which are set unless the user has set them:
RAY_USAGE_STATS_ENABLED=0 sends no statistics;
RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 hides GPUs from tasks without one. For a
cluster that runs already: RAY_NUM_REDIS_GET_RETRIES=4 gives up after seconds,
RAY_BACKEND_LOG_LEVEL=error hides logs, and RAY_AUTH_MODE=token shows the token
of this user if there is one. If the user sets RAY_ADDRESS, --address=auto
stands for it.
"""

from collections.abc import Iterator, Mapping, Sequence
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any
import warnings

from qa_jax import errors
from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import remote
from qa_jax.sweeps.engines import scheduler

CONNECT_SECONDS = 3.0
JOIN_SECONDS = 30.0  # to start Python and join a cluster
TOKEN = pathlib.Path('~/.ray/auth_token')
JOIN = """
import ray, sys
try:
  ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')
except (Exception, SystemExit) as e:
  sys.exit(f'{e} {e.__context__ or ""}')
"""


def _import(address: str) -> Any:
  """Imports Ray after setting its environment variables."""
  settings = {'RAY_USAGE_STATS_ENABLED': '0',
              'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '1'}
  if address != 'local':
    settings |= {'RAY_NUM_REDIS_GET_RETRIES': '4',
                 'RAY_BACKEND_LOG_LEVEL': 'error'}
    if TOKEN.expanduser().is_file():
      settings['RAY_AUTH_MODE'] = 'token'
  for name, value in settings.items():
    os.environ.setdefault(name, value)
  import ray
  return ray


def check(setup: scheduler.Setup) -> None:
  """Checks that a Ray cluster answers.

  An unreachable address is refused after CONNECT_SECONDS. A child process then
  joins the cluster, because ray.init has no time limit of its own.

  Raises:
    UserError: Ray is not installed, or no cluster answers at the address.
  """
  address = setup.address
  try:
    _import(address)
  except ImportError:
    raise errors.UserError("--engine=ray needs Ray: pip install -e '.[ray]'"
                           ) from None
  if address == 'local':
    return
  if address == 'auto':
    address = os.environ.get('RAY_ADDRESS') or address
  where = f'--address={setup.address}' + (
      f' ({address})' * (address != setup.address))
  if address != 'auto':
    host, _, port = address.removeprefix('ray://').rpartition(':')
    if not host or not port.isdigit():
      raise errors.UserError(f'{where}: expected HOST:PORT, auto or local')
    try:
      socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as e:
      raise errors.UserError(
          f'{where}: no Ray cluster there: {errors.host_reason(e)}; `ray start '
          '--head` starts one') from None
  try:
    child = subprocess.run([sys.executable, '-c', JOIN, address], text=True,
                           capture_output=True, timeout=JOIN_SECONDS)
  except subprocess.TimeoutExpired:
    raise errors.UserError(
        f'{where}: no Ray cluster there: no answer in {JOIN_SECONDS:g} seconds;'
        ' `ray start --head` starts one') from None
  if child.returncode:
    raise errors.UserError(f'{where}: {_reason(child.stderr)}')


def _reason(text: str) -> str:
  if 'Could not find any running Ray instance' in text:
    return ('no Ray cluster runs on this machine; `ray start --head` starts '
            'one, and --address=local one for this sweep alone')
  if 'AuthToken' in text:
    return (f'the cluster refuses the token of this machine; copy {TOKEN} of '
            'the one that it was started on to all')
  return ' '.join(text.split())[:300]


def run(trials: Sequence[plan.Trial], command: scheduler.Command,
        setup: scheduler.Setup) -> dict[str, str]:
  """Runs trials; returns the names of failed trials with the reasons.

  share() computes the GPUs or TPU chips of a trial. An exception ends all
  trials.

  Raises:
    UserError: there is no cluster, or more workers than it has devices.
  """
  ray = _import(setup.address)
  here = ({'include_dashboard': False, '_node_ip_address': '127.0.0.1'}
          if setup.address == 'local' else {})
  handler = signal.getsignal(signal.SIGTERM)
  try:
    with warnings.catch_warnings(), console.say_if_slow(
        f'--address={setup.address}: starting Ray' if here else
        f'--address={setup.address}: joining the Ray cluster'):
      # JAX warns of any fork. The forked children call exec at once.
      warnings.filterwarnings('ignore', r'os\.fork\(\)', RuntimeWarning)
      ray.init(address=setup.address, log_to_driver=False,
               logging_level='ERROR', **here)
  except (Exception, SystemExit) as e:  # ray.init raises many types
    raise errors.UserError(f'--address={setup.address}: '
                           + _reason(f'{e} {e.__context__ or ""}')) from None
  # ray.init replaces the handler of SIGTERM by one that prints a stack and ends
  # this process after 3 seconds, before the trials have saved their states.
  signal.signal(signal.SIGTERM, handler)
  try:
    workers, resources = share(
        [node['Resources'] for node in ray.nodes() if node['Alive']],
        setup.workers)
    task = ray.remote(max_retries=0, **resources)(_call)

    def start(starts: Sequence[scheduler.Start]) -> Iterator[Process]:
      for s in starts:
        size = s.log.tell()
        s.log.close()  # frees the lock for the task
        yield Process(ray, task.remote(remote.Work(
            command(s.trial), s.trial.log, s.trial.metrics)), s.trial, size)

    return scheduler.run_trials(
        scheduler.Queue(trials, setup.study), workers, start)
  finally:
    ray.shutdown()


def share(nodes: Sequence[Mapping[str, float]], workers: int,
          ) -> tuple[int, dict[str, Any]]:
  """Returns the number of concurrent trials and the resources of each.

  `workers` 0 stands for one trial a GPU, or one a machine without GPUs. A trial
  never spans machines.

  Raises:
    UserError: there are more workers than devices. Ray would wait for ever.
  """
  kind = next((kind for kind in ('GPU', 'TPU')
               if any(node.get(kind) for node in nodes)), 'CPU')
  counts = [int(node.get(kind, 0)) for node in nodes]
  wanted = workers or (sum(counts) if kind == 'GPU' else len(nodes))
  most_each = max(counts, default=0)
  # One process uses all chips of a TPU host. Of GPUs and cores, a trial gets
  # the most with which all trials fit.
  each = most_each if kind == 'TPU' else next(
      (n for n in range(most_each, 0, -1)
       if sum(number // n for number in counts) >= wanted), 0)
  most = sum(number // (each or 1) for number in counts)
  if workers > most or not each:
    raise errors.UserError(
        f'--workers={workers}, but the cluster takes at most {most} trials on '
        f'its {sum(counts)} {kind}s')
  return workers or most, {
      'CPU': {'num_cpus': each}, 'GPU': {'num_cpus': 1, 'num_gpus': each},
      'TPU': {'num_cpus': 1, 'resources': {'TPU': each}}}[kind]


def _call(work: remote.Work) -> int:
  import ray
  return work(f'on {ray.util.get_node_ip_address()}')


class Process(remote.Process):
  """A Ray task, which can be lost with its machine."""

  def __init__(self, ray: Any, task: Any, trial: plan.Trial, size: int):
    super().__init__(trial, size)
    self._ray, self._task = ray, task

  def poll(self) -> int | None:
    if self._code is None and self._ray.wait([self._task], timeout=0)[0]:
      try:
        self._code = self._ray.get(self._task)
      except self._ray.exceptions.RayError as e:
        scheduler.record_note(self._trial.log, str(e).strip().split('\n')[-1])
        self._code = 1
    return self._code

  def end(self, force: bool) -> None:
    self._ray.cancel(self._task, force=force)
