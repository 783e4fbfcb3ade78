"""The span heads, one file each, and HEADS, the table that names them.

A head is a Flax module that maps `HeadInput` to `SpanScores`. A new head is a
file here, an import and an entry of HEADS. A class with `token_wise` True
computes the start and end of a token from that token alone, and no other
scores; it then scores packed rows before they are unpacked. A subclass does not
inherit this.
"""

from collections.abc import Callable
import functools

import flax.linen as nn

from qa_jax.heads import answerability
from qa_jax.heads import compound
from qa_jax.heads import length_prior
from qa_jax.heads.biaffine import Biaffine
from qa_jax.heads.biased import Biased
from qa_jax.heads.conditional import Conditional
from qa_jax.heads.independent import Independent
from qa_jax.heads.layer_mix import LayerMix
from qa_jax.heads.mlp import Mlp
from qa_jax.heads.mlp_span import MlpSpan
from qa_jax.heads.shared import Shared
from qa_jax.heads.transformed import Transformed
from qa_jax.heads.trilinear import Trilinear
from qa_jax.span_scores import HeadInput as HeadInput
from qa_jax.span_scores import SpanScores as SpanScores

HEADS: dict[str, Callable[..., nn.Module]] = {
    'independent': Independent,
    'biased': Biased,
    'shared': Shared,
    'mlp': Mlp,
    'transformed': Transformed,
    'layer_mix': LayerMix,
    'conditional': Conditional,
    'biaffine': Biaffine,
    'trilinear': Trilinear,
    'mlp_span': MlpSpan,
}
# These heads stand on a base head, which they look up in the whole table.
HEADS |= {
    'length_prior': functools.partial(length_prior.build_head, HEADS),
    'compound': functools.partial(compound.build_head, HEADS),
    'answerability': functools.partial(answerability.build_head, HEADS),
}
