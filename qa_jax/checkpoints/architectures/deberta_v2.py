"""DeBERTa of versions 2 and 3, both `deberta-v2`."""

from collections.abc import Mapping
from typing import Any

from qa_jax import errors
from qa_jax.checkpoints.architectures import bert
from qa_jax.checkpoints.architectures.base import Architecture
from qa_jax.models.encoders import deberta_v2

LAYER = 'encoder.layer.{i}.'
SELF = LAYER + 'attention.self.'
# Field → the type of its value, and its value in a config.json without it.
DEFAULTS: dict[str, tuple[type, Any]] = {
    'type_vocab_size': (int, 0), 'position_buckets': (int, -1),
    'max_relative_positions': (int, -1), 'share_att_key': (bool, False),
    'position_biased_input': (bool, True), 'conv_kernel_size': (int, 0),
    'conv_act': (str, 'tanh')}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of an encoder that are not sizes."""
  out = {}
  for name, (kind, default) in DEFAULTS.items():
    out[name] = config.get(name, default)
    errors.require(type(out[name]) is kind,
                   f'{name} is {out[name]!r}, expected {kind.__name__}')
  errors.require(
      config.get('relative_attention') is True,
      f'relative_attention {config.get("relative_attention", False)!r} is not '
      'supported; only True is')
  width = config['hidden_size']
  errors.require(
      config.get('embedding_size', width) == width,
      f'embedding_size {config.get("embedding_size")!r} differs from '
      f'hidden_size {width}: a DeBERTa that projects its embeddings is not '
      'supported')
  size = width // config['num_attention_heads']
  errors.require(
      config.get('attention_head_size', size) == size,
      f'attention_head_size {config.get("attention_head_size")!r} is not '
      f'supported; only {size} is, hidden_size / num_attention_heads')
  terms = config.get('pos_att_type') or ''
  if isinstance(terms, str):
    terms = terms.lower().split('|')
  errors.require(
      isinstance(terms, list) and all(isinstance(t, str) for t in terms),
      f'pos_att_type is {config.get("pos_att_type")!r}, expected a list')
  norms = str(config.get('norm_rel_ebd', 'none')).lower().split('|')
  return out | {'pos_att_type': '|'.join(t.strip() for t in terms),
                'norm_rel_ebd': '|'.join(n.strip() for n in norms)}


ARCHITECTURES = {
    'deberta-v2': Architecture(
        deberta_v2.DebertaV2Config, 'DebertaV2', prefix='deberta.',
        fields={ours: theirs for ours, theirs in bert.FIELDS.items()
                if ours != 'type_vocab_size'},
        supported={'hidden_act': 'gelu', 'relative_attention': True,
                   'conv_groups': 1},
        options=bert.OPTIONS | {name: name for name in (
            *DEFAULTS, 'pos_att_type', 'norm_rel_ebd')},
        default_eps=1e-7, read=read,
        # Checkpoints have this table even if no input gets absolute positions.
        unused=r'embeddings\.position_embeddings\.weight',
        names={
            'encoder/embeddings/relative/embedding': 'encoder.rel_embeddings',
            'encoder/embeddings/relative/layer_norm': 'encoder.LayerNorm',
            bert.OURS + 'convolution': 'encoder.conv.conv',
            bert.OURS + 'convolution/layer_norm': 'encoder.conv.LayerNorm',
            **{ours: theirs for ours, theirs in bert.NAMES.items()
               if 'query_key_value' not in ours},
            bert.OURS + 'attention/query_key': (
                SELF + 'query_proj', SELF + 'key_proj'),
            bert.OURS + 'attention/value': SELF + 'value_proj',
            bert.OURS + 'attention/position_key': SELF + 'pos_key_proj',
            bert.OURS + 'attention/position_query': SELF + 'pos_query_proj'})}
