"""The encoders with their sizes, and the model of an encoder and a head."""

from qa_jax.models.dropout import DropoutKeys as DropoutKeys
from qa_jax.models.encoders import ENCODERS as ENCODERS
from qa_jax.models.encoders.base import PRESETS as PRESETS
from qa_jax.models.encoders.base import EncoderConfig as EncoderConfig
from qa_jax.models.encoders.bert import BertConfig as BertConfig
from qa_jax.models.encoders.bert import BertEncoder as BertEncoder
from qa_jax.models.qa import Packed as Packed
from qa_jax.models.qa import QAModel as QAModel
from qa_jax.models.qa import init_params as init_params
from qa_jax.models.qa import model_inputs as model_inputs
