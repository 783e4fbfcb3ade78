"""A run and held-out questions → the run's calibration.json."""

from collections.abc import Sequence
import dataclasses
import pathlib

import numpy as np

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.data import sources
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.decoding import answers
from qa_jax.decoding import candidates
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import calibration
from qa_jax.metrics import squad
from qa_jax.runtime import console


def calibrate(workdir: pathlib.Path, data: str, *,
              checkpoint: str = 'best', progress: str = '') -> dict[str, float]:
  """Chooses the threshold on `data` and stores it; what is to be told.

  Raises:
    UserError: no run, or one that was trained on some of the questions.
  """
  if not RunDirectory(workdir).is_run():
    raise errors.UserError(
        f'{workdir} is not a run: what is chosen is stored with one')
  qa = predict.load(workdir, checkpoint=checkpoint, calibrated=False)
  windows, made = input_pipeline.load_windows(qa.config, data, qa.tokenizer)
  console.say(made)
  examples = windows.examples
  check_untrained(workdir, data, examples)
  parts, fitted_to = [], []
  blocks = windows.blocks(decode_lib.BLOCK)
  for n, (_, block) in enumerate(blocks, 1):
    spans = decode_lib.score_windows(
        qa.model, qa.params, block, qa.config, golds=True,
        temperatures=calibration.TEMPERATURES,
        progress=decode_lib.progress_label(progress, n, len(blocks)))
    parts.append(answers.merge_windows(
        block, dataclasses.replace(spans, log_partition=None),
        n_best=qa.config.decode.n_best,
        null_rule=qa.config.decode.null_rule))
    fitted_to.append(_fitting(block, spans, qa.config.decode))
  found = answers.join_answers(parts, [first for first, _ in blocks])
  threshold, values = _threshold(examples, found, qa.config.decode)
  temperature, fitted = _temperature(fitted_to)
  values |= fitted
  decode = qa.config.to_dict()['decode']
  calibration.write_calibration(workdir, calibration.Calibration(
      threshold=threshold, temperature=temperature, data=data,
      sha256=store.fingerprint(examples), questions=len(examples),
      checkpoint=RunDirectory(workdir).resolve_step(checkpoint),
      decode={name: decode[name] for name in calibration.DECODE}), values)
  return values


def _threshold(examples: Sequence[Example], found: answers.Answers,
               decode: config_lib.Decode
               ) -> tuple[float | None, dict[str, float]]:
  """The threshold of the best F1; EM and F1 there and at 0."""
  if decode.null_rule == 'never' or not any(e.impossible for e in examples):
    console.say('no threshold: the null rule is never' if decode.null_rule ==
                'never' else 'no threshold: every question has an answer')
    return None, {'questions': len(examples)}
  em, f1 = squad.per_question(
      examples, answers.answer_texts(examples, found), '2.0')
  silent = np.array([float(not e.gold_texts) for e in examples])
  threshold, _ = calibration.choose_threshold(found.na_score, f1, silent)
  values: dict[str, float] = {
      'questions': len(examples), 'threshold': threshold}
  for name, at in (('zero', 0.0), ('held_out', threshold)):
    none = found.na_score > at
    values[f'at_{name}_exact_match'] = 100 * float(
        np.where(none, silent, em).mean())
    values[f'at_{name}_f1'] = 100 * float(np.where(none, silent, f1).mean())
  return threshold, values


def _fitting(windows: windows_lib.WindowSet, spans: candidates.WindowSpans,
             decode: config_lib.Decode) -> calibration.TemperatureData:
  """What is known of the questions whose answer, or null, can be found."""
  examples = windows.examples
  first = np.searchsorted(windows.example_of, np.arange(len(examples)))
  best = np.maximum.reduceat(
      (spans.score[:, 0] if spans.exact is None else spans.exact).astype(
          np.float64), first)
  row, column = np.nonzero(spans.gold_scores > candidates.NO_SPAN / 2)
  gold_of = windows.example_of[row]
  nulls = decode.null_rule != 'never'
  fits = np.zeros(len(examples), bool)
  fits[gold_of] = True
  if nulls:
    fits |= np.array([e.impossible for e in examples])
  fits &= best > candidates.NO_SPAN
  keep = fits[gold_of]
  return calibration.TemperatureData(
      mass=np.logaddexp.reduceat(
          spans.log_partition.astype(np.float64), first, axis=0)[fits],
      best=best[fits],
      null=np.minimum.reduceat(spans.null.astype(np.float64), first)[fits]
      if nulls else None,
      gold=spans.gold_scores[row, column].astype(np.float64)[keep],
      gold_of=(np.cumsum(fits) - 1)[gold_of[keep]])


def _temperature(parts: Sequence[calibration.TemperatureData]
                 ) -> tuple[float, dict[str, float]]:
  """The temperature, and the loss before and after."""
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
  """Refuses questions whose contexts a run, or one it began from, has seen.

  Articles that are shared, without a context that is, are told in a line.

  Raises:
    UserError: some were trained on, or that cannot be told.
  """
  contexts = {e.context for e in examples}
  titles = {e.title for e in examples} - {''}
  run: pathlib.Path | None = workdir
  while run:
    config = RunDirectory(run).read_config()
    trained = _trained_on(run, config.data.train)
    seen = contexts & {e.context for e in trained}
    if seen:
      count = sum(e.context in seen for e in examples)
      raise errors.UserError(
          f'{count} of {len(examples)} questions of {data} are about contexts '
          f'that {run} was trained on; hold out articles: config.data.train='
          "'articles(of=\"…\", high=0.9)' and --data='articles(of=\"…\", "
          "low=0.9)'")
    shared = titles & {e.title for e in trained}
    if shared:
      console.say(f'warning: {len(shared)} of {len(titles)} articles of {data} '
                  f'were trained on in part, such as {min(shared)!r}')
    source = pathlib.Path(config.model.init_from)
    run = source if config.model.init_from and RunDirectory(source).is_run(
        ) else None


def _trained_on(run: pathlib.Path, spec: str) -> Sequence[Example]:
  """The training data as they were."""
  try:
    examples = sources.load_examples(spec)
  except errors.UserError as e:
    raise errors.UserError(
        f'whether {run} was trained on these questions cannot be told: {e}'
        ) from None
  expected = files.read_object(run / 'run.json').get('sha256', {}).get('train')
  if store.fingerprint(examples) != expected:
    raise errors.UserError(
        f'whether {run} was trained on these questions cannot be told: {spec} '
        'has changed since; restore the file')
  return examples
