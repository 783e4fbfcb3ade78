"""The program of each of the two processes that test_processes starts.

  python -m tests.common.together --output=DIR --coordinator=HOST:PORT …

Each process writes DIR/INDEX.json, and at the end the second kills itself.
"""

import json
import os
import pathlib
import signal
import sys

from absl import flags
import jax

from experiments import cli
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.data import windows
from qa_jax.runtime import processes
from qa_jax.runtime import signals
from qa_jax.training import dry_run
from qa_jax.training import population
from qa_jax.training import train
from qa_jax.training import trainer
from tests.common import dispatch
from tests.common import tiny

RUNS: dict[str, config_lib.Config] = {
    'whole': tiny.config(
        parallel={'num_devices': 4},
        train={'num_steps': 5, 'checkpoint_every_steps': 4,
               'eval_every_steps': 3}),
    'other': tiny.config(
        objective='shared_norm',  # keeps the windows of a question together
        parallel={'num_devices': 4, 'mode': 'mesh', 'mesh': {'fsdp': 2}},
        data={'packing': True},
        train={'num_steps': 3, 'batch_size': 16, 'updates_per_dispatch': 2}),
}


def train_until(number: int, step: int, workdir: pathlib.Path) -> None:
  """Trains; the second process sends itself a signal with `step` in flight."""
  def fault():
    if jax.process_index() == 1:
      os.kill(os.getpid(), number)

  with dispatch.fault_at(step, fault):
    train.train(RUNS['whole'], workdir)


def refusal(call, *arguments) -> str:
  try:
    call(*arguments)
  except errors.UserError as e:
    return str(e)
  raise AssertionError


def score_other_weights(output: pathlib.Path) -> None:
  """Evaluates another checkpoint on each process."""
  flags.FLAGS.checkpoint = str(4 + jax.process_index())
  evaluate.score_model(output)


def main() -> None:
  cli.join()
  workdir = pathlib.Path(evaluate.OUTPUT.value)
  found, read = {}, []
  gather = windows.WindowSet.gather

  def gathering(self, rows, length, **options):
    read.append(len(rows))
    return gather(self, rows, length, **options)

  windows.WindowSet.gather = gathering
  for name, config in RUNS.items():
    # Only the first process is asked for the profile, which cuts a dispatch.
    profiled = name == 'other' and jax.process_index() == 0
    profile = range(1, 2) if profiled else range(0)
    found[name] = train.train(config, workdir / name, profile_steps=profile)
    found[f'{name} rows'] = sorted(set(read))
    read.clear()
  flags.FLAGS.workdir = str(workdir / 'whole')
  flags.FLAGS.data = RUNS['whole'].data.eval
  found['scored'], _ = evaluate.score_model(workdir / 'scored')
  try:
    train_until(signal.SIGTERM, 1, workdir / 'stopped')
  except signals.Stopped as e:
    found['stopped'] = e.code
  processes.wait_for_all('stopped')
  found['saved'] = sorted(
      int(p.name) for p in (workdir / 'stopped' / 'checkpoints').iterdir())
  processes.wait_for_all('looked')
  found['resumed'] = train.train(RUNS['whole'], workdir / 'stopped')
  dry_run.SECONDS = 60.0 * jax.process_index()  # another limit on each
  found['dry run'] = dry_run.summarize(trainer.build_trainer(RUNS['whole']))
  found['refused'] = [
      refusal(lambda: processes.check_equal_on_all(
          config='same', data=f'of {jax.process_index()}')),
      refusal(population.train_members, [RUNS['whole']],
              [workdir / 'member']),
      refusal(trainer.build_trainer, tiny.config(parallel={'mode': 'jit'})),
      refusal(score_other_weights, workdir / 'mixed'),
      refusal(trainer.build_trainer, tiny.config(seed=jax.process_index())),
      refusal(train.train, RUNS['whole'], workdir / f'{jax.process_index()}')]
  (workdir / f'{jax.process_index()}.json').write_text(json.dumps(found))
  train_until(signal.SIGKILL, 3, workdir / 'killed')


if __name__ == '__main__':
  from experiments import evaluate  # defines flags, and not for tests
  processes.HEARTBEAT_SECONDS = 20
  sys.argv[0] = 'together'
  cli.run(main, several=True, model=True)
