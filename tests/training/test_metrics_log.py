"""The rows of training metrics: mean losses, speeds, and the last step."""

import json
import math

import jax
import numpy as np
import pytest

from qa_jax import input_pipeline
from qa_jax.data import cache
from qa_jax.runtime import console as console_lib
from qa_jax.training import metrics_log as metrics_log_lib
from qa_jax.training import train
from qa_jax.training import trainer as trainer_lib
from tests.common import runs
from tests.common import tiny

LOSSES = [4.0, 2.0, math.nan, 8.0, 16.0]  # of steps 1 … 5


@pytest.fixture
def make_meter(tmp_path):
  """Returns a function that makes a meter of a row every 2 of 5 steps."""
  opened = []

  def make(**options):
    opened.append(metrics_log_lib.MetricsLog(tmp_path, 0))
    return metrics_log_lib.StepMetrics(
        opened[-1], metrics_log_lib.Costs(), every_steps=2, steps_per_epoch=4,
        devices=jax.devices()[:1], max_skipped=2, num_steps=5, **options)
  yield make
  for log in opened:
    log.close()


def values(step: int) -> tuple[int, dict[str, float]]:
  loss = LOSSES[step - 1]
  return step, {'loss': loss, 'grad_norm': 1.0,
                'skipped': float(math.isnan(loss))}


def written(tmp_path) -> list[dict]:
  return [json.loads(line) for line in
          (tmp_path / 'metrics.jsonl').read_text().splitlines()]


def test_the_loss_of_a_row_is_the_mean_since_the_row_before(
    make_meter, tmp_path):
  meter = make_meter()
  for step in range(1, 6):
    meter.add_batch(np.arange(2), np.ones(2))
    meter.add_steps([values(step)])
  assert [(row['step'], row['loss']) for row in written(tmp_path)] == [
      (2, 3.0), (4, 8.0), (5, 16.0)]  # the loss of step 3 is no number


def test_losses_before_a_checkpoint_count_in_the_next_row(make_meter, tmp_path):
  before = make_meter()
  before.add_batch(np.arange(2), np.ones(2))
  before.add_steps([values(1)])
  after = make_meter(losses=before.losses)
  after.add_batch(np.arange(2), np.ones(2))
  after.add_steps([values(2)])
  assert written(tmp_path)[0]['loss'] == 3.0


def test_speeds_are_of_complete_steps_in_the_last_row_too(
    make_meter, tmp_path, monkeypatch):
  """All batches are dispatched before the first step is complete."""
  now = [0.0]
  monkeypatch.setattr(metrics_log_lib.time, 'perf_counter', lambda: now[0])
  meter = make_meter()
  for _ in range(5):
    meter.add_batch(np.arange(2), np.array([10, 20]))
  for step in range(1, 6):
    now[0] += 0.5  # seconds a step
    meter.add_steps([values(step)])
  for row in written(tmp_path):
    assert row['examples_per_second'] == 4.0
    assert row['tokens_per_second'] == 60.0


def test_steps_that_are_read_together_took_equally_long(
    make_meter, tmp_path, monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(metrics_log_lib.time, 'perf_counter', lambda: now[0])
  meter = make_meter()
  for _ in range(5):
    meter.add_batch(np.array([0, 3, -1]), np.array([10, 20]))
  now[0] = 3.0
  meter.leave_out(1.0)
  meter.add_steps([values(1), values(2)])  # 1 s each
  now[0] = 9.0
  meter.add_steps([values(3), values(4), values(5)])  # 2 s each
  assert [(row['epoch'], row['examples_per_second'], row['tokens_per_second'],
           row['skipped']) for row in written(tmp_path)] == [
      (0.5, 2.0, 30.0, 0), (1.0, 1.0, 15.0, 1), (1.25, 1.0, 15.0, 1)]
  assert capsys.readouterr().err.endswith('Its windows: 0 3\n')


@pytest.mark.slow
def test_rows_of_a_resumed_run_equal_those_of_an_undisturbed_one(
    tmp_path):
  """The run is killed between two rows, after a checkpoint."""
  config = tiny.config(train={'log_every_steps': 5})
  train.train(config, tmp_path / 'whole')
  runs.train_until_killed(config, tmp_path / 'killed', 5)
  train.train(config, tmp_path / 'killed')
  whole = runs.rows_of(tmp_path / 'whole')
  assert runs.rows_of(tmp_path / 'killed') == whole
  assert [row['step'] for row in whole if row['split'] == 'train'] == [5, 7]


def test_a_run_begins_with_its_size_and_the_compilation(tmp_path, capsys):
  train.train(tiny.config(), tmp_path)
  lines = capsys.readouterr().err.splitlines()
  size, = (n for n, line in enumerate(lines) if ' parameters on ' in line)
  assert '2 x cpu (pmap), float32, attention xla; 7 updates of 8' in lines[size]
  assert lines[size + 1].startswith('compiling 1 batch shape')
  assert 'training begins' not in lines[size + 1]  # it is the only shape
  assert lines[size + 2].startswith('compiled in ')
  assert lines[size + 3].startswith('train 1/7  loss ')
  assert any('gold spans are whole tokens' in line for line in lines[:size])


def test_the_line_about_gold_spans_counts_no_questions(tmp_path):
  row = {'question': 'Who met Bob?', 'context': 'Ada met Bob.'}
  rows = [{**row, 'answers': [{'text': 'Ada', 'answer_start': 0}]},
          {**row, 'answers': []}, {**row, 'answers': [], 'question': 'x ' * 21}]
  (tmp_path / 'rows.json').write_text(json.dumps(rows))
  windows, note = input_pipeline.load_windows(
      tiny.config(), str(tmp_path / 'rows.json'),
      cache.LearnedVocabulary(200, True))
  assert '2 of them, whose list of answers is empty' in note
  assert note.endswith('cut to data.max_question_length=16 tokens: 1')
  assert trainer_lib.describe_alignment(windows.audit) == (
      '1 of 1 gold spans are whole tokens')


def test_a_long_silence_is_broken_without_a_terminal(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(console_lib.time, 'monotonic', lambda: now[0])
  progress = console_lib.Progress('evaluate', total=4)
  for done in range(1, 5):
    now[0] += 20.0
    progress.update(done)
  assert capsys.readouterr().err == (
      'evaluate 1/4  ETA –\nevaluate 3/4  ETA 0:20\n')
