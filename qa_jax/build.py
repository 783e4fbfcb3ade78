"""The model and objective of a config, and checks that its parts fit together.

Each check runs without data and without computing anything, so that a mistake
is refused before slow work.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import heads
from qa_jax import objectives
from qa_jax import registry
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.decoding import answers
from qa_jax.decoding import candidates
from qa_jax.decoding import null_rules
from qa_jax.decoding import search
from qa_jax.heads import nesting
from qa_jax.models import attention
from qa_jax.models import encoders
from qa_jax.models import qa
from qa_jax.span_scores import SpanScores
from qa_jax.span_scores import check_width

SIZES = ('hidden_size', 'num_layers', 'num_heads', 'mlp_size')


def encoder_config(config: config_lib.Config, vocab_size: int,
                   source: pathlib.Path | None, pad_id: int | None = None
                   ) -> encoders.EncoderConfig:
  """Returns the sizes of the encoder, for a vocabulary of `vocab_size` entries.

  They are the sizes of the checkpoint `source`, or without one those of
  model.preset. A size that is set in the config overrides the preset. A
  config.model.num_layers below that of the checkpoint takes its first layers.
  `pad_id` is that of the checkpoint's tokenizer, if it is used.

  Raises:
    UserError: the preset is unknown, a size or the pad_id contradicts the
      checkpoint, a size is missing, the vocabulary exceeds its embeddings,
      hidden_size is not divisible by num_heads, windows exceed the encoder's
      positions, or position_base is set for an encoder without positions to
      draw.
  """
  given: dict[str, int] = {}
  name, arguments = registry.parse_spec(
      config.model.encoder or 'bert', 'encoder')
  if config.model.preset:
    # A function that builds an encoder has the presets of all encoders.
    presets = getattr(registry.find_constructor(
        encoders.ENCODERS, name, what='encoder'), 'PRESETS',
                      encoders.EncoderConfig.PRESETS)
    if config.model.preset not in presets:
      raise errors.UserError(
          f'unknown config.model.preset {config.model.preset!r}'
          f'{errors.did_you_mean(config.model.preset, presets)}')
    given |= presets[config.model.preset]
  given |= {k: size for k in SIZES if (size := getattr(config.model, k))}
  if source is None:
    if missing := [k for k in SIZES if k not in given]:
      raise errors.UserError(
          f'config.model.{missing[0]} is 0 and no preset or init_from gives it')
    sizes = registry.build(
        encoders.ENCODERS, config.model.encoder or 'bert', what='encoder',
        kind=encoders.EncoderConfig, given={'vocab_size': vocab_size, **given,
                                            **_constants_of_config(config)})
  elif RunDirectory(source).is_run():
    sizes = RunDirectory(source).read_encoder_config()
  else:
    sizes = hugging_face.read_config(source, pad_id)
  if config.model.encoder and source is not None:
    _check_encoder(config, sizes, name, arguments, source)
  for key, value in given.items():
    if getattr(sizes, key) != value:
      if key == 'num_layers' and 0 < config.model.num_layers < sizes.num_layers:
        sizes = dataclasses.replace(sizes, num_layers=value)
        continue
      if getattr(config.model, key):
        raise errors.UserError(
            f'config.model.{key}={value}, but {source} has '
            f"{getattr(sizes, key)}; 0 takes the checkpoint's size")
      raise errors.UserError(
          f'config.model: preset {config.model.preset!r} has {key} {value}, '
          f'but {source} has {getattr(sizes, key)}; set '
          "config.model.preset='' to take the checkpoint's sizes")
  if vocab_size > sizes.vocab_size:
    raise errors.UserError(
        f'the vocabulary has {vocab_size} entries, but the embeddings of '
        f'{source} only {sizes.vocab_size}')
  check_positions(config, sizes)
  errors.require(
      not config.model.position_base
      or (source is None and sizes.has_position_table),
      f'config.model.position_base={config.model.position_base:g}, but '
      + (f'{source} has its positions' if source else
         f'the encoder {encoders.name_of(sizes)!r} has no table of positions')
      + '; set it to 0')
  errors.require(
      not config.model.equal_query_key or source is None,
      f'config.model.equal_query_key=True, but {source} has its weights; set '
      'it to False')
  return dataclasses.replace(sizes, **_constants_of_config(config))


def _constants_of_config(config: config_lib.Config) -> dict[str, float]:
  """Returns the constants of an encoder that are fields of a config."""
  return {name: getattr(config.model, name) for name in (
      'dropout', 'attention_dropout', 'initializer_range', 'position_base',
      'equal_query_key')}


def _check_encoder(config: config_lib.Config, sizes: encoders.EncoderConfig,
                   name: str, arguments: Mapping[str, Any],
                   source: pathlib.Path) -> None:
  """Raises a UserError if model.encoder contradicts the checkpoint `source`."""
  stored = encoders.name_of(sizes)
  wrong = [f'{key} {getattr(sizes, key, None)!r}' for key, value in
           arguments.items() if getattr(sizes, key, None) != value]
  if name != stored or wrong:
    raise errors.UserError(
        f'config.model.encoder={config.model.encoder!r}, but {source} has '
        f'{", ".join(wrong) if name == stored else f"the encoder {stored!r}"}; '
        "set it to '' to take the checkpoint's")


def check_positions(config: config_lib.Config,
                    sizes: encoders.EncoderConfig) -> None:
  """Raises a UserError if windows are longer than the encoder has positions."""
  if config.data.max_length > sizes.max_position:
    raise errors.UserError(
        f'config.data.max_length={config.data.max_length} exceeds the '
        f"encoder's {sizes.max_position} positions")


def check_layer_decay(config: config_lib.Config,
                      sizes: encoders.EncoderConfig) -> None:
  """Raises a UserError if layers have other rates and cannot have them.

  They share their parameters, or are frozen.
  """
  errors.require(
      not config.optim.freeze_encoder or config.optim.layer_decay == 1,
      f'config.optim.layer_decay={config.optim.layer_decay}, but the layers '
      'have no learning rate under optim.freeze_encoder=True; set layer_decay '
      'to 1')
  errors.require(
      not sizes.SHARES_LAYERS or config.optim.layer_decay == 1,
      f'config.optim.layer_decay={config.optim.layer_decay}, but the layers of '
      f'the encoder {encoders.name_of(sizes)!r} share their parameters, and so '
      'one learning rate; set it to 1')


def check_attention(config: config_lib.Config,
                    sizes: encoders.EncoderConfig, *, training: bool,
                    platform: str | None = None) -> None:
  """Raises a UserError if model.attention is unknown or does not fit its use.

  A `platform` of None is that of this process; '' checks only the limits that
  hold on every platform. The kernels are imported.
  """
  use = _use(config, sizes, training, platform)
  attention.check_attention(
      config.model.attention, use, 'config.model.attention')
  attention.import_kernels(config.model.attention, use)


def attention_in_use(config: config_lib.Config,
                     sizes: encoders.EncoderConfig) -> str:
  """Returns the implementation of attention that training uses here.

  Both are named if local and global layers use different ones.
  """
  use = _use(config, sizes, True, None)
  local, everywhere = (
      attention.resolve_attention(config.model.attention, u)
      for u in (use, dataclasses.replace(use, window=None)))
  return local if local == everywhere else (
      f'{local} (local layers) and {everywhere} (global layers)')


def usable_attention(
    config: config_lib.Config, sizes: encoders.EncoderConfig
) -> tuple[config_lib.Config, str]:
  """Returns a config whose attention works here, and a note if it is auto."""
  name = config.model.attention
  problem = (attention.limitation(name, _use(config, sizes, False, None))
             if name in attention.ATTENTION else 'is unknown here')
  if not problem:
    return config, ''
  model = dataclasses.replace(config.model, attention='auto')
  return (dataclasses.replace(config, model=model),
          f'config.model.attention={name!r} of the run {problem}: auto is used')


def compute_dtype(config: config_lib.Config, platform: str | None = None
                  ) -> str:
  """Returns precision.compute_dtype, with 'auto' resolved for a platform.

  A `platform` of None is that of this process. The resolved value is 'float32',
  'tf32' or 'bfloat16'; activations of 'tf32' are float32.
  """
  return config_lib.compute_dtype(
      config, jax.default_backend() if platform is None else platform)


def _activation_dtype(name: str) -> jnp.dtype:
  return jnp.dtype('float32' if name == 'tf32' else name)


def _use(config: config_lib.Config, sizes: encoders.EncoderConfig,
         training: bool, platform: str | None) -> attention.Use:
  if platform is None:
    platform = jax.default_backend()
  return attention.Use(
      platform=platform,
      length=config.data.max_length,
      packed=bool(config_lib.packing(config, platform)),
      num_heads=sizes.num_heads,
      head_size=sizes.hidden_size // sizes.num_heads, training=training,
      dtype=_activation_dtype(compute_dtype(config, platform)),
      dropout=sizes.attention_dropout, biased=sizes.ATTENTION_BIAS,
      window=sizes.attention_window)


def build_model(config: config_lib.Config, sizes: encoders.EncoderConfig,
                platform: str | None = None) -> qa.QAModel:
  """Returns the model without parameters; a wrong model.head is a UserError.

  So is an encoder of a user's package that fails when it is traced. `platform`
  is that of `compute_dtype`.
  """
  head = registry.build(heads.HEADS, config.model.head, what='head',
                        kind=nn.Module)
  dtype = compute_dtype(config, platform)
  if registry.is_importable(config.model.encoder):
    _trace_encoder(config.model, sizes, _activation_dtype(dtype))
  return qa.QAModel(
      config=sizes, head=head, attention=config.model.attention,
      compute_dtype=_activation_dtype(dtype), tf32=dtype == 'tf32')


def _trace_encoder(model: config_lib.Model, sizes: encoders.EncoderConfig,
                   dtype: jnp.dtype) -> None:
  """Raises a UserError if an encoder fails or does not return vectors."""
  part = f'config.model.encoder={model.encoder!r}'
  sizes = dataclasses.replace(sizes, vocab_size=sizes.vocab_size or 100)
  ids = jax.ShapeDtypeStruct(nesting.WINDOWS, jnp.int32)
  with errors.naming(part, registry.imported_modules(model.encoder)):
    encoder = sizes.build(dtype, model.attention)
    layers, _ = jax.eval_shape(lambda ids: encoder.init_with_output(
        jax.random.key(0), ids, ids, ids), ids)
  shapes = [getattr(x, 'shape', None) for x in jax.tree.leaves(layers)]
  wanted = (*nesting.WINDOWS, sizes.hidden_size)
  errors.require(
      isinstance(layers, tuple | list) and {*shapes} == {wanted},
      f'{part} returns {type(layers).__name__} of shapes {shapes}, expected a '
      f'tuple of the output of each layer, [B, L, D] = {wanted}')


def is_stored_head(model: qa.QAModel) -> bool:
  """Returns whether Hugging Face's class of the encoder has the model's head.

  Parameters of equal names are no proof, since a head of a user's package may
  compute something else from them.
  """
  names = ARCHITECTURES[model.config.architecture].heads
  return type(model.head) in [heads.HEADS[name] for name in names]


def incompatibility(objective: objectives.Objective, scores: SpanScores) -> str:
  """Returns why an objective cannot train a head, '' if it can.

  `scores` are the shapes of the head's scores in training. An objective must
  not leave pair or null scores of the head untrained.
  """
  has = {part: getattr(scores, part) not in (None, False)
         for part in objectives.base.NEEDS}
  if missing := sorted(need for need in objective.needs if not has[need]):
    return f'needs a head with {" and ".join(missing)} scores'
  if objective.scores_other_spans and scores.conditional:
    return ('adds starts and ends of any span, but in training this head '
            'scores ends for the gold start alone')
  for part in ('pair', 'null'):
    if has[part] and not (objective.trains_pair_and_null
                          or part in objective.needs):
      return f"leaves the head's {part} scores as they were drawn"
  return ''


def scores_all_spans(head: nn.Module) -> bool:
  """Returns whether a head scores ends for every start also in training."""
  return not nesting.score_shapes(head, training=True).conditional


def check_specs(config: config_lib.Config) -> objectives.Objective:
  """Returns the objective of a config if its head, search and rules fit it.

  Raises a UserError as `check_objective` and `check_decode` do. No file is
  read.
  """
  objective = check_objective(config.objective, config.model.head)
  check_decode(config.decode, registry.build(
      heads.HEADS, config.model.head, what='head', kind=nn.Module),
               objective, config.data.max_length)
  return objective


def check_objective(objective_spec: str, head_spec: str
                    ) -> objectives.Objective:
  """Returns the objective of a spec string if it fits the head.

  Raises:
    UserError: a spec string is wrong, the objective cannot train the head, it
      needs spans that are longer than the head scores, or an imported one
      demands or reads what there is not, or returns no loss per window.
  """
  objective = registry.build(
      objectives.OBJECTIVES, objective_spec, what='objective',
      kind=objectives.Objective)
  for need in objective.needs:
    errors.check_choice(f'objective {objective_spec!r}', 'needs', need,
                        objectives.base.NEEDS)
  scores = nesting.score_shapes(
      registry.build(heads.HEADS, head_spec, what='head', kind=nn.Module),
      training=True)
  if problem := incompatibility(objective, scores):
    fitting_heads = ', '.join(
        name for name, make in heads.HEADS.items() if not incompatibility(
            objective, nesting.score_shapes(make(), training=True)))
    fitting_objectives = ', '.join(
        name for name, make in objectives.OBJECTIVES.items()
        if not incompatibility(make(), scores))
    raise errors.UserError(
        f'config.objective={objective_spec!r} {problem}; it does not fit '
        f'config.model.head={head_spec!r}. Heads that fit: {fitting_heads}; '
        f'objectives that fit this head: {fitting_objectives}')
  # Tracing the loss raises the errors that depend on arguments in the specs.
  windows, length = nesting.WINDOWS
  one = jax.ShapeDtypeStruct((windows,), jnp.int32)
  mask = jax.ShapeDtypeStruct((windows, length), jnp.bool_)
  batch = {
      'context_mask': mask, 'start_mask': mask, 'start_positions': one,
      'end_positions': one, 'context_start': one, 'step': one,
      'draw': jax.ShapeDtypeStruct((windows,), jnp.float32),
      'gold_spans': jax.ShapeDtypeStruct((windows, 1, 2), jnp.int32),
      **({'group': one} if objective.needs_whole_questions else {})}
  with errors.naming(f'objective {objective_spec!r}',
                     registry.imported_modules(objective_spec)):
    try:
      loss = jax.eval_shape(objective.loss, scores, batch)
    except KeyError as e:
      if e.args[0] in batch:
        raise
      raise errors.UserError(
          f'objective {objective_spec!r} reads batch[{e.args[0]!r}], but a '
          f'loss gets {", ".join(sorted(batch))}' + (
              '; group needs needs_whole_questions=True'
              if e.args[0] == 'group' else '')) from None
  shape = getattr(loss, 'shape', None)
  errors.require(
      shape == (windows,),
      f'objective {objective_spec!r} returns a loss of shape {shape} for '
      f'{windows} windows, expected one loss a window, [B] = ({windows},)')
  return objective


def check_decode(decode: config_lib.Decode, head: nn.Module,
                 objective: objectives.Objective, length: int = 384) -> None:
  """Checks the decode fields of a config against a trained head.

  A search of a user's package is traced for windows of `length` tokens, and a
  null rule of a user's package is called once.

  Raises:
    UserError: the search, null rule or merge is unknown, the null rule needs a
      null logit that the objective does not train, decode.max_answer_length
      exceeds the lengths that the head scores, or the search or the null rule
      fails.
  """
  find = search.find_search(decode.search)
  errors.check_known('config.decode.merge', decode.merge, answers.MERGES)
  needs = null_rules.find_rule(decode.null_rule).needs
  if 'null' in needs and 'null' not in objective.needs:
    raise errors.UserError(
        f'config.decode.null_rule={decode.null_rule!r} {_null_advice()}')
  pair = nesting.score_shapes(head, training=False).pair
  check_width(pair, decode.max_answer_length,
              f'config.decode.max_answer_length={decode.max_answer_length}')
  if registry.is_importable(decode.search):
    mask = jax.ShapeDtypeStruct((nesting.WINDOWS[0], length), bool)
    with errors.naming(f'config.decode.search={decode.search!r}',
                       registry.imported_modules(decode.search)):
      jax.eval_shape(
          functools.partial(candidates.window_candidates, find,
                            longest=decode.max_answer_length,
                            n_best=decode.n_best),
          nesting.score_shapes(head, training=False, length=length), mask, mask)
  if registry.is_importable(decode.null_rule):
    # Two questions, of two windows and of one.
    scores = np.array([0.5, -1.0, 2.0])
    with errors.naming(f'config.decode.null_rule={decode.null_rule!r}',
                       registry.imported_modules(decode.null_rule)):
      null_rules.no_answer_scores(decode.null_rule, null_rules.WindowScores(
          null=scores, best=scores[::-1].copy(), first=np.array([0, 2]),
          normaliser=scores + 3 if 'normaliser' in needs else None))


def untrained_lengths(config: config_lib.Config,
                      objective: objectives.Objective) -> str:
  """Returns a line about decoded spans that training leaves out, '' if none."""
  longest = config.decode.max_answer_length
  trained = objective.max_answer_length
  if trained is None or longest <= trained:
    return ''
  return (f'config.decode.max_answer_length={longest} exceeds '
          f'max_answer_length={trained} of the objective: longer spans are '
          'decoded, but never trained unless they are gold; set both to one '
          'value')


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


def init_source(config: config_lib.Config) -> pathlib.Path | None:
  """Returns the directory of model.init_from, None for an encoder from scratch.

  Raises:
    UserError: `init_from` is neither a directory nor a hub id.
  """
  source = config.model.init_from
  if source and RunDirectory(pathlib.Path(source)).is_run():
    return pathlib.Path(source)
  return hugging_face.resolve_source(source) if source else None
