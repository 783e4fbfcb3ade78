"""A model of ours → a Hugging Face directory, or a run directory."""

import dataclasses
import json
import pathlib
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy
from tokenizers import implementations

from qa_jax import errors
from qa_jax.checkpoints import hugging_face
from qa_jax.checkpoints import manager
from qa_jax.checkpoints import run_record
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from qa_jax.io import files
from qa_jax.models import bert

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
  """A model with what is known of how it came about."""

  name: str
  model: pretrained.Pretrained
  run: pathlib.Path | None  # the directory of a run of ours


def read_source(source: str, checkpoint_name: str = 'best') -> ConversionSource:
  """A run, a Hugging Face or TensorFlow directory, or a hub id.

  Raises:
    UserError: none of these, or damaged.
  """
  directory = pathlib.Path(source)
  if not RunDirectory(directory).is_run():
    return ConversionSource(source, pretrained.read_pretrained(source), None)
  qa = predict.load(directory, checkpoint=checkpoint_name)
  return ConversionSource(source, pretrained.Pretrained(
      qa.model, qa.params, qa.tokenizer, qa.config, True, ()), directory)


def write_hugging_face(source: ConversionSource, target: pathlib.Path) -> None:
  """What transformers loads as a BertForQuestionAnswering, with equal logits.

  An encoder without a span head becomes a BertModel.

  Raises:
    UserError: a head that has no place there, or `target` is not empty.
  """
  model = source.model
  tensors = hugging_face.to_hugging_face(model.params)
  if 'qa_outputs.weight' not in tensors:
    raise errors.UserError(
        f'{source.name} has the head {model.config.model.head!r}; only '
        "'independent' and 'biased' have a place in a BertForQuestionAnswering")
  if not model.has_head:
    tensors = {k: v for k, v in tensors.items()
               if not k.startswith('qa_outputs.')}

  check_target(target)

  def write(directory: pathlib.Path) -> None:
    write_weights(tensors, directory)
    architecture = 'BertForQuestionAnswering' if model.has_head else 'BertModel'
    files.write_json(directory / 'config.json', {
        **hugging_face_config(model.model.config, architecture),
        'qa_jax': pretrained.carried_fields(model.config)})
    write_tokenizer(model.tokenizer, model.model.config.max_position, directory)
    files.write_text(directory / 'README.md', model_card(source))

  files.write_directory(target, write)


def write_weights(tensors: hugging_face.Arrays,
                  directory: pathlib.Path) -> None:
  """model.safetensors; beside a span head, "bert." begins the other names."""
  begin = 'bert.' if 'qa_outputs.weight' in tensors else ''
  (directory / 'model.safetensors').write_bytes(safetensors.numpy.save(
      {name if name.startswith('qa_outputs.') else begin + name:
       np.ascontiguousarray(value) for name, value in tensors.items()},
      metadata={'format': 'pt'}))


def hugging_face_config(sizes: bert.BertConfig,
                        architecture: str) -> dict[str, Any]:
  """config.json as transformers writes it."""
  return {
      'architectures': [architecture], 'model_type': 'bert',
      'hidden_size': sizes.hidden_size, 'num_hidden_layers': sizes.num_layers,
      'num_attention_heads': sizes.num_heads,
      'intermediate_size': sizes.mlp_size, 'vocab_size': sizes.vocab_size,
      'max_position_embeddings': sizes.max_position,
      'type_vocab_size': sizes.type_vocab_size, 'hidden_act': 'gelu',
      'layer_norm_eps': sizes.layer_norm_eps,
      'hidden_dropout_prob': sizes.dropout,
      'attention_probs_dropout_prob': sizes.attention_dropout,
      'initializer_range': sizes.initializer_range,
      'pad_token_id': 0, 'dtype': 'float32'}


def write_tokenizer(tokenizer: tokenizer_lib.Tokenizer, longest: int,
                    directory: pathlib.Path) -> None:
  """vocab.txt, tokenizer.json and tokenizer_config.json of a BertTokenizer."""
  tokenizer.save(directory)
  files.write_text(directory / 'tokenizer.json', whole_tokenizer(tokenizer))
  files.write_json(directory / 'tokenizer_config.json', {
      **files.read_object(directory / 'tokenizer_config.json'),
      'model_max_length': longest,
      **{f'{name}_token': f'[{name.upper()}]'
         for name in ('pad', 'unk', 'cls', 'sep', 'mask')}})


def whole_tokenizer(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """tokenizer.json: normaliser, WordPiece and special tokens in one."""
  return implementations.BertWordPieceTokenizer(
      dict(tokenizer.index), lowercase=tokenizer.lowercase).to_str(pretty=True)


def model_card(source: ConversionSource) -> str:
  """README.md, from run.json and the metrics of a run, or from neither."""
  model, sizes = source.model, source.model.model.config
  name = pathlib.Path(source.name).name
  results = _results(source.run) if source.run else {}
  about = huggingface_hub.ModelCardData(
      model_name=name, library_name='transformers',
      pipeline_tag='question-answering' if model.has_head else None,
      tags=['qa_jax', 'bert', 'extractive-question-answering'],
      eval_results=[huggingface_hub.EvalResult(
          task_type='question-answering', dataset_type=data, dataset_name=data,
          metric_type=metric, metric_value=round(values[metric], 2))
          for data, values in results.items()
          for metric in ('exact_match', 'f1')] or None)
  shape = (f'{sizes.num_layers} layers, hidden size {sizes.hidden_size}, '
           f'{sizes.num_heads} heads, {len(model.tokenizer.vocab)} '
           f'{"lower-cased" if model.tokenizer.lowercase else "cased"} '
           'WordPieces')
  lines = ['---', about.to_yaml().strip(), '---', f'# {name}', '',
           f'A BERT of {shape}, written by qa_jax.', '']
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
        "passage's tokens; there is none if the score at `[CLS]` exceeds it. "
        'How windows were cut and answers chosen is in `config.json` under '
        '`qa_jax`; `qa_jax.load(".")` does so.', '']
  return '\n'.join(lines)


def _results(run: pathlib.Path) -> dict[str, dict[str, float]]:
  """The folders of eval/ → their metrics.json."""
  found = {path.parent.name: files.read_object(path)
           for path in sorted(run.glob('eval/*/metrics.json'))}
  for name, values in found.items():
    for key in ('total', 'exact_match', 'f1'):
      if type(values.get(key)) not in (int, float):
        raise errors.UserError(
            f'{run}/eval/{name}/metrics.json: {key} is {values.get(key)!r}, '
            'expected a number; evaluate again')
  return found


def _training(run: pathlib.Path) -> list[str]:
  """How the run was trained, as its config.json and run.json say."""
  record = files.read_object(run / 'run.json')
  versions = record.get('packages', {})
  facts = {
      'commit': record.get('git', {}).get('commit') or 'unknown',
      'seed': record.get('seed'), 'jax': versions.get('jax'),
      'python': record.get('python'), 'devices': record.get('devices'),
      'sha256': record.get('sha256')}
  return ['## Training', '', '```json', json.dumps(facts, indent=2), '```', '',
          'Config:', '', '```json', json.dumps(
              RunDirectory(run).read_config().to_dict(), indent=2), '```', '']


def write_run_directory(source: ConversionSource, target: pathlib.Path,
                        argv: list[str]) -> None:
  """A run directory that evaluate, predict, load and init_from accept.

  Its one checkpoint, 0, has no optimizer state: there is nothing to resume.

  Raises:
    UserError: no span head, a run already, or `target` is not empty.
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
    store = manager.Checkpoints(directory / 'checkpoints')
    try:
      store.save(0, params=jax.tree.map(np.asarray, model.params),
                 optimizer={'step': np.zeros((), np.int32)},
                 meta={'source': source.name}, metrics={})
    finally:
      store.close()

  files.write_directory(target, write)


FORMATS = ('hf', 'qa_jax')


def check_target(target: pathlib.Path) -> None:
  """Raises a UserError unless `target` can be written and holds nothing."""
  files.check_writable(target / 'config.json')
  if target.is_dir() and any(target.iterdir()):
    raise errors.UserError(f'{target} is not empty; choose another directory')
