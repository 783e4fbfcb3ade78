"""ModernBERT, in the configs of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.checkpoints.architectures import bert
from qa_jax.checkpoints.architectures.base import Architecture
from qa_jax.models.encoders.modernbert import ModernBertConfig

OURS, LAYER = 'encoder/layer_{i}/', 'layers.{i}.'
# The two kinds of layers in a config of transformers 5.
GLOBAL, LOCAL = 'full_attention', 'sliding_attention'
THETAS = {GLOBAL: ('global_theta', 'global_rope_theta'),  # theirs: version 4
          LOCAL: ('local_theta', 'local_rope_theta')}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the constants of an encoder that are not sizes."""
  out: dict[str, Any] = {}
  for name in ('attention_bias', 'mlp_bias', 'norm_bias'):
    out[name] = config.get(name, False)
    errors.require(type(out[name]) is bool,
                   f'{name} is {out[name]!r}, expected true or false')
  size = config['hidden_size'] // config['num_attention_heads']
  errors.require(
      config.get('head_dim') in (None, size),
      f'head_dim {config.get("head_dim")!r} is not supported; only {size} is, '
      'hidden_size / num_attention_heads')
  out['local_attention'] = config.get('local_attention', 128)
  every = config.get('global_attn_every_n_layers', 3)
  for name, value in (('local_attention', out['local_attention']),
                      ('global_attn_every_n_layers', every)):
    errors.require(type(value) is int and value >= 1,
                   f'{name} is {value!r}, expected a positive int')
  # transformers 5 sets local_attention to twice this field where a file has it.
  side = out['local_attention'] // 2
  errors.require(
      config.get('sliding_window', side) == side,
      f'sliding_window {config.get("sliding_window")!r} is not supported; only '
      f'{side} is, local_attention / 2')
  return out | _thetas(config) | {'global_every': _global_every(
      config.get('layer_types'), every, config['num_hidden_layers'])}


def _global_every(kinds: Any, every: int, count: int) -> int:
  """Returns n if layers 0, n, 2n, … of `kinds`, layer_types, are global.

  Without layer_types, and of several n, it is `every`.
  """
  if kinds is None:
    return every
  for n in (every, *range(1, count + 1)):
    if kinds == [LOCAL if i % n else GLOBAL for i in range(count)]:
      return n
  raise errors.UserError(
      f'layer_types {kinds!r} is not supported; only {count} layers of which '
      f'every n-th is {GLOBAL!r} from the first on, and the others {LOCAL!r}')


def _thetas(config: Mapping[str, Any]) -> dict[str, float]:
  """Returns the bases of the rotary positions of both kinds of layers."""
  errors.require(
      not config.get('rope_scaling'),
      f'rope_scaling {config.get("rope_scaling")!r} is not supported; only '
      'None is')
  stored, out = config.get('rope_parameters') or {}, {}
  for kind, (ours, older) in THETAS.items():
    rope = stored.get(kind) or {} if isinstance(stored, dict) else None
    errors.require(
        isinstance(rope, dict) and rope.keys() <= {'rope_type', 'rope_theta'}
        and rope.get('rope_type', 'default') == 'default'
        and stored.keys() <= THETAS.keys(),
        f'rope_parameters {stored!r} is not supported; only rope_type '
        f"'default' and rope_theta of {GLOBAL!r} and {LOCAL!r} are")
    value = rope.get('rope_theta', config.get(
        older, getattr(ModernBertConfig, ours)))
    if value is None and kind == LOCAL:  # of transformers 4: as in the others
      value = out['global_theta']
    errors.require(type(value) in (int, float) and 0 < value < 1e38,
                   f'{older} is {value!r}, expected a positive number')
    out[ours] = float(value)
  return out


def write(sizes: ModernBertConfig, head: Any) -> dict[str, Any]:
  """Returns the fields of config.json beside sizes, of both versions.

  Raises:
    UserError: the LayerNorm of the head differs from those of the encoder.
  """
  for ours, theirs in (('eps', sizes.layer_norm_eps),
                       ('norm_bias', sizes.norm_bias)) if head else ():
    errors.require(
        getattr(head, ours) == theirs,
        f"head 'transformed': {ours}={getattr(head, ours)}, but the encoder "
        f'has {theirs}; ModernBERT in transformers has one for both')
  return {
      'classifier_bias': bool(head and head.dense_bias),
      'embedding_dropout': sizes.dropout, 'mlp_dropout': sizes.dropout,
      'layer_types': [LOCAL if i % sizes.global_every else GLOBAL
                      for i in range(sizes.num_layers)],
      'rope_parameters': {
          kind: {'rope_type': 'default', 'rope_theta': getattr(sizes, ours)}
          for kind, (ours, _) in THETAS.items()},
      **{older: getattr(sizes, ours) for ours, older in THETAS.values()}}


def head_spec(tensors: Mapping[str, np.ndarray],
              sizes: ModernBertConfig) -> str:
  """Returns the spec string of the head in a checkpoint for answering."""
  bias = tensors.get('classifier.bias')
  arguments = {
      'bias': bias is not None and bool(bias.any()),
      'dense_bias': 'head.dense.bias' in tensors,
      'norm_bias': 'head.norm.bias' in tensors}
  texts = [f'{name}=True' for name, value in arguments.items() if value]
  if sizes.layer_norm_eps != 1e-5:
    texts.append(f'eps={sizes.layer_norm_eps!r}')
  return f'transformed({", ".join(texts)})' if texts else 'transformed'


ARCHITECTURES = {
    'modernbert': Architecture(
        ModernBertConfig, 'ModernBert', prefix='model.',
        fields={ours: theirs for ours, theirs in bert.FIELDS.items()
                if ours != 'type_vocab_size'},
        supported={'hidden_activation': 'gelu',
                   'classifier_activation': 'gelu'},
        options={
            'attention_dropout': 'attention_dropout',
            'initializer_range': 'initializer_range',
            'local_attention': 'local_attention',
            'global_every': 'global_attn_every_n_layers',
            'attention_bias': 'attention_bias', 'mlp_bias': 'mlp_bias',
            'norm_bias': 'norm_bias'},
        eps='norm_eps', default_eps=1e-5, read=read, write=write,
        reads=r'^(embeddings|layers|final_norm|head|classifier)\b',
        names={
            'encoder/embeddings/word/embedding': 'embeddings.tok_embeddings',
            'encoder/embeddings/layer_norm': 'embeddings.norm',
            OURS + 'attention/layer_norm': LAYER + 'attn_norm',
            OURS + 'attention/query_key_value': LAYER + 'attn.Wqkv',
            OURS + 'attention/output': LAYER + 'attn.Wo',
            OURS + 'mlp/layer_norm': LAYER + 'mlp_norm',
            OURS + 'mlp/intermediate': LAYER + 'mlp.Wi',
            OURS + 'mlp/output': LAYER + 'mlp.Wo',
            'encoder/final/layer_norm': 'final_norm'},
        head='classifier', head_is_shared=True, heads=('transformed',),
        head_names={'head/dense': 'head.dense', 'head/layer_norm': 'head.norm'},
        head_spec=head_spec, tokens={
            'bos_token_id': 'cls_id', 'cls_token_id': 'cls_id',
            'eos_token_id': 'sep_id', 'sep_token_id': 'sep_id'})}
