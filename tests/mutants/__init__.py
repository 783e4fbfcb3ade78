"""Mutations of the core, and the command that counts how many tests notice.

  python -m tests.mutants              every mutation: an hour
  python -m tests.mutants heads sign   those whose name holds one of the words

docs/robustness.md describes the command.
"""
