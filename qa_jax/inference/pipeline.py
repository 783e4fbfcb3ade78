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
from typing import Any

import jax

from qa_jax import errors
from qa_jax.inference import predict

TASK = 'question-answering'
PADDINGS = (None, True, False, 'do_not_pad', 'longest', 'max_length')
# Arguments of transformers that choose how torch loads and runs a model.
ABSENT = ('config', 'feature_extractor', 'framework', 'revision', 'use_fast',
          'token', 'device_map', 'dtype', 'torch_dtype', 'trust_remote_code',
          'model_kwargs', 'num_workers', 'binary_output', 'modelcard')
GENERATED = 32  # questions of a generator that are answered together


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of a call. None takes the default of the model."""

  top_k: int = 1
  doc_stride: int | None = None  # context tokens that windows share
  max_answer_len: int = 15  # tokens, counting both ends
  max_seq_len: int | None = None  # tokens of a window
  max_question_len: int | None = None  # tokens
  handle_impossible_answer: bool = False
  align_to_words: bool = True
  batch_size: int | None = None  # windows


class QuestionAnswering:
  """A pipeline: a model with the options of its calls."""

  task = TASK

  def __init__(self, qa: predict.QA, options: Options):
    self.qa, self.options = qa, options
    # Models with checked configs by options; they share the parameters.
    self._prepared = functools.lru_cache(maxsize=16)(
        functools.partial(prepare_model, qa))
    self._prepared(options)  # wrong options are refused before the first call

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.qa!r})'

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Returns the answers to questions as dicts.

    A dict has `score`, `start`, `end` and `answer`. One question gives a dict,
    or a list of dicts if `top_k` is above 1 and there are several answers.
    Several questions give a list of these, and a generator of questions gives a
    generator of them. `score` is the posterior of the answer among all spans of
    all windows of its context. The answer to a context without tokens is ''.

    Questions are `question=…, context=…` (texts, or lists of equal length, or
    several questions of one context), or dicts with these keys, or objects
    with question_text and context_text. Options are the fields of Options.

    Raises:
      UserError: an argument is unknown or wrong, or a text is empty.
    """
    given = {k: kwargs.pop(k) for k in (
        'question', 'context', 'data', 'X') if k in kwargs}
    qa, options = self._model(kwargs)
    questions = _questions(args, given)
    if isinstance(questions, Iterator):
      return self._stream(qa, options, questions)
    results = _answer(qa, options, questions)
    return results[0] if len(results) == 1 else results

  def _model(self, changes: Mapping[str, Any]) -> tuple[predict.QA, Options]:
    options = change_options(self.options, changes)
    return self._prepared(options), options

  def _stream(self, qa: predict.QA, options: Options,
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
      model, allow_code=allow_code)
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
    kind = type(getattr(Options, name))
    kind = bool if kind is bool else int
    least = 0 if name == 'doc_stride' else 1
    if type(value) is not kind or (kind is int and value < least):
      wanted = 'bool' if kind is bool else f'an integer of at least {least}'
      raise errors.UserError(f'pipeline: {name}={value!r}, expected {wanted}')
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
  return predict.with_options(
      qa, batch_size=options.batch_size, max_length=length,
      window_overlap=overlap, max_question_length=question,
      buckets=[b for b in data.buckets if b < length],
      max_answer_length=options.max_answer_len,
      # Equal texts are merged afterwards, so more candidates are needed.
      n_best=2 * options.top_k + 10, merge='none',
      null_rule='min_null' if options.handle_impossible_answer else 'never',
      null_threshold=0.0, whole_words=options.align_to_words)


def _answer(qa: predict.QA, options: Options, questions: Iterable[Any]
            ) -> list[dict[str, Any] | list[dict[str, Any]]]:
  return [_result(answer, options) for answer in qa.answer_batch(
      [_question(i, q) for i, q in enumerate(questions)])]


def _result(answer: predict.Answer, options: Options
            ) -> dict[str, Any] | list[dict[str, Any]]:
  """Returns the `top_k` best answers; a single one is no list.

  A context without a token has the empty answer.
  """
  merged: dict[str, dict[str, Any]] = {}  # lower-cased text → best place
  for candidate in answer.n_best:
    row = merged.setdefault(candidate['text'].lower(), {
        'score': 0.0, 'start': candidate['start'], 'end': candidate['end'],
        'answer': candidate['text']})
    row['score'] = min(row['score'] + candidate['probability'], 1.0)
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
    single = isinstance(value, Mapping) or hasattr(value, 'question_text')
    if not single and isinstance(value, Iterable) and not isinstance(
        value, str):
      return list(value)
    return [value]
  if {*given} != {'question', 'context'}:
    raise errors.UserError(
        'pipeline: give question=… and context=…, or dicts with these keys')
  question, context = given['question'], given['context']
  if isinstance(question, (list, tuple)):
    contexts = ([context] * len(question) if isinstance(context, str)
                else context)
    if not isinstance(contexts, (list, tuple)) or len(question) != len(
        contexts):
      raise errors.UserError(
          f'pipeline: {len(question)} questions need one context or '
          f'{len(question)} of them')
    return [{'question': q, 'context': c}
            for q, c in zip(question, contexts, strict=True)]
  return [{'question': question, 'context': context}]


def _question(i: int, item: Any) -> dict[str, Any]:
  """Returns a question as the dict that `QA.answer_batch` takes."""
  if hasattr(item, 'question_text'):  # a SquadExample of transformers
    item = {'question': item.question_text, 'context': item.context_text}
  if isinstance(item, Mapping):
    for key in ('question', 'context'):
      if item.get(key) == '':
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
