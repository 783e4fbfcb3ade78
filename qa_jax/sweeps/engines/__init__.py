"""ENGINES: what runs the trials of a sweep.

An engine takes trials whose configs are checked, a command for each and a
Setup; it runs what is missing, and says which ones failed and why. A new one
is a file and a line; if it only starts processes elsewhere, schedule.drive does
the rest.
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
    'local': local.run,
    'population': population.run,
    'ray': ray.run,
    'slurm': slurm.run,
}
# Those that use other machines; each says before anything is written whether it
# can. The others share out the devices of this one.
ELSEWHERE: dict[str, Callable[[scheduler.Setup], None]] = {
    'ray': ray.check,
    'slurm': slurm.check,
}
