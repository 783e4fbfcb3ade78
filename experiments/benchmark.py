r"""Measures speed beside torch + transformers, after comparing the outputs.

  python -m experiments.benchmark --suite=all --output=bench.json \
      --workdir=MINILM_DIR --data=train-v2.0.json [--peer_python=PYTHON]

--suite=all runs train, forward, search, features, evaluate, input and startup.
Three more run by name: scaling draws docs/scaling_{step,search}.svg; variants
measures every head, objective and search beside the default; population
measures trials as one program and as processes. The peer's packages are those
of requirements-peers.txt, in this Python or in --peer_python; without them
qa_jax is measured alone. --set=precision.compute_dtype=bfloat16 sets a config
field of qa_jax.
"""

from collections.abc import Sequence
import itertools
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from qa_jax import errors

if TYPE_CHECKING:
  from benchmarks import session as session_lib

SUITE = flags.DEFINE_list('suite', [], 'Names of suites, or all.')
OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the numbers.')
DATA = flags.DEFINE_string(
    'data', '', "Data SPEC; '': generated data with the lengths of SQuAD.")
WORKDIR = flags.DEFINE_string(
    'workdir', '', "MiniLM-L6 directory or hub id; '': random weights.")
ENCODERS = flags.DEFINE_list(
    'encoders', 'minilm_l6,base',
    'Encoder sizes of the suite train; other suites take the first.')
DTYPES = flags.DEFINE_list(
    'dtypes', 'float32,bfloat16',
    'Compute dtypes of train and forward. In bfloat16, torch takes many '
    'minutes on a CPU without instructions for it.')
PEER_PYTHON = flags.DEFINE_string(
    'peer_python', '', "Interpreter that has the peer; '': this one.")
THREADS = flags.DEFINE_integer(
    'threads', 2, 'Cores for qa_jax, and for the peer.')
ROUNDS = flags.DEFINE_integer(
    'rounds', 3, 'Measurements of qa_jax and of the peer, in turns.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of weights, data and dropout.')
SET = flags.DEFINE_multi_string(
    'set', [], 'FIELD=VALUE, a config field of qa_jax; may be repeated.')
QUICK = flags.DEFINE_bool(
    'quick', False, 'Tiny sizes: runs everything, measures nothing.')
FIGURES = flags.DEFINE_string('figures', 'docs', 'Directory for the figures.')
SCRATCH = flags.DEFINE_string(
    'scratch', None, 'Directory to keep intermediate files in.')


def main() -> None:
  from benchmarks import harness
  from benchmarks import session as session_lib
  from benchmarks import suites
  from benchmarks import table
  from benchmarks.suites import scaling
  from qa_jax.io import files
  from qa_jax.runtime import console

  names = chosen(SUITE.value)
  if OUTPUT.value:
    files.check_writable(pathlib.Path(OUTPUT.value))
  with tempfile.TemporaryDirectory(prefix='qa_jax_bench_') as scratch:
    session = make_session(pathlib.Path(SCRATCH.value or scratch).absolute())
    outcomes, record = {}, {}
    try:
      for name in names:
        console.say(f'suite {name}')
        try:
          outcomes[name] = suites.SUITES[name](session)
        except harness.WorkerError as e:  # others go on if one could start
          errors.require('ours' in session.about, f'suite {name}: {e}')
          outcomes[name] = session_lib.Outcome(failed=[f'suite {name}: {e}'])
        record = table.record(session, outcomes, sys.argv)
        if OUTPUT.value:  # after each suite, because the next may take long
          files.write_json(pathlib.Path(OUTPUT.value), record)
        # Curves of tiny sizes would replace the figures of the documents.
        if outcomes[name].curves and (FIGURES.present or not QUICK.value):
          for path in scaling.draw(outcomes[name].curves,
                                   pathlib.Path(FIGURES.value)):
            console.say(f'wrote {path}')
    finally:  # also after Ctrl-C or on a full disk
      if record:
        print(table.plain(record, list(outcomes.values())), end='')
    if OUTPUT.value:
      print(f'numbers: {OUTPUT.value}')
    failed = [reason for o in outcomes.values() for reason in (
        *o.failed, *(f'{row.suite} {row.what}: {row.verdict}'
                     for row in o.rows if row.refused))]
    errors.require(not failed, f'left out: {"; ".join(failed)}')


def chosen(names: Sequence[str]) -> tuple[str, ...]:
  """Returns the suites of the given names; 'all' stands for those of ALL."""
  from benchmarks import suites

  picked = tuple(dict.fromkeys(itertools.chain.from_iterable(
      suites.ALL if name == 'all' else [name] for name in names)))
  for name in picked:
    if name not in suites.SUITES:
      raise errors.UserError(f'--suite={name}: there is none such'
                             f'{errors.did_you_mean(name, suites.SUITES)}')
  return picked


def make_session(scratch: pathlib.Path) -> 'session_lib.Session':
  """Builds the session that the flags describe, after checking them."""
  from benchmarks import cores
  from benchmarks import session as session_lib
  from qa_jax.checkpoints import hugging_face

  try:
    scratch.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.UserError(f'--scratch={scratch}: {e.strerror}') from None
  # An earlier benchmark left caches and complete runs there.
  errors.require(not any(scratch.iterdir()),
                 f'--scratch={scratch} is not empty; choose a new directory')
  for name, flag in (('threads', THREADS), ('rounds', ROUNDS)):
    if flag.value < 1:
      raise errors.UserError(f'--{name}={flag.value} must be at least 1')
  most = len(cores.available())
  errors.require(THREADS.value <= most or not THREADS.present,
                 f'--threads={THREADS.value}: there are {most} cores to use')
  for flag, choices in ((ENCODERS, session_lib.NAMES),
                        (DTYPES, session_lib.DTYPES)):
    errors.require(bool(flag.value), f'--{flag.name}=: give some of '
                   f'{", ".join(choices)}')
    for name in flag.value:
      if name not in choices:
        raise errors.UserError(f'--{flag.name}={name}: there is none such'
                               f'{errors.did_you_mean(name, choices)}')
  return session_lib.Session(
      sizes=session_lib.TINY if QUICK.value else session_lib.FULL,
      scratch=scratch,
      data=DATA.value,
      encoders=tuple(ENCODERS.value),
      dtypes=tuple(DTYPES.value),
      encoder=str(hugging_face.resolve_source(WORKDIR.value))
      if WORKDIR.value else '',
      overrides=cli.assignments(
          SET.value, '--set={}: expected FIELD=VALUE, such as '
          'train.batch_size=8'),
      rounds=ROUNDS.value,
      threads=min(THREADS.value, most),
      seed=SEED.value,
      peer_python=PEER_PYTHON.value or sys.executable)


if __name__ == '__main__':
  cli.run(main, required=('suite',), aliases={'model': 'workdir'})
