r"""Exports a model as one program that runs without qa_jax.

  python -m experiments.export --workdir=runs/squad --output=exported
  python exported/run.py --question="Who …?" --context="…"

The directory --output gets program.bin (encoder, head and span search as
StableHLO, for any number and length of windows), params.safetensors,
tokenizer.json, meta.json, SHA256SUMS and run.py. run.py needs only jax,
flatbuffers, numpy, safetensors and tokenizers.
"""

import pathlib

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory to create.')
PLATFORMS = flags.DEFINE_list(
    'platforms', 'cpu,cuda,tpu', 'Platforms of the program.')


def main() -> None:
  from qa_jax.export import hugging_face
  from qa_jax.export import stablehlo
  from qa_jax.runtime import console

  stablehlo.check_platforms(PLATFORMS.value)
  target = pathlib.Path(OUTPUT.value)
  hugging_face.check_target(target)
  model = cli.load_model(WORKDIR.value)
  console.say(f'exporting a program for {", ".join(PLATFORMS.value)}')
  for name, size in stablehlo.export_run(model, target,
                                         PLATFORMS.value).items():
    print(f'{target / name}  {size / 2**20:.2f} MiB')
  print(f'ask it: python {target / "run.py"} --question="…" --context="…"')


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir', 'output'),
          aliases={'length': 'max_length', 'merge': 'decode.merge'})
