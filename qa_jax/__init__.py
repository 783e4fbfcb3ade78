"""qa_jax: research on extractive question answering in JAX and Flax."""


def load(source: str, **options):
  """Loads a model for inference and returns it as a `predict.QA`.

  `source` is a run directory, a Hugging Face directory or a hub id. `options`
  are those of `qa_jax.inference.predict.load`.
  """
  # Deferred: `qa_jax.data` and `qa_jax.metrics` must load without jax.
  from qa_jax.inference import predict
  return predict.load(source, **options)
