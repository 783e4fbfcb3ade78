"""Samplers, which propose variants from search_space() of a config file.

A field maps to a list of choices, or to a tuple that is a range: (low, high),
(low, high, 'log'). Ranges of ints give ints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import math
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.sweeps import study as study_lib

DIGITS = 4  # significant digits of a sampled float, a part of a run's name
TRIES = 20  # draws before the search space counts as exhausted

# seed → sampler. TPE: Bergstra et al. (2011), after ten random variants.
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    'random': lambda seed: optuna.samplers.RandomSampler(seed=seed),
    'tpe': lambda seed: optuna.samplers.TPESampler(seed=seed)}


def parse_space(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
  """Returns the Optuna distribution of each field.

  Raises:
    UserError: there is no field, or a field has neither choices nor a range.
  """
  if not isinstance(space, Mapping) or not space:
    raise errors.UserError(
        f'search_space() gives {space!r}, expected fields with choices or '
        "ranges, such as {'optim.learning_rate': (1e-5, 1e-3, 'log')}")
  return {str(field): _parse(str(field), value)
          for field, value in space.items()}


def _parse(field: str, value: Any) -> BaseDistribution:
  if isinstance(value, list) and value and all(
      isinstance(x, (bool, int, float, str)) for x in value):
    return CategoricalDistribution(value)
  if isinstance(value, tuple) and len(value) in (2, 3):
    low, high, *log = value
    kinds = {type(low), type(high)}
    if (kinds <= {int, float} and math.isfinite(low) and math.isfinite(high)
        and log in ([], ['log']) and low < high and (low > 0 or not log)):
      kind = IntDistribution if kinds == {int} else FloatDistribution
      return kind(low, high, log=bool(log))
  raise errors.UserError(
      f'search_space(): {field}: {value!r}, expected a list of choices, '
      "(low, high) with low < high, or (low, high, 'log') with 0 < low")


def propose_rounds(
    study: study_lib.Study, space: Mapping[str, BaseDistribution], sampler: str,
    *, config: config_lib.Config, variants: Sequence[Mapping[str, Any]],
    count: int, size: int) -> Iterator[list[Mapping[str, Any]]]:
  """Yields growing lists of variants, up to the default and `count` others.

  `variants` are those of an earlier start of the sweep, the default {} first;
  the first list repeats them, so that their trials finish. Each further list
  has `size` more, which the sampler proposes from the results of the study.
  """
  drawn = [*variants] or [{}]
  configs = [_resolved(config, v) for v in drawn]
  if variants:
    yield [*drawn]  # finish the earlier variants first
    if len(drawn) > count:
      return
  while True:
    for _ in range(min(size, count + 1 - len(drawn))):
      variant = _propose(study, space, sampler, config, configs)
      if variant is None:
        count = 0
        break
      drawn.append(variant)
      configs.append(_resolved(config, variant))
    yield [*drawn]
    if len(drawn) > count:
      return


def _propose(study: study_lib.Study, space: Mapping[str, BaseDistribution],
             sampler: str, config: config_lib.Config,
             known: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """Returns the overrides of a new variant; None after TRIES repetitions.

  The seed counts the Optuna trials: an interrupted sweep draws as a whole one.
  """
  for _ in range(TRIES):
    with study.guard():
      study.optuna.sampler = SAMPLERS[sampler](
          config.seed + len(study.optuna.get_trials(deepcopy=False)))
      trial = study.optuna.ask(dict(space))
      variant = {field: _rounded(value, space[field])
                 for field, value in trial.params.items()}
      if _resolved(config, variant) not in known:
        trial.set_user_attr('overrides', json.dumps(variant))
        return variant
      study.optuna.tell(trial, state=TrialState.FAIL)
  return None


def _resolved(config: config_lib.Config,
              variant: Mapping[str, Any]) -> dict[str, Any]:
  return config_lib.check_config(
      config_lib.override(config.to_dict(), variant)).to_dict()


def _rounded(value: Any, space: BaseDistribution) -> Any:
  if not isinstance(space, FloatDistribution):
    return value
  return min(max(float(f'{value:.{DIGITS}g}'), space.low), space.high)
