"""The dry run: its memory and time, beside the sizes of a run."""

import dataclasses

import jax
import pytest

from qa_jax.runtime import devices
from qa_jax.training import dry_run
from qa_jax.training import trainer as trainer_lib
from tests.common import tiny


@pytest.fixture(scope='module')
def trainer() -> trainer_lib.Trainer:
  return trainer_lib.build_trainer(tiny.config(
      train={'num_steps': 30}, data={'max_length': 96, 'buckets': (56,)}))


def test_time_grows_with_the_positions_of_batches(trainer, monkeypatch):
  monkeypatch.setattr(dry_run, '_time', lambda *_: (600.0, 3))
  lengths = [next(trainer.batches)['token_ids'].shape[1]
             for _ in range(trainer.batches.steps_per_epoch)]
  assert {*lengths} == {56, 96}
  trainer.batches.seek({'epoch': 0, 'index': 0})
  minutes = 30 * 600 * sum(lengths) / len(lengths) / 96 / 60
  text = dry_run.summarize(trainer)['eta']
  hours, rest = divmod(-(-minutes // 1), 60)
  assert text.startswith(f'{hours:.0f} h {rest:.0f} min: an estimate from 3 ')


def test_no_step_is_tried_that_may_not_fit(trainer, monkeypatch):
  def never(*_):
    raise AssertionError('a step ran')
  monkeypatch.setattr(devices, 'free_bytes', lambda _: 1024.0)
  monkeypatch.setattr(dry_run, '_time', never)
  summary = dry_run.summarize(trainer)
  assert summary['eta'].startswith('not timed: beside the state a step needs')
  assert 'seconds_per_step' not in summary


def test_devices_of_a_cpu_share_its_memory(trainer, monkeypatch):
  monkeypatch.setattr(dry_run, '_time', lambda *_: (1.0, 3))
  pair = trainer_lib.build_trainer(tiny.config(
      train={'num_steps': 30}, data={'max_length': 96, 'buckets': (56,)},
      parallel={'num_devices': 2}))
  megabytes = float(dry_run.summarize(pair)['activation_megabytes'].split()[0])
  for times, timed in ((1.5, False), (2.5, True)):
    monkeypatch.setattr(devices, 'free_bytes', lambda _, times=times: (
        times * megabytes * 2**20 / dry_run.MEMORY_SHARE))
    assert ('seconds_per_step' in dry_run.summarize(pair)) == timed


def test_the_first_step_is_not_timed(trainer, monkeypatch):
  class Clock:
    now, steps = 0.0, 0

    def perf_counter(self):
      return self.now

  clock, step = Clock(), trainer.parallel.step

  def slow(*args):
    clock.now += 2.0 if clock.steps else 90.0
    clock.steps += 1
    return step(*args)

  monkeypatch.setattr(dry_run, 'time', clock)
  monkeypatch.setattr(dry_run, 'SECONDS', 91.0)  # time for two steps
  slow_trainer = dataclasses.replace(
      trainer, parallel=dataclasses.replace(trainer.parallel, step=slow))
  summary = dry_run.summarize(slow_trainer)
  assert summary['seconds_per_step'].startswith('2 for ')
  trainer.batches.seek({'epoch': 0, 'index': 0})


@pytest.mark.parametrize('freeze', [False, True])
def test_the_parameters_are_those_that_learn(trainer, freeze):
  text = dry_run.describe_parameters(dataclasses.replace(
      trainer, config=tiny.config(optim={'freeze_encoder': freeze})))
  every = sum(x.size for x in jax.tree.leaves(trainer.state.params))
  head = 2 * trainer.model.config.hidden_size  # a start and an end score
  assert text == f'{every:,} parameters' + (
      f' ({head} of the head are trained)' * freeze)


@pytest.mark.parametrize('changes', [
    {'data': {'packing': True}}, {'parallel': {'mode': 'mesh'}},
    pytest.param({'train': {'grad_accumulation': 2}},
                 marks=pytest.mark.slow)], ids=str)
def test_every_way_to_train_has_a_dry_run(changes):
  summary = dry_run.summarize(trainer_lib.build_trainer(tiny.config(**changes)))
  assert float(summary['activation_megabytes'].split()[0]) > 0
  assert 'an estimate' in summary['eta']


@pytest.mark.parametrize(('seconds', 'text'), [
    (0.4, '0 s'), (119.0, '119 s'), (121.0, '3 min'), (7140.0, '119 min'),
    (7141.0, '2 h 0 min'), (9000.0, '2 h 30 min')])
def test_a_time_has_the_unit_that_people_read(seconds, text):
  assert dry_run._clock(seconds) == text
