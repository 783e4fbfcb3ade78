"""A checkpoint of Hugging Face or TensorFlow → a model of ours."""

import dataclasses
import pathlib
from typing import Any

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.io import files
from qa_jax.models import qa

# Fields of a run's config that a Hugging Face config.json can carry, so that
# an exported model cuts windows and answers as it did.
CARRIED = {'data': ('max_length', 'window_overlap', 'max_question_length'),
           'decode': ('max_answer_length', 'n_best', 'search', 'null_rule',
                      'null_threshold', 'merge')}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """What a checkpoint gives, and what to tell the user about it."""

  model: qa.QAModel
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config
  has_head: bool  # False: params['head'] holds zeros
  notes: tuple[str, ...]


def read_pretrained(source: str) -> Pretrained:
  """A directory of Hugging Face or TensorFlow, or a hub id.

  Its head is `independent`, or `biased` if the checkpoint's has a bias.

  Raises:
    UserError: neither, damaged, another architecture, or no vocabulary.
  """
  directory = hugging_face.resolve_source(source)
  words = tokenizer_lib.read_tokenizer(directory)
  sizes = hugging_face.read_config(directory)
  if len(words.vocab) > sizes.vocab_size:
    raise errors.UserError(
        f'{source}: the vocabulary has {len(words.vocab)} entries, but the '
        f'embeddings only {sizes.vocab_size}')
  tensors, notes = hugging_face.read_tensors(directory)
  head = hugging_face.stored_head(tensors)
  if head == 'biased':
    notes.append("the checkpoint's head has a bias: it is read as the head "
                 "'biased'")
  fields: dict[str, dict[str, Any]] = {
      'model': {'preset': '', 'init_from': source,
                'head': head or 'independent'},
      'data': {'lowercase': words.lowercase,
               'max_length': min(384, sizes.max_position)},
      'train': {'num_steps': 1}}
  for group, values in _carried(directory).items():
    fields[group] = {**fields.get(group, {}), **values}
  config = config_lib.check_config(fields)
  build.check_positions(config, sizes)
  model = build.build_model(config, sizes)
  params, more = hugging_face.fit_tensors(tensors, qa.zero_params(model),
                                          directory)
  notes += [note for note in more if note != hugging_face.FRESH_HEAD]
  return Pretrained(model, params, words, config, bool(head), tuple(notes))


def carried_fields(config: config_lib.Config) -> dict[str, dict[str, Any]]:
  """The fields of CARRIED of a config."""
  values = config.to_dict()
  return {group: {name: values[group][name] for name in names}
          for group, names in CARRIED.items()}


def _carried(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Those that config.json holds, if we wrote it."""
  path = directory / 'config.json'
  found = files.read_object(path).get('qa_jax', {}) if path.is_file() else {}
  if not isinstance(found, dict) or not all(
      group in CARRIED and isinstance(values, dict)
      and set(values) <= set(CARRIED[group])
      for group, values in found.items()):
    raise errors.UserError(
        f'{path}: qa_jax holds other fields than {CARRIED}')
  return found
