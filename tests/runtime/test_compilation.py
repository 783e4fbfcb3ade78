"""Programs compile in threads, and are awaited one by one."""

import contextlib
import threading
import time
import types

import jax
import pytest

from qa_jax import errors
from qa_jax.runtime import compilation
from tests.common import compiled

MINUTE = 60.0  # no test waits so long unless it fails


def program(log, name, until=None, error=None):
  """Returns a lowering function whose program compiles after `until` is set."""
  def compile_():
    if until:
      assert until.wait(MINUTE)
    if error:
      raise error
    log.append(name)
  return lambda: types.SimpleNamespace(compile=compile_)


def test_a_program_is_ready_while_another_compiles():
  log, opened, times = [], threading.Event(), []
  with compilation.Compilation('program', {
      'b': program(log, 'b', opened), 'a': program(log, 'a')},
                               times.append) as programs:
    programs.wait('a')
    assert programs.is_ready('a') and not programs.is_ready('b')
    assert programs.is_ready('unknown') and not programs.is_done()
    assert log == ['a'] and not times
    programs.wait('b', lambda: True)  # a signal came
    assert not programs.is_ready('b')
    opened.set()
    programs.wait_for_all()
    assert programs.is_done() and log == ['a', 'b'] and len(times) == 1


def test_one_program_is_traced_at_a_time():
  tracing, most = [], []

  def lower():
    tracing.append(1)
    most.append(len(tracing))
    time.sleep(0.001)  # lets another thread run
    tracing.pop()
    return types.SimpleNamespace(compile=lambda: None)
  with compilation.Compilation('program', dict.fromkeys(
      range(50), lower)) as programs:
    programs.wait_for_all()
  assert most == [1] * 50


@pytest.mark.parametrize('ask', ['is_done', 'wait_for_all'])
def test_a_failed_compilation_is_one_line_that_names_the_program(ask):
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of\n  memory')
  with compilation.Compilation('the step for a batch', {
      (8, 64): program([], 'a'), (8, 96): program([], 'b', error=error)
  }) as programs:
    programs.wait((8, 64))
    while not programs.is_ready((8, 96)):
      pass
    with pytest.raises(errors.UserError) as info:
      getattr(programs, ask)()
  assert str(info.value) == (
      'the step for a batch (8, 96) cannot be compiled: '
      'RESOURCE_EXHAUSTED: out of memory')


def test_a_mistake_in_the_code_of_a_program_keeps_its_traceback():
  def lower():
    raise TypeError('a mistake')
  with compilation.Compilation('program', {'a': lower}) as programs, (
      pytest.raises(TypeError, match='a mistake')):
    programs.wait('a')


def test_leaving_drops_the_programs_that_have_not_begun():
  log, opened, begun = [], threading.Event(), threading.Event()

  def first():
    begun.set()
    return program(log, 'first', opened)()
  with compilation.Compilation('program', {
      name: first if name == 0 else program(log, name, opened)
      for name in range(3 * compilation.THREADS)}):
    assert begun.wait(MINUTE)
    threading.Timer(0.05, opened.set).start()
  assert 'first' in log and len(log) <= compilation.THREADS


@pytest.mark.parametrize('fails', [False, True])
def test_a_compilation_reports_its_end_unless_it_was_left_by_an_error(fails):
  log, opened, begun, reports = [], threading.Event(), threading.Event(), []

  def lower():
    begun.set()
    return program(log, 'a', opened)()
  programs = compilation.Compilation('program', {'a': lower}, reports.append)
  with contextlib.suppress(KeyboardInterrupt), programs:
    assert begun.wait(MINUTE)
    if fails:
      raise KeyboardInterrupt
    opened.set()
  opened.set()
  programs.wait_for_all()
  assert log == ['a'] and len(reports) == (not fails)


def test_a_call_with_equal_shapes_compiles_nothing_again():
  function = jax.jit(lambda x: x * 2 + 1)
  inputs = [jax.numpy.ones(n) for n in (3, 5, 7)]
  with compiled.listed() as made:
    with compilation.Compilation('program', {
        len(x): lambda x=x: function.lower(x) for x in inputs}) as programs:
      programs.wait_for_all()
    assert len(made) == 3
    for x in inputs:
      function(x)
    assert len(made) == 3
