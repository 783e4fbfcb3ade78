"""qa_jax: extractive question answering in pure JAX."""
