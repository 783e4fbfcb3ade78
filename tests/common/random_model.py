"""A tiny model with random parameters, and its run directory."""

import contextlib
import functools
import pathlib

import jax
import numpy as np

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax.checkpoints import manager
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.inference import predict
from qa_jax.models import encoders
from qa_jax.models import qa as qa_lib
from qa_jax.models.encoders import bert
from tests.common import tiny

QUESTION, CONTEXT = 'Who built it?', 'Mira built the Osprey in Oslo.'


@functools.cache
def random_qa(head: str, **decode) -> predict.QA:
  """Returns an untrained model of one layer with a tokenizer and config."""
  config = tiny.config(model={'head': head}, decode={
      'max_answer_length': 4, 'n_best': 6, 'null_rule': 'never', **decode})
  tokenizer = tokenizer_lib.train_tokenizer([QUESTION + CONTEXT],
                                            vocab_size=120)
  return draw_qa(config, bert.BertConfig(
      vocab_size=len(tokenizer.vocab), hidden_size=16, num_layers=1,
      num_heads=2, mlp_size=32), tokenizer, seed=6, scale=0.3)


def draw_qa(config: config_lib.Config, sizes: encoders.EncoderConfig,
            tokenizer: tokenizer_lib.Tokenizer, *, seed: int = 0,
            scale: float = 0.5) -> predict.QA:
  """Returns an untrained model whose parameters are all normal draws.

  Parameters that start at zero, such as biases, would hide mistakes.
  """
  model = build.build_model(config, sizes)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
      lambda x: rng.normal(0, scale, x.shape).astype(np.float32),
      jax.eval_shape(lambda: qa_lib.init_params(model, jax.random.key(0))))
  return predict.QA(model, params, tokenizer, config)


def write_run(qa: predict.QA, directory: pathlib.Path,
              last: predict.QA | None = None) -> pathlib.Path:
  """Writes a run directory with the model as its only checkpoint, of step 0.

  If `last` is given, its parameters are the checkpoint of step 1, and step 0 is
  the best.
  """
  run = RunDirectory(directory)
  run.write(qa.config, qa.model.config, qa.tokenizer, {})
  with contextlib.closing(manager.Checkpoints(run.checkpoints)) as store:
    for step, model in enumerate([qa, last] if last else [qa]):
      store.save(step, params=model.params, meta={},
                 metrics={'f1': 90.0 - step} if last else {},
                 optimizer={'step': np.zeros((), np.int32)})
  return directory
