r"""Runs what README.md shows, small: every command and the block of Python.

  make readme    (python -m tests.project.readme_commands [--only=WORD])

Commands run in their order, in a temporary folder that shows the tree through
links, with the config's rehearsal instead of its real size and with generated
files where the README names yours. What takes a network, a cluster or another
hour is named with the reason. `--parse` only reads the flags, all of them.
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
SKIPPED = {  # beginning or part of a command → why
    'make ': 'is a whole run of its own', 'pip install': 'network',
    'ray start': 'cluster', '--engine=ray': 'cluster',
    '--engine=slurm': 'cluster', '--coordinator': 'cluster',
    'experiments.ensemble': 'several runs of yours',
    'experiments.suite': 'sets that are fetched'}
# What stands for yours, and sizes that only rehearse.
SMALLER = {
    r'(\.py):(base|large|minilm_l6)': r'\1:tiny',
    'DIR_WITH_SAFETENSORS_AND_VOCAB': 'runs/rehearsal',
    '--seeds=3': '--seeds=1', '--trials=20': '--trials=1'}
REHEARSAL = ['--config.train.num_epochs=0', '--config.train.num_steps=4',
             '--config.train.batch_size=8',
             '--config.train.eval_every_steps=2',
             '--config.train.checkpoint_every_steps=2']
DATA = ['--config.data.train=synthetic(size=40)',
        '--config.data.eval=synthetic(seed=1, size=12, split="eval")']
MADE = {  # file a command names → what an earlier one left
    'predictions.json': 'runs/real/eval/dev-v2.0/predictions.json'}
PORT = 8765


def blocks(text: str, language: str) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def commands(text: str) -> list[str]:
  """Shell commands of all blocks: whole lines, without comments."""
  found = []
  for block in blocks(text, 'sh'):
    for line in re.sub(r'\\\n\s*', '', block).splitlines():
      line = re.sub(r'\s+#.*', '', line)
      found += [part.strip() for part in line.split(' && ') if part.strip()]
  return found


def why_skipped(command: str) -> str:
  """The reason, or ''."""
  return next((why for part, why in SKIPPED.items() if part in command), '')


def optional(command: str, *, given: bool) -> str:
  """The command with or without what stands in brackets."""
  return re.sub(r'\s\[(-[^\]]*)\]', r' \1' if given else '', command)


def rehearsed(command: str) -> list[str]:
  """The arguments that run it small."""
  for pattern, smaller in SMALLER.items():
    command = re.sub(pattern, smaller, command)
  arguments = shlex.split(optional(command, given=False))
  if '--config=' in command:
    arguments += REHEARSAL
    arguments += [] if '--config.data.' in command else DATA
  return [sys.executable if a == 'python' else a for a in arguments]


def parse(command: str) -> int:
  """Reads all flags of a command in this process, as the command itself does,
  and checks the config; the exit code."""
  from absl import flags

  from experiments import cli
  run, before = cli.run, set(flags.FLAGS)

  def only_parse(main, **options):
    del main
    run(lambda: cli.config() and None if options.get('config') else None,
        **options)

  _, _, module, *arguments = shlex.split(optional(command, given=True))
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


def prepare(folder: pathlib.Path) -> None:
  """The tree through links, and the files that the README's reader has."""
  from qa_jax.data import synthetic
  for path in ROOT.iterdir():
    if path.name not in ('runs', '.git'):
      (folder / path.name).symlink_to(path)
  for name, split, size in (('train', 'train', 160), ('dev', 'eval', 12)):
    examples = synthetic.synthetic(size=size, split=split, impossible=0.3)
    (folder / f'{name}-v2.0.json').write_text(json.dumps({
        'version': 'v2.0', 'data': [{'title': e.title, 'paragraphs': [{
            'context': e.context, 'qas': [{
                'id': e.id, 'question': e.question,
                'is_impossible': e.impossible, 'answers': [
                    {'text': a.text, 'answer_start': a.start}
                    for a in e.answers]}]}]} for e in examples]}))
  (folder / 'in.jsonl').write_text(json.dumps(
      {'question': examples[0].question, 'context': examples[0].context}))


def run(arguments: list[str], folder: pathlib.Path) -> int:
  for name, made in MADE.items():
    if (folder / made).is_file():
      (folder / name).write_bytes((folder / made).read_bytes())
  if 'experiments.serve' in arguments:
    return serve([*arguments, f'--port={PORT}'], folder)
  return subprocess.run(arguments, cwd=folder, check=False,
                        stdout=subprocess.DEVNULL).returncode


def serve(arguments: list[str], folder: pathlib.Path) -> int:
  """0 if the server answers within ten minutes: the machine may be busy."""
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


def python_block(code: str) -> list[str]:
  """The block with its dots left out, as a command."""
  return [sys.executable, '-c', re.sub(r',\s*…\]', ']', code)]


def main(arguments: list[str]) -> int:
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  found = commands(text)
  if arguments == ['--parse']:
    return sum(bool(parse(c)) for c in found
               if c.startswith('python -m experiments.'))
  only = ''.join(arguments).removeprefix('--only=')
  failed, ran, started = [], 0, time.monotonic()
  with tempfile.TemporaryDirectory(prefix='qa_jax_readme_') as name:
    folder = pathlib.Path(name)
    prepare(folder)
    for command in [*found, *blocks(text, 'python')]:
      why = why_skipped(command)
      if why or only not in command:
        print(f'skipped ({why or "not asked for"}): {command}', flush=True)
        continue
      is_shell = command in found
      began = time.monotonic()
      code = run(rehearsed(command) if is_shell else python_block(command),
                 folder)
      print(f'{"FAILED" if code else "ran"} ({time.monotonic() - began:.0f} s)'
            f': {command}', flush=True)
      failed += [command] * bool(code)
      ran += 1
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(f'{len(failed)} of {ran} commands failed, in '
        f'{(time.monotonic() - started) / 60:.0f} minutes, '
        f'{(used.ru_utime + used.ru_stime) / 60:.0f} of them of CPU')
  return int(bool(failed))


if __name__ == '__main__':
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
  sys.exit(main(sys.argv[1:]))
