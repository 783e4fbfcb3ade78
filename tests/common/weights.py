"""Recorded Hugging Face checkpoints, with models and parameters for them."""

import pathlib

import jax
import numpy as np

from qa_jax import heads
from qa_jax.checkpoints import hugging_face
from qa_jax.models import qa

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
TINY = GOLDEN / 'tiny_bert'


def model(directory: pathlib.Path = TINY,
          head: str = 'independent') -> qa.QAModel:
  """Builds the model of a recorded checkpoint with another head."""
  return qa.QAModel(hugging_face.read_config(directory), heads.HEADS[head]())


def fresh(head: str = 'independent', directory: pathlib.Path = TINY):
  """Draws parameters with numpy, which compiles nothing."""
  shapes = jax.eval_shape(
      lambda: qa.init_params(model(directory, head), jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32), shapes)
