"""The notebook runs as it stands, and is kept without outputs.

Outputs would be numbers of some machine and day, and a diff of each run: who
opens it makes them in a minute.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = json.loads(
    (ROOT / 'docs' / 'tutorial.ipynb').read_text(encoding='utf-8'))
CELLS = [c for c in NOTEBOOK['cells'] if c['cell_type'] == 'code']


def test_it_has_no_outputs():
  assert CELLS
  for cell in CELLS:
    assert not cell['outputs'] and cell['execution_count'] is None


def test_its_cells_run_in_their_order_and_end_with_a_report(tmp_path):
  code = '\n'.join(''.join(cell['source']) for cell in CELLS)
  done = subprocess.run(
      [sys.executable, '-c', code], cwd=tmp_path, check=False,
      capture_output=True, text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)})
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'biaffine(rank=8)' in done.stdout
