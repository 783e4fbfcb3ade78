r"""Evaluates one model on many data sets.

  python -m experiments.suite --workdir=runs/squad \
      --suite=configs/suites/transfer.py

The suite file names data SPECs in groups. --suite.GROUP.NAME=SPEC replaces a
SPEC, or adds it to a group. A data set that cannot be read is skipped with a
message, and averages leave it out. Writes suite.{json,md,html} and the
predictions on every data set to WORKDIR/suites/NAME or --output. The flags of
decoding, --checkpoint and --nocalibrated add their values to NAME. --workdir
also takes a Hugging Face directory or hub id.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string('workdir', None, 'Run, checkpoint or hub id.')
SUITE = config_flags.DEFINE_config_file(
    'suite', None, 'File of data sets; FILE:variant.', lock_config=False,
    accept_new_attributes=True)
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the intervals.')


def main() -> None:
  from qa_jax.checkpoints.run_directory import RunDirectory
  from qa_jax.evaluation import suite
  from qa_jax.io import documents
  from qa_jax.io import files
  from qa_jax.runtime import settings

  name = pathlib.Path(str(
      flags.FLAGS['suite'].config_filename).partition(':')[0]).stem
  name += cli.evaluation_label()
  workdir = pathlib.Path(WORKDIR.value)
  if not (OUTPUT.value or RunDirectory(workdir).is_run()):
    raise errors.UserError('--output is needed where --workdir is not a run')
  output = pathlib.Path(OUTPUT.value or workdir / 'suites' / name)
  files.check_writable(output / 'suite.json')
  groups = suite.check_suite(cli.fields_of(SUITE.value, 'suite'))
  settings.configure_process()
  qa = cli.load_model(WORKDIR.value)
  rows = suite.run_suite(qa, groups, output, seed=SEED.value)
  print(documents.to_markdown(suite.write_suite(
      rows, output, f'{WORKDIR.value} on the suite {name}')), end='')
  print(f'\nsuite: {output}/suite.md, .html and .json')


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir', 'suite'))
