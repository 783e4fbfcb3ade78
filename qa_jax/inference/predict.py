"""Answers to questions by a trained model: `load(...)` returns a QA."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import itertools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from qa_jax import build
from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax import objectives
from qa_jax import registry
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import examples as examples_lib
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.data import tokenizer_files
from qa_jax.data import windows as windows_lib
from qa_jax.decoding import answers as answers_lib
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import pretrained
from qa_jax.inference import span_view
from qa_jax.io import files
from qa_jax.metrics import calibration as calibration_lib
from qa_jax.metrics import selective
from qa_jax.models import qa
from qa_jax.runtime import compilation
from qa_jax.runtime import console

QUESTION_FIELDS = ('question', 'context', 'id')  # of a row of questions
# Fields of config.data that affect a trained model: how it cuts, batches and
# caches windows. The others belong to training or to the tokenizer.
DATA_OPTIONS = ('max_length', 'window_overlap', 'max_question_length',
                'buckets', 'packing', 'cache')


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to one question, with the n-best candidates.

  `text` is `context[start:end]`. "No answer" is '' with start and end 0.
  `score` is None if the context has no legal span. Probabilities are posteriors
  among all spans of all windows and null (except if the null rule is `never`),
  so that they can be compared between contexts. They are at the calibration
  temperature, or at 1 without calibration.
  """

  text: str
  start: int  # characters of the context
  end: int  # exclusive
  score: float | None  # of the best span, also if there is no answer
  null_score: float
  probability: float  # of this answer, or of null if there is no answer
  null_probability: float
  n_best: tuple[dict[str, Any], ...] = dataclasses.field(
      default=(), repr=False)


@dataclasses.dataclass(frozen=True, repr=False)
class QA:
  """A trained model with its tokenizer and config, as `load` returns it."""

  model: qa.QAModel
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config
  calibration: calibration_lib.Calibration | None = None  # None: not in use
  # The null threshold of the config before that of the calibration.
  uncalibrated_threshold: float = 0.0
  window_note: str = ''  # see pretrained.Pretrained
  step: int | None = None  # of the checkpoint; None: not of a run
  # The calibration of the run, whether it fits config.decode or not.
  stored_calibration: calibration_lib.Calibration | None = None

  def __repr__(self) -> str:
    sizes, decode = self.model.config, self.config.decode
    return (f'QA(head={self.config.model.head!r}, '
            f'layers={sizes.num_layers}, hidden_size={sizes.hidden_size}, '
            f'max_length={self.config.data.max_length}, '
            f'null_rule={decode.null_rule!r}, '
            f'calibrated={self.calibration is not None})')

  def answer(self, question: str, context: str, *,
             n_best: int | None = None) -> Answer:
    """Returns the best span of the context, or no answer by the null rule.

    `n_best` is the most candidates in `Answer.n_best`; without it, and at most
    if decode.merge merges candidates, it is decode.n_best. It never changes the
    answer. A call `qa(question, context)` does the same.

    Raises:
      UserError: `question` or `context` is no text, or `n_best` is below 1.
    """
    return self._answer_examples([_example('0', question, context)],
                                 n_best=n_best)[0]

  __call__ = answer

  def answer_batch(self, questions: Iterable[dict[str, str]],
                   progress: str = '', *, cache: bool = False,
                   n_best: int | None = None) -> list[Answer]:
    """Returns the answers to dicts with `question` and `context`.

    A dict may have an `id`, which is not used. If `cache`, the windows are
    stored in the cache of windows, like those of a data set. `progress` names a
    progress bar. `n_best` is that of `answer`.

    Raises:
      UserError: `questions` is no list of dicts, or a dict lacks a text or has
        an unknown key; the message names the row.
    """
    if isinstance(questions, (str, Mapping)) or not isinstance(
        questions, Iterable):
      raise errors.UserError(
          f'questions is {type(questions).__name__}, expected a list of dicts '
          'with question and context')
    return self._answer_examples(
        [_row_example(i, row) for i, row in enumerate(questions)],
        progress, cache=cache, n_best=n_best)

  def _answer_examples(self, rows: list[examples_lib.Example],
                       progress: str = '', *, cache: bool = False,
                       n_best: int | None = None) -> list[Answer]:
    n_best = plain(n_best)
    if n_best is not None:
      errors.require(
          type(n_best) is int and n_best >= 1,
          f'n_best={n_best!r}, expected an integer of at least 1')
      # More candidates to merge would give other answers.
      if (n_best > self.config.decode.n_best
          and self.config.decode.merge == 'none'):
        return with_options(self, n_best=n_best)._answer_examples(
            rows, progress, cache=cache)
    if cache:
      windows, note = input_pipeline.load_windows(
          self.config, rows, self.tokenizer)
      console.say(note)
    else:
      windows = input_pipeline.make_windows(self.config, rows, self.tokenizer)
      if note := input_pipeline.cut_note(self.config, windows):
        console.say_once(note)
    self.say_window_note(windows)
    answers = decode_lib.answer_questions(
        self.model, self.params, windows, self.config, progress=progress,
        temperature=self._temperature)
    answered = [self._answer(row, answers, e) for e, row in enumerate(rows)]
    return [dataclasses.replace(a, n_best=a.n_best[:n_best]) for a in answered]

  def say_window_note(self, windows: windows_lib.WindowSet) -> None:
    """Prints `window_note` once, if windows are several or questions long."""
    longest = windows.questions.lengths.max(initial=0)
    if self.window_note and (
        len(windows) > len(windows.examples)
        or longest >= self.config.data.max_question_length):
      console.say_once(self.window_note)

  def _answer(self, row: examples_lib.Example, answers: answers_lib.Answers,
              e: int) -> Answer:
    candidates = answers_lib.n_best_rows(row, answers, e)
    best = candidates[0] if candidates else {
        'text': '', 'start': 0, 'end': 0, 'score': None, 'probability': 0.0}
    null = float(np.exp(answers.null_log_p[e]))
    if selective.declines(answers.na_score[e],
                          self.config.decode.null_threshold):
      best = {**best, 'text': '', 'start': 0, 'end': 0, 'probability': null}
    return Answer(**best, null_score=float(answers.null_score[e]),
                  null_probability=null, n_best=tuple(candidates))

  def spans(self, question: str, context: str) -> span_view.SpanView:
    """Returns tokens and scores of the window that holds the best span."""
    windows = input_pipeline.make_windows(
        self.config, [_example('0', question, context)], self.tokenizer)
    return span_view.view_window(
        self.model, self.params, windows, self.config,
        temperature=self._temperature)

  @property
  def _temperature(self) -> float:
    return self.calibration.temperature if self.calibration else 1.0

  def warm_up(self) -> int:
    """Compiles all programs of `answer` and `spans` and returns their number.

    They are the programs for one device and windows that are not packed.
    """
    windows = input_pipeline.make_windows(
        self.config, [examples_lib.Example('0', '', '')], self.tokenizer)
    calls = []
    for length in input_pipeline.batch_buckets(self.config):
      inputs = self.model, self.params, self.config, windows, length
      calls += [span_view.call_of_bucket(*inputs),
                *decode_lib.calls_of_bucket(*inputs)]
    lower = {number: lambda run=run, arguments=arguments: run.lower(*arguments)
             for number, (run, arguments) in enumerate(calls, 1)}
    with (compilation.Compilation('a program of answers', lower) as programs,
          contextlib.closing(console.Progress('compile', len(lower))) as bar):
      for number in lower:
        programs.wait(number)
        bar.update(number)
    for run, arguments in calls:  # the first call of a program is slower
      jax.block_until_ready(run(*arguments))
    return len(calls)


def _example(number: str, question: Any, context: Any,
             place: str = '') -> examples_lib.Example:
  return examples_lib.Example(
      number, examples_lib.check_text(question, f'question{place}'),
      examples_lib.check_text(context, f'context{place}'))


def _row_example(i: int, row: Any) -> examples_lib.Example:
  if not isinstance(row, Mapping):
    raise errors.UserError(f'row {i} is {type(row).__name__}, expected a dict '
                           'with question and context')
  for key in row:
    if key not in QUESTION_FIELDS:
      raise errors.UserError(
          f'row {i} has the unknown key {key!r}'
          f'{errors.did_you_mean(str(key), QUESTION_FIELDS)}')
  return _example(str(i), row.get('question'), row.get('context'),
                  f' of row {i}')


def load(source: str | os.PathLike[str], *, checkpoint: str | int = 'best',
         calibrated: bool = True, allow_code: Iterable[str] = (),
         **overrides: Any) -> QA:
  """Reads a model from a run directory, a checkpoint directory or a hub id.

  A checkpoint directory is one of Hugging Face or TensorFlow. `checkpoint`
  ('best', 'last' or a step, as 3000) chooses among the checkpoints of a run.
  If `calibrated`, the run's calibration.json is used, provided that it was
  computed for this checkpoint and this config.decode.

  `allow_code` names the packages of your own heads, objectives, data sources,
  null rules and searches that the config of the run may import. A run that
  names another package is refused, since a directory is data.

  `overrides` replace fields of config.decode, such as `max_answer_length=10` or
  `null_rule='never'`, of config.data (`max_length`, `window_overlap`,
  `max_question_length`, `buckets`, `packing` and `cache`), and
  config.model.attention. Without `attention`, the attention of the run is used
  if this machine supports it, and `auto` otherwise.

  Raises:
    UserError: `source` is nothing of these, is damaged, or is an encoder
      without a span head, or an option is unknown or wrong.
  """
  if not isinstance(source, (str, os.PathLike)):
    raise errors.UserError(
        f'source is {type(source).__name__}, expected a path or a hub id')
  checkpoint = plain(checkpoint)
  if type(checkpoint) not in (str, int):
    raise errors.UserError(
        f'checkpoint={checkpoint!r}, expected best, last or a step')
  if isinstance(allow_code, str) or not isinstance(allow_code, Iterable):
    raise errors.UserError(f'allow_code={allow_code!r}, expected a tuple of '
                           "packages, such as ('my_project',)")
  if type(calibrated) is not bool:
    raise errors.UserError(f'calibrated={calibrated!r}, expected bool')
  checkpoint = str(checkpoint)
  run = RunDirectory(pathlib.Path(source))
  if not run.is_run():
    check_no_choice(checkpoint, source)
    return _load_pretrained(run, source, allow_code, overrides)
  stored_config = run.read_config(allow_code)
  config = _override(stored_config, overrides)
  tokenizer = tokenizer_files.read_tokenizer(run.tokenizer)
  sizes = run.read_encoder_config()
  if 'attention' not in overrides:
    config, note = build.usable_attention(config, sizes)
    if note:
      console.say(note)
  model = build.build_model(config, sizes)
  _check_fits(model, config, tokenizer)
  shapes = qa.param_shapes(model)
  step = run.resolve_step(checkpoint)
  params = run.read_parameters(str(step), shapes)
  uncalibrated = stored_config.decode.null_threshold
  stored = calibration_lib.read_calibration(run.path) if calibrated else None
  config, calibration = (_calibrate(config, stored, run, step, overrides)
                         if stored else (config, None))
  return QA(model, params, tokenizer, config, calibration, uncalibrated,
            step=step, stored_calibration=stored)


def check_no_choice(checkpoint: str | int,
                    source: str | os.PathLike[str]) -> None:
  """Raises a UserError if `checkpoint` is chosen of a source that is no run."""
  errors.require(
      checkpoint == 'best',
      f'checkpoint={checkpoint!r} chooses among the checkpoints of a run, but '
      f'{source} is no run directory; leave it out')


def with_options(qa: QA, *, batch_size: int | None = None,
                 **overrides: Any) -> QA:
  """Returns the model with other options of `load`, and its calibration.

  `batch_size` is config.train.eval_batch_size. A UserError is raised if an
  option is unknown, wrong or does not fit the model.
  """
  config = _override(qa.config, overrides)
  if batch_size:
    config = dataclasses.replace(config, train=dataclasses.replace(
        config.train, eval_batch_size=batch_size))
  _check_fits(qa.model, config, qa.tokenizer)
  return dataclasses.replace(qa, config=config)


def _load_pretrained(run: RunDirectory, source: str | os.PathLike[str],
                     allow_code: Iterable[str], overrides: dict[str, Any]
                     ) -> QA:
  if run.config_file.is_file() and run.encoder_file.is_file():
    raise errors.UserError(f'{source} holds no checkpoint; train first')
  checkpoint = pretrained.read_pretrained(str(source), allow_code)
  if not checkpoint.has_head:
    kind = checkpoint.architecture
    raise errors.UserError(
        f'{source} is {f"a {kind}" if kind else "an encoder"} without a span '
        'head of a class …ForQuestionAnswering: fine-tune it first: python -m '
        'experiments.train --config=configs/squad1.py --config.model.preset= '
        f'--config.model.init_from={source} --workdir=RUN')
  for note in checkpoint.notes:
    console.say(note)
  config = _override(checkpoint.config, overrides)
  model = checkpoint.model.clone(attention=config.model.attention)
  _check_fits(model, config, checkpoint.tokenizer)
  return QA(model, checkpoint.params, checkpoint.tokenizer, config,
            window_note=(checkpoint.window_note
                         if config.data == checkpoint.config.data else ''))


def _override(config: config_lib.Config,
              overrides: dict[str, Any]) -> config_lib.Config:
  values = config.to_dict()
  fields = {'decode': tuple(values['decode']), 'data': DATA_OPTIONS,
            'model': ('attention',)}
  for key, value in overrides.items():
    groups = [group for group, names in fields.items() if key in names]
    if not groups:
      known = [name for names in fields.values() for name in names]
      raise errors.UserError(
          f'load() has no option {key!r}; it takes {", ".join(known)}'
          if key in values['data'] else
          f'load() has no option {key!r}{errors.did_you_mean(key, known)}')
    values[groups[0]][key] = plain(value)
  return config_lib.check_config(values)


def plain(value: Any) -> Any:
  """Returns a number or an array of numpy as a number or a list of Python."""
  return (value.tolist() if isinstance(value, np.generic | np.ndarray)
          else value)


def refit_calibration(qa: QA) -> QA:
  """Returns the model with the stored calibration in use only if it fits.

  Prints a line if this is a change. The null threshold stays.
  """
  stored = qa.stored_calibration
  if stored is None:
    return qa
  problem = _misfit(stored, qa.step, qa.config)
  if bool(problem) == bool(qa.calibration):
    console.say(problem or (
        f'{calibration_lib.NAME}: temperature {stored.temperature:.4g} in use'))
  return dataclasses.replace(qa, calibration=None if problem else stored)


def _misfit(calibration: calibration_lib.Calibration, step: int,
            config: config_lib.Config) -> str:
  """Returns the message that a calibration does not fit, or ''."""
  decode = dataclasses.asdict(config.decode)
  problem = calibration.misfit(step, decode)
  return problem and (f'{calibration_lib.NAME} {problem}: not used; '
                      f'{calibration.remedy(decode)}')


def _calibrate(config: config_lib.Config,
               calibration: calibration_lib.Calibration, run: RunDirectory,
               step: int, overrides: Mapping[str, Any]) -> tuple[
                   config_lib.Config, calibration_lib.Calibration | None]:
  """Returns the config with the calibrated null threshold, and calibration."""
  if problem := _misfit(calibration, step, config):
    console.say(problem)
    return config, None
  said = f'{run.path / calibration_lib.NAME}: '
  in_use = f'temperature {calibration.temperature:.4g} in use'
  threshold, configured = calibration.threshold, config.decode.null_threshold
  if threshold is None:
    console.say(f'{said}{in_use}')
    return config, calibration
  if 'null_threshold' in overrides:
    console.say(f'{said}null threshold {threshold:.4g} is replaced by the '
                f'given null_threshold={configured:.4g}, {in_use}')
    return config, calibration
  console.say(f'{said}null threshold {threshold:.4g} replaces {configured:.4g} '
              f'of the config, {in_use}')
  return dataclasses.replace(config, decode=dataclasses.replace(
      config.decode, null_threshold=threshold)), calibration


def _check_fits(model: qa.QAModel, config: config_lib.Config,
                tokenizer: tokenizer_lib.Tokenizer) -> None:
  build.check_positions(config, model.config)
  windows_lib.check_limit(config.data.max_length, tokenizer)
  windows_lib.check_lengths(**input_pipeline.window_lengths(config),
                            outer_length=tokenizer.outer_length)
  build.check_attention(config, model.config, training=False)
  build.check_decode(config.decode, model.head, registry.build(
      objectives.OBJECTIVES, config.objective, what='objective',
      kind=objectives.Objective), config.data.max_length)


def _question_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place, row); the error at other JSON says what a line must be."""
  hint = ('; a line is {"question": …, "context": …}; answer SQuAD JSON by '
          'python -m experiments.evaluate --data')
  rows = files.parse_rows(files.read_text(path), path)
  try:
    place, row = first = next(rows, ('', {}))
  except errors.UserError as e:
    raise errors.UserError(f'{e}{hint}') from None
  errors.require('question' in row or not {'data', 'paragraphs', 'qas'} & {
      *row}, f'{place} is no question{hint}')
  yield from itertools.chain([first] if place else [], rows)


def read_questions(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a JSONL file, or raises a UserError that names the line.

  Each row has the texts `question` and `context`, and may have an `id`, a text
  or an integer. Other fields, such as gold answers, are left out.
  """
  rows = []
  for place, row in _question_rows(path):
    for key in ('question', 'context'):
      errors.require(key in row, f'{place}: there is no {key!r}')
      examples_lib.check_text(row[key], f'{place}: {key}')
    if 'id' in row and type(row['id']) is not int:
      examples_lib.check_text(row['id'], f'{place}: id')
    rows.append({key: row[key] for key in QUESTION_FIELDS if key in row})
  return rows
