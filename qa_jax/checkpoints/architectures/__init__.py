"""The architectures of Hugging Face that load, by `model_type`.

A new architecture is a file here and an entry of ARCHITECTURES. Its encoder is
an entry of ENCODERS in qa_jax/models/encoders.
"""

from qa_jax.checkpoints.architectures import bert
from qa_jax.checkpoints.architectures import deberta_v2
from qa_jax.checkpoints.architectures import modernbert
from qa_jax.checkpoints.architectures.base import Architecture as Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **bert.ARCHITECTURES, **deberta_v2.ARCHITECTURES,
    **modernbert.ARCHITECTURES}
# Architectures that are refused → what to add to the message.
REFUSED = {'deberta': ': version 1 of DeBERTa has another attention and a '
                      "byte-level BPE; its versions 2 and 3 are 'deberta-v2'"}
