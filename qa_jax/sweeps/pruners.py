"""Pruners, which stop trials of a sweep early.

`halving` compares runs while they train, at the first, second, fourth, …
evaluation: a trial stops if its F1 is not in the better half of the trials that
reached this evaluation (asynchronous successive halving, Li et al. (2020)).
`wilcoxon` compares variants over seeds: a variant that is significantly worse
than the best variant on their common seeds gets no further seed (one-sided
Wilcoxon signed-rank test).
"""

from collections.abc import Mapping, Sequence
import warnings

import optuna
from optuna.trial import TrialState

from qa_jax import errors

P_VALUE = 0.1
# Four results are the fewest that can be significant, as 2^-4 < P_VALUE < 2^-3.
# So the fifth seed is the first that can be saved.
WILCOXON_SEEDS = 5
PRUNERS = ('none', 'halving', 'wilcoxon')


def check_pruner(name: str, *, seeds: int, eval_every_steps: int) -> None:
  """Checks that a pruner exists and can prune a trial of this sweep.

  Raises:
    UserError: the pruner is unknown, `halving` has no evaluations while
      training, or `wilcoxon` has too few seeds.
  """
  if name not in PRUNERS:
    raise errors.UserError(f'--pruner={name}: choose {", ".join(PRUNERS)}'
                           f'{errors.did_you_mean(name, PRUNERS)}')
  if name == 'halving' and not eval_every_steps:
    raise errors.UserError(
        '--pruner=halving compares evaluations while training; set '
        'config.train.eval_every_steps')
  if name == 'wilcoxon' and seeds < WILCOXON_SEEDS:
    raise errors.UserError(
        f'--pruner=wilcoxon: {seeds} seeds cannot tell variants apart at '
        f'p < {P_VALUE}; give --seeds={WILCOXON_SEEDS} or more')


def while_training(name: str, eval_every_steps: int,
                   ) -> optuna.pruners.BasePruner:
  """Returns the Optuna pruner that reads every intermediate value."""
  if name == 'halving':
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=eval_every_steps, reduction_factor=2)
  return optuna.pruners.NopPruner()


def worse_over_seeds(values: Mapping[int, float],
                     others: Sequence[Mapping[int, float]]) -> str:
  """Returns the reason why a variant needs no further seed, or ''.

  `values` maps the seeds of the variant to scores, as `others` do those of the
  other variants. The best of these that has all its seeds is the rival.
  """
  rivals = [{seed: other[seed] for seed in values} for other in others
            if values.keys() <= other.keys()]
  if not values or not rivals:
    return ''
  best = max(rivals, key=lambda rival: sum(rival.values()))
  study = optuna.create_study(direction='maximize')
  study.add_trial(optuna.trial.create_trial(
      value=sum(best.values()) / len(best), intermediate_values=best))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    pruner = optuna.pruners.WilcoxonPruner(p_threshold=P_VALUE)
  if not pruner.prune(study, optuna.trial.create_trial(
      state=TrialState.RUNNING, intermediate_values=dict(values))):
    return ''
  return (f'worse than the best variant on {len(values)} seeds (Wilcoxon, '
          f'p < {P_VALUE})')
