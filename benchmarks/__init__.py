"""Benchmarks beside a peer: two processes in turn, outputs compared first."""
