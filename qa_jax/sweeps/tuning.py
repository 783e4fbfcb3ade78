"""The choice of tuned fields, such as the learning rate, by an earlier sweep.

A study chooses their values on held-out training articles and then compares
variants on other questions. A choice on the compared questions would make the
scores of all variants too high.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.sweeps import plan

SCORE = 'f1'


@dataclasses.dataclass(frozen=True)
class Choice:
  """The best of the variants that differ in tuned fields only."""

  variant: Mapping[str, Any]  # without a seed
  tuned: Sequence[Mapping[str, Any]]  # values of the tuned fields, as tried
  scores: Sequence[float]  # of each, a mean over seeds
  best: int  # index into both

  def line(self) -> str:
    """Returns the choice, all scores, and a warning at the end of the range."""
    shared = {k: v for k, v in self.variant.items() if k not in self.tuned[0]}
    tried = ', '.join(f'{_text(values)}: {score:.2f}' for values, score in zip(
        self.tuned, self.scores, strict=True))
    return (f'{_text(shared) or "default"}: {_text(self.tuned[self.best])} '
            f'({SCORE.upper()} of {tried}){self._warning()}')

  def _warning(self) -> str:
    """Returns a warning if a number is the smallest or largest tried, or ''."""
    warning = ''
    for field, value in self.tuned[self.best].items():
      tried = [values[field] for values in self.tuned]
      if type(value) in (int, float) and min(tried) < max(tried):
        for name, end in (('smallest', min(tried)), ('largest', max(tried))):
          if value == end:
            warning += (f'; {field}={value} is the {name} tried, so a better '
                        'value may lie beyond it')
    return warning


def choose(variants: Sequence[Mapping[str, Any]], fields: Sequence[str],
           workdir: pathlib.Path, *, data: str) -> list[Choice]:
  """Chooses the best variant of each group that differs in `fields` only.

  The score is F1 in the sweep at `workdir`, a mean over its seeds. The order is
  that of the first variant of each group. Variants that differ in `seed` alone
  count once. `data` is the data SPEC on which the chosen variants will be
  compared.

  Raises:
    UserError: a variant lacks a field or a complete trial, its trials have
      other seeds than those of another variant, or they were scored on
      questions of `data`.
  """
  names = plan.planned_names(workdir)
  if not names:
    raise errors.UserError(f'--tuned_in={workdir} is no sweep: it has no '
                           'sweep.json that names trials')
  variants = [*{plan.label_variant(v): v for v in map(
      plan.without_seed, variants)}.values()]
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for variant in variants:
    for field in fields:
      if field not in variant:
        raise errors.UserError(
            f'--tuned={field}: {_text(variant) or "the default"} of sweep() '
            'does not set it; tune fields that every variant sets')
    shared = {k: v for k, v in variant.items() if k not in fields}
    groups.setdefault(json.dumps(shared, sort_keys=True), []).append(variant)
  count_shared = functools.cache(lambda spec: _count_shared(spec, data))
  by_seed = {plan.label_variant(v): _scores(v, names, workdir, count_shared)
             for v in variants}
  seeds = {label: sorted(scores) for label, scores in by_seed.items()}
  first = next(iter(seeds))
  for label, of_variant in seeds.items():
    if of_variant != seeds[first]:
      raise errors.UserError(
          f'--tuned_in={workdir}: {label} has the seeds {of_variant}, but '
          f'{first} has {seeds[first]}; give every variant the same seeds')
  choices = []
  for group in groups.values():
    scores = [float(np.mean([*by_seed[plan.label_variant(v)].values()]))
              for v in group]
    best = int(np.argmax(scores))
    choices.append(Choice(
        group[best], [{f: v[f] for f in fields} for v in group], scores, best))
  return choices


def variants_of(choices: Sequence[Choice],
                variants: Sequence[Mapping[str, Any]]
                ) -> list[Mapping[str, Any]]:
  """Returns the chosen variants, with all their seeds.

  The order is that of the choices, so that the group of the default comes first
  with whatever value was chosen for it.
  """
  return [v for choice in choices for v in variants
          if plan.without_seed(v) == choice.variant]


def _count_shared(spec: str, other: str) -> int:
  """Returns how many questions two data SPECs ask about equal passages."""
  one, two = ({(e.context, e.question) for e in sources.load_examples(s)}
              for s in (spec, other))
  return len(one & two)


def _scores(variant: Mapping[str, Any], names: Sequence[str],
            workdir: pathlib.Path, count_shared: Callable[[str], int]
            ) -> dict[int, float]:
  """Reads {seed: F1} of all trials of a variant, which must be complete.

  `count_shared` maps their data SPEC to the number of its questions that will
  be compared, which must be 0.
  """
  label, scores = plan.label_variant(variant), {}
  for name in names:
    if name.rpartition('.seed-')[0] != label:
      continue
    run = RunDirectory(workdir / 'trials' / name)
    config = run.read_config() if run.config_file.is_file() else None
    path = config and run.evaluation(
        config.data.eval) / predictions_lib.METRICS
    if not path or not path.is_file():
      raise errors.UserError(
          f'--tuned_in={workdir}: {name} is not complete; complete that sweep '
          'first, by its own command')
    if count := count_shared(config.data.eval):
      raise errors.UserError(
          f'--tuned_in={workdir} was scored on config.data.eval='
          f'{config.data.eval!r}, with {count:,} questions of this '
          'comparison; tune on other data, such as '
          'articles(of="TRAIN", low=0.8)')
    scores[config.seed] = predictions_lib.read_metrics(path)[SCORE]
  if not scores:
    raise errors.UserError(f'--tuned_in={workdir} has no trial of {label}; its '
                           'sweep() must give the same variants')
  return scores


def _text(fields: Mapping[str, Any]) -> str:
  return ', '.join(f'{k}={v}' for k, v in fields.items())
