r"""Averages the span probabilities of runs and n-best files into an ensemble.

  python -m experiments.ensemble --workdir=runs/a,runs/b,runs/c \
      --data=dev-v2.0.json --output=runs/ensemble \
      --held_out='articles(of="train-v2.0.json", low=0.9)'

A member is a run, the directory of an evaluation or an nbest.jsonl, with any
head and tokenizer. A run is evaluated on --data if there is no evaluation of
its checkpoint. --held_out names the questions on which members are selected
greedily and the null threshold is chosen. Without it, all members are averaged
and the threshold is 0. If a member is no run, --held_out also needs
--held_out_members. The flags of decoding, --checkpoint and --nocalibrated apply
to each member, which must then be a run. Writes metrics.json, predictions.json,
na_probs.json, nbest.jsonl and ensemble.{json,md}.
"""

import pathlib

from absl import flags

from experiments import cli

MEMBERS = flags.DEFINE_list(
    'workdir', [], 'Members: runs, evaluations, n-best files.')
DATA = flags.DEFINE_string('data', None, 'Data SPEC of the questions.')
OUTPUT = flags.DEFINE_string('output', None, 'Directory for the results.')
HELD_OUT = flags.DEFINE_string(
    'held_out', '', 'Data SPEC to select members on.')
HELD_OUT_MEMBERS = flags.DEFINE_list(
    'held_out_members', [],
    'For each member, its run or its evaluation on --held_out.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of tests and intervals.')


def main() -> None:
  from qa_jax.evaluation import ensemble
  from qa_jax.io import documents
  from qa_jax.io import files
  from qa_jax.runtime import settings

  output = pathlib.Path(OUTPUT.value)
  files.check_writable(output / 'ensemble.json')
  settings.configure_process()
  result = ensemble.build_ensemble(
      MEMBERS.value, DATA.value, held_out=HELD_OUT.value,
      held_out_members=HELD_OUT_MEMBERS.value, **cli.options())
  print(documents.to_markdown(ensemble.write_ensemble(
      result, output, seed=SEED.value)), end='')
  print(f'\nfiles: {output}')


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir', 'data', 'output'),
          aliases={'members': 'workdir'})
