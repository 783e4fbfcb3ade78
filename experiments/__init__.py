"""Commands: each reads absl flags, calls qa_jax and sets an exit code."""
