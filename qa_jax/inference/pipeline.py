"""The call `pipeline('question-answering')` of transformers, for its programs.

transformers removed this pipeline in version 5.3. The arguments, the dicts and
the shapes of the results are those of version 4.57. Its differences on purpose
are listed in docs/library.md.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import itertools
import os
import re
from typing import Any

import jax
import numpy as np

from qa_jax import errors
from qa_jax.data import windows as windows_lib
from qa_jax.inference import predict

TASK = 'question-answering'
PADDINGS = (None, True, False, 'do_not_pad', 'longest', 'max_length')
# Arguments of transformers that choose how torch loads and runs a model.
ABSENT = ('config', 'feature_extractor', 'framework', 'revision', 'use_fast',
          'token', 'device_map', 'dtype', 'torch_dtype', 'trust_remote_code',
          'model_kwargs', 'num_workers', 'binary_output', 'modelcard')
# Fields of the config → the options that set them, for messages.
NAMES = {'max_length': 'max_seq_len', 'window_overlap': 'doc_stride',
         'max_question_length': 'max_question_len',
         'max_answer_length': 'max_answer_len'}
GENERATED = 32  # questions of a generator that are answered together
# Equal texts are one answer. Its score adds up those of the ADDED best spans,
# as in transformers if top_k is 1, and is equal for any top_k.
ADDED = 12
MOST = 10_000  # spans in which top_k different texts are looked for


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of a call, with the defaults of transformers."""

  top_k: int = 1
  # Context tokens that windows share; None: half a window, at most 128.
  doc_stride: int | None = None
  max_answer_len: int = 15  # tokens, counting both ends
  max_seq_len: int | None = None  # tokens of a window; None: as the model
  max_question_len: int | None = None  # tokens; None: 64, or what has room
  handle_impossible_answer: bool = False
  align_to_words: bool = True
  batch_size: int | None = None  # windows; None: as the model


class QuestionAnswering:
  """A pipeline: a model with the options of its calls."""

  task = TASK

  def __init__(self, qa: predict.QA, options: Options):
    self.qa, self.options = qa, options
    # Models with checked configs by options; they share the parameters.
    self._prepared = functools.lru_cache(maxsize=16)(
        functools.partial(prepare_model, qa))
    self._prepared(options)  # wrong options are refused before the first call

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (self.qa, self.options)  # no pickle has a cache

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.qa!r})'

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Returns the answers to questions as dicts.

    A dict has `score`, `start`, `end` and `answer`. One question gives a dict,
    or a list of dicts if `top_k` is above 1 and there are several answers.
    Several questions give a list of these, and a generator of questions gives a
    generator of them. `score` is the posterior of the answer among all spans of
    all windows of its context, added over its places among the ADDED best
    spans. The answer to a context without tokens is ''.

    Questions are `question=…, context=…` (texts, or lists of equal length, or
    several questions of one context), or dicts with these keys, or objects
    with question_text and context_text, or a data set of them: an iterable, or
    an object with a length and items. Options are the fields of Options.

    Raises:
      UserError: an argument is unknown or wrong, or a text is empty.
    """
    given = {k: kwargs.pop(k) for k in (
        'question', 'context', 'data', 'X') if k in kwargs}
    options = change_options(self.options, kwargs)
    qa, questions = self._prepared(options), _questions(args, given)
    if isinstance(questions, Iterator):
      return _stream(qa, options, questions)
    results = _answer(qa, options, questions)
    return results[0] if len(results) == 1 else results


def _stream(qa: predict.QA, options: Options,
            questions: Iterator[Any]) -> Iterator[Any]:
  while rows := list(itertools.islice(questions, GENERATED)):
    yield from _answer(qa, options, rows)


def pipeline(task: str | None = None,
             model: str | os.PathLike[str] | predict.QA | None = None, *,
             tokenizer: Any = None, device: Any = None,
             allow_code: Iterable[str] = (), **options: Any,
             ) -> QuestionAnswering:
  """Builds the question-answering pipeline of a model.

  `model` is a QA, or a source of `qa_jax.load`: a run directory, a Hugging Face
  directory or a hub id. `options` are the fields of Options; a call may
  override them. `device` must name the platform that JAX already uses.
  `allow_code` is that of `load`.

  Raises:
    UserError: the task, the model or an argument is unknown or wrong.
  """
  if task not in (None, TASK):
    raise errors.UserError(f'pipeline: task={task!r}; {TASK!r} is the only one')
  if model is None:
    raise errors.UserError(
        'pipeline: model is missing; give a run directory, a Hugging Face '
        'directory or a hub id')
  if tokenizer is not None and tokenizer != model:
    raise errors.UserError(
        f'pipeline: tokenizer={tokenizer!r}; the tokenizer of the model is '
        'used, leave it out')
  _check_device(device)
  for name in ABSENT:
    if options.pop(name, None) not in (None, False):
      raise errors.UserError(
          f'pipeline: {name} has no meaning here, JAX runs the model; leave it '
          'out')
  checked = change_options(Options(), options)
  qa = model if isinstance(model, predict.QA) else predict.load(
      model, allow_code=allow_code, **_decoding(checked))
  return QuestionAnswering(qa, checked)


def change_options(options: Options, changes: Mapping[str, Any]) -> Options:
  """Returns options with `changes`; a wrong name or type is a UserError.

  A change to None has no effect, as in transformers.
  """
  changes = dict(changes)
  padding = changes.pop('padding', None)  # it changes no result
  if padding not in PADDINGS:
    raise errors.UserError(f'pipeline: padding={padding!r} is none of '
                           f'{", ".join(map(repr, PADDINGS))}')
  if 'topk' in changes:  # the old name of top_k
    changes.setdefault('top_k', changes.pop('topk'))
  known = [f.name for f in dataclasses.fields(Options)]
  for name, value in list(changes.items()):
    if name not in known:
      raise errors.UserError(f'pipeline: no argument {name!r}'
                             f'{errors.did_you_mean(name, known)}')
    if value is None:
      del changes[name]
      continue
    changes[name] = value = predict.plain(value)
    kind = bool if isinstance(getattr(Options, name), bool) else int
    least = 0 if name == 'doc_stride' else 1
    if type(value) is not kind or (kind is int and value < least):
      wanted = 'bool' if kind is bool else f'an integer of at least {least}'
      raise errors.UserError(f'pipeline: {name}={value!r}, expected {wanted}')
    errors.require(name != 'top_k' or value <= MOST, (
        f'pipeline: top_k={value!r}, expected at most {MOST}'))
  return dataclasses.replace(options, **changes)


def prepare_model(qa: predict.QA, options: Options) -> predict.QA:
  """Returns the model with the config that the options ask for.

  Raises:
    UserError: a window has no room, or the head scores shorter spans only.
  """
  data = qa.config.data
  length = options.max_seq_len or data.max_length
  overlap = (min(length // 2, 128) if options.doc_stride is None
             else options.doc_stride)
  room = length - overlap - qa.tokenizer.outer_length - 1  # a step of 1 token
  question = options.max_question_len or max(min(64, room), 1)
  try:
    windows_lib.check_lengths(
        length, overlap, question, qa.tokenizer.outer_length)
    prepared = predict.with_options(
        qa, batch_size=options.batch_size, max_length=length,
        window_overlap=overlap, max_question_length=question,
        buckets=[b for b in data.buckets if b < length],
        # Equal texts are merged afterwards, so more candidates are needed.
        n_best=2 * options.top_k + 10, **_decoding(options))
  except errors.UserError as e:
    raise errors.UserError('pipeline: ' + re.sub(
        rf'(?:config\.)?(?:data\.|decode\.)?\b({"|".join(NAMES)})\b',
        lambda match: NAMES[match[1]], str(e))) from None
  return predict.refit_calibration(prepared)


def _decoding(options: Options) -> dict[str, Any]:
  """Returns the fields of config.decode that a calibration must fit."""
  return {'null_rule': 'min_null' if options.handle_impossible_answer
                       else 'never',
          'null_threshold': 0.0, 'merge': 'none',
          'max_answer_length': options.max_answer_len,
          'whole_words': options.align_to_words}


def _answer(qa: predict.QA, options: Options, questions: Iterable[Any]
            ) -> list[dict[str, Any] | list[dict[str, Any]]]:
  rows = [_question(i, q) for i, q in enumerate(questions)]
  return [_result(answer, options)
          for answer in _candidates(qa, options, rows)]


def _candidates(qa: predict.QA, options: Options, rows: list[dict[str, Any]]
                ) -> list[predict.Answer]:
  """Returns the answers with enough candidates for `top_k` different texts.

  A question has fewer if all its spans, or the MOST best ones, have fewer.
  """
  answers, n_best = qa.answer_batch(rows), qa.config.decode.n_best
  while n_best < MOST:
    lacking = [i for i, answer in enumerate(answers)
               if len(answer.n_best) == n_best and len({
                   c['text'].lower() for c in answer.n_best}) < options.top_k]
    if not lacking:
      break
    n_best = min(8 * n_best, MOST)
    for i, answer in zip(lacking, qa.answer_batch(
        [rows[i] for i in lacking], n_best=n_best), strict=True):
      answers[i] = answer
  return answers


def _result(answer: predict.Answer, options: Options
            ) -> dict[str, Any] | list[dict[str, Any]]:
  """Returns the `top_k` best answers; a single one is no list.

  A context without a token has the empty answer.
  """
  merged: dict[str, dict[str, Any]] = {}  # lower-cased text → best place
  for rank, candidate in enumerate(answer.n_best):
    key, probability = candidate['text'].lower(), candidate['probability']
    if key not in merged:
      merged[key] = {'score': probability, 'start': candidate['start'],
                     'end': candidate['end'], 'answer': candidate['text']}
    elif rank < ADDED:
      merged[key]['score'] = min(merged[key]['score'] + probability, 1.0)
  rows = list(merged.values())
  if options.handle_impossible_answer or not rows:
    rows.append({'score': answer.null_probability, 'start': 0, 'end': 0,
                 'answer': ''})
  rows = sorted(rows, key=lambda row: -row['score'])[:options.top_k]
  return rows[0] if len(rows) == 1 else rows


def _questions(args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
  """Returns the questions of a call as a list, or as a given iterator."""
  if args and given:
    raise errors.UserError(
        f'pipeline: {next(iter(given))!r} and arguments without a name '
        'contradict each other')
  if len(args) == 2 and all(isinstance(a, str) for a in args):
    given = {'question': args[0], 'context': args[1]}
  elif len(args) > 1:
    return list(args)
  elif args or {*given} in ({'data'}, {'X'}):
    value = args[0] if args else next(iter(given.values()))
    if isinstance(value, Iterator):
      return value
    if isinstance(value, Mapping) and {*value} == {
        'question', 'context'} and isinstance(
            value['question'], list | tuple | np.ndarray):
      return _questions((), value)  # several questions as columns
    if isinstance(value, (str, Mapping)) or hasattr(value, 'question_text'):
      return [value]
    if isinstance(value, Iterable):
      return list(value)
    if hasattr(value, '__len__') and hasattr(value, '__getitem__'):
      return [value[i] for i in range(len(value))]
    return [value]
  if {*given} != {'question', 'context'}:
    raise errors.UserError(
        'pipeline: give question=… and context=…, or dicts with these keys')
  question, context = (predict.plain(given[name])
                       for name in ('question', 'context'))
  if isinstance(question, (list, tuple)):
    contexts = ([context] * len(question) if isinstance(context, str)
                else context)
    if not isinstance(contexts, (list, tuple)) or len(question) != len(
        contexts):
      given = (f'{len(contexts)} contexts were given' if isinstance(
          contexts, (list, tuple)) else f'{type(contexts).__name__} was given')
      raise errors.UserError(
          f'pipeline: {len(question)} question'
          f'{"s need" if len(question) > 1 else " needs"} one context or '
          f'{len(question)} of them, and {given}')
    return [{'question': q, 'context': c}
            for q, c in zip(question, contexts, strict=True)]
  return [{'question': question, 'context': context}]


def _question(i: int, item: Any) -> dict[str, Any]:
  """Returns a question as the dict that `QA.answer_batch` takes."""
  if hasattr(item, 'question_text'):  # a SquadExample of transformers
    item = {'question': item.question_text, 'context': item.context_text}
  if isinstance(item, Mapping):
    for key in ('question', 'context'):
      if isinstance(item.get(key), str) and not item[key]:
        raise errors.UserError(f'pipeline: {key} of row {i} is empty')
  return item


def _check_device(device: Any) -> None:
  """Raises a UserError unless `device` is the first one that JAX uses."""
  if device is None:
    return
  platform, name = jax.default_backend(), str(device)
  accelerator = ('0', 'cuda', 'cuda:0', 'gpu', 'gpu:0', 'tpu', 'tpu:0')
  if name not in (('-1', 'cpu') if platform == 'cpu' else accelerator):
    raise errors.UserError(
        f'pipeline: device={name}, but JAX runs on {platform}; leave it out, '
        'or set JAX_PLATFORMS before the program starts')
