"""Applies each mutation to a copy of the tree, and runs its tests there.

Prints one line for each mutation and the share that the tests killed. Exit code
0: all but the mutations that are explained as equivalent were killed.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

from tests.mutants import table

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENOUGH = 0.95  # share of the mutations that must be killed
TIMEOUT_SECONDS = 900  # a test that hangs has noticed the mutation
PASSED, FAILED = 0, 1  # exit codes of pytest


def mutate(text: str, mutation: table.Mutation) -> str:
  """Returns the text of a file with one changed line.

  Raises:
    ValueError: the old text is not part of exactly one line, or the changed
      file is not Python.
  """
  count = text.count(mutation.old)
  if count != 1 or '\n' in mutation.old:
    raise ValueError(f'{mutation.file} has {mutation.old!r} {count} times, not '
                     'in one line: change the table of tests/mutants')
  changed = text.replace(mutation.old, mutation.new)
  compile(changed, mutation.file, 'exec')  # SyntaxError is a ValueError's kin
  return changed


def copy_tree(target: pathlib.Path) -> None:
  """Copies the files that git knows or would add, as they are now."""
  names = subprocess.run(
      ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
      cwd=ROOT, check=True, capture_output=True, text=True).stdout.split('\0')
  for name in filter(None, names):
    source = ROOT / name
    if source.is_file() and not source.is_symlink():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      (target / name).write_bytes(source.read_bytes())


def run_tests(tree: pathlib.Path, tests: str) -> int | None:
  """Returns the exit code of pytest, None if it took too long."""
  environment = {
      **os.environ, 'PYTHONDONTWRITEBYTECODE': '1', 'PYTHONPATH': str(tree),
      'JAX_COMPILATION_CACHE_DIR': f'{tree}/.compiled'}
  command = [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0',
             *shlex.split(tests)]
  try:
    return subprocess.run(
        command, cwd=tree, env=environment, check=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        timeout=TIMEOUT_SECONDS).returncode
  except subprocess.TimeoutExpired:
    return None


def outcome(tree: pathlib.Path, mutation: table.Mutation) -> str:
  """Returns 'killed', 'survived', or why the tests did not run."""
  path = tree / mutation.file
  text = path.read_text(encoding='utf-8')
  try:
    changed = mutate(text, mutation)
  except ValueError as e:  # the other mutations still run
    return f'NOT RUN, {e}'
  path.write_text(changed, encoding='utf-8')
  try:
    code = run_tests(tree, mutation.tests)
  finally:
    path.write_text(text, encoding='utf-8')
  return {FAILED: 'killed', None: 'killed', PASSED: 'survived'}.get(
      code, f'NOT RUN, exit code {code}')


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.mutants')
  parser.add_argument('words', nargs='*', metavar='WORD',
                      help='only mutations whose name holds one of the words')
  words = parser.parse_args().words
  chosen = {name: mutation for name, mutation in table.MUTATIONS.items()
            if not words or any(word in name for word in words)}
  if not chosen:
    parser.error(f'no mutation has a name with {" or ".join(words)}')
  with tempfile.TemporaryDirectory(prefix='mutants') as directory:
    tree = pathlib.Path(directory)
    copy_tree(tree)
    found, passing = {}, set()
    for name, mutation in chosen.items():
      # Tests that fail without a mutation would seem to kill it.
      if mutation.tests not in passing:
        if run_tests(tree, mutation.tests) != PASSED:
          print(f'pytest {mutation.tests} fails without a mutation')
          return 1
        passing.add(mutation.tests)
      began = time.perf_counter()
      found[name] = outcome(tree, mutation)
      why = f' ({mutation.equivalent})' if (
          mutation.equivalent and found[name] == 'survived') else ''
      print(f'{name:26} {found[name]}{why}  '
            f'{time.perf_counter() - began:.0f} s', flush=True)
  killed = sum(result == 'killed' for result in found.values())
  print(f'{killed} of {len(found)} killed, {100 * killed / len(found):.1f} %')
  unexplained = [name for name, result in found.items() if result != 'killed'
                 and not (result == 'survived'
                          and chosen[name].equivalent)]
  if unexplained:
    print(f'not killed, without an explanation: {", ".join(unexplained)}')
  return int(bool(unexplained)
             or (not words and killed < ENOUGH * len(found)))


if __name__ == '__main__':
  sys.exit(main())
