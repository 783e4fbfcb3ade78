"""The facts of an architecture: its config.json and the names of its weights.

Common names are those of Hugging Face without the prefix of the encoder, such
as `bert.`; DistilBERT's are renamed to BERT's.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from qa_jax.models.encoders import EncoderConfig


def pair_spec(tensors: Mapping[str, np.ndarray], sizes: EncoderConfig) -> str:
  """Returns the spec string of a head that is a pair of S and E alone."""
  del sizes
  bias = tensors.get('qa_outputs.bias')
  return 'independent' if bias is None or not bias.any() else 'biased'


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
  eps: str = 'layer_norm_eps'  # the name of that field; '': there is none
  default_eps: float = 1e-12
  # Reads further fields of the encoder from config.json. Raises a UserError.
  read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
  # Returns further fields of config.json for an encoder and the module of its
  # head, None for no head. Raises a UserError.
  write: Callable[[EncoderConfig, Any], dict[str, Any]] = lambda *_: {}
  # A regex that is found in the names of encoder and head, without prefix. Any
  # other name belongs to another task's head or to the pooler.
  reads: str = r'\b(embeddings\w*|encoder|transformer|qa_outputs)\b'
  # The layer whose rows are S and E, and the heads of ours that an export can
  # have. If its name is shared by the models of other tasks, it is the layer of
  # a span head in a class *ForQuestionAnswering alone.
  head: str = 'qa_outputs'
  head_is_shared: bool = False
  heads: tuple[str, ...] = ('independent', 'biased')
  # Layers of the head before S and E, as in `names`. They may be those of the
  # head of another task, such as masked words.
  head_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Returns the spec string of the head in a checkpoint's tensors.
  head_spec: Callable[[Mapping[str, np.ndarray], Any], str] = pair_spec
  # Fields of config.json → the id in a tokenizer that an export writes.
  tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  renames: tuple[tuple[str, str], ...] = ()  # a part of a name → the common one
  # Positions are counted from pad_token_id + 1, as in fairseq. The earlier rows
  # of the table are never used, and are left out here.
  positions_after_pad: bool = False
  unused: str = ''  # regex of common names that may have no parameter
  exported_as: str = ''  # the entry of ARCHITECTURES that an export is; '': it
