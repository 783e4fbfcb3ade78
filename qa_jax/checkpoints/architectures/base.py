"""The facts of an architecture: its config.json and the names of its weights.

Common names are those of Hugging Face without the prefix of the encoder, such
as `bert.`. For the models of `bert.py` they are the names of BERT.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from qa_jax.models.encoders import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A `model_type` of Hugging Face, and the encoder that computes it."""

  encoder: type[EncoderConfig]
  class_prefix: str  # of the names in `architectures`: BertForMaskedLM
  fields: Mapping[str, str]  # our field → theirs; a checkpoint has them all
  # Our path → common name without .weight or .bias; {i} is the layer, {part} a
  # word. A tuple lists tensors that are concatenated along the last axis.
  names: Mapping[str, str | tuple[str, ...]]
  prefix: str  # of the names of the encoder's weights
  supported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # ^ other fields, and what they must be
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # ^ our field → theirs, for fields that an export writes
  eps: str = 'layer_norm_eps'  # the name of that field
  default_eps: float = 1e-12
  # Reads further fields of the encoder from config.json. Raises a UserError.
  read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
  renames: tuple[tuple[str, str], ...] = ()  # a part of a name → the common one
  # Positions are counted from pad_token_id + 1, as in fairseq. The earlier rows
  # of the table are never used, and are left out here.
  positions_after_pad: bool = False
  unused: str = ''  # regex of common names that may have no parameter
  exported_as: str = ''  # the entry of ARCHITECTURES that an export is; '': it
