"""The table of mutations fits the code; `python -m tests.mutants` runs it."""

import pathlib
import shlex

import pytest

from tests.common.imports import ROOT
from tests.mutants import __main__ as mutants
from tests.mutants import table


@pytest.mark.parametrize('name', table.MUTATIONS)
def test_a_mutation_changes_one_line_of_a_file_that_still_compiles(name):
  mutation = table.MUTATIONS[name]
  text = (ROOT / mutation.file).read_text(encoding='utf-8')
  changed = mutants.mutate(text, mutation).split('\n')
  lines = text.split('\n')
  assert len(lines) == len(changed)
  assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1


def test_a_stale_mutation_is_an_error():
  mutation = table.Mutation('x.py', 'a + b', 'a - b', '')
  for text in ('c = a * b', 'c = a + b\nd = a + b'):
    with pytest.raises(ValueError, match='change the table'):
      mutants.mutate(text, mutation)
  with pytest.raises(SyntaxError):
    mutants.mutate('a + b', table.Mutation('x.py', 'a + b', 'a +', ''))


def test_there_are_60_mutations_and_few_are_equivalent():
  equivalent = [m for m in table.MUTATIONS.values() if m.equivalent]
  assert len(table.MUTATIONS) >= 60
  assert len(equivalent) <= (1 - mutants.ENOUGH) * len(table.MUTATIONS)


def test_the_tests_of_a_mutation_exist():
  for mutation in table.MUTATIONS.values():
    path, *_ = shlex.split(mutation.tests)
    assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_a_mutation_is_killed_or_survives_and_is_taken_back(tmp_path):
  (tmp_path / 'code.py').write_text('VALUE = 1  # one\n')
  (tmp_path / 'test_code.py').write_text(
      'import pathlib\n'
      'def test_value():\n'
      '  text = (pathlib.Path(__file__).parent / "code.py").read_text()\n'
      '  assert text.startswith("VALUE = 1")\n')
  outcome = lambda old, new, tests='test_code.py': mutants.outcome(
      pathlib.Path(tmp_path), table.Mutation('code.py', old, new, tests))
  assert outcome('VALUE = 1', 'VALUE = 2') == 'killed'
  assert outcome('# one', '# two') == 'survived'
  assert outcome('# one', '# two', 'test_none.py').startswith('NOT RUN')
  assert outcome('VALUE = 3', 'VALUE = 2').startswith('NOT RUN')
  assert (tmp_path / 'code.py').read_text() == 'VALUE = 1  # one\n'
