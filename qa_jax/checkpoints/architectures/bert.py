"""BERT, and the encoders that compute what BERT's computes."""

from qa_jax.checkpoints.architectures.base import Architecture
from qa_jax.models.encoders import bert

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


def _like_bert(encoder: type[bert.BertConfig], class_prefix: str, prefix: str,
               **facts) -> Architecture:
  facts = {'fields': FIELDS, 'supported': SUPPORTED, 'options': OPTIONS} | facts
  return Architecture(encoder, class_prefix, names=NAMES, prefix=prefix,
                      **facts)


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
    # Clark et al. (2020), where embeddings are as wide as layers: not small.
    'electra': _like_bert(bert.BertConfig, 'Electra', 'electra.',
                          exported_as='bert'),
    # Sanh et al. (2019): without token types; here all have a vector of zeros.
    'distilbert': _like_bert(
        bert.BertConfig, 'DistilBert', 'distilbert.', exported_as='bert',
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
