"""Speed beside a peer's: two processes in turn, outputs compared first."""
