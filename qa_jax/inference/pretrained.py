"""Models of this library from checkpoints of Hugging Face or TensorFlow."""

from collections.abc import Iterable
import dataclasses
from typing import Any

import jax

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry
from qa_jax.checkpoints import hugging_face
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.models import qa

# Rows of the embeddings without a token: they are padded to multiples of 128.
MOST_SPARE = 127
# Parameters that a small model may have beside those of a checkpoint.
MOST_FRESH = 10**6
# Config fields that an export stores in config.json under 'qa_jax', so that a
# loaded export has the windows and decoding of its run.
CARRIED = {'data': ('max_length', 'window_overlap', 'max_question_length'),
           'decode': ('max_answer_length', 'n_best', 'search', 'null_rule',
                      'null_threshold', 'merge', 'whole_words')}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """The model of a checkpoint, with notes to show to the user."""

  model: qa.QAModel
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config
  has_head: bool  # False: params['head'] is all zeros
  notes: tuple[str, ...]
  architecture: str = ''  # class in config.json, such as BertForMaskedLM
  # On windows that are shorter than the default. It concerns contexts of
  # several windows and long questions, and is shown with the first of them.
  window_note: str = ''


def read_pretrained(source: str, allow_code: Iterable[str] = ()) -> Pretrained:
  """Reads the checkpoint of a Hugging Face or TensorFlow directory or hub id.

  The head is `head_spec` of the architecture: for BERT `biased` if its bias is
  not zero, else `independent`.
  A UserError is raised if `source` is no checkpoint, is damaged, or has another
  architecture or no vocabulary. `allow_code` is that of `predict.load`.
  """
  directory = hugging_face.resolve_source(source)
  tokenizer = tokenizer_files.read_tokenizer(directory)
  checkpoint = hugging_face.read_checkpoint(directory)
  sizes, notes = checkpoint.sizes, [*checkpoint.notes]
  hugging_face.check_padding(checkpoint.config, tokenizer.pad_id)
  if len(tokenizer.vocab) > sizes.vocab_size:
    raise errors.UserError(
        f'{source}: the vocabulary has {len(tokenizer.vocab)} entries, but '
        f'the embeddings only {sizes.vocab_size}')
  if sizes.vocab_size - len(tokenizer.vocab) > MOST_SPARE:
    notes.append(
        f'the vocabulary has {len(tokenizer.vocab)} entries and the embeddings '
        f'{sizes.vocab_size}: is a part of it missing?')
  head = hugging_face.stored_head(checkpoint)
  if head == 'biased':
    notes.append(
        "the checkpoint's head has a bias: it is read as the head 'biased'")
  fields: dict[str, dict[str, Any]] = {
      'data': {'lowercase': tokenizer.lowercase,
               **fitting_windows(
                   min(sizes.max_position,
                       tokenizer.max_length or sizes.max_position),
                   tokenizer.outer_length)},
      'model': {'preset': '', 'init_from': source,
                'head': head or 'independent'}, 'train': {'num_steps': 1}}
  carried = _carried(checkpoint.config)
  for group, values in carried.items():
    fields[group] = {**fields.get(group, {}), **values}
  config = config_lib.check_config(fields)
  threshold = config.decode.null_threshold
  # An export has no such field before transformers writes its config.json anew.
  if threshold and 'transformers_version' in checkpoint.config.fields:
    notes.append(
        f'{checkpoint.config.path}: the null threshold {threshold:.4g} is that '
        'of the export that transformers loaded and saved; if it was trained '
        'meanwhile, choose another by decode.null_threshold')
  registry.check_code(str(checkpoint.config.path),
                      config_lib.spec_strings(config), allow_code)
  build.check_positions(config, sizes)
  model = build.build_model(config, sizes)
  asked, stored = (
      sum(x.size for x in jax.tree.leaves(tree))
      for tree in (qa.param_shapes(model), checkpoint.tensors))
  errors.require(  # before they are in memory
      asked <= 2 * stored + MOST_FRESH,
      f'{checkpoint.config.path}: its sizes ask for {asked:,} parameters, but '
      f'the weights are {stored:,}')
  params, head_notes = hugging_face.fit_tensors(checkpoint,
                                                qa.zero_params(model))
  notes += [note for note in head_notes if note != hugging_face.FRESH_HEAD]
  return Pretrained(model, params, tokenizer, config, bool(head), tuple(notes),
                    checkpoint.config.class_name,
                    '' if 'data' in carried else _window_note(config.data))


def fitting_windows(positions: int, outer_length: int = 3) -> dict[str, int]:
  """Returns the window lengths of config.data for the longest input.

  `outer_length` is the tokenizer's number of special tokens of a window.

  They are the defaults if these fit. The overlap is at most half a window, as
  in the pipeline of transformers. A question of the full length leaves a
  quarter of its context tokens for the step, so that windows stay few.
  """
  default = config_lib.Data()
  longest = min(default.max_length, positions)
  question = min(default.max_question_length, longest // 2)
  room = longest - question - outer_length
  overlap = min(default.window_overlap, longest // 2, 3 * room // 4)
  return {'max_length': longest, 'max_question_length': question,
          'window_overlap': max(overlap, 0)}


def _window_note(data: config_lib.Data) -> str:
  """Returns a note if windows are shorter than the default, else ''."""
  if data.max_length >= config_lib.Data().max_length:
    return ''
  return (f'the checkpoint takes {data.max_length} tokens: a window has '
          f'{data.max_length} tokens, at most {data.max_question_length} of '
          f'the question, and overlaps the next by {data.window_overlap}')


def carried_fields(config: config_lib.Config) -> dict[str, dict[str, Any]]:
  """Returns the values of the CARRIED fields of a config."""
  values = config.to_dict()
  return {group: {name: values[group][name] for name in names}
          for group, names in CARRIED.items()}


def _carried(config: hugging_face.ConfigFile) -> dict[str, dict[str, Any]]:
  """Returns the CARRIED fields of config.json; {} if it is not an export."""
  fields = config.fields.get('qa_jax', {})
  if not isinstance(fields, dict) or not all(
      group in CARRIED and isinstance(values, dict)
      and set(values) <= set(CARRIED[group])
      for group, values in fields.items()):
    raise errors.UserError(
        f'{config.path}: qa_jax holds other fields than {CARRIED}; export it '
        'again')
  return fields
