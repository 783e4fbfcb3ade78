"""What fits together: head, objective, decoding; told before a run starts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qa_jax import aggregate
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import heads
from qa_jax import null_rules
from qa_jax import objectives
from qa_jax import registry
from qa_jax import search
from qa_jax.heads import nesting
from qa_jax.heads.base import SpanScores


def misfit(objective: objectives.Objective, scores: SpanScores) -> str:
  """What stands between an objective and a head's training scores, or ''."""
  has = {'pair': scores.pair is not None, 'null': scores.null is not None,
         'boundary': scores.boundary is not None,
         'conditional': scores.conditional}
  missing = sorted(need for need in objective.needs if not has[need])
  if missing:
    return f'needs a head with {" and ".join(missing)} scores'
  if objective.spans and scores.conditional:
    return ('adds starts and ends of any span, but in training this head '
            'scores ends for the gold start alone')
  for part in ('pair', 'null'):
    if has[part] and not (objective.pairs or part in objective.needs):
      return f"leaves the head's {part} scores as they were drawn"
  return ''


def adds_up(head: nn.Module) -> bool:
  """Whether a head's start and end scores are for any span, so that sums over
  all of them say something."""
  return not nesting.score_shapes(head, training=True).conditional


def check_objective(objective_spec: str,
                    head_spec: str) -> objectives.Objective:
  """The objective, if it trains the head.

  Raises:
    UserError: it does not, what does being named, or spans are scored that the
      head does not score.
  """
  objective = registry.build(
      objectives.OBJECTIVES, objective_spec, what='objective')
  scores = nesting.score_shapes(
      registry.build(heads.HEADS, head_spec, what='head'), training=True)
  problem = misfit(objective, scores)
  if problem:
    fitting_heads = [
        name for name, make in heads.HEADS.items() if not misfit(
            objective, nesting.score_shapes(make(), training=True))]
    fitting_objectives = [name for name, make in objectives.OBJECTIVES.items()
                          if not misfit(make(), scores)]
    raise errors.UserError(
        f'config.objective={objective_spec!r} {problem}; it does not fit '
        f'config.model.head={head_spec!r}. Heads that fit: '
        f'{", ".join(fitting_heads)}; objectives that fit this head: '
        f'{", ".join(fitting_objectives)}')
  one = jax.ShapeDtypeStruct((1,), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
  jax.eval_shape(objective.loss, scores, {
      'context_mask': mask, 'start_mask': mask, 'start_positions': one,
      'end_positions': one, 'group': one, 'step': one,
      'gold_spans': jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)})
  return objective


def check_decode(decode: config_lib.Decode, head: nn.Module,
                 objective: objectives.Objective) -> None:
  """Refuses what does not exist or does not fit the trained head.

  Raises:
    UserError: an unknown search, null rule or merge; a null rule that needs a
      null logit where there is none; or spans longer than the head scores.
  """
  registry.build(search.SEARCHES, decode.search, what='search')
  for field, value, table in (
      ('null_rule', decode.null_rule, null_rules.NULL_RULES),
      ('merge', decode.merge, aggregate.MERGES)):
    if value not in table:
      raise errors.UserError(f'unknown config.decode.{field} {value!r}'
                             f'{errors.did_you_mean(value, table)}')
  if ('null' in null_rules.NULL_RULES[decode.null_rule].needs
      and 'null' not in objective.needs):
    raise errors.UserError(
        f'config.decode.null_rule={decode.null_rule!r} {_null_advice()}')
  pair = nesting.score_shapes(head, training=False).pair
  if pair is not None and pair.shape[-1] < decode.max_answer_length:
    raise errors.UserError(
        f'config.decode.max_answer_length={decode.max_answer_length} exceeds '
        f'the {pair.shape[-1]} lengths that the head scores; lower it or widen '
        'the head')


def _null_advice() -> str:
  having = [
      name for name, make in heads.HEADS.items()
      if nesting.score_shapes(make(), training=True).null is not None]
  training = [name for name, make in objectives.OBJECTIVES.items()
              if 'null' in make().needs]
  others = [name for name, rule in null_rules.NULL_RULES.items()
            if 'null' not in rule.needs]
  return (f'needs a null logit: a head that has one ({", ".join(having)}) and '
          f'an objective that trains it ({", ".join(training)}); without, '
          f'choose one of {", ".join(others)}')
