"""The ALBERT encoder (Lan et al., 2020): BERT whose layers share parameters.

Section 3.1 there: embeddings of a smaller size are projected to the hidden
size, and every layer has the parameters of `layer_0`.
"""

import dataclasses
from typing import ClassVar

from qa_jax import errors
from qa_jax.models.encoders import bert


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlbertConfig(bert.BertConfig):
  """The sizes and constants of ALBERT."""

  ALWAYS_PROJECTS: ClassVar[bool] = True
  SHARES_LAYERS: ClassVar[bool] = True
  embedding_size: int = 128
  hidden_act: str = 'gelu_new'  # version 1 has gelu
  architecture: str = 'albert'

  def __post_init__(self):
    super().__post_init__()
    errors.check_known('hidden_act of the encoder', self.hidden_act,
                       bert.ACTIVATIONS)
