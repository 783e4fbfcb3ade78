"""Text in, static-shape numpy batches out. No jax here."""
