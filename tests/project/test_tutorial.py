"""The tutorial notebook runs, and it is stored without outputs.

Outputs would change with every machine and every run.
"""

import json
import pathlib
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads(
    (ROOT / 'docs' / 'tutorial.ipynb').read_text(encoding='utf-8'))
CELLS = [c for c in NOTEBOOK['cells'] if c['cell_type'] == 'code']


def test_it_has_no_outputs():
  assert CELLS
  for cell in CELLS:
    assert not cell['outputs'] and cell['execution_count'] is None


def test_its_cells_run_in_order_and_print_the_report(
    tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  code = '\n'.join(''.join(cell['source']) for cell in CELLS)
  fewer_steps = code.replace("'num_steps': 60", "'num_steps': 3")
  assert fewer_steps != code
  exec(compile(fewer_steps, 'tutorial.ipynb', 'exec'), {})
  assert 'biaffine(rank=8)' in capsys.readouterr().out
