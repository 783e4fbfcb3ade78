"""Code that must never run, whoever wrote the files that are read."""

import ast
import hashlib
import pathlib
import re
import types

import hypothesis
from hypothesis import strategies as st
import pytest

from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import run_directory
from qa_jax.training import trainer
from tests.common import weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(p for folder in ('qa_jax', 'experiments', 'configs')
               for p in (ROOT / folder).rglob('*.py'))
# Calls that run code when they read, unpack to a named path, or use a shell.
MODULES = {'pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal',
           'shelve', 'torch', 'tarfile', 'zipfile', 'yaml'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen',
         'shutil.unpack_archive', 'torch.load', 'pd.read_pickle',
         'tempfile.mktemp'}


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(
    p.relative_to(ROOT)))
def test_no_file_can_make_us_run_its_code(path):
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      assert not {a.name.split('.')[0] for a in node.names} & MODULES
    elif isinstance(node, ast.ImportFrom):
      assert (node.module or '').split('.')[0] not in MODULES
    elif isinstance(node, ast.Call):
      assert ast.unparse(node.func) not in CALLS, node.lineno
      for keyword in node.keywords:
        if keyword.arg in ('shell', 'allow_pickle'):
          assert ast.unparse(keyword.value) == 'False', node.lineno


def test_what_is_fetched_from_the_hub_is_no_code():
  assert not [p for p in hugging_face.FETCHED if not re.search(
      r'\.(json|safetensors|txt)$', p)]


def test_a_run_knows_the_bytes_it_was_initialised_from():
  found = trainer.Trainer.weight_hashes.func(
      types.SimpleNamespace(source=weights.TINY))
  expected = hashlib.sha256(
      (weights.TINY / 'model.safetensors').read_bytes()).hexdigest()
  assert found['init_from: model.safetensors'] == expected
  assert 'init_from: config.json' in found


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(st.text(max_size=200) | st.sampled_from([
    '..', '../..', '/etc/passwd', '.', '', 'a/../..', '\0', '…/…', '+', '-',
    'squad_json(path="../../x")', '~', 'C:\\x', 'a' * 500]))
def test_an_evaluation_stays_in_its_run(spec):
  name = run_directory.evaluation_name(spec)
  assert re.fullmatch(r'[^\s/\\:*?"<>|._-][^\s/\\:*?"<>|]{0,79}', name), name
  assert name.isprintable() and len(name.encode()) <= 200
  home = pathlib.Path('/runs/a/eval')
  assert (home / name).resolve().parent == home


def test_the_server_listens_to_this_machine_alone_by_default():
  text = (ROOT / 'experiments' / 'serve.py').read_text()
  assert "DEFINE_string('host', '127.0.0.1'" in text
