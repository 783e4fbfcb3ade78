r"""Compares the variants of sweeps or runs with the first variant.

  python -m experiments.report --workdir=runs/heads
  python -m experiments.report --workdir=runs/a,runs/b,runs/c --output=report

Runs that differ only in the seed are one variant. The report compares their
answers to data.eval, or to --data=SPEC if experiments.evaluate has evaluated
every run on it. Of runs with equal configs and seeds, the first is compared.
Writes report.md, .html (one file, with all plots), .csv, .tex, .png, with a row
for each run report_runs.csv and, if runs were evaluated while they trained,
report_curves.png to --output, or to report/ in the first WORKDIR.
"""

import pathlib

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_list('workdir', [], 'Sweeps and runs.')
DATA = flags.DEFINE_string(
    'data', '', 'Data SPEC on which all runs were evaluated [data.eval].')
PLANNED = flags.DEFINE_integer(
    'planned', 0, 'Number of comparisons that the study will have, for its '
    'power; 0: those of this report.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the report.')


def main() -> None:
  from qa_jax.io import files
  from qa_jax.sweeps import compare
  from qa_jax.sweeps import report

  workdirs = [pathlib.Path(w) for w in WORKDIR.value]
  output = pathlib.Path(OUTPUT.value or workdirs[0] / 'report')
  files.check_writable(output / 'report.md')
  if PLANNED.value < 0:
    raise errors.UserError(f'--planned={PLANNED.value} must be at least 0')
  comparison = compare.compare(workdirs, data=DATA.value,
                               planned=PLANNED.value)
  report.write_report(comparison, output)
  print('\n'.join(report.headline(comparison)))
  print(f'report: {output}/report.md, .html, .csv, .tex, .png and '
        'report_runs.csv')


if __name__ == '__main__':
  cli.run(main, required=('workdir',))
