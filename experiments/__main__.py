"""Lists the commands: python -m experiments.

Any argument but --help is a mistake with exit code 2. Otherwise a job script
with a space in place of the dot would succeed without training.
"""

import ast
import pathlib
import shlex
import sys

from experiments import cli
from qa_jax import errors


def commands() -> dict[str, str]:
  """Returns the first line of the docstring of every command, by its name."""
  texts = {}
  for path in sorted(pathlib.Path(__file__).parent.glob('[a-z]*.py')):
    if path.stem != 'cli':
      tree = ast.parse(path.read_text(encoding='utf-8'))
      texts[path.stem] = (ast.get_docstring(tree) or '').splitlines()[0]
  return texts


def main() -> None:
  cli.prepare_streams()
  if given := [a for a in sys.argv[1:] if a not in cli.HELP]:
    name, *rest = given
    use = shlex.join(['python', '-m', f'experiments.{name}', *rest])
    known = commands()
    print(f'error: use {use}' if name in known else 'error: unknown command '
          f'{name!r}{errors.did_you_mean(name, known)}', file=sys.stderr)
    sys.exit(2)
  with cli.quiet_pipes():
    print('python -m experiments.COMMAND [--help]')
    for name, text in commands().items():
      print(f'  {name:16} {text}')


if __name__ == '__main__':
  main()
