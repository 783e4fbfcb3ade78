"""What the README shows works."""

import pathlib
import re
import shutil
import subprocess
import sys

from qa_jax import heads
from qa_jax import objectives
from qa_jax.decoding import answers
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.models import attention
from qa_jax.training import parallel
from tests.project import readme_commands

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_added_head_passes_every_test_of_heads(tmp_path):
  diff = re.search(r'```diff\n(.*?)```', README, re.DOTALL)[1]
  assert len([x for x in diff.splitlines() if x.startswith('+')]) <= 25
  for name in ('qa_jax', 'tests', 'pyproject.toml'):
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, tmp_path / name)
  subprocess.run(['git', 'apply', '--unidiff-zero', '-'], input=diff, text=True,
                 cwd=tmp_path, check=True)
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-k', 'cosine', 'tests/test_heads.py',
       'tests/test_fit.py'],
      cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:]
  assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 15


def test_every_choice_is_in_the_table():
  for table in (heads.HEADS, objectives.OBJECTIVES, search.SEARCHES,
                null_rules.NULL_RULES, answers.MERGES, parallel.MODES,
                attention.ATTENTION):
    for name in table:
      assert re.search(rf'`{name}(\(base=…\))?`', README), name


def test_every_file_it_names_is_there():
  for name in re.findall(r'--config=(\S+?\.py)', README):
    assert (ROOT / name).is_file(), name
  for module in re.findall(r'python -m (experiments\.\w+)', README):
    assert (ROOT / f'{module.replace(".", "/")}.py').is_file(), module
  for link in re.findall(r'\]\(([^)#]+)\)', README):
    assert (ROOT / link).exists(), link


def test_every_command_has_flags_that_parse_and_a_config_that_holds():
  done = subprocess.run(
      [sys.executable, '-m', 'tests.project.readme_commands', '--parse'],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False)
  assert done.returncode == 0, done.stderr


def test_what_is_not_run_says_why_and_the_rest_is_small():
  found = readme_commands.commands(README)
  assert len(found) > 20
  for command in found:
    if readme_commands.why_skipped(command):
      continue
    program, *arguments = readme_commands.rehearsed(command)
    assert program == sys.executable, command
    assert not any(a.startswith('[') for a in arguments), command
    for a in arguments:
      assert not re.match(r'--config=.*:(?!tiny$)', a), command
