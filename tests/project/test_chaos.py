"""Each fault of the table, a few times; `make chaos` has the full counts."""

import pytest

from tests.chaos import table


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name == 'R15' else name
    for name in table.FAULTS])
def test_what_a_fault_must_not_break_it_does_not(name, tmp_path):
  fault = table.FAULTS[name]
  if not fault.few:
    pytest.skip(f'by make chaos: {fault.why}')
  print(fault.program(tmp_path, fault.few, 0))


def test_every_fault_has_its_figure_here_or_is_said_to_be_elsewhere():
  rows = {*table.FAULTS} | {*table.ELSEWHERE}
  assert {f'R{n}' for n in range(1, 15)} <= rows
  assert all(f.few or f.why for f in table.FAULTS.values())
