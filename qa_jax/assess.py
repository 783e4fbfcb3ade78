"""A model on a data set: what `evaluate`, suites and ensembles share."""

import pathlib

import jax

from qa_jax import build
from qa_jax import evaluate
from qa_jax import features
from qa_jax import logs
from qa_jax import parallel
from qa_jax import predict
from qa_jax import processes
from qa_jax.data import store
from qa_jax.data import windows as windows_lib


def on(qa: predict.QA, data: str, *, output: pathlib.Path | None,
       progress: str = '') -> dict[str, float]:
  """Metrics of a loaded model on a SPEC; writes the files under `output`.

  Raises:
    UserError: data that cannot be had, or scores that are not finite.
  """
  return of(qa, features.load(qa.config, data, qa.tokenizer), output=output,
            progress=progress)


def of(qa: predict.QA, loaded: tuple[windows_lib.WindowSet, str], *,
       output: pathlib.Path | None, progress: str = '') -> dict[str, float]:
  """The same of what `features.load` gave."""
  windows, made = loaded
  mesh = parallel.data_mesh()
  evaluator = evaluate.Evaluator(
      qa.model, windows, qa.config, mesh, calibration=qa.calibration)
  logs.say(made)
  if qa.calibration and qa.calibration.sha256 == store.fingerprint(
      windows.examples):
    logs.say('warning: the threshold was chosen on these very questions')
  params = processes.put(qa.params, jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec()))  # a copy on every device
  return evaluator.evaluate(params, output=output, progress=progress)


def place(workdir: pathlib.Path, data: str) -> pathlib.Path | None:
  """Where a run keeps an evaluation; None of what is no run."""
  if not build.is_run(workdir):
    return None
  return workdir / 'eval' / evaluate.data_name(data)
