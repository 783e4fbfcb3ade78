"""Tuned fields: the best value of each variant, on data of their own."""

import re
import shlex

import pytest

from qa_jax import errors
from qa_jax.io import files
from qa_jax.sweeps import grid
from qa_jax.sweeps import plan as plan_lib
from qa_jax.sweeps import tuning
from tests.common import commands
from tests.common import sweeps
from tests.common import tiny

pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

RATE, DECAY = 'optim.learning_rate', 'optim.layer_decay'
HEADS = ('independent', 'shared')
VARIANTS = grid.product(grid.over('model.head', HEADS),
                        grid.over(RATE, (1e-4, 3e-4, 1e-3)))
HELD_OUT = {'data': {'eval': 'synthetic(size=8, seed=7)'}}
COMPARED = tiny.FIELDS['data']['eval']


def tuned_sweep(workdir, scores, *, variants=VARIANTS, seeds=1, **changes):
  """Writes a sweep whose i-th trial has the i-th F1; None is not complete."""
  trials = plan_lib.plan_trials(
      tiny.config(**(changes or HELD_OUT)), variants, seeds, workdir)
  plan_lib.write_plan(workdir, trials, None)
  for trial, score in zip(trials, scores, strict=True):
    files.write_json(trial.run / 'config.json', trial.config.to_dict())
    if score is not None:
      sweeps.measure(trial, score)
  return workdir


def choose(workdir, variants=VARIANTS, fields=(RATE,)):
  return tuning.choose(variants, fields, workdir, data=COMPARED)


def refusal(workdir, *args, **changes) -> str:
  with pytest.raises(errors.UserError) as caught:
    choose(workdir, *args, **changes)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_each_variant_gets_its_own_best_value(tmp_path):
  choices = choose(tuned_sweep(tmp_path, [1.0, 5.0, 2.0, 1.0, 2.0, 3.0]))
  assert [c.variant for c in choices] == [
      {'model.head': 'independent', RATE: 3e-4},
      {'model.head': 'shared', RATE: 1e-3}]
  assert [c.scores for c in choices] == [[1, 5, 2], [1, 2, 3]]


def test_the_tuned_default_stays_first_where_the_rate_varies_first(tmp_path):
  """The chosen variant of `shared` stands before that of `independent`."""
  variants = [{RATE: rate, 'model.head': head, 'seed': seed}
              for rate in (1e-3, 3e-3) for head in HEADS for seed in (0, 1)]
  workdir = tuned_sweep(
      tmp_path, [7.0, 7.5, 7.2, 7.1] * 2, variants=variants)
  tuned = tuning.variants_of(choose(workdir, variants), variants)
  assert [(v['model.head'], v[RATE], v['seed']) for v in tuned] == [
      ('independent', 3e-3, 0), ('independent', 3e-3, 1),
      ('shared', 1e-3, 0), ('shared', 1e-3, 1)]


def test_scores_are_means_over_seeds(tmp_path):
  """Sorted by seed: the second value is best with the first seed only."""
  choice, _ = choose(tuned_sweep(
      tmp_path, [1.0, 9.0, 6.0, 1, 1, 2, 1.0, 2.0, 6.0, 1, 1, 2], seeds=2))
  assert choice.scores == [1.0, 5.5, 6.0] and choice.variant[RATE] == 1e-3


def test_seeds_that_the_sweep_sets_are_no_variants(tmp_path):
  """The second rate is best with the first seed only."""
  variants = grid.product(VARIANTS[:3], grid.seeds(2))
  choice, = choose(tuned_sweep(
      tmp_path / 'rates', [1.0, 9.0, 6.0, 1.0, 2.0, 6.0], variants=variants),
                   variants)
  assert choice.variant == VARIANTS[2] and choice.scores == [1.0, 5.5, 6.0]
  config = sweeps.write_config(
      tmp_path / 'c.py', f'\ndef sweep():\n  return {variants!r}\n')
  result = commands.command(
      'sweep', f'--config={config}', f'--workdir={tmp_path}/x', '--print',
      f'--tuned={RATE}', f'--tuned_in={tmp_path}/rates')
  assert [shlex.split(line)[-2:] for line in result.out.splitlines()] == [
      [f'--config.{RATE}=0.001', f'--config.seed={seed}'] for seed in (0, 1)]


def test_several_fields_are_tuned_together(tmp_path):
  both = grid.product(VARIANTS[:3], grid.over(DECAY, (1.0, 0.8)))
  tuned_sweep(tmp_path, [1.0, 2.0, 3.0, 9.0, 8.0, 4.0], variants=both)
  choice, = choose(tmp_path, both, (RATE, DECAY))
  assert choice.variant == both[3]
  assert [c.variant for c in choose(tmp_path, both)] == [both[4], both[3]]


def test_line_names_all_scores_and_warns_at_the_ends(tmp_path):
  inner, end = choose(tuned_sweep(tmp_path, [1.0, 5.0, 2.0, 1.0, 2.0, 3.0]))
  assert inner.line() == (
      f'model.head=independent: {RATE}=0.0003 (F1 of {RATE}=0.0001: 1.00, '
      f'{RATE}=0.0003: 5.00, {RATE}=0.001: 2.00)')
  assert end.line().endswith(
      f'; {RATE}=0.001 is the largest tried, so a better value may lie beyond '
      'it')
  least, _ = choose(tuned_sweep(tmp_path / 'b', [9.0, 5.0, 2.0, 1, 2, 3]))
  assert f'; {RATE}=0.0001 is the smallest tried' in least.line()
  one, = choose(tuned_sweep(tmp_path / 'c', [1.0], variants=VARIANTS[:1]),
                VARIANTS[:1])
  assert 'tried' not in one.line()


def test_fields_of_lists_and_texts_are_tuned(tmp_path):
  variants = [*grid.over('data.buckets', ((24, 32), (24, 40))),
              *grid.over('optim.schedule', ('linear', 'cosine'))]
  for n, (pair, field) in enumerate(((variants[:2], 'data.buckets'),
                                     (variants[2:], 'optim.schedule'))):
    choice, = choose(tuned_sweep(tmp_path / str(n), [1.0, 5.0], variants=pair),
                     pair, (field,))
    assert choice.variant == pair[1] and 'may lie beyond' not in choice.line()


def test_what_cannot_be_tuned_is_refused(tmp_path):
  assert 'no sweep.json' in refusal(tmp_path)
  whole = tuned_sweep(tmp_path / 'whole', [1.0] * 6)
  assert f'--tuned={DECAY}: model.head=independent' in refusal(
      whole, fields=[DECAY])
  assert 'has no trial of model.head-mlp' in refusal(
      whole, [*VARIANTS, {'model.head': 'mlp', RATE: 1e-4}])
  part = tuned_sweep(tmp_path / 'part', [1.0] * 5 + [None])
  assert re.search('shared.*seed-3 is not complete; complete', refusal(part))
  same = tuned_sweep(tmp_path / 'same', [1.0] * 6, data={})
  assert f'was scored on config.data.eval={COMPARED!r}' in refusal(same)
  # Neither another spelling nor a part of the compared questions is held out.
  for name, spec in (('spelled', COMPARED.replace('(', '( ')),
                     ('part of', f'articles(of={COMPARED!r}, high=0.5)')):
    leaky = tuned_sweep(tmp_path / name, [1.0] * 6, data={'eval': spec})
    assert 'questions of this comparison' in refusal(leaky)


def test_variants_with_other_seeds_are_refused(tmp_path):
  tuned_sweep(tmp_path, [1.0] * 6)
  more = plan_lib.plan_trials(tiny.config(**HELD_OUT), VARIANTS[:1], 2,
                              tmp_path)
  names = files.read_object(tmp_path / 'sweep.json')['trials']
  plan_lib.write_plan(tmp_path, more, None, whole=names)
  files.write_json(more[1].run / 'config.json', more[1].config.to_dict())
  sweeps.measure(more[1], 1.0)
  assert 'has the seeds [3], but' in refusal(tmp_path)


def test_command_runs_the_chosen_variants_only(tmp_path):
  config = sweeps.write_config(
      tmp_path / 'c.py', f'\ndef sweep():\n  return {VARIANTS!r}\n')
  rates = tuned_sweep(tmp_path / 'rates', [1.0, 5.0, 2.0, 1.0, 2.0, 3.0])
  argv = ('sweep', f'--config={config}', f'--workdir={tmp_path}/x', '--print',
          '--seeds=2')
  result = commands.command(*argv, f'--tuned={RATE}', f'--tuned_in={rates}')
  assert [shlex.split(line)[-3:] for line in result.out.splitlines()] == [
      [f'--config.model.head={head}', f'--config.{RATE}={rate}',
       f'--config.seed={seed}'] for seed in (3, 4)
      for head, rate in zip(HEADS, (0.0003, 0.001), strict=True)]
  assert f'tuned in {rates}: model.head=shared: {RATE}=0.001' in result.err
  for flag in (f'--tuned={RATE}', f'--tuned_in={rates}'):
    assert 'need each other' in commands.refusal(*argv, flag)
  assert 'it selects variants of sweep()' in commands.refusal(
      *(a for a in argv if a != '--print'), '--sampler=random',
      f'--tuned={RATE}', f'--tuned_in={rates}')
