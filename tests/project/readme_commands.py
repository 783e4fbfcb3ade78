r"""Runs every command and Python block of README.md and docs/, in small.

  make readme    (python -m tests.project.readme_commands [--only=WORD])

The commands run in order in a temporary folder that links to the tree. Configs
are replaced by their :tiny form, and the reader's files by generated ones.
Commands that need a network or a cluster are skipped with the reason.
`--parse` only reads the flags of all commands and checks their configs.
"""

import json
import os
import pathlib
import re
import resource
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
SKIPPED = {  # part of a command → the reason to skip it
    'make ': 'runs on its own', 'source ': 'is for the shell of the reader',
    'pip install': 'network', 'answerdotai/': 'network',
    'printf ': 'is for the shell of the reader',
    'ray start': 'cluster', '--engine=ray': 'cluster',
    '--engine=slurm': 'cluster', '--coordinator': 'cluster',
    'experiments.ensemble': 'needs several runs of the reader',
    'experiments.suite': 'needs data sets of the reader'}
SMALLER = {  # pattern in a command → smaller or generated replacement
    r'(\.py):(base|large|minilm_l6)': r'\1:tiny',
    'CHECKPOINT_DIR|MINILM': 'runs/squad2', r'=RUN\b': '=runs/squad2',
    '--seeds=3': '--seeds=1', '--trials=20': '--trials=1',
    ' --window_overlap=64': ' --window_overlap=16',  # of shorter windows
    # The vocabulary of :tiny splits English words into many tokens.
    '--config.data.max_length=192': '--config.data.max_length=512'}
REHEARSAL = ['--config.train.num_epochs=0', '--config.train.num_steps=4',
             '--config.train.batch_size=8',
             '--config.train.eval_every_steps=2',
             '--config.train.checkpoint_every_steps=2']
DATA = ['--config.data.train=synthetic(size=40)',
        '--config.data.eval=synthetic(seed=1, size=12, split="eval")']
OUTPUTS = {  # file that a command reads → file that an earlier command wrote
    'predictions.json': 'runs/squad2/eval/dev-v2.0/predictions.json'}
PORT = 8765


def blocks(text: str, language: str) -> list[str]:
  """Returns the fenced blocks of a language."""
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def commands(text: str) -> list[str]:
  """Returns the shell commands of all blocks, one line each, no comments."""
  lines = [re.sub(r'\s+#.*', '', line) for block in blocks(text, 'sh')
           for line in re.sub(r'\\\n\s*', '', block).splitlines()]
  return [line.strip() for line in lines if line.strip()]


def skip_reason(command: str) -> str:
  """Returns the reason not to run a command, or ''."""
  return next((why for part, why in SKIPPED.items() if part in command), '')


def small_arguments(command: str) -> list[str]:
  """Returns the arguments that run a command in small."""
  for pattern, smaller in SMALLER.items():
    command = re.sub(pattern, smaller, command)
  arguments = shlex.split(command)
  if '--config=' in command:
    arguments += REHEARSAL
    arguments += [] if '--config.data.' in command else DATA
  return [sys.executable if a == 'python' else a for a in arguments]


def python_arguments(text: str) -> list[str]:
  """Returns the command that runs all Python blocks of a page as one script."""
  code = '\n'.join(blocks(text, 'python'))
  return [sys.executable, '-c', code.replace('runs/quickstart', 'runs/mine')]


def parse(command: str) -> int:
  """Returns the exit code of a command that reads its flags and checks its
  config in this process, and does nothing else."""
  from absl import flags

  from experiments import cli
  run, before = cli.run, set(flags.FLAGS)

  def only_parse(main, **options):
    del main
    run(lambda: cli.config() and None if options.get('config') else None,
        **options)

  _, _, module, *arguments = shlex.split(command)
  cli.run, sys.argv = only_parse, [module, *arguments]
  try:
    runpy.run_module(module, run_name='__main__', alter_sys=True)
  except SystemExit as e:
    return int(e.code or 0)
  finally:
    cli.run = run
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
  return 1


def squad_file(examples) -> str:
  """Returns examples as the text of a SQuAD JSON file."""
  return json.dumps({'version': 'v2.0', 'data': [{
      'title': e.title, 'paragraphs': [{'context': e.context, 'qas': [{
          'id': e.id, 'question': e.question, 'is_impossible': e.impossible,
          'answers': [{'text': a.text, 'answer_start': a.start}
                      for a in e.answers]}]}]} for e in examples]})


def prepare(folder: pathlib.Path) -> None:
  """Links the tree into a folder and writes the files of the reader."""
  from qa_jax.data import synthetic
  for path in ROOT.iterdir():
    if path.name not in ('runs', '.git'):
      (folder / path.name).symlink_to(path)
  for split, name, size in (('train', 'train', 160), ('eval', 'dev', 12)):
    for share, *versions in (0, 'v1.1'), (0.3, 'v2.0', 'v2.0-subset'):
      examples = synthetic.synthetic(size=size, split=split, impossible=share)
      for version in versions:
        (folder / f'{name}-{version}.json').write_text(squad_file(examples))
  for command in commands((ROOT / 'README.md').read_text(encoding='utf-8')):
    if command.startswith('printf '):
      subprocess.run(['sh', '-c', command], cwd=folder, check=True)
  (folder / 'in.jsonl').write_text(json.dumps(
      {'question': examples[0].question, 'context': examples[0].context}))


def run(arguments: list[str], folder: pathlib.Path) -> int:
  """Runs a command in a folder and returns its exit code."""
  for name, output in OUTPUTS.items():
    if (folder / output).is_file():
      (folder / name).write_bytes((folder / output).read_bytes())
  if 'experiments.serve' in arguments:
    return serve([*arguments, f'--port={PORT}'], folder)
  return subprocess.run(arguments, cwd=folder, check=False,
                        stdout=subprocess.DEVNULL).returncode


def serve(arguments: list[str], folder: pathlib.Path) -> int:
  """Returns 0 if the server answers within ten minutes."""
  server = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL)
  try:
    for _ in range(600):
      time.sleep(1)
      if server.poll() is not None:
        return server.returncode or 1
      try:
        with urllib.request.urlopen(f'http://127.0.0.1:{PORT}/') as reply:
          return int(reply.status != 200)
      except OSError:
        pass
    return 1
  finally:
    server.terminate()
    server.wait()


def main(arguments: list[str]) -> int:
  texts = [page.read_text(encoding='utf-8') for page in PAGES]
  if arguments == ['--parse']:
    return sum(bool(parse(c)) for text in texts for c in commands(text)
               if c.startswith('python -m experiments.'))
  steps = {}  # what is printed → the arguments that run it in small
  for page, text in zip(PAGES, texts, strict=True):
    steps |= {c: small_arguments(c) for c in commands(text)}
    if blocks(text, 'python'):
      steps[f'Python blocks of {page.name}'] = python_arguments(text)
  only = ''.join(arguments).removeprefix('--only=')
  failed, count, started = [], 0, time.monotonic()
  with tempfile.TemporaryDirectory(prefix='qa_jax_readme_') as name:
    folder = pathlib.Path(name)
    prepare(folder)
    for step, small in steps.items():
      why = skip_reason(step)
      if why or only not in step:
        print(f'skipped ({why or "not selected"}): {step}', flush=True)
        continue
      begin = time.monotonic()
      code = run(small, folder)
      print(f'{"FAILED" if code else "ran"} ({time.monotonic() - begin:.0f} s)'
            f': {step}', flush=True)
      failed += [step] * bool(code)
      count += 1
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(f'{len(failed)} of {count} commands failed, in '
        f'{(time.monotonic() - started) / 60:.0f} minutes, '
        f'{(used.ru_utime + used.ru_stime) / 60:.0f} of them of CPU')
  return int(bool(failed))


if __name__ == '__main__':
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  sys.exit(main(sys.argv[1:]))
