"""Engines, which run the trials of a sweep.

An engine runs the incomplete trials of a list and returns the names of the
failed trials with the reasons. A new engine is a file and a row of ENGINES; an
engine that only starts processes can use scheduler.run_trials.
"""

from collections.abc import Callable, Mapping, Sequence

from qa_jax.sweeps import plan
from qa_jax.sweeps.engines import local
from qa_jax.sweeps.engines import population
from qa_jax.sweeps.engines import ray
from qa_jax.sweeps.engines import scheduler
from qa_jax.sweeps.engines import slurm

Engine = Callable[
    [Sequence[plan.Trial], scheduler.Command, scheduler.Setup],
    Mapping[str, str]]

ENGINES: dict[str, Engine] = {
    'local': local.run, 'population': population.run,
    'ray': ray.run, 'slurm': slurm.run}
# Checks of the engines that use other machines; they run before any file is
# written. The other engines divide the devices of this machine.
ELSEWHERE: dict[str, Callable[[scheduler.Setup], None]] = {
    'ray': ray.check, 'slurm': slurm.check}
