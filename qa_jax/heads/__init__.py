"""HEADS: every span head, one file each."""

from collections.abc import Callable

import flax.linen as nn

from qa_jax.heads import independent

HEADS: dict[str, Callable[..., nn.Module]] = {
    'independent': independent.Independent,
}
