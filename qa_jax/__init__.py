"""qa_jax: research on extractive question answering in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from qa_jax.inference.pipeline import pipeline as pipeline
  from qa_jax.inference.predict import load as load

__version__ = '0.1.0'
__all__ = ('__version__', 'load', 'pipeline')


def __getattr__(name: str) -> Any:
  """Imports `load` or `pipeline` at its first use, with its real signature.

  `import qa_jax.data` and `import qa_jax.metrics` thus load no jax.
  """
  modules = {'load': 'predict', 'pipeline': 'pipeline'}
  if name not in modules:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'qa_jax.inference.{modules[name]}')
  return getattr(module, name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
