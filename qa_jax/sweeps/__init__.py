"""Sweeps: variants times seeds of a config, their trials, and reports.

`grid` builds lists of variants without jax. The other files are imported one
by one, because `study` loads optuna and `report` loads matplotlib.
"""

from qa_jax.sweeps import grid as grid
