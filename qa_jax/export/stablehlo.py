"""Export of a model as one StableHLO program: encoder, head and span search.

Glossary of shapes: B batch (windows), L window length, K n-best candidates.

jax.export writes the program, which takes any number of windows of any length
within its bounds. The process that loads it compiles it for its platform.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import pathlib
import re
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import span_scores
from qa_jax.data import windows
from qa_jax.decoding import candidates
from qa_jax.decoding import search
from qa_jax.export import hugging_face
from qa_jax.export import run as run_lib
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.models import qa

PLATFORMS = ('cpu', 'cuda', 'tpu', 'rocm')


def answer_program(model: qa.QAModel, decode: config_lib.Decode,
                   temperature: float, context_type: int,
                   ) -> Callable[..., dict[str, jax.Array]]:
  """Returns the function of parameters and windows that is exported.

  `context_type` is that of the tokenizer.
  """
  model = model.clone(attention='xla')  # plain StableHLO, for every platform
  find = search.find_search(decode.search)
  normaliser = 'normaliser' in decode_lib.null_rule_needs(decode)

  def run(params: Mapping[str, jax.Array],  # by their names in safetensors
          token_ids: jax.Array,  # [B, L] int32
          context: jax.Array,  # [B, 2] int32: context tokens [begin, end)
          start_mask: jax.Array,  # [B, L] bool: legal starts
          end_mask: jax.Array,  # [B, L] bool: legal ends
          ) -> dict[str, jax.Array]:  # [B, K] spans, [B] sums and null scores
    position = jnp.arange(token_ids.shape[1])[None]  # [1, L]
    begin, end = context[:, :1], context[:, 1:]  # [B, 1]; at `end` is [SEP]
    context_mask = (position >= begin) & (position < end)
    start_mask, end_mask = start_mask & context_mask, end_mask & context_mask
    head_starts = start_mask if decode.whole_words else None
    attention_mask = (position <= end).astype(jnp.int32)
    scores = model.apply(
        {'params': flax.traverse_util.unflatten_dict(params, sep='/')},
        token_ids=token_ids, attention_mask=attention_mask,
        token_type_ids=context_type * (
            (position >= begin) & (position <= end)).astype(jnp.int32),
        context_mask=context_mask, start_mask=head_starts)
    scores = span_scores.mask_padding(scores, attention_mask)
    fields = candidates.window_candidates(
        find, scores, start_mask, end_mask, n_best=decode.n_best,
        longest=decode.max_answer_length,
        softmax_mask=context_mask if normaliser else None)
    log_partition = candidates.log_partitions(
        scores, start_mask, end_mask, jnp.float32([temperature]),
        longest=decode.max_answer_length)
    return {'normaliser': jnp.zeros_like(fields['null']), **fields,
            'log_partition': log_partition[:, 0]}
  return run


def lower_program(model: qa.QAModel, params: Mapping[str, Any],
                  config: config_lib.Config, platforms: Sequence[str],
                  context_type: int = 1, temperature: float = 1.0,
                  ) -> tuple[jax.export.Exported, int]:
  """Lowers the program; also returns the length of its shortest windows.

  It is at least the longest span, the n-best list and every count of head and
  search: below these, the shapes of the search depend on the window length.
  """
  longest = config.data.max_length
  # Arguments may be specs, such as answerability(base="conditional(beam=64)").
  counts = [int(count) for spec in (config.decode.search, config.model.head)
            for count in re.findall(r'(?<![\w.])\d[\d_]*(?![\w.])', spec)]
  shortest = min(longest, max(
      32, config.decode.max_answer_length, config.decode.n_best, *counts))
  if shortest == longest:
    (batch,), length = jax.export.symbolic_shape('b'), longest
  else:
    batch, length = jax.export.symbolic_shape(
        'b, l', constraints=[f'l >= {shortest}', f'l <= {longest}'])
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  mask = jax.ShapeDtypeStruct((batch, length), jnp.bool_)
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype)
            for k, v in params.items()}
  export = jax.export.export(
      jax.jit(answer_program(
          model, config.decode, temperature, context_type)),
      platforms=platforms)
  return (export(shapes, ints(batch, length), ints(batch, 2), mask, mask),
          shortest)


def check_platforms(names: Sequence[str]) -> None:
  """Raises a UserError for a name that is not in PLATFORMS, and for none."""
  errors.require(names, f'no platform; choose from {", ".join(PLATFORMS)}')
  for name in names:
    if name not in PLATFORMS:
      raise errors.UserError(
          f'unknown platform {name!r}; choose from {", ".join(PLATFORMS)}')


def export_run(model: predict.QA, target: pathlib.Path,
               platforms: Sequence[str]) -> dict[str, int]:
  """Writes the program and its runner to `target`; returns sizes in bytes.

  A UserError is raised if a platform is unknown, `target` is not empty, or the
  model merges candidates, which the program cannot do.
  """
  check_platforms(platforms)
  data, decode = model.config.data, model.config.decode
  if decode.merge != 'none':
    raise errors.UserError(
        f'config.decode.merge={decode.merge!r} compares texts, which the '
        'program does not see; --merge=none exports without it')
  if decode.null_rule not in run_lib.NULL_RULES:
    raise errors.UserError(
        f'config.decode.null_rule={decode.null_rule!r} is not in the runner; '
        f'choose one of {", ".join(run_lib.NULL_RULES)}')
  build.check_positions(model.config, model.model.config)
  windows.check_lengths(data.max_length, data.window_overlap,
                        data.max_question_length, model.tokenizer.outer_length)
  params = {k: np.ascontiguousarray(v) for k, v in
            flax.traverse_util.flatten_dict(model.params, sep='/').items()}
  temperature = model.calibration.temperature if model.calibration else 1.0
  exported, shortest = lower_program(
      model.model, params, model.config, platforms,
      model.tokenizer.context_type, temperature)
  tokenizer = model.tokenizer
  meta = {
      'max_length': data.max_length, 'min_length': shortest,
      'window_overlap': data.window_overlap,
      'max_question_length': data.max_question_length,
      'pad_id': tokenizer.pad_id, 'cls_id': tokenizer.cls_id,
      'sep_id': tokenizer.sep_id, 'separators': tokenizer.separators,
      'wordpiece': tokenizer.is_wordpiece, 'whole_words': decode.whole_words,
      'null_rule': decode.null_rule,
      'null_threshold': decode.null_threshold, 'temperature': temperature,
      'max_answer_length': decode.max_answer_length, 'n_best': decode.n_best,
      'platforms': list(exported.platforms),
      'calling_convention': exported.calling_convention_version,
      'jax': jax.__version__}
  contents = {
      'program.bin': bytes(exported.serialize()),
      'params.safetensors': safetensors.numpy.save(params),
      'tokenizer.json': tokenizer.closed_json().encode(),
      'meta.json': (json.dumps(meta, indent=2) + '\n').encode()}
  sums = ''.join(f'{hashlib.sha256(contents[name]).hexdigest()}  {name}\n'
                 for name in run_lib.FILES)
  contents |= {'SHA256SUMS': sums.encode(),
               'run.py': pathlib.Path(run_lib.__file__).read_bytes()}

  def write(directory: pathlib.Path) -> None:
    for name, content in contents.items():
      (directory / name).write_bytes(content)

  hugging_face.check_target(target)
  files.write_directory(target, write)
  return {name: len(content) for name, content in contents.items()}
