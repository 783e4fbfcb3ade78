"""qa_jax: extractive question answering in pure JAX."""


def load(source: str, **options):
  """A workdir, a Hugging Face directory or a hub id → `predict.QA`."""
  from qa_jax.inference import predict  # deferred: data and metrics need no jax
  return predict.load(source, **options)
