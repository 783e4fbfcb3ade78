"""The encoders and their table ENCODERS.

A new encoder is a file here and a line of the table; `base` has the interface.
Its names in checkpoints are an entry of qa_jax/checkpoints/architectures.
"""

from qa_jax.models.encoders.albert import AlbertConfig
from qa_jax.models.encoders.base import EncoderConfig
from qa_jax.models.encoders.bert import BertConfig
from qa_jax.models.encoders.bert import ElectraConfig
from qa_jax.models.encoders.bert import RobertaConfig
from qa_jax.models.encoders.deberta_v2 import DebertaV2Config
from qa_jax.models.encoders.modernbert import ModernBertConfig
from qa_jax.models.encoders.mpnet import MPNetConfig

# Name in `model.encoder` → constants, which build the module.
ENCODERS: dict[str, type[EncoderConfig]] = {
    'bert': BertConfig,
    'roberta': RobertaConfig,
    'electra': ElectraConfig,
    'albert': AlbertConfig,
    'mpnet': MPNetConfig,
    'deberta_v2': DebertaV2Config,
    'modernbert': ModernBertConfig,
}


def name_of(config: EncoderConfig) -> str:
  """Returns the name of an encoder in ENCODERS, or 'module:class'."""
  return next((name for name, kind in ENCODERS.items() if kind is type(config)),
              f'{type(config).__module__}:{type(config).__name__}')
