"""Faults as programs: each does the damage, asserts what must survive it, and
returns its figure in a line.

  python -m tests.chaos            all, with the counts that count (make chaos)
  python -m tests.chaos R2 R14     some of them
  python -m tests.chaos --few      all, as the suite runs them

Nobody is asked not to use the machine meanwhile: but for the ten seconds that a
signal may take, no time is asserted.
"""
