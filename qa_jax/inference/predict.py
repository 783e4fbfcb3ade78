"""Answers to questions by a trained model: `load(...)` returns a QA."""

from collections.abc import Iterable, Mapping
import dataclasses
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
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates as candidates_lib
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import pretrained
from qa_jax.inference import span_view
from qa_jax.io import files
from qa_jax.metrics import calibration as calibration_lib
from qa_jax.metrics import selective
from qa_jax.models import qa
from qa_jax.runtime import console


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to one question, with the n-best candidates.

  `text` is `context[start:end]`. "No answer" is '' with start and end 0.
  Probabilities are posteriors among all spans of all windows and null (except
  if the null rule is `never`), so that they can be compared between contexts.
  They are at the calibration temperature, or at 1 without calibration.
  """

  text: str
  start: int  # characters of the context
  end: int  # exclusive
  score: float
  null_score: float
  probability: float  # of this answer, or of null if there is no answer
  null_probability: float
  n_best: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class QA:
  """A trained model with its tokenizer and config."""

  model: qa.QAModel
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config
  calibration: calibration_lib.Calibration | None = None  # None: not in use

  def answer(self, *, question: str, context: str) -> Answer:
    """Returns the best span of the context, or no answer by the null rule."""
    return self.answer_batch([{'question': question, 'context': context}])[0]

  def answer_batch(self, questions: Iterable[dict[str, str]],
                   progress: str = '', *, cache: bool = False) -> list[Answer]:
    """Returns the answers to dicts with `question` and `context`.

    If `cache`, the windows are stored in the cache of windows, like those of a
    data set. `progress` names a progress bar.
    """
    rows = [_example(str(i), q.get('question'), q.get('context'),
                     f' of row {i}') for i, q in enumerate(questions)]
    if cache:
      windows, note = input_pipeline.load_windows(
          self.config, rows, self.tokenizer)
      console.say(note)
    else:
      windows = input_pipeline.make_windows(self.config, rows, self.tokenizer)
    answers = decode_lib.answer_questions(
        self.model, self.params, windows, self.config, progress=progress,
        temperature=self.calibration.temperature if self.calibration else 1.0)
    decode_lib.check_finite(answers)
    return [self._answer(row, answers, e) for e, row in enumerate(rows)]

  def _answer(self, row: examples_lib.Example, answers: answers_lib.Answers,
              e: int) -> Answer:
    candidates = answers_lib.n_best_rows(row, answers, e)
    best = candidates[0] if candidates else {
        'text': '', 'start': 0, 'end': 0, 'score': candidates_lib.NO_SPAN,
        'probability': 0.0}
    null = float(np.exp(answers.null_log_p[e]))
    if selective.declines(answers.na_score[e],
                          self.config.decode.null_threshold):
      best = {**best, 'text': '', 'start': 0, 'end': 0, 'probability': null}
    return Answer(**best, null_score=float(answers.null_score[e]),
                  null_probability=null, n_best=tuple(candidates))

  def spans(self, question: str, context: str) -> span_view.SpanView:
    """Returns tokens and span scores; more than one window is a UserError."""
    windows = input_pipeline.make_windows(
        self.config, [_example('0', question, context)], self.tokenizer)
    return span_view.view_window(self.model, self.params, windows, self.config)

  def warm_up(self) -> int:
    """Compiles all programs of `answer` and `spans` and returns their number.

    They are the programs for one device and windows that are not packed.
    """
    windows = input_pipeline.make_windows(
        self.config, [examples_lib.Example('0', '', '')], self.tokenizer)
    programs = 0
    for length in input_pipeline.batch_buckets(self.config):
      inputs = self.model, self.params, self.config, windows, length
      span_view.warm_up(*inputs)
      programs += 1 + decode_lib.warm_up(*inputs)
    return programs


def _example(number: str, question: Any, context: Any,
             place: str = '') -> examples_lib.Example:
  return examples_lib.Example(
      number, examples_lib.check_text(question, f'question{place}'),
      examples_lib.check_text(context, f'context{place}'))


def load(source: str | pathlib.Path, *, checkpoint: str = 'best',
         calibrated: bool = True, **overrides: Any) -> QA:
  """Reads a model from a run directory, a checkpoint directory or a hub id.

  A checkpoint directory is one of Hugging Face or TensorFlow. `checkpoint`
  ('best', 'last' or a step) chooses among the checkpoints of a run directory.
  If `calibrated`, the run's calibration.json is used, provided that it was
  computed for this checkpoint and this config.decode.

  `overrides` replace fields of config.decode and config.data, such as
  `max_answer_length=10` or `null_rule='never'`, and config.model.attention.
  Without `attention`, the attention of the run is used if this machine
  supports it, and `auto` otherwise. A UserError is raised if `source` is
  nothing of these, is damaged, or is an encoder without a span head.
  """
  run = RunDirectory(pathlib.Path(source))
  if not run.is_run():
    return _load_pretrained(run, source, overrides)
  config = _override(run.read_config(), overrides)
  tokenizer = tokenizer_lib.read_tokenizer(run.tokenizer)
  sizes = run.read_encoder_config()
  if 'attention' not in overrides:
    config, note = build.usable_attention(config, sizes)
    if note:
      console.say(note)
  model = build.build_model(config, sizes)
  _check_fits(model, config)
  shapes = jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0)))
  params = run.read_parameters(checkpoint, shapes)
  config, calibration = (_calibrate(config, run, checkpoint, overrides)
                         if calibrated else (config, None))
  return QA(model, params, tokenizer, config, calibration)


def _load_pretrained(run: RunDirectory, source: str | pathlib.Path,
                     overrides: dict[str, Any]) -> QA:
  if run.config_file.is_file() and run.encoder_file.is_file():
    raise errors.UserError(f'{source} holds no checkpoint; train first')
  checkpoint = pretrained.read_pretrained(str(source))
  if not checkpoint.has_head:
    raise errors.UserError(
        f'{source} is an encoder without a span head: fine-tune it first '
        '(config.model.init_from)')
  for note in checkpoint.notes:
    console.say(note)
  config = _override(checkpoint.config, overrides)
  model = checkpoint.model.clone(attention=config.model.attention)
  _check_fits(model, config)
  return QA(model, checkpoint.params, checkpoint.tokenizer, config)


def _override(config: config_lib.Config,
              overrides: dict[str, Any]) -> config_lib.Config:
  values = config.to_dict()
  fields = {'decode': values['decode'], 'data': values['data'],
            'model': ('attention',)}
  for key, value in overrides.items():
    groups = [group for group, names in fields.items() if key in names]
    if not groups:
      known = [name for names in fields.values() for name in names]
      raise errors.UserError(
          f'load() has no option {key!r}{errors.did_you_mean(key, known)}')
    values[groups[0]][key] = value
  return config_lib.check_config(values)


def _calibrate(config: config_lib.Config, run: RunDirectory, checkpoint: str,
               overrides: Mapping[str, Any]) -> tuple[
                   config_lib.Config, calibration_lib.Calibration | None]:
  """Returns the config with the calibrated null threshold, and calibration."""
  calibration = calibration_lib.read_calibration(run.path)
  if calibration is None:
    return config, None
  problem = calibration.misfit(run.resolve_step(checkpoint),
                               dataclasses.asdict(config.decode))
  if problem:
    console.say(f'{calibration_lib.NAME} {problem}: not used; calibrate anew')
    return config, None
  said = f'{run.path / calibration_lib.NAME}: '
  if calibration.threshold is None or 'null_threshold' in overrides:
    console.say(f'{said}temperature {calibration.temperature:.4g} in use')
    return config, calibration
  console.say(
      f'{said}null threshold {calibration.threshold:.4g} replaces '
      f'{config.decode.null_threshold:.4g} of the config, temperature '
      f'{calibration.temperature:.4g}')
  return dataclasses.replace(config, decode=dataclasses.replace(
      config.decode, null_threshold=calibration.threshold)), calibration


def _check_fits(model: qa.QAModel, config: config_lib.Config) -> None:
  build.check_positions(config, model.config)
  build.check_attention(config, model.config, training=False)
  build.check_decode(config.decode, model.head, registry.build(
      objectives.OBJECTIVES, config.objective, what='objective'))


def read_questions(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a JSONL file, or raises a UserError that names the line.

  Each row has the texts `question` and `context`, and may have an `id`, a text
  or an integer.
  """
  rows = []
  for place, row in files.read_rows(path):
    for key in ('question', 'context'):
      examples_lib.check_text(row.get(key), f'{place}: {key}')
    if 'id' in row and type(row['id']) is not int:
      examples_lib.check_text(row['id'], f'{place}: id')
    rows.append(row)
  return rows
