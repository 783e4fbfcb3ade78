"""A run of the flat package layout: it loads, evaluates and resumes.

tests/golden/run_of_flat_layout was trained by the code of commit e1e9f95, with
the settings of conftest.py for XLA, for 6 steps with a checkpoint every 3.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.evaluation import evaluator
from qa_jax.inference import predict
from qa_jax.training import train
from tests.common import runs

OLD = pathlib.Path(__file__).parents[1] / 'golden' / 'run_of_flat_layout'


def test_its_evaluation_is_the_recorded_one(tmp_path):
  data = RunDirectory(OLD).read_config().data.eval
  recorded = RunDirectory(OLD).evaluation(data)
  evaluator.evaluate_data(predict.load(OLD), data, output=tmp_path)
  for name in ('metrics.json', 'predictions.json'):
    assert json.loads((tmp_path / name).read_text()) == json.loads(
        (recorded / name).read_text())
  for old, new in zip(*((folder / 'nbest.jsonl').read_text().splitlines()
                        for folder in (recorded, tmp_path)), strict=True):
    old, new = json.loads(old), json.loads(new)
    assert [a['text'] for a in new['answers']] == [
        a['text'] for a in old['answers']]
    # Equal to the bit on one processor; another may round otherwise.
    assert [a['score'] for a in new['answers']] == pytest.approx(
        [a['score'] for a in old['answers']], abs=1e-5)


def test_it_resumes_to_the_recorded_parameters(tmp_path):
  """Resumes without dropout, whose masks are others since commit b6a8620.

  The code of that commit resumed the same checkpoint in the same way.
  """
  run = tmp_path / 'run'
  shutil.copytree(OLD, run)
  shutil.rmtree(run / 'checkpoints' / '6')
  shutil.rmtree(run / 'eval')
  fields = json.loads((run / 'config.json').read_text())
  fields['model'] |= {'dropout': 0.0, 'attention_dropout': 0.0}
  (run / 'config.json').write_text(json.dumps(fields))
  metrics = train.train(RunDirectory(run).read_config(), run)
  assert metrics['total'] == 20
  resumed = runs.state_of(run, 6)
  assert resumed.pop('position') == runs.state_of(OLD, 6).pop('position')
  with np.load(OLD.with_name('run_of_flat_layout_resumed.npz')) as recorded:
    recorded = dict(recorded)
  assert recorded.keys() == {k for k in resumed if k.startswith('[0]')}
  for name, value in recorded.items():
    # Equal to the bit on one processor. Another rounds otherwise, and Adam
    # makes of that up to 1e-3 in three steps at a rate of 1e-2.
    np.testing.assert_allclose(resumed[name], value, atol=1e-3, err_msg=name)
