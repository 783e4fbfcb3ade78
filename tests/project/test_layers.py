"""The table of allowed imports, equal to the code."""

import ast
import graphlib
import subprocess
import sys

import pytest

from tests.common import imports as imports_lib
from tests.common.imports import FILES
from tests.common.imports import ROOT

# Part of the package → the parts it imports. A part is a wing or a file at
# the root. The table is exact: an entry that no import needs fails as well.
ALLOWED = {
    'errors': '',
    'config': 'errors',
    'config_comments': 'config',
    'registry': 'errors',
    'io': 'errors',
    'span_scores': 'errors',
    'data': 'errors io registry',
    'runtime': 'errors io',
    'heads': 'errors registry span_scores',
    'objectives': 'errors registry span_scores',
    'models': 'errors span_scores',
    'metrics': 'data errors io',
    'decoding': 'data errors registry span_scores',
    'checkpoints': 'config data errors io models registry runtime',
    'build': (
        'checkpoints config decoding errors heads models objectives '
        'registry span_scores'),
    'input_pipeline': 'checkpoints config data errors runtime',
    'inference': (
        'build checkpoints config data decoding errors input_pipeline '
        'io metrics models objectives registry runtime span_scores'),
    'evaluation': (
        'checkpoints config data decoding errors inference input_pipeline '
        'io metrics models runtime'),
    'serving': (
        'data errors inference input_pipeline io metrics runtime'),
    'export': (
        'build checkpoints config data decoding errors inference io metrics '
        'models runtime span_scores'),
    'training': (
        'build checkpoints config data errors evaluation input_pipeline io '
        'metrics models objectives runtime span_scores'),
    'sweeps': (
        'checkpoints config data errors io metrics runtime training'),
    '__init__': 'inference',
}
NO_JAX = ('config', 'data', 'errors', 'io', 'metrics', 'registry')
SEES_CONFIG = {
    'build', 'checkpoints', 'evaluation', 'export', 'inference',
    'config_comments', 'input_pipeline', 'sweeps', 'training'}
# Packages that take a tenth of a second or more. They are imported where they
# are used, so that a command does not wait for what it may not need.
HEAVY = {'optuna', 'ray', 'starlette', 'matplotlib', 'cramjam', 'jinja2',
         'orbax', 'tensorstore', 'tensorflow_datasets', 'wandb'}
FORBIDDEN = ('torch', 'transformers', 'tensorflow', 'pickle', 'experiments',
             'configs', 'tests', 'benchmarks')


def part_of(module: str) -> str:
  """Returns 'data' for 'qa_jax.data.windows', 'build' for 'qa_jax.build'."""
  return module.split('.')[1] if '.' in module else '__init__'


def imported_parts() -> dict[str, set[str]]:
  """Returns part → the other parts that its files import, at any depth."""
  table: dict[str, set[str]] = {}
  for path in FILES:
    part = part_of(imports_lib.module_name(path))
    table.setdefault(part, set()).update(
        part_of(name) for name in imports_lib.imported_modules(path)
        if name.startswith('qa_jax'))
  return {part: others - {part} for part, others in table.items()}


def test_the_table_of_imports_is_what_the_code_does():
  allowed = {part: set(others.split()) for part, others in ALLOWED.items()}
  assert imported_parts() == allowed


def test_no_file_imports_itself_over_others():
  graph = {imports_lib.module_name(path): {
      name for name in imports_lib.imported_modules(path, deferred=False)
      if name.startswith('qa_jax.')} for path in FILES}
  # A package is loaded before its files, so its __init__ counts for each.
  for name, others in graph.items():
    for other in list(others):
      package = other.rpartition('.')[0]
      while package != 'qa_jax' and package:
        if not name.startswith(f'{package}.') and name != package:
          others.add(package)
        package = package.rpartition('.')[0]
  list(graphlib.TopologicalSorter(graph).static_order())  # CycleError


@pytest.mark.parametrize(
    'path', FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_file_imports_what_it_must_not(path):
  roots = {name.split('.')[0] for name in imports_lib.imported_modules(path)}
  assert not roots & set(FORBIDDEN)
  part = part_of(imports_lib.module_name(path))
  if part in NO_JAX:
    assert not roots & {'jax', 'flax', 'optax'}
  if part not in SEES_CONFIG | {'config'}:
    assert 'qa_jax.config' not in imports_lib.imported_modules(path)


def test_configs_import_little():
  for path in (ROOT / 'configs').rglob('*.py'):
    known = {'collections.abc', 'configs.common', 'ml_collections',
             'qa_jax.config', 'qa_jax.errors', 'qa_jax.sweeps.grid'}
    assert imports_lib.imported_modules(path, deferred=False) <= known, path
    # Only a sweep over all encoders needs their table.
    assert imports_lib.imported_modules(path) <= {*known, 'qa_jax.models'}, path


@pytest.mark.parametrize('part', NO_JAX)
def test_data_metrics_and_files_load_without_jax(part):
  code = (f'import sys, qa_jax.{part}; '
          'print(*{m.partition(".")[0] for m in sys.modules})')
  loaded = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT,
                          capture_output=True, text=True).stdout.split()
  assert not {'jax', 'tensorflow', 'matplotlib'} & set(loaded)


def test_importing_every_wing_loads_no_heavy_extra():
  wings = sorted(path.parent.name for path in (ROOT / 'qa_jax').glob(
      '*/__init__.py'))
  code = (f'import sys; from qa_jax import {", ".join(wings)}; '
          'print(*{m.partition(".")[0] for m in sys.modules})')
  loaded = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT,
                          capture_output=True, text=True).stdout.split()
  assert not HEAVY & set(loaded)


def test_a_command_loads_no_jax_before_its_flags_are_right():
  code = ('import sys, experiments.train; '
          'print(*{m.partition(".")[0] for m in sys.modules})')
  loaded = subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT,
                          capture_output=True, text=True).stdout.split()
  assert not {'jax', 'flax', 'numpy', *HEAVY} & set(loaded)


def test_every_wing_says_what_it_is():
  for path in (ROOT / 'qa_jax').glob('*/__init__.py'):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    assert doc and doc.splitlines()[0].endswith('.'), path
