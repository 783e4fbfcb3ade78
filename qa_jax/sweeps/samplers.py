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
from qa_jax.runtime import console
from qa_jax.sweeps import plan
from qa_jax.sweeps import study as study_lib

DIGITS = 4  # significant digits of a sampled float, a part of a run's name
TRIES = 50  # draws before the search space counts as exhausted

# seed → sampler. TPE: Bergstra et al. (2011), after ten random variants.
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    'random': lambda seed: optuna.samplers.RandomSampler(seed=seed),
    'tpe': lambda seed: optuna.samplers.TPESampler(seed=seed)}


def parse_space(space: Mapping[str, Any]) -> dict[str, BaseDistribution]:
  """Returns the Optuna distribution of each field.

  Raises:
    UserError: there is no field, a field has neither choices nor a range, is
      the seed, or no config has it.
  """
  if not isinstance(space, Mapping) or not space:
    raise errors.UserError(
        f'search_space() gives {space!r}, expected fields with choices or '
        "ranges, such as {'optim.learning_rate': (1e-5, 1e-3, 'log')}")
  parsed = {str(field): _parse(str(field), value)
            for field, value in space.items()}
  errors.require('seed' not in parsed, 'search_space(): seed is not searched; '
                 'leave it out, --seeds=N runs each draw with N seeds')
  known = config_lib.paths()
  for field in parsed:
    if field not in known:
      raise errors.UserError(f'search_space(): config has no field {field!r}'
                             f'{errors.did_you_mean(field, known)}')
  return parsed


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
    count: int, size: int, check: Callable[[config_lib.Config], None],
    ) -> Iterator[list[Mapping[str, Any]]]:
  """Yields growing lists of variants, up to the default and `count` others.

  `variants` are those of an earlier start of the sweep, the default {} first;
  the first list repeats them, so that their trials finish. Each further list
  has `size` more, which the sampler proposes from the results of the study.
  A draw whose config is invalid, or for which `check` raises a UserError, is
  said and replaced by another draw.

  Raises:
    UserError: every draw is refused.
  """
  drawn = [*variants] or [{}]
  known = [_resolved(config, v) for v in drawn]
  refused: dict[str, str] = {}  # draw → reason
  if variants:
    yield [*drawn]  # finish the earlier variants first
    if len(drawn) > count:
      return
  while True:
    for _ in range(min(size, count + 1 - len(drawn))):
      variant = _propose(study, space, sampler, config, known, refused, check)
      if variant is None:
        if refused and len(drawn) == 1:
          raise errors.UserError('search_space(): every draw is refused: '
                                 f'{[*refused.values()][-1]}')
        console.say(f'{TRIES} draws of --sampler={sampler} gave no new variant:'
                    f' the search ends with {len(drawn) - 1} instead of '
                    f'--trials={count}')
        count = 0
        break
      drawn.append(variant)
    yield [*drawn]
    if len(drawn) > count:
      return


def _propose(study: study_lib.Study, space: Mapping[str, BaseDistribution],
             sampler: str, config: config_lib.Config,
             known: list[config_lib.Config], refused: dict[str, str],
             check: Callable[[config_lib.Config], None],
             ) -> dict[str, Any] | None:
  """Returns the overrides of a new variant; None after TRIES draws without one.

  Adds its config to `known`, and draws that are refused to `refused`. The seed
  counts the Optuna trials: an interrupted sweep draws as a whole one.
  """
  for _ in range(TRIES):
    with study.guard():
      study.optuna.sampler = SAMPLERS[sampler](
          config.seed + len(study.optuna.get_trials(deepcopy=False)))
      trial = study.draw(space)
    variant = {field: _rounded(value, space[field])
               for field, value in trial.params.items()}
    is_new = _admit(config, variant, known, refused, check)
    with study.guard():
      if is_new:
        trial.set_user_attr('overrides', json.dumps(variant))
        return variant
      study.optuna.tell(trial, state=TrialState.FAIL)
  return None


def _admit(config: config_lib.Config, variant: Mapping[str, Any],
           known: list[config_lib.Config], refused: dict[str, str],
           check: Callable[[config_lib.Config], None]) -> bool:
  """Returns whether a draw is new and not refused, and notes it as either."""
  text = json.dumps(variant)
  if text in refused:
    return False
  try:
    varied = _resolved(config, variant)
    if varied in known:
      return False
    check(varied)
  except errors.UserError as e:
    refused[text] = f'{plan.label_variant(variant)}: {e}'
    console.say(f'draws another variant instead of {refused[text]}')
    return False
  known.append(varied)
  return True


def _resolved(config: config_lib.Config,
              variant: Mapping[str, Any]) -> config_lib.Config:
  return config_lib.check_config(
      config_lib.override(config.to_dict(), variant))


def _rounded(value: Any, space: BaseDistribution) -> Any:
  if not isinstance(space, FloatDistribution):
    return value
  return min(max(float(f'{value:.{DIGITS}g}'), space.low), space.high)
