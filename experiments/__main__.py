"""Lists the commands: python -m experiments."""

import ast
import pathlib

from experiments import cli


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
  with cli.quiet_pipes():
    print('python -m experiments.COMMAND [--help]')
    for name, text in commands().items():
      print(f'  {name:16} {text}')


if __name__ == '__main__':
  main()
