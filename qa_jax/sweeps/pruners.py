"""PRUNERS: which trials of a sweep need not go on.

`halving` compares runs while they train: at the first evaluation, the second,
the fourth, … whoever is not in the better half of those that came so far ends
(asynchronous successive halving, Li et al. (2020)). `wilcoxon` compares
variants over seeds: one that is worse than the best on the seeds that both have
does not get its other seeds (Wilcoxon's signed-rank test, one-sided).
"""

from collections.abc import Mapping, Sequence
import warnings

import optuna
from optuna.trial import TrialState

from qa_jax import errors

P_VALUE = 0.1
# With fewer, no difference is significant: 2^-3 > P_VALUE. The last of the
# seeds is the first that can be spared.
WILCOXON_SEEDS = 5
PRUNERS = ('none', 'halving', 'wilcoxon')


def check_pruner(name: str, *, seeds: int, eval_every_steps: int) -> None:
  """Refuses a pruner that does not exist or can never prune.

  Raises:
    UserError: as said.
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
  """What Optuna asks at each intermediate value."""
  if name == 'halving':
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=eval_every_steps, reduction_factor=2)
  return optuna.pruners.NopPruner()


def worse_over_seeds(values: Mapping[int, float],
                     others: Sequence[Mapping[int, float]]) -> str:
  """Why a variant needs no further seed, or ''.

  `values` are its scores by seed, `others` those of other variants; the best of
  these that have all its seeds is what it is compared with.
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
