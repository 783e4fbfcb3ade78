r"""Exports a model as one program that runs without qa_jax.

  python -m experiments.export --workdir=runs/squad --output=exported
  python exported/run.py --question="Who …?" --context="…"

--output gets program.bin (encoder, head and span search as StableHLO, for any
number and length of windows), params.safetensors, tokenizer.json, meta.json,
SHA256SUMS, and run.py, which needs jax, flatbuffers, numpy, safetensors and
tokenizers alone.
"""

import pathlib

from absl import flags

from experiments import cli
from qa_jax.export import hugging_face
from qa_jax.export import stablehlo
from qa_jax.inference import predict

WORKDIR = flags.DEFINE_string('workdir', None, 'Run, checkpoint or hub id.')
OUTPUT = flags.DEFINE_string('output', None, 'New directory.')
PLATFORMS = flags.DEFINE_list(
    'platforms', 'cpu,cuda,tpu', 'What the program can run on.')
LENGTH = flags.DEFINE_integer(
    'length', 0, "Tokens of the longest window; 0: as the run's.")
CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'best', 'best, last or a step.')
MERGE = flags.DEFINE_string(
    'merge', None, "'none' leaves out the decode.merge of a run.")


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
