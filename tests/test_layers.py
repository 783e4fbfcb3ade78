"""Who may import whom: the layers of the architecture, enforced."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = (
    {'errors', 'files', 'registry', 'grid', 'manifest', 'lock', 'stop',
     'watchdog'},
    {'data', 'metrics', 'significance', 'analysis', 'null_rules', 'aggregate',
     'calibration', 'ensemble', 'answering'},
    {'models', 'heads', 'objectives', 'search', 'gather'},
    {'optim', 'update', 'parallel', 'checkpoint', 'weights', 'weight_files',
     'weight_names', 'tensor_bundle', 'logs',
     'meter', 'pictures', 'processes', 'runtime', 'tracker'},
    {'config', 'build', 'fit', 'evaluate', 'predict', 'pretrained', 'convert',
     'export', 'runner', 'train', 'keeper', 'kept', 'features', 'forecast',
     'calibrate', 'reliability', 'assess',
     'ensemble_files', 'suite', 'population', 'sweep',
     'study', 'pruners', 'search_space', 'view', 'web', 'engines', 'compare',
     'report', 'page', 'analysis_report', 'bench'},
)
NO_JAX = LAYERS[0] | LAYERS[1] | {'config'}
NO_DATA = LAYERS[2] | LAYERS[3]
FILES = sorted((ROOT / 'qa_jax').rglob('*.py'))


def part_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / 'qa_jax').parts[0].removesuffix('.py')


def layer_of(part: str) -> int:
  return next(i for i, parts in enumerate(LAYERS) if part in parts)


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names that a file imports, at any depth of its code."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def test_every_file_has_a_layer():
  parts = {part_of(f) for f in FILES} - {'__init__'}
  assert parts == set().union(*LAYERS) & parts
  assert len(parts) > 10


@pytest.mark.parametrize(
    'path', [f for f in FILES if part_of(f) != '__init__'],
    ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_downwards(path):
  part = part_of(path)
  for name in imports(path):
    if name.startswith('qa_jax.'):
      target = name.split('.')[1]
      assert layer_of(target) <= layer_of(part), name
      assert not (part in NO_DATA and target == 'data'), name
    root = name.split('.')[0]
    assert not (part in NO_JAX and root in ('jax', 'flax', 'optax')), name
    assert root not in ('torch', 'transformers', 'tensorflow', 'pickle'), name


@pytest.mark.parametrize('folder', ['configs', 'experiments'])
def test_nothing_imports_configs_or_experiments(folder):
  for path in FILES:
    assert not any(n.split('.')[0] == folder for n in imports(path)), path


def test_configs_import_nothing_but_ml_collections_and_grid():
  for path in (ROOT / 'configs').rglob('*.py'):
    assert imports(path) <= {'ml_collections', 'qa_jax.grid'}, path


def test_data_and_metrics_load_without_jax():
  code = ('import sys; from qa_jax import metrics; '
          'from qa_jax.data import batches, sources, tokenizer, windows; '
          'assert "jax" not in sys.modules and "tensorflow" not in sys.modules')
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
