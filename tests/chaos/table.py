"""The table of faults, with their counts in the suite and in make chaos."""

from collections.abc import Callable
import dataclasses
import pathlib

from tests.chaos import damage
from tests.chaos import disk
from tests.chaos import fuzz
from tests.chaos import kills
from tests.chaos import numbers
from tests.chaos import runs
from tests.chaos import serving
from tests.chaos import sweeps


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault: program(directory, count, seed) asserts and returns its figure."""

  what: str
  program: Callable[[pathlib.Path, int, int], str]
  many: int  # count of `make chaos`
  few: int = 0  # count in the suite; 0: left out, for the reason `why`
  why: str = ''


EVERY = 10**6  # at most so many kills: at every operation
FAULTS: dict[str, Fault] = {
    'R1': Fault('kill, resume', runs.resume, 60, why='minutes to compile; '
                'test_resume.py kills a run within its process'),
    'R2': Fault('kill in a save', runs.mid_save, 50, 2),
    'R3': Fault('bit rot', damage.checkpoints, 40, 1),
    'R4': Fault('disk full', disk.full, 5, why='minutes; test_logs.py, '
                'test_checkpoint.py and test_files.py have its parts'),
    'R5': Fault('two writers', runs.two_writers, 10, why='minutes to '
                'compile; test_lock.py'),
    'R6': Fault('SIGTERM', runs.stopped, 20, why='a minute; test_stop.py'),
    'R8': Fault('non-finite steps', numbers.non_finite, 40,
                why='a minute; test_skip.py'),
    'R9': Fault('data damage', damage.data, 2000, 40),
    'R10': Fault('sweep loss', sweeps.killed, 30,
                 why='half an hour; test_sweep.py'),
    'R11': Fault('NaN metric', numbers.best, 200, 2),
    'R12': Fault('run-ahead', runs.run_ahead, 1000,
                 why='a minute; conftest.py has 8 devices'),
    'R13': Fault('weights of others', damage.weights_of_others, 2000, 10),
    'R14': Fault('compile cache damage', damage.compiled, 6,
                 why='a minute a run'),
    'R15': Fault('kill at each file operation of a save', kills.saves, EVERY,
                 30),
    'R16': Fault('kill at each file operation of a run', kills.run, EVERY,
                 why='an hour; R15 has its saves, test_resume.py its kills'),
    'R17': Fault('kill at each file operation of a population', kills.members,
                 EVERY, why='hours; R15 has its saves, test_population.py its '
                 'kills'),
    'load': Fault('1,000 requests, 50 at a time', serving.load, 1000,
                  why='a minute to compile; test_server.py'),
    **{f'fuzz-{name}': Fault(f'any {name}', program, 100_000, 100)
       for name, program in fuzz.PARSERS.items()},
}
# Faults that other tests cover.
ELSEWHERE = {
    'R7': 'rank loss: test_processes.py kills a process and the coordinator',
}
