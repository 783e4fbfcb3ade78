"""The table SUITES, and SIDES: the worker's part of each suite."""

from collections.abc import Callable
from typing import Any

from benchmarks.session import Outcome
from benchmarks.session import Session
from benchmarks.suites import evaluate
from benchmarks.suites import features
from benchmarks.suites import forward
from benchmarks.suites import inputs
from benchmarks.suites import population
from benchmarks.suites import scaling
from benchmarks.suites import search
from benchmarks.suites import startup
from benchmarks.suites import train
from benchmarks.suites import variants

SUITES: dict[str, Callable[[Session], Outcome]] = {
    'train': train.run, 'forward': forward.run, 'search': search.run,
    'features': features.run, 'evaluate': evaluate.run, 'input': inputs.run,
    'startup': startup.run, 'scaling': scaling.run, 'variants': variants.run,
    'population': population.run}
ALL = tuple(  # the suites that have targets
    name for name in SUITES
    if name not in ('scaling', 'variants', 'population'))

# Objects whose `calls()` a worker answers, by name.
SIDES: dict[str, Callable[[], Any]] = {
    'train': train.Ours, 'forward': forward.Ours, 'search': search.Ours,
    'features': features.Ours, 'evaluate': evaluate.Ours,
    'input': inputs.Ours, 'scaling': scaling.Ours, 'variants': variants.Ours,
    'population': population.Ours}
