"""What a run keeps: its directory, checkpoints, evaluations."""

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import jax

from qa_jax import build
from qa_jax import checkpoint
from qa_jax import evaluate
from qa_jax import files
from qa_jax import logs
from qa_jax import update
from qa_jax.data import store as store_lib

if TYPE_CHECKING:
  from qa_jax import train


class Keeper:
  """Evaluates and saves a run at the steps that its config says."""

  def __init__(self, trainer: 'train.Trainer', store: checkpoint.Checkpoints,
               log: logs.MetricsLog, costs: logs.Costs,
               workdir: pathlib.Path):
    self._trainer, self._store = trainer, store
    self._log, self._costs, self._workdir = log, costs, workdir
    self.metrics: dict[str, float] = {}  # of the latest evaluation

  def _evaluates(self, step: int) -> bool:
    every = self._trainer.config.train.eval_every_steps
    return (step == self._trainer.num_steps
            or bool(every and step % every == 0))

  def due(self, step: int) -> bool:
    """Whether there is something to `keep` before this step."""
    every = self._trainer.config.train.checkpoint_every_steps
    return self._evaluates(step) or step % every == 0

  def keep(self, step: int, state: update.TrainState) -> str:
    """Evaluates, if it is time, then saves; what to tell the user, or ''."""
    trainer, metrics = self._trainer, {}
    if self._evaluates(step) and trainer.evaluator:
      last = step == trainer.num_steps
      self.metrics = metrics = trainer.evaluator.evaluate(
          state.params,
          output=_output(trainer, self._workdir) if last else None)
      self._log.write(step, 'eval', {
          **metrics, **self._costs.spent(len(trainer.devices))})
    self._store.save(
        step, params=state.params,
        optimizer={'opt_state': state.opt_state, 'step': state.step},
        meta={'position': trainer.batches.position,
              'devices': len(trainer.devices)}, metrics=metrics)
    if not metrics:
      return ''
    return f'eval EM {metrics["exact_match"]:.2f} F1 {metrics["f1"]:.2f}'


def write_run(trainer: 'train.Trainer', workdir: pathlib.Path, argv: list[str],
              more: dict[str, Any] | None = None) -> None:
  """All at once, by a rename: a workdir is empty or it is a run.

  `more` goes into run.json.
  """
  if (workdir / 'config.json').is_file():
    return
  hashes = {'vocabulary': trainer.tokenizer.fingerprint,
            'train': store_lib.fingerprint(trainer.windows.examples)}
  if trainer.evaluator:
    hashes['eval'] = store_lib.fingerprint(trainer.evaluator.windows.examples)

  def write(directory: pathlib.Path) -> None:
    files.write_json(directory / 'alignment.json', {
        'counts': trainer.windows.audit, 'examples': trainer.windows.faults})
    build.write_run(
        directory, trainer.config, trainer.sizes, trainer.tokenizer,
        logs.run_record(seed=trainer.config.seed, argv=argv or sys.argv,
                        devices=trainer.devices, hashes=hashes)
        | (more or {}))

  files.write_directory(workdir, write)


def restore(trainer: 'train.Trainer', store: checkpoint.Checkpoints,
            step: int | None) -> None:
  """Puts the state of checkpoint `step` on the devices; None: as it begins."""
  state = trainer.state
  shardings = trainer.parallel.state_sharding(state)
  if step is None:
    trainer.state = jax.device_put(state, shardings)
    return
  shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state, shardings)
  params, optimizer, meta = store.restore(
      step, params=shapes.params,
      optimizer={'opt_state': shapes.opt_state, 'step': shapes.step})
  trainer.state = update.TrainState(
      params=params, **optimizer,
      key_data=jax.device_put(state.key_data, shardings.key_data))
  trainer.batches.seek(meta['position'])
  logs.say(f'resuming from step {step} of {trainer.num_steps}')
  if meta['devices'] != len(trainer.devices):
    regrouped = ('; questions are grouped anew, so this epoch may repeat or '
                 'skip windows' if trainer.batches.group_questions else '')
    logs.say(f'{meta["devices"]} devices before, {len(trainer.devices)} now: '
             f'equal but for rounding{regrouped}')


def _output(trainer: 'train.Trainer', workdir: pathlib.Path) -> pathlib.Path:
  return workdir / 'eval' / evaluate.data_name(trainer.config.data.eval)


def final_metrics(trainer: 'train.Trainer',
                  workdir: pathlib.Path) -> dict[str, Any]:
  if not trainer.evaluator:
    return {}
  path = _output(trainer, workdir) / 'metrics.json'
  if not path.is_file():
    return trainer.evaluator.evaluate(trainer.state.params,
                                      output=_output(trainer, workdir))
  return files.read_object(path)
