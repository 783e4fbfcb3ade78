"""The wheel of `pip install .`, built here without network."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import qa_jax
from tests.common import imports

ROOT = pathlib.Path(__file__).resolve().parents[2]


def package_files() -> set[str]:
  return {str(p.relative_to(ROOT)) for p in (ROOT / 'qa_jax').rglob('*')
          if p.is_file() and '__pycache__' not in p.parts}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> pathlib.Path:
  tree = tmp_path_factory.mktemp('tree')
  for name in ('pyproject.toml', 'README.md', 'LICENSE', 'requirements.txt'):
    shutil.copy(ROOT / name, tree / name)
  shutil.copytree(ROOT / 'qa_jax', tree / 'qa_jax')
  done = subprocess.run(
      [sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-index',
       '--no-build-isolation', '--quiet', '--wheel-dir', 'dist'],
      cwd=tree, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  found, = (tree / 'dist').glob('*.whl')
  return found


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel):
  with zipfile.ZipFile(wheel) as z:
    names = {n for n in z.namelist() if '.dist-info/' not in n}
  assert names == package_files()
  assert any(n.endswith('.html') for n in names)


def test_every_module_of_the_wheel_imports_away_from_the_tree(
    wheel, tmp_path):
  with zipfile.ZipFile(wheel) as z:
    z.extractall(tmp_path)
  code = f'''
import importlib, pkgutil, sys
sys.path.insert(0, {str(tmp_path)!r})
import qa_jax
assert qa_jax.__file__.startswith({str(tmp_path)!r})
for module in pkgutil.walk_packages(qa_jax.__path__, 'qa_jax.'):
  importlib.import_module(module.name)
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]


def test_every_library_that_is_imported_is_declared(wheel):
  with zipfile.ZipFile(wheel) as z:
    metadata, = (n for n in z.namelist() if n.endswith('.dist-info/METADATA'))
    text = z.read(metadata).decode()
  declared = {canonical(name) for name in re.findall(
      r'^Requires-Dist: ([\w.-]+)', text, re.MULTILINE)}
  owners = importlib.metadata.packages_distributions()
  for path in imports.FILES:
    for name in imports.imported_modules(path):
      root = name.split('.')[0]
      if root in sys.stdlib_module_names or root == 'qa_jax':
        continue
      names = {canonical(n) for n in owners.get(root, [root])}
      assert names & declared, f'{path}: {name}'


def canonical(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def test_wheel_has_the_version_of_the_package(wheel):
  assert wheel.name.startswith(f'qa_jax-{qa_jax.__version__}-')


def test_changelog_begins_with_the_version_of_the_package():
  text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
  versions = re.findall(r'^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$', text,
                        re.MULTILINE)
  assert versions[0] == qa_jax.__version__
