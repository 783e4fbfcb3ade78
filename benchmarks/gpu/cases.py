"""Configs whose windows have SQuAD's lengths and whose vocabulary has BERT's
size, and the FLOPs of a batch."""

from collections.abc import Sequence
import contextlib
import pathlib
from typing import Any

import jax

from benchmarks import session
from qa_jax import config as config_lib
from qa_jax.data import cache
from qa_jax.data import sources
from qa_jax.models.encoders import bert

VOCABULARY = 30_522  # entries of bert-base-uncased


def vocabulary(directory: pathlib.Path, size: int) -> str:
  """Writes a vocabulary of `size` entries, if it is missing; returns its path.

  The entries are learned from generated text and filled up with unused ones.
  """
  if not (directory / 'vocab.txt').is_file():
    learned = cache.LearnedVocabulary(2000, True).tokenizer(
        sources.load_examples(session.generated(100)))
    entries = [*learned.vocab]
    entries += [f'[unused{i}]' for i in range(size - len(entries))]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'vocab.txt').write_text(
        '\n'.join(entries) + '\n', encoding='utf-8')
  return str(directory)


def on_device(kind: str, cores: int | None, platform: str
              ) -> contextlib.AbstractContextManager[None]:
  """Returns a context that names a device, which kernels need for lowering.

  `kind` and `platform` are names of jax; no such device need be there.
  """
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (), (), axis_types=(), abstract_device=jax.sharding.AbstractDevice(
          kind, cores, platform)))


def config(scratch: pathlib.Path, *, preset: str, batch: int, length: int,
           dtype: str = 'bfloat16', attention: str = 'auto',
           packing: bool | str = False, dropout: float = 0.1,
           attention_dropout: float | None = None, questions: int = 400,
           vocab_size: int = VOCABULARY, **fields: Any) -> config_lib.Config:
  """Returns the checked config of a train step, on one device by default.

  `attention_dropout` is `dropout` by default. A further field a.b is given as
  the keyword a__b.
  """
  return config_lib.check_config(config_lib.override(
      config_lib.Config().to_dict(), {
          'model.preset': preset, 'model.attention': attention,
          'model.dropout': dropout, 'model.attention_dropout': (
              dropout if attention_dropout is None else attention_dropout),
          'data.train': session.generated(questions),
          'data.max_length': length, 'data.window_overlap': length // 4,
          'data.max_question_length': min(64, length // 4),
          'data.packing': packing, 'data.buckets': [length],
          'data.cache': 'none',
          'data.vocab': vocabulary(scratch / f'vocab{vocab_size}', vocab_size),
          'train.batch_size': batch, 'train.num_steps': 1000,
          'train.updates_per_dispatch': 1,
          'parallel.num_devices': 1, 'parallel.mode': 'jit',
          'precision.compute_dtype': dtype,
          **{k.replace('__', '.'): v for k, v in fields.items()}}))


def flops(preset: str, lengths: Sequence[int]) -> float:
  """Computes the FLOPs of the encoder's products in one update.

  `lengths` are the tokens of each window. A product counts three times: once
  forwards, and once for the gradient of each operand.
  """
  sizes = bert.BertConfig.PRESETS[preset]
  hidden = sizes['hidden_size']
  tokens = float(sum(lengths))
  squares = float(sum(float(n) * n for n in lengths))
  dense = 2 * tokens * (4 * hidden * hidden + 2 * hidden * sizes['mlp_size'])
  return 3 * sizes['num_layers'] * (dense + 4 * squares * hidden)
