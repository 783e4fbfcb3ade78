"""HEADS: every span head, one file each."""

from collections.abc import Callable

import flax.linen as nn

from qa_jax.heads import answerability
from qa_jax.heads import biaffine
from qa_jax.heads import biased
from qa_jax.heads import compound
from qa_jax.heads import conditional
from qa_jax.heads import independent
from qa_jax.heads import layer_mix
from qa_jax.heads import length_prior
from qa_jax.heads import mlp
from qa_jax.heads import mlp_span
from qa_jax.heads import shared
from qa_jax.heads import trilinear

HEADS: dict[str, Callable[..., nn.Module]] = {
    'independent': independent.Independent,
    'biased': biased.Biased,
    'shared': shared.Shared,
    'mlp': mlp.Mlp,
    'layer_mix': layer_mix.LayerMix,
    'conditional': conditional.Conditional,
    'biaffine': biaffine.Biaffine,
    'trilinear': trilinear.Trilinear,
    'mlp_span': mlp_span.MlpSpan,
    'length_prior': length_prior.length_prior,
    'compound': compound.compound,
    'answerability': answerability.answerability,
}
