r"""Converts a checkpoint to a Hugging Face directory or to a run directory.

  python -m experiments.convert_weights --workdir=runs/squad --output=hf/squad
  python -m experiments.convert_weights --workdir=uncased_L-12_H-768_A-12 \
      --output=hf/bert
  python -m experiments.convert_weights --workdir=DIR_OR_HUB_ID \
      --output=runs/theirs --format=qa_jax

--workdir is a run directory, a Hugging Face directory or hub id with
safetensors (docs/checkpoints.md lists the architectures), or a directory with
TensorFlow's bert_model.ckpt, bert_config.json and vocab.txt. The conversion
needs neither TensorFlow nor torch.
"""

import pathlib
import sys

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory to create.')
FORMAT = flags.DEFINE_string('format', 'hf', 'hf, or qa_jax (a run directory).')
CALIBRATED = flags.DEFINE_bool(
    'calibrated', True, 'Take the null threshold of calibration.json.')
CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'best', 'Checkpoint of a run: best, last or a step.')


def main() -> None:
  from qa_jax.export import hugging_face
  from qa_jax.runtime import console

  if FORMAT.value not in hugging_face.FORMATS:
    raise errors.UserError(
        f'--format={FORMAT.value!r}'
        f'{errors.did_you_mean(FORMAT.value, hugging_face.FORMATS)}')
  target = pathlib.Path(OUTPUT.value)
  hugging_face.check_target(target)
  source = hugging_face.read_source(WORKDIR.value, CHECKPOINT.value,
                                    calibrated=CALIBRATED.value)
  for note in source.model.notes:
    console.say(note)
  if not source.model.has_head:
    console.say('the checkpoint has no span head: the encoder is converted')
  if FORMAT.value == 'hf':
    hugging_face.write_hugging_face(source, target)
  else:
    hugging_face.write_run_directory(source, target, sys.argv)
  print(f'{WORKDIR.value} as {FORMAT.value} in {target}')


if __name__ == '__main__':
  cli.run(main, required=('workdir', 'output'),
          aliases={'source': 'workdir', 'target': 'output'})
