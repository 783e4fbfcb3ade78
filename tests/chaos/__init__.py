"""The fault campaign: programs that do damage and check what survives it.

Each program returns one line with its figure.

  python -m tests.chaos            all faults at their full counts (make chaos)
  python -m tests.chaos R2 R14     some of them
  python -m tests.chaos --few      all faults at the counts of the suite

The machine may be used meanwhile: except for the ten seconds that a signal may
take, no time is asserted.
"""
