"""The tutorial notebook runs, and it is stored with outputs and figures.

The stored outputs are of a fine-tuned model. The test trains a tiny one.
"""

import base64
import json
import pathlib
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads(
    (ROOT / 'docs' / 'tutorial.ipynb').read_text(encoding='utf-8'))
CELLS = [c for c in NOTEBOOK['cells'] if c['cell_type'] == 'code']


def test_it_has_outputs_in_order_and_figures():
  assert [c['execution_count'] for c in CELLS] == [*range(1, len(CELLS) + 1)]
  outputs = [o for c in CELLS for o in c['outputs']]
  assert not any(o['output_type'] == 'error' for o in outputs)
  figures = [o['data']['image/png'] for o in outputs
             if 'image/png' in o.get('data', {})]
  assert len(figures) == 2
  for figure in figures:
    assert base64.b64decode(figure)[:4] == b'\x89PNG'
  text = ''.join(''.join(o.get('text', ())) for o in outputs)
  assert 'Harrow Point?  →  Ingrid Solvang' in text
  assert str(ROOT) not in text and '/tmp' not in text


@pytest.mark.slow
def test_its_cells_run_in_order_and_print_the_report(
    tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  code = '\n'.join(''.join(cell['source']) for cell in CELLS)
  fewer_steps = code.replace("'num_steps': 60", "'num_steps': 3")
  assert fewer_steps != code
  monkeypatch.chdir(tmp_path)  # without runs/squad2
  exec(compile(fewer_steps, 'tutorial.ipynb', 'exec'), {})
  assert 'biaffine(rank=8)' in capsys.readouterr().out
