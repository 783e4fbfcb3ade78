"""Commands: absl flags, one qa_jax call, an exit code."""
