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
from qa_jax.export import hugging_face
from qa_jax.export import stablehlo
from qa_jax.inference import predict

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory to create.')
PLATFORMS = flags.DEFINE_list(
    'platforms', 'cpu,cuda,tpu', 'Platforms of the program.')
LENGTH = flags.DEFINE_integer(
    'length', 0, 'Tokens of a window; 0: max_length of the run.')
CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'best', 'Checkpoint of a run: best, last or a step.')
MERGE = flags.DEFINE_string(
    'merge', None, "'none': export without the decode.merge of the run.")


def main() -> None:
  cli.required(workdir=WORKDIR.value, output=OUTPUT.value)
  stablehlo.check_platforms(PLATFORMS.value)
  target = pathlib.Path(OUTPUT.value)
  hugging_face.check_target(target)
  options = {'max_length': LENGTH.value} if LENGTH.value else {}
  if MERGE.value is not None:
    options['merge'] = MERGE.value
  model = predict.load(WORKDIR.value, checkpoint=CHECKPOINT.value, **options)
  for name, size in stablehlo.export_run(model, target,
                                         PLATFORMS.value).items():
    print(f'{target / name}  {size / 2**20:.2f} MiB')


if __name__ == '__main__':
  cli.run(main)
