"""The BERT encoder, and the model of an encoder with a span head.

`QAModel` combines `BertEncoder` with a head of `qa_jax.heads`. BertConfig has
the sizes of an encoder, and PRESETS those of published encoders.
"""

from qa_jax.models.bert import PRESETS
from qa_jax.models.bert import BertConfig
from qa_jax.models.bert import BertEncoder
from qa_jax.models.dropout import DropoutKeys
from qa_jax.models.qa import Packed
from qa_jax.models.qa import QAModel
from qa_jax.models.qa import init_params
from qa_jax.models.qa import model_inputs

__all__ = ['PRESETS', 'BertConfig', 'BertEncoder', 'DropoutKeys', 'Packed',
           'QAModel', 'init_params', 'model_inputs']
