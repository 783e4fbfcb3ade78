"""Calibration of a run on held-out questions → its calibration.json."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import examples as examples_lib
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import selective
from qa_jax.metrics import squad
from qa_jax.runtime import console

# calibrate_run warns below this number n of questions. Two standard errors of a
# rate of 50 % are 200 · √(0.25 / n) = 100 / √n points: 7 points for 200.
ENOUGH_QUESTIONS = 200


def calibrate_run(workdir: pathlib.Path, data: str, *,
                  checkpoint: str | int = 'best', progress: str = '',
                  **overrides: Any) -> dict[str, float]:
  """Chooses threshold and temperature on `data` and stores them with the run.

  Returns the metrics of the held-out questions to print. `data` is a SPEC;
  `checkpoint` is 'best', 'last' or a step. `overrides` are those of
  `predict.load`.

  Raises:
    UserError: there is no run, it was trained on some of the questions,
      neither a threshold nor a temperature can be computed on them, or
      `overrides` sets the threshold.
  """
  if not RunDirectory(workdir).is_run():
    raise errors.UserError(
        f'{workdir} is not a run: a calibration is stored with a run')
  if 'null_threshold' in overrides:
    raise errors.UserError(
        f'null_threshold={overrides["null_threshold"]}: a calibration chooses '
        'the threshold itself; leave it out')
  qa = predict.load(workdir, checkpoint=checkpoint, calibrated=False,
                    **overrides)
  windows, note = input_pipeline.load_windows(qa.config, data, qa.tokenizer)
  console.say(note)
  examples, decode = windows.examples, qa.config.decode
  examples_lib.check_answered(examples, data)
  check_untrained(workdir, data, examples)
  if len(examples) < ENOUGH_QUESTIONS:
    console.say(
        f'warning: {data} has {len(examples)} questions. Below '
        f'{ENOUGH_QUESTIONS} the threshold and the temperature depend on which '
        'questions were drawn: a rate of right answers is known to '
        f'{100 / len(examples) ** 0.5:.0f} points only; hold out more')
  first_windows, blocks, parts = [], [], []
  for first, block, label in decode_lib.numbered_blocks(windows, progress):
    spans = decode_lib.score_windows(
        qa.model, qa.params, block, qa.config, golds=True,
        temperatures=calibration.TEMPERATURES, progress=label)
    first_windows.append(first)
    blocks.append(answers_lib.merge_windows(
        block, dataclasses.replace(spans, log_partition=None),
        n_best=decode.n_best, null_rule=decode.null_rule, merge=decode.merge))
    parts.append(_temperature_data(block, spans, decode))
  answers = answers_lib.join_answers(blocks, first_windows)
  threshold, metrics = _choose_threshold(examples, answers, decode)
  temperature, fit = _fit_temperature(parts)
  if threshold is None and not fit:
    raise errors.UserError(
        f'{data}: none of its {len(examples)} questions can choose a threshold '
        f'or fit a temperature, so {workdir / calibration.NAME} is not written;'
        ' give --data questions with answers that can be found, or some without'
        ' an answer')
  metrics |= fit
  fields = qa.config.to_dict()['decode']
  calibration.write_calibration(workdir, calibration.Calibration(
      threshold=threshold, temperature=temperature, data=data,
      sha256=store.fingerprint(examples), questions=len(examples),
      checkpoint=qa.step,
      decode={name: fields[name] for name in calibration.DECODE}), metrics)
  return metrics


def _choose_threshold(examples: Sequence[Example], answers: answers_lib.Answers,
                      decode: config_lib.Decode
                      ) -> tuple[float | None, dict[str, float]]:
  """Returns the threshold of the best F1, and EM and F1 at 0 and at it."""
  if decode.null_rule == 'never' or not any(e.impossible for e in examples):
    console.say('no threshold: the null rule is never' if decode.null_rule ==
                'never' else 'no threshold: every question has an answer')
    return None, {'questions': len(examples)}
  answered = squad.per_question(
      examples, answers_lib.answer_texts(examples, answers), '2.0')
  unanswered = squad.empty_scores(examples, '2.0')
  threshold, _ = calibration.choose_threshold(
      answers.na_score, answered[1], unanswered[1])
  if selective.declines(answers.na_score, threshold).all():
    console.say('never answer: on these questions F1 is best if none is '
                'answered')
  metrics = {'questions': len(examples), 'threshold': threshold}
  for name, t in (('zero', 0.0), ('held_out', threshold)):
    declined = selective.declines(answers.na_score, t)
    em, f1 = 100 * np.where(declined, unanswered, answered).mean(axis=1)
    metrics |= {f'at_{name}_exact_match': float(em), f'at_{name}_f1': float(f1)}
  return threshold, metrics


def _temperature_data(
    windows: windows_lib.WindowSet, spans: candidates.WindowSpans,
    decode: config_lib.Decode) -> calibration.TemperatureData:
  """Collects the scores of all questions that a temperature can be fitted to.

  Their gold span can be returned by a search, or null is their right answer.
  """
  examples = windows.examples
  first = np.searchsorted(windows.example_of, np.arange(len(examples)))
  exact = spans.score[:, 0] if spans.exact is None else spans.exact
  best = np.maximum.reduceat(exact.astype(np.float64), first)
  row, column = np.nonzero(spans.gold_scores > candidates.NO_SPAN / 2)
  gold_of = windows.example_of[row]
  with_null = decode.null_rule != 'never'
  fits = np.array([with_null and e.impossible for e in examples], bool)
  fits[gold_of] = True
  fits &= best > candidates.NO_SPAN
  usable = fits[gold_of]
  return calibration.TemperatureData(
      log_partition=np.logaddexp.reduceat(
          spans.log_partition.astype(np.float64), first, axis=0)[fits],
      best=best[fits],
      null=np.minimum.reduceat(spans.null.astype(np.float64), first)[fits]
      if with_null else None,
      gold=spans.gold_scores[row, column].astype(np.float64)[usable],
      gold_of=(np.cumsum(fits) - 1)[gold_of[usable]])


def _fit_temperature(parts: Sequence[calibration.TemperatureData]
                     ) -> tuple[float, dict[str, float]]:
  """Returns the temperature, and the loss before and after."""
  data = calibration.join_temperature_data(parts)
  temperature, before, after = calibration.fit_temperature(data)
  if not len(data.best):
    console.say('no temperature: no question has an answer that can be found')
    return temperature, {}
  low, high = calibration.TEMPERATURES[0], calibration.TEMPERATURES[-1]
  if not low * 1.001 < temperature < high * 0.999:
    console.say(f'warning: the temperature is at its bound, {temperature:.3g}')
  return temperature, {
      'fitted_on': len(data.best), 'temperature': temperature,
      'nats_before': before, 'nats': after}


def check_untrained(workdir: pathlib.Path, data: str,
                    examples: Sequence[Example]) -> None:
  """Checks that a run, and each run it began from, saw none of the contexts.

  Prints a warning if questions share an article with the training data, but no
  context. `data` is the SPEC of the examples, for messages. The runs end at one
  that was converted from a checkpoint of another project, whose data.train is
  empty.

  Raises:
    UserError: the run was trained on some of the contexts, or its training data
      or a run that it began from has changed or is missing, so that this cannot
      be checked.
  """
  contexts = {e.context for e in examples}
  titles = {e.title for e in examples} - {''}
  run: RunDirectory | None = RunDirectory(workdir)
  while run and (config := run.read_config()).data.train:
    trained = _training_examples(run, config.data.train)
    seen = contexts & {e.context for e in trained}
    if seen:
      count = sum(e.context in seen for e in examples)
      raise errors.UserError(
          f'{count} of {len(examples)} questions of {data} are about contexts '
          f'that {run.path} was trained on; hold out articles: '
          "config.data.train='articles(of=\"…\", high=0.9)' and "
          "--data='articles(of=\"…\", low=0.9)'")
    shared = titles & {e.title for e in trained}
    if shared:
      console.say(f'warning: {len(shared)} of {len(titles)} articles of {data} '
                  f'were trained on in part, such as {min(shared)!r}')
    run = _parent(run, config.model.init_from)


def _parent(run: RunDirectory, init_from: str) -> RunDirectory | None:
  """Returns the run that a run began from, None if it began from no run.

  A UserError is raised if this run is missing or another one has its place.
  """
  if not init_from:
    return None
  parent, hashes = RunDirectory(pathlib.Path(init_from)), _hashes(run)
  if parent.is_run():
    config = f'init_from: {parent.config_file.name}'
    if hashes.get(config, '') not in ('', files.sha256(parent.config_file)):
      raise errors.UserError(
          f'{_unknown(run)}: {init_from} is not the run that it began from; '
          f'restore that run, or work in the directory where {run.path} was '
          'trained')
    return parent
  if any(name.startswith('init_from: checkpoints/') for name in hashes):
    raise errors.UserError(
        f'{_unknown(run)}: the run {init_from}, from which it began, is not '
        f'there; restore it, or work in the directory where {run.path} was '
        'trained')
  return None


def _hashes(run: RunDirectory) -> dict[str, str]:
  """Reads the hashes of the inputs of a run."""
  return run.read_record().get('sha256', {})


def _unknown(run: RunDirectory) -> str:
  return f'whether {run.path} was trained on these questions cannot be told'


def _training_examples(run: RunDirectory, spec: str) -> Sequence[Example]:
  """Reads training data; raises a UserError if it is missing or has changed."""
  try:
    examples = sources.load_examples(spec)
  except errors.UserError as e:
    raise errors.UserError(f'{_unknown(run)}: {e}') from None
  if store.fingerprint(examples) != _hashes(run).get('train'):
    raise errors.UserError(
        f'{_unknown(run)}: {spec} has changed since; restore the file')
  return examples
