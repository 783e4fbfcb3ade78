"""BERT, and the encoders that are BERT's up to a few constants."""

from collections.abc import Mapping
from typing import Any

from qa_jax import errors
from qa_jax.checkpoints.architectures.base import Architecture
from qa_jax.models.encoders import albert
from qa_jax.models.encoders import bert
from qa_jax.models.encoders import mpnet

# Our field of a BertConfig → BERT's of config.json.
FIELDS = {
    'hidden_size': 'hidden_size', 'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads', 'mlp_size': 'intermediate_size',
    'vocab_size': 'vocab_size', 'max_position': 'max_position_embeddings',
    'type_vocab_size': 'type_vocab_size'}
OPTIONS = {'dropout': 'hidden_dropout_prob',
           'attention_dropout': 'attention_probs_dropout_prob',
           'initializer_range': 'initializer_range'}
TOKEN_TYPES = 'embeddings.token_type_embeddings.weight'
POSITIONS = 'embeddings.position_embeddings.weight'
OURS, LAYER = 'encoder/layer_{i}/', 'encoder.layer.{i}.'
NAMES = {
    'encoder/embeddings/{part}/embedding': 'embeddings.{part}_embeddings',
    'encoder/embeddings/layer_norm': 'embeddings.LayerNorm',
    OURS + 'attention/query_key_value': (
        LAYER + 'attention.self.query', LAYER + 'attention.self.key',
        LAYER + 'attention.self.value'),
    OURS + 'attention/output': LAYER + 'attention.output.dense',
    OURS + 'attention/layer_norm': LAYER + 'attention.output.LayerNorm',
    OURS + 'mlp/intermediate': LAYER + 'intermediate.dense',
    OURS + 'mlp/output': LAYER + 'output.dense',
    OURS + 'mlp/layer_norm': LAYER + 'output.LayerNorm',
}
# A decoder's attention is causal: it computes something else.
SUPPORTED = {'hidden_act': 'gelu', 'position_embedding_type': 'absolute',
             'is_decoder': False}


# Embeddings of another size than the layers; the default is transformers'.
FACTORISED = OPTIONS | {'embedding_size': 'embedding_size'}


def _embedding_size(config: Mapping[str, Any]) -> dict[str, Any]:
  size = config.get('embedding_size', 128)
  errors.require(
      type(size) is int and size > 0,
      f'embedding_size is {size!r}, expected a positive int')
  return {'embedding_size': size}


# The names of ALBERT, whose layers have the parameters of one.
ONE, SHARED = 'encoder/layer_0/', (
    'encoder.albert_layer_groups.0.albert_layers.0.')
ALBERT_NAMES = {
    'encoder/embeddings/project': 'encoder.embedding_hidden_mapping_in',
    **{ours: theirs for ours, theirs in NAMES.items() if '{i}' not in ours},
    ONE + 'attention/query_key_value': tuple(
        f'{SHARED}attention.{part}' for part in ('query', 'key', 'value')),
    ONE + 'attention/output': SHARED + 'attention.dense',
    ONE + 'attention/layer_norm': SHARED + 'attention.LayerNorm',
    ONE + 'mlp/intermediate': SHARED + 'ffn',
    ONE + 'mlp/output': SHARED + 'ffn_output',
    ONE + 'mlp/layer_norm': SHARED + 'full_layer_layer_norm'}
MPNET_NAMES = {
    'encoder/embeddings/relative/embedding': 'encoder.relative_attention_bias',
    **NAMES,
    OURS + 'attention/query_key_value': tuple(
        f'{LAYER}attention.attn.{part}' for part in 'qkv'),
    OURS + 'attention/output': LAYER + 'attention.attn.o',
    OURS + 'attention/layer_norm': LAYER + 'attention.LayerNorm'}


def _albert(config: Mapping[str, Any]) -> dict[str, Any]:
  activation = config.get('hidden_act', 'gelu_new')
  errors.check_known('hidden_act', activation, bert.ACTIVATIONS)
  return {**_embedding_size(config), 'hidden_act': activation}


def _like_bert(encoder: type[bert.BertConfig], class_prefix: str, prefix: str,
               **facts) -> Architecture:
  facts = {'fields': FIELDS, 'supported': SUPPORTED, 'options': OPTIONS,
           'names': NAMES} | facts
  return Architecture(encoder, class_prefix, prefix=prefix, **facts)


ARCHITECTURES = {
    'bert': _like_bert(bert.BertConfig, 'Bert', 'bert.'),
    # Liu et al. (2019), also DistilRoBERTa: one token type.
    'roberta': _like_bert(bert.RobertaConfig, 'Roberta', 'roberta.',
                          positions_after_pad=True),
    # Conneau et al. (2020) and Martin et al. (2020), with Unigram vocabularies.
    'xlm-roberta': _like_bert(bert.RobertaConfig, 'XLMRoberta', 'roberta.',
                              positions_after_pad=True),
    'camembert': _like_bert(bert.RobertaConfig, 'Camembert', 'roberta.',
                            positions_after_pad=True),
    # Clark et al. (2020).
    'electra': _like_bert(
        bert.ElectraConfig, 'Electra', 'electra.', options=FACTORISED,
        read=_embedding_size,
        names={'encoder/embeddings/project': 'embeddings_project'} | NAMES),
    # Lan et al. (2020), as published: one group of one layer.
    'albert': _like_bert(
        albert.AlbertConfig, 'Albert', 'albert.', names=ALBERT_NAMES,
        options=FACTORISED | {'hidden_act': 'hidden_act'}, read=_albert,
        supported={'position_embedding_type': 'absolute',
                   'num_hidden_groups': 1, 'inner_group_num': 1}),
    # Song et al. (2020). transformers takes neither another token of padding
    # nor another number of buckets, whatever these fields are.
    'mpnet': _like_bert(
        mpnet.MPNetConfig, 'MPNet', 'mpnet.', names=MPNET_NAMES,
        fields={ours: theirs for ours, theirs in FIELDS.items()
                if ours != 'type_vocab_size'},
        supported={'hidden_act': 'gelu', 'pad_token_id': 1,
                   'relative_attention_num_buckets': mpnet.BUCKETS},
        positions_after_pad=True),
    # Sanh et al. (2019): without token types; here all have a vector of zeros.
    # transformers takes the eps 1e-12, whatever a config.json has.
    'distilbert': _like_bert(
        bert.BertConfig, 'DistilBert', 'distilbert.', exported_as='bert',
        eps='',
        fields={'hidden_size': 'dim', 'num_layers': 'n_layers',
                'num_heads': 'n_heads', 'mlp_size': 'hidden_dim',
                'vocab_size': 'vocab_size',
                'max_position': 'max_position_embeddings'},
        supported={'activation': 'gelu'},
        renames=(('transformer.layer.', 'encoder.layer.'),
                 ('.attention.q_lin.', '.attention.self.query.'),
                 ('.attention.k_lin.', '.attention.self.key.'),
                 ('.attention.v_lin.', '.attention.self.value.'),
                 ('.attention.out_lin.', '.attention.output.dense.'),
                 ('.sa_layer_norm.', '.attention.output.LayerNorm.'),
                 ('.ffn.lin1.', '.intermediate.dense.'),
                 ('.ffn.lin2.', '.output.dense.'),
                 ('.output_layer_norm.', '.output.LayerNorm.'))),
}
