r"""Chooses a run's null threshold and temperature on held-out articles.

  python -m experiments.train --config=configs/squad2.py --workdir=runs/squad \
      --config.data.train='articles(of="train-v2.0.json", high=0.9)'
  python -m experiments.calibrate --workdir=runs/squad \
      --data='articles(of="train-v2.0.json", low=0.9)'

Writes WORKDIR/calibration.json. Other commands then use it for the same
checkpoint and decoding, unless --nocalibrated is given. Questions that the
run was trained on are refused, and fewer than 200 questions give a warning.
"""

import pathlib

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string('workdir', None, 'Run to calibrate.')
DATA = flags.DEFINE_string('data', None, 'Data SPEC of the held-out questions.')


def main() -> None:
  from qa_jax.evaluation import calibrate
  from qa_jax.runtime import settings

  workdir = pathlib.Path(WORKDIR.value)
  settings.configure_process()
  cli.print_metrics(calibrate.calibrate_run(
      workdir, DATA.value, checkpoint=flags.FLAGS['checkpoint'].value,
      progress='calibrate', **cli.decoding()))
  print(f'{workdir}/calibration.json is used from now on')


if __name__ == '__main__':
  cli.run(main, model=True, calibrated=False, required=('workdir', 'data'))
