"""Conversion of a model to a Hugging Face directory or a run directory."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy

from qa_jax import build
from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_directory
from qa_jax.checkpoints import run_record
from qa_jax.checkpoints.architectures import ARCHITECTURES
from qa_jax.checkpoints.architectures import Architecture
from qa_jax.checkpoints.architectures import bert
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.metrics import calibration as calibration_lib
from qa_jax.metrics import predictions
from qa_jax.models import encoders
from qa_jax.models.encoders import EncoderConfig
from qa_jax.runtime import console

FORMATS = ('hf', 'qa_jax')
# Constants of an encoder that change nothing it computes when it answers.
TRAINING = ('dropout', 'attention_dropout', 'initializer_range',
            'position_base', 'equal_query_key')
USAGE = '''\
```python
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained('.')
model = transformers.{auto}.from_pretrained('.')
inputs = tokenizer('Who …?', 'The passage.', return_tensors='pt')
with torch.no_grad():
  outputs = model(**inputs)
```
'''


@dataclasses.dataclass(frozen=True)
class ConversionSource:
  """A model to convert, with the run directory that it comes from, if any."""

  name: str
  model: pretrained.Pretrained
  run: pathlib.Path | None
  step: int | None = None  # of the checkpoint of the run
  calibration: calibration_lib.Calibration | None = None  # of the run, in use


def read_source(source: str, checkpoint_name: str = 'best', *,
                calibrated: bool = True) -> ConversionSource:
  """Reads a run, a Hugging Face or TensorFlow directory, or a hub id.

  If `calibrated`, the null threshold of a run is that of its calibration.json.
  A UserError is raised if `source` is none of these or is damaged.
  """
  directory = pathlib.Path(source)
  if not RunDirectory(directory).is_run():
    predict.check_no_choice(checkpoint_name, source)
    return ConversionSource(source, pretrained.read_pretrained(source), None)
  qa = predict.load(directory, checkpoint=checkpoint_name,
                    calibrated=calibrated)
  return ConversionSource(source, pretrained.Pretrained(
      qa.model, qa.params, qa.tokenizer, qa.config, has_head=True, notes=()),
                          directory, qa.step, qa.calibration)


def write_hugging_face(source: ConversionSource, target: pathlib.Path) -> None:
  """Writes a BertForQuestionAnswering of transformers with equal logits.

  An encoder of another family keeps its class. An encoder without a span head
  becomes a BertModel. A UserError is raised if the class has no such head, as
  BERT's has only `independent` and `biased`, or if `target` is not empty.
  """
  model = source.model
  sizes, kind = model.model.config, _architecture(model.model.config)
  tensors = hugging_face.to_hugging_face(model.params, kind)
  if not model.has_head:
    tensors = {k: v for k, v in tensors.items()
               if not hugging_face.in_head(k, kind)}
  elif not build.is_stored_head(model.model):
    raise errors.UserError(
        f'{source.name} has the head {model.config.model.head!r}; only '
        f'{" and ".join(map(repr, kind.heads))} can be a '
        f'{kind.class_prefix}ForQuestionAnswering')
  check_target(target)
  if source.calibration and source.calibration.temperature != 1:
    console.say(
        f'the temperature {source.calibration.temperature:.4g} of '
        f'{calibration_lib.NAME} stays behind: probabilities of {target} are '
        'those at temperature 1')
  fields = hugging_face_config(
      sizes, kind.class_prefix + (
          'ForQuestionAnswering' if model.has_head else 'Model'))
  pad_id = model.tokenizer.pad_id
  errors.require(
      kind.supported.get('pad_token_id', pad_id) == pad_id,
      f'{source.name}: its token of padding has the id {pad_id}, but '
      f'{kind.class_prefix} of transformers takes the token '
      f'{kind.supported.get("pad_token_id")} for padding; train with the '
      'vocabulary of a checkpoint')
  fields |= kind.write(sizes, model.model.head if model.has_head else None)
  fields |= {theirs: getattr(model.tokenizer, ours)
             for theirs, ours in kind.tokens.items()}
  fields['pad_token_id'] = pad_id
  if kind.positions_after_pad:  # the rows that are never used are zeros
    unused = pad_id + 1
    table = tensors[bert.POSITIONS]
    tensors = tensors | {bert.POSITIONS: np.concatenate(
        [np.zeros((unused, table.shape[1]), table.dtype), table])}
    fields |= {'max_position_embeddings': sizes.max_position + unused,
               'bos_token_id': model.tokenizer.cls_id,
               'eos_token_id': model.tokenizer.sep_id}
  _check_stored(sizes, hugging_face.ConfigFile(
      target / 'config.json', fields, sizes.architecture))

  def write(directory: pathlib.Path) -> None:
    write_weights(tensors, directory, kind)
    files.write_json(directory / 'config.json', {
        **fields, 'qa_jax': pretrained.carried_fields(model.config)})
    write_tokenizer(model.tokenizer, sizes.max_position, directory)
    if sizes.type_vocab_size < 2:  # no second type for transformers to look up
      path = directory / 'tokenizer_config.json'
      files.write_json(path, files.read_object(path) | {
          'model_input_names': ['input_ids', 'attention_mask']})
    files.write_text(directory / 'README.md', model_card(source))

  files.write_directory(target, write)


def _architecture(sizes: EncoderConfig) -> Architecture:
  name = encoders.name_of(sizes)
  errors.require(
      name in encoders.ENCODERS,
      f'transformers has no class for the encoder {name!r}; only '
      f'{", ".join(map(repr, encoders.ENCODERS))} can be exported')
  errors.check_known('architecture of the encoder', sizes.architecture,
                     ARCHITECTURES)
  return ARCHITECTURES[sizes.architecture]


def _check_stored(sizes: EncoderConfig, file: hugging_face.ConfigFile) -> None:
  """Raises a UserError unless config.json has all constants of an encoder."""
  stored = hugging_face.encoder_config(file)
  lost = [f'{name}={value!r}' for name, value in vars(sizes).items()
          if name not in TRAINING and getattr(stored, name, None) != value]
  errors.require(
      not lost, f'{file.path}: {file.class_name} of transformers has no '
      f'{" and ".join(lost)}, which this encoder has')


def write_weights(tensors: hugging_face.Arrays, directory: pathlib.Path,
                  kind: Architecture = ARCHITECTURES['bert']) -> None:
  """Writes model.safetensors; encoder names get a prefix if there is a head."""
  prefix = kind.prefix if f'{kind.head}.weight' in tensors else ''
  (directory / 'model.safetensors').write_bytes(safetensors.numpy.save(
      {name if hugging_face.in_head(name, kind) else prefix + name:
       np.ascontiguousarray(value) for name, value in tensors.items()},
      metadata={'format': 'pt'}))


def hugging_face_config(sizes: EncoderConfig,
                        architecture: str) -> dict[str, Any]:
  """Returns the fields of config.json as transformers writes them."""
  kind = _architecture(sizes)
  return {
      'architectures': [architecture], 'model_type': sizes.architecture,
      'dtype': 'float32', **kind.supported,
      kind.eps: sizes.layer_norm_eps,
      **{theirs: getattr(sizes, ours)
         for ours, theirs in {**kind.fields, **kind.options}.items()}}


def write_tokenizer(tokenizer: tokenizer_lib.Tokenizer, longest: int,
                    directory: pathlib.Path) -> None:
  """Writes the tokenizer's files; `longest` bounds the tokens of a text."""
  tokenizer.save(directory)
  files.write_text(directory / 'tokenizer.json', tokenizer.to_json())
  files.write_json(directory / 'tokenizer_config.json', {
      **files.read_object(directory / 'tokenizer_config.json'),
      'model_max_length': min(longest, tokenizer.max_length or longest),
      **dict(zip(tokenizer_lib.ROLES, tokenizer.special, strict=True))})


def model_card(source: ConversionSource) -> str:
  """Returns README.md, with the metrics and the training of a run, if any."""
  model, sizes = source.model, source.model.model.config
  name = pathlib.Path(source.name).absolute().name  # also of '.'
  results = _results(source) if source.run else {}
  about = huggingface_hub.ModelCardData(
      model_name=name, library_name='transformers',
      pipeline_tag='question-answering' if model.has_head else None,
      tags=['qa_jax', sizes.architecture, 'extractive-question-answering'],
      eval_results=[huggingface_hub.EvalResult(
          task_type='question-answering', dataset_type=data, dataset_name=data,
          metric_type=metric, metric_value=round(values[metric], 2))
          for data, values in results.items()
          for metric in ('exact_match', 'f1')] or None)
  kind = _architecture(sizes).class_prefix
  case = 'lower-cased' if model.tokenizer.lowercase else 'cased'
  lines = ['---', about.to_yaml().strip(), '---', f'# {name}', '',
           f'A {"BERT" if sizes.architecture == "bert" else kind} of '
           f'{sizes.num_layers} layer{"s" * (sizes.num_layers > 1)}, '
           f'hidden size {sizes.hidden_size}, '
           f'{sizes.num_heads} heads, {len(model.tokenizer.vocab)} {case} '
           f'{"WordPieces" if model.tokenizer.is_wordpiece else "tokens"}, '
           'written by qa_jax.', '']
  if results:
    lines += ['| data | questions | EM | F1 |', '|---|---|---|---|']
    lines += [f'| {data} | {v["total"]} | {v["exact_match"]:.2f} '
              f'| {v["f1"]:.2f} |' for data, v in results.items()] + ['']
  if source.run:
    lines += _training(source.run)
  lines += ['## Use', '', USAGE.format(
      auto='AutoModelForQuestionAnswering' if model.has_head else 'AutoModel')]
  if model.has_head:
    lines += [
        'An answer is the best `start_logits[i] + end_logits[j]` over the '
        f"passage's tokens; {_declining(model)} "
        '`config.json` holds the options for windows and decoding under '
        '`qa_jax`, and `qa_jax.load(".")` uses them.', '']
  return '\n'.join(lines)


def _declining(model: pretrained.Pretrained) -> str:
  """Returns the sentence on when a question gets no answer."""
  decode = model.config.decode
  if decode.null_rule == 'never':
    return 'every question gets one (null rule `never`).'
  rule = f'the score of the null rule `{decode.null_rule}`'
  if decode.null_rule in ('min_null', 'margin'):
    rule += (f', that of `{model.tokenizer.special[2]}` minus that of the best '
             'answer,')
  return (f'there is none if {rule} exceeds the null threshold '
          f'{decode.null_threshold:.6g}.')


def _results(source: ConversionSource) -> dict[str, dict[str, float]]:
  """Reads the metrics of a run's evaluations by the name of their folder.

  An evaluation of another step or at another held-out threshold is left out,
  with a message. An evaluation of earlier versions, which recorded no step, is
  taken to be of this one. If the null threshold was chosen on the questions of
  an evaluation, its EM and F1 are those at threshold 0.
  """
  results, step = {}, source.step
  threshold = source.calibration and source.calibration.threshold
  for path in sorted(source.run.glob('eval/*/metrics.json')):
    values = files.read_object(path)
    recorded = run_directory.read_step(path.parent)
    if step is not None and recorded not in (None, step):
      console.say(f'{path.parent} is the evaluation of step {recorded}, not of '
                  f'step {step}: the model card leaves it out')
      continue
    if (held_out := values.get('held_out_threshold')) != threshold:
      console.say(f'{path.parent} is an evaluation at the held-out threshold '
                  f'{held_out}, not {threshold}: the model card leaves it out; '
                  'evaluate again')
      continue
    if values.get(predictions.CHOSEN_HERE):
      values |= {key: values[f'at_zero_{key}'] for key in (
          'exact_match', 'f1') if f'at_zero_{key}' in values}
    results[path.parent.name] = values
    predictions.check_scores(path, values, ('total', 'exact_match', 'f1'))
  return results


def _training(run: pathlib.Path) -> list[str]:
  """Returns the lines on training, from run.json and config.json."""
  record = RunDirectory(run).read_record()
  # Command line and uncommitted changes are left out: they may be private.
  facts = {
      'commit': record.get('git', {}).get('commit') or 'unknown',
      'seed': record.get('seed'), 'jax': record.get('packages', {}).get('jax'),
      **{key: record.get(key) for key in ('python', 'devices', 'sha256')}}
  config = RunDirectory(run).read_config().to_dict()
  return ['## Training', '', '```json', json.dumps(facts, indent=2), '```', '',
          'Config:', '', '```json', json.dumps(config, indent=2), '```', '']


def write_run_directory(source: ConversionSource, target: pathlib.Path,
                        argv: list[str]) -> None:
  """Writes a run directory for evaluate, predict, load and init_from.

  Its only checkpoint is of step 0 and has no optimizer state: training cannot
  be resumed from it. A UserError is raised if the model has no span head or is
  a run already, or if `target` is not empty.
  """
  model = source.model
  if source.run:
    raise errors.UserError(f'{source.name} is a run already; --format=hf '
                           'makes a Hugging Face directory of it')
  if not model.has_head:
    raise errors.UserError(
        f'{source.name} is an encoder without a span head: fine-tune it '
        '(config.model.init_from takes it as it is), or choose --format=hf')
  check_target(target)

  def write(directory: pathlib.Path) -> None:
    RunDirectory(directory).write(
        model.config, model.model.config, model.tokenizer,
        run_record.run_record(
            seed=model.config.seed, argv=argv, devices=jax.devices(),
            hashes={'vocabulary': model.tokenizer.fingerprint}))
    with contextlib.closing(manager.Checkpoints(
        RunDirectory(directory).checkpoints)) as store:
      store.save(0, params=jax.tree.map(np.asarray, model.params),
                 optimizer={'step': np.zeros((), np.int32)},
                 meta={'source': source.name}, metrics={})

  files.write_directory(target, write)


def check_target(target: pathlib.Path) -> None:
  """Raises a UserError if `target` cannot be written or is not empty."""
  files.check_writable(target / 'config.json')
  if target.is_dir() and any(target.iterdir()):
    raise errors.UserError(f'{target} is not empty; choose another directory')
