"""Ask a question: `load(...)` for notebooks, batches for JSONL."""

from collections.abc import Iterable, Mapping, Sequence
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
  """An answer: `context[start:end] == text`; '' at (0, 0) is "no answer"."""

  text: str
  start: int  # character offsets into the context, end exclusive
  end: int
  score: float
  null_score: float
  # Posteriors among all spans of all windows of the context and no answer, at
  # the run's temperature: comparable from one context to the next. Without
  # calibration the temperature is 1; by the null rule `never`, no answer is not
  # among the outcomes.
  probability: float  # of this answer, or of none if that is what it is
  null_probability: float
  n_best: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class QA:
  """A trained model with its tokenizer and decoding options."""

  model: qa.QAModel
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  config: config_lib.Config
  calibration: calibration_lib.Calibration | None = None  # in use

  def answer(self, *, question: str, context: str) -> Answer:
    """The best span of the context, or '' if the null rule says so."""
    return self.answer_batch([{'question': question, 'context': context}])[0]

  def answer_batch(self, questions: Iterable[dict[str, str]],
                   progress: str = '', *,
                   cache: bool = False) -> list[Answer]:
    """Answers dicts with `question` and `context`, batched and bucketed.

    Their windows are kept as those of a data set if `cache`.
    """
    rows = [examples_lib.Example(
        str(i),
        examples_lib.check_text(q.get('question'), f'question of row {i}'),
        examples_lib.check_text(q.get('context'), f'context of row {i}'))
            for i, q in enumerate(questions)]
    if cache:
      windows, made = input_pipeline.load_windows(self.config, rows,
                                                  self.tokenizer)
      console.say(made)
    else:
      windows = input_pipeline.make_windows(self.config, rows, self.tokenizer)
    answers = decode_lib.answer_questions(
        self.model, self.params, windows, self.config, progress=progress,
        temperature=self.calibration.temperature if self.calibration else 1.0)
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
    """Tokens, start and end scores, and the band of the outer sum.

    Raises:
      UserError: question and context need more than one window.
    """
    row = examples_lib.Example(
        '0', examples_lib.check_text(question, 'question'),
        examples_lib.check_text(context, 'context'))
    return span_view.span_view(
        self.model, self.params,
        input_pipeline.make_windows(self.config, [row], self.tokenizer),
        self.config)


def load(source: str | pathlib.Path, *, checkpoint: str = 'best',
         calibrated: bool = True, **overrides: Any) -> QA:
  """A workdir, a Hugging Face or TensorFlow directory, or a hub id → QA.

  What a run's calibration.json says is used if `calibrated` and if it is of
  this checkpoint and way of decoding. `overrides` replace fields of
  config.decode and config.data, such as `max_answer_length=10` or
  `null_rule='never'`, and `attention`. Without that, a run's own is used if it
  can be here, else `auto`.

  Raises:
    UserError: none of these, damaged, or an encoder without span head.
  """
  directory = pathlib.Path(source)
  if RunDirectory(directory).is_run():
    config = _override(RunDirectory(directory).read_config(), overrides)
    words = tokenizer_lib.read_tokenizer(directory / 'tokenizer')
    sizes = RunDirectory(directory).read_encoder_config()
    if 'attention' not in overrides:
      config, note = build.usable_attention(config, sizes)
      if note:
        console.say(note)
    model = build.build_model(config, sizes)
    _check_fits(model, config)
    shapes = jax.eval_shape(lambda: qa.init_params(model, jax.random.key(0)))
    params = RunDirectory(directory).read_parameters(checkpoint, shapes)
    found = calibration_lib.read_calibration(directory) if calibrated else None
    if found:
      config, found = _calibrated(config, found,
                                  RunDirectory(directory).resolve_step(checkpoint),
                                  overrides)
    return QA(model, params, words, config, found)
  if (directory / 'config.json').is_file() and (
      directory / 'encoder.json').is_file():
    raise errors.UserError(f'{directory} holds no checkpoint; train first')
  found = pretrained.read_pretrained(str(source))
  if not found.has_head:
    raise errors.UserError(
        f'{source} is an encoder without a span head: fine-tune it first '
        '(config.model.init_from)')
  for note in found.notes:
    console.say(note)
  config = _override(found.config, overrides)
  model = found.model.clone(attention=config.model.attention)
  _check_fits(model, config)
  return QA(model, found.params, found.tokenizer, config)


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


def _calibrated(
    config: config_lib.Config, found: calibration_lib.Calibration,
    step: int, overrides: Mapping[str, Any],
    ) -> tuple[config_lib.Config, calibration_lib.Calibration | None]:
  """The config with the stored threshold, if what is stored fits."""
  decode = dataclasses.asdict(config.decode)
  problem = found.misfit(step, decode)
  if problem:
    console.say(f'{calibration_lib.NAME} {problem}: not used; calibrate anew')
    return config, None
  if found.threshold is None or 'null_threshold' in overrides:
    return config, found
  return dataclasses.replace(config, decode=dataclasses.replace(
      config.decode, null_threshold=found.threshold)), found


def _check_fits(model: qa.QAModel, config: config_lib.Config) -> None:
  build.check_positions(config, model.config)
  build.check_attention(config, model.config, training=False)
  build.check_decode(config.decode, model.head, registry.build(
      objectives.OBJECTIVES, config.objective, what='objective'))


def read_questions(path: pathlib.Path) -> Sequence[dict[str, Any]]:
  """Rows of a JSONL file, each with `question` and `context` (and `id`).

  Raises:
    UserError: the file is missing or a line is not such an object, by number.
  """
  rows = []
  for number, line in enumerate(files.read_text(path).split('\n'), 1):
    if line.strip():
      row = files.parse_object(line, f'{path}:{number}')
      for key in ('question', 'context'):
        examples_lib.check_text(row.get(key), f'{path}:{number}: {key}')
      if 'id' in row and type(row['id']) is not int:
        examples_lib.check_text(row['id'], f'{path}:{number}: id')
      rows.append(row)
  return rows
