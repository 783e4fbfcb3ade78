"""SUITES: every suite, one file each; SIDES: our worker's part of them."""

from collections.abc import Callable
from typing import Any

from qa_jax.bench.session import Outcome
from qa_jax.bench.session import Session
from qa_jax.bench.suites import evaluate
from qa_jax.bench.suites import features
from qa_jax.bench.suites import forward
from qa_jax.bench.suites import inputs
from qa_jax.bench.suites import population
from qa_jax.bench.suites import scaling
from qa_jax.bench.suites import search
from qa_jax.bench.suites import startup
from qa_jax.bench.suites import train
from qa_jax.bench.suites import variants

SUITES: dict[str, Callable[[Session], Outcome]] = {
    'train': train.run, 'forward': forward.run, 'search': search.run,
    'features': features.run, 'evaluate': evaluate.run, 'input': inputs.run,
    'startup': startup.run, 'scaling': scaling.run, 'variants': variants.run,
    'population': population.run}
ALL = tuple(  # of the targets
    name for name in SUITES
    if name not in ('scaling', 'variants', 'population'))

# Objects whose `calls()` a worker answers, by name.
SIDES: dict[str, Callable[[], Any]] = {
    'train': train.Ours, 'forward': forward.Ours, 'search': search.Ours,
    'features': features.Ours, 'evaluate': evaluate.Ours,
    'input': inputs.Ours, 'scaling': scaling.Ours, 'variants': variants.Ours,
    'population': population.Ours}
