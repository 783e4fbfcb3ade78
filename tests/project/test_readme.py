"""README.md and docs/ say what the code does."""

import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from docs import generate
from qa_jax import config_comments
from qa_jax import heads
from qa_jax import models
from qa_jax import objectives
from qa_jax.decoding import answers
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.models import attention
from qa_jax.models.encoders import bert
from qa_jax.training import optimizer
from qa_jax.training import parallel
from tests.common import heads as heads_lib
from tests.project import readme_commands
from tests.project.readme_commands import PAGES
from tests.project.readme_commands import ROOT

README = (ROOT / 'README.md').read_text(encoding='utf-8')
TABLES = {
    'README.md': (heads.HEADS, objectives.OBJECTIVES, search.SEARCHES,
                  null_rules.NULL_RULES, answers.MERGES, parallel.MODES,
                  attention.ATTENTION),
    'docs/heads.md': (heads.HEADS,),
    'docs/objectives.md': (objectives.OBJECTIVES,),
    'docs/decoding.md': (search.SEARCHES, null_rules.NULL_RULES)}


def sections(page: pathlib.Path) -> set[str]:
  """Returns the anchors of a page's headings."""
  headings = re.findall(r'(?m)^#+ (.*)$', page.read_text(encoding='utf-8'))
  return {re.sub(r'[^\w -]', '', x.lower()).replace(' ', '-')
          for x in headings}


@pytest.mark.slow
def test_the_added_head_passes_every_test_of_heads(tmp_path):
  diff = readme_commands.blocks(README, 'diff')[0]
  assert len([x for x in diff.splitlines() if x.startswith('+')]) <= 25
  for name in ('qa_jax', 'tests', 'pyproject.toml'):
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    copy(ROOT / name, tmp_path / name)
  subprocess.run(['git', 'apply', '--unidiff-zero', '-'], input=diff, text=True,
                 cwd=tmp_path, check=True)
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-k', 'cosine', 'tests/heads',
       'tests/project/test_build.py'],
      cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:]
  assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 15


def test_the_readme_is_short():
  lines = README.splitlines()
  assert len(lines) <= 150
  assert max(map(len, lines)) <= 120


@pytest.mark.parametrize('page', TABLES)
def test_a_page_names_every_choice(page):
  text = (ROOT / page).read_text(encoding='utf-8')
  for table in TABLES[page]:
    for name in table:
      assert re.search(rf'`{name}(\([^`]*\))?`', text), name


@pytest.mark.parametrize(('field', 'choices'), [
    ('model.preset', bert.BertConfig.PRESETS),
    ('model.attention', attention.ATTENTION),
    ('decode.search', search.SEARCHES),
    ('decode.null_rule', null_rules.NULL_RULES),
    ('decode.merge', answers.MERGES), ('optim.schedule', optimizer.SCHEDULES),
    ('parallel.mode', parallel.MODES)])
def test_the_comment_of_a_field_names_every_choice(field, choices):
  words = re.findall(r'\w+', config_comments.comments()[field])
  assert {*choices} <= {*words}


@pytest.mark.parametrize(
    'page', (*PAGES, ROOT / 'RESULTS.md', ROOT / 'CONTRIBUTING.md'),
    ids=lambda page: page.name)
def test_the_files_and_sections_that_a_page_names_exist(page):
  text = page.read_text(encoding='utf-8')
  for name in re.findall(r'--config=(\S+?\.py)', text):
    assert (ROOT / name).is_file(), name
  for module in re.findall(r'python -m ((?:experiments|benchmarks)[.\w]+)',
                           text):
    assert (ROOT / f'{module.replace(".", "/")}.py').is_file(), module
  for name in re.findall(r'`((?:qa_jax|tests|configs|benchmarks)/[\w/.]+)`',
                         text):
    assert (ROOT / name).exists(), name
  for link, section in re.findall(r'\]\(([^)#:]*)#?([^):]*)\)', text):
    target = page.parent / link if link else page
    assert target.exists(), link
    assert not section or section in sections(target), (link, section)


@pytest.mark.parametrize('page', ('docs/heads.md', 'docs/objectives.md'))
def test_a_page_has_the_arguments_of_every_choice_with_defaults(page):
  text = (ROOT / page).read_text(encoding='utf-8')
  _, table = text.split('| argument |')
  rows = [[re.findall('`(.*?)`', cell) for cell in row.split(' | ')[:3]]
          for row in table.split('\n\n')[0].splitlines()[2:]]
  listed = sorted((choice, name, value) for names, choices, (value,) in rows
                  for name in names for choice in choices)
  assert listed == sorted(
      (choice, name, repr(parameter.default))
      for choice, make in TABLES[page][0].items()
      for name, parameter in inspect.signature(make).parameters.items()
      if name not in ('heads', 'name', 'parent'))  # not of a spec string


def count_parameters(spec: str) -> int:
  return sum(x.size for x in jax.tree.leaves(heads_lib.random_params(spec)))


@pytest.mark.parametrize(('spec', 'units'), [
    *((name, heads_lib.SIZE) for name in heads.HEADS),
    ('conditional(form="electra")', 512), ('answerability(form="xlnet")', 0),
    ('mlp(hidden_size=7)', 7), ('mlp_span(hidden_size=7)', 7)])
def test_a_page_has_the_number_of_parameters_of_every_head(spec, units):
  text = (ROOT / 'docs' / 'heads.md').read_text(encoding='utf-8')
  name = spec.partition('(')[0]
  row = re.search(rf'(?m)^\| `{name}\b.*\| (.*) \|$', text)
  assert row, f'docs/heads.md has no row of {name} that ends with a formula'
  own, _, rest = row[1].partition(', ')
  forms = own.split(' or ')  # of the classifier of `answerability`
  product = re.sub(r'(?<=[\w)])(?=[A-Z(])', '*', (
      forms[-1] if 'xlnet' in spec else forms[0]) + rest)
  base = inspect.signature(heads.HEADS[name]).parameters.get('base')
  assert count_parameters(spec) == eval(product, {
      'D': heads_lib.SIZE, 'H': units, 'R': 64, 'W': 30, 'N': 3,
      'base': base and count_parameters(base.default)})


def test_the_sizes_of_every_preset_are_listed():
  text = (ROOT / 'docs' / 'configuration.md').read_text(encoding='utf-8')
  header, _, *rows = text.split('| preset |')[1].split('\n\n')[0].splitlines()
  fields = re.findall('`(.*?)`', header)
  assert {name: dict(zip(fields, map(int, sizes), strict=True))
          for name, *sizes in (re.findall(r'\w+', row) for row in rows)
          } == models.PRESETS


def test_every_page_of_docs_is_in_the_index():
  index = (ROOT / 'docs' / 'README.md').read_text(encoding='utf-8')
  for page in PAGES:
    assert page.name == 'README.md' or f']({page.name})' in index


def test_the_list_of_config_fields_is_up_to_date():
  assert generate.page() == generate.PAGE.read_text(encoding='utf-8'), (
      'run python -m docs.generate')


def test_every_command_has_flags_that_parse_and_a_valid_config():
  done = subprocess.run(
      [sys.executable, '-m', 'tests.project.readme_commands', '--parse'],
      cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_a_command_is_skipped_with_a_reason_or_runs_in_small(tmp_path):
  readme_commands.prepare(tmp_path)
  given = {file.name for file in tmp_path.iterdir()}
  for page in PAGES:
    for command in readme_commands.commands(page.read_text(encoding='utf-8')):
      if readme_commands.skip_reason(command):
        continue
      program, *arguments = readme_commands.small_arguments(command)
      assert program == sys.executable, command
      for argument in arguments:
        assert not re.match(r'--config=.*:(?!tiny$)', argument), command
        assert not re.search(r'=[A-Z_]{2,}$', argument), command
      written = re.findall(r'(?<=--output=)\S+', command)
      read = re.findall(r'(?<![\w/])[\w.-]+\.jsonl?\b', ' '.join(arguments))
      assert given.union(written, readme_commands.OUTPUTS) >= {*read}, command


@pytest.mark.slow
def test_the_commands_for_own_data_run_as_they_are_written(tmp_path):
  """A reader has only README.md and an activated environment."""
  section = README.partition('## Fine-tune on your own data\n')[2]
  script = readme_commands.blocks(section, 'sh')[0]
  assert len(readme_commands.commands(f'```sh\n{script}```')) == 4
  for name in ('experiments', 'configs', 'qa_jax'):
    (tmp_path / name).symlink_to(ROOT / name)
  activated = {**os.environ, 'PATH': os.pathsep.join(
      (str(pathlib.Path(sys.executable).parent), os.environ['PATH']))}
  del activated['XLA_FLAGS']  # of the tests: they slow the training down
  done = subprocess.run(
      ['sh', '-e', '-x'], input=script, text=True, cwd=tmp_path, env=activated,
      capture_output=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert '\nAda\n' in done.stdout  # as the comment after the command says
  results = tmp_path / 'runs' / 'mine' / 'eval' / 'mine'
  predictions = json.loads((results / 'predictions.json').read_text())
  assert [*predictions.values()] == ['Ada', 'a boat']
  assert json.loads((results / 'metrics.json').read_text())['f1'] == 100
  assert len((results / 'nbest.jsonl').read_text().splitlines()) == 2


def test_the_environment_is_active_before_the_first_command():
  """A command that starts with `python` fails before that."""
  first, *others = readme_commands.commands(README)
  create, activate, install = first.split(' && ')
  assert create == 'python3 -m venv .venv'
  assert activate == 'source .venv/bin/activate'
  assert install == 'pip install -e .'
  assert any(command.startswith('python ') for command in others)


@pytest.mark.slow
def test_the_parts_run_alone():
  text = (ROOT / 'docs' / 'library.md').read_text(encoding='utf-8')
  blocks = readme_commands.blocks(text, 'python')
  assert all(block.count('\n') <= 4 for block in blocks)  # with imports
  names = {}
  exec('\n'.join(blocks), names)
  spans = names['spans']
  assert (spans.start[0, 0], spans.end[0, 0]) == (4, 6)
  assert names['scores'].pair.shape == (1, 9, 30)
  assert len(names['cut']) >= len(names['examples'])
  cut, batch = names['cut'], names['batch']
  losses = [names['objective'].loss(names['score_batch'](params, batch), batch)
            for params in (names['params'], names['init_params'](
                names['model'], jax.random.key(0)))]
  assert losses[0].shape == (8,) and losses[0].mean() < losses[1].mean()
  assert {*names['window'].tolist()} == {*range(8)}
  for w, begin, end in zip(names['window'], names['begin'], names['end'],
                           strict=True):
    assert 0 <= begin < end <= len(cut.examples[cut.example_of[w]].context)
  assert names['metrics']['exact_match'] == 100
  assert names['score'] == {'exact_match': 100, 'f1': 100, 'total': 1}
