"""Names and configs of checkpoints on the hub, with tiny tensors as weights.

tests/golden/hub_checkpoints.json holds the names and the configs, and how they
were known.
"""

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from qa_jax import heads
from qa_jax.checkpoints import hugging_face
from qa_jax.models import qa
from qa_jax.models.encoders import bert
from tests.common import weights
from tests.common.refusals import refusal

HUB = json.loads((weights.GOLDEN / 'hub_checkpoints.json').read_text())
CHECKPOINTS = {row['id']: row for row in HUB['checkpoints']}
LOADED = [name for name, row in CHECKPOINTS.items() if 'family' in row]
REFUSED = [name for name, row in CHECKPOINTS.items() if 'family' not in row]
# Tiny sizes by their letters in the fixture.
SIZES = {'D': 4, 'E': 3, 'M': 6, 'V': 7, 'P': 5, 'T': 2, 'N': 2, '1': 1}
# Field of config.json, of BERT and of DistilBERT → letter of its size.
FIELDS = {'hidden_size': 'D', 'dim': 'D', 'embedding_size': 'D',
          'intermediate_size': 'M', 'hidden_dim': 'M', 'vocab_size': 'V',
          'max_position_embeddings': 'P', 'position_buckets': 'P',
          'type_vocab_size': 'T'}
SIZES['R'] = 2 * SIZES['P']  # relative positions


def config_of(row: Mapping[str, Any]) -> dict[str, Any]:
  return HUB['configs'][row['config']] | row['fields']


def layers_of(row: Mapping[str, Any]) -> int:
  config = config_of(row)
  return config.get('num_hidden_layers') or config['n_layers']


def encoder_shapes(row: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Returns name → shape of the encoder's tensors, as the file has them."""
  return expand(row, HUB['families'][row['family']])


def expand(row: Mapping[str, Any],
           patterns: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
  """Returns name → shape for name patterns, for every layer of a checkpoint."""
  shapes = {}
  for pattern, letters in patterns.items():
    if row.get('gamma'):
      pattern = pattern.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
          'LayerNorm.bias', 'LayerNorm.beta')
    for i in range(layers_of(row) if '{i}' in pattern else 1):
      shapes[pattern.format(i=i, p=row['prefix'])] = tuple(
          SIZES[letter] for letter in letters.split())
  return shapes


def write(directory: pathlib.Path, row: Mapping[str, Any]) -> dict[str, int]:
  """Writes a tiny checkpoint and returns name → value of the read tensors.

  Each tensor that a span model reads is filled with another number. The
  tensors of other parts are filled with -1.
  """
  config = config_of(row)
  tiny = {field: SIZES[letter] for field, letter in FIELDS.items()
          if config.get(field)}
  if row['family'] == 'electra':  # small embeddings
    tiny['embedding_size'] = SIZES['E']
  tiny |= {field: 2 for field in ('num_attention_heads', 'n_heads')
           if field in config}
  (directory / 'config.json').write_text(json.dumps(config | tiny))
  parts = [expand(row, HUB['parts'][part]) for part in row['parts']]
  shapes = functools.reduce(dict.__or__, parts, encoder_shapes(row))
  read = {name: number for number, name in enumerate(shapes, 1)
          if name in encoder_shapes(row) or name.startswith('qa_outputs.')}
  safetensors.numpy.save_file(
      {name: np.full(shape, read.get(name, -1), np.float32)
       for name, shape in shapes.items()}, directory / 'model.safetensors')
  return read


@functools.cache
def template(sizes: bert.BertConfig) -> Any:
  """Returns parameters of the biased head on an encoder, all of them -2."""
  model = qa.QAModel(sizes, heads.HEADS['biased']())
  shapes = jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0)))
  return jax.tree.map(lambda x: np.full(x.shape, -2, x.dtype), shapes)


@pytest.mark.parametrize('name', LOADED)
def test_sizes_are_read_from_the_config_of_the_hub(tmp_path, name):
  config = config_of(CHECKPOINTS[name])
  (tmp_path / 'config.json').write_text(json.dumps(config))
  sizes = hugging_face.read_config(tmp_path)
  assert sizes.num_layers == layers_of(CHECKPOINTS[name])
  assert sizes.hidden_size == config.get('hidden_size', config.get('dim'))
  assert sizes.vocab_size == config['vocab_size']
  assert sizes.max_position == 512
  assert sizes.layer_norm_eps == config.get('layer_norm_eps', 1e-12)


@pytest.mark.parametrize('name', LOADED)
def test_every_tensor_of_the_encoder_is_used_once(tmp_path, name):
  row = CHECKPOINTS[name]
  read = write(tmp_path, row)
  fresh = template(hugging_face.read_config(tmp_path))
  params, notes = hugging_face.load_parameters(tmp_path, fresh)
  values = {float(v) for x in jax.tree.leaves(params) for v in np.unique(x)}
  span_model = row['result'] == 'span model'
  # DistilBERT has no token types: they become zeros.
  assert values == {*read.values()} | (
      {0.0} if row['family'] == 'distilbert' else set()) | (
      set() if span_model else {-2.0})
  assert (hugging_face.FRESH_HEAD in notes) == (not span_model)
  skipped = [part for part in row['parts'] if part != 'span head']
  assert any('not read' in note for note in notes) == bool(skipped)


@pytest.mark.parametrize('name', LOADED)
def test_layer_norms_have_their_weight_as_scale(tmp_path, name):
  row = CHECKPOINTS[name]
  read = write(tmp_path, row)
  params, _ = hugging_face.load_parameters(
      tmp_path, template(hugging_face.read_config(tmp_path)))
  last, prefix = layers_of(row) - 1, row['prefix']
  leaves = ('gamma', 'beta') if row.get('gamma') else ('weight', 'bias')
  layer_norm = params['encoder']['embeddings']['layer_norm']
  output_norm = params['encoder'][f'layer_{last}']['mlp']['layer_norm']
  output = (f'{prefix}transformer.layer.{last}.output_layer_norm.'
            if row['family'] == 'distilbert'
            else f'{prefix}encoder.layer.{last}.output.LayerNorm.')
  for ours, theirs in zip(('scale', 'bias'), leaves, strict=True):
    assert {*layer_norm[ours]} == {
        read[f'{prefix}embeddings.LayerNorm.{theirs}']}
    assert {*output_norm[ours]} == {read[output + theirs]}


@pytest.mark.parametrize('name', REFUSED)
def test_other_encoders_are_refused_by_name(tmp_path, name):
  row = CHECKPOINTS[name]
  (tmp_path / 'config.json').write_text(json.dumps(config_of(row)))
  message = refusal(hugging_face.read_config, tmp_path)
  assert row['result'].removeprefix('refused: ') in message


def test_the_fixture_says_how_names_were_known():
  assert len(CHECKPOINTS) == len(HUB['checkpoints']) >= 20
  assert all(row['known'].startswith(('file', 'listing', 'rule'))
             for row in CHECKPOINTS.values())
  used = {part for name in LOADED for part in CHECKPOINTS[name]['parts']}
  assert used == {*HUB['parts']}
