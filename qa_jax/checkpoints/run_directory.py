"""The layout of a run directory, and the reading of a finished run."""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import pathlib
import re
from typing import Any

import jax

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry
from qa_jax.checkpoints import manager
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.io import files
from qa_jax.models import bert

# Fields that may differ in a resumed run: no computed value depends on them.
FREE_FIELDS = ('train.step_timeout_seconds',)
# Fields of earlier versions, without effect, that a stored config may have.
RETIRED_FIELDS = ('data.on_device',)


class RunDirectory:
  """A run directory: the only place that knows the names of its files."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.config_file = path / 'config.json'  # the resolved config
    self.record_file = path / 'run.json'  # seed, command, code, devices, inputs
    self.encoder_file = path / 'encoder.json'  # sizes of the encoder
    self.metrics_file = path / 'metrics.jsonl'  # one row a step
    self.alignment_file = path / 'alignment.json'  # audit of gold spans
    self.tokenizer = path / 'tokenizer'
    self.checkpoints = path / 'checkpoints'

  def evaluation(self, data: str) -> pathlib.Path:
    """Returns the directory of the evaluation on the data SPEC `data`."""
    return self.path / 'eval' / evaluation_name(data)

  def is_run(self) -> bool:
    """Returns whether the directory is a run, not a Hugging Face checkpoint."""
    return self.config_file.is_file() and self.checkpoints.is_dir()

  def read_config(self, allow_code: Iterable[str] = ()) -> config_lib.Config:
    """Reads the config, whose specs may import code of allowed packages only.

    The packages are those of `allow_code` and of `registry.allow_code`. No run,
    a damaged config.json or other code is a UserError.
    """
    config = self._read_config()
    registry.check_code(str(self.config_file), config_lib.spec_strings(config),
                        allow_code)
    return config

  def _read_config(self) -> config_lib.Config:
    if not self.config_file.is_file():
      raise errors.UserError(
          f'{self.path} is not a run directory: it has no config.json')
    fields = files.read_object(self.config_file)
    for field in RETIRED_FIELDS:
      group, name = field.split('.')
      if isinstance(fields.get(group), dict):
        fields[group].pop(name, None)
    return config_lib.check_config(fields)

  def read_record(self) -> dict[str, Any]:
    """Reads run.json: seed, command, git commit, packages, hashes of inputs."""
    return files.read_object(self.record_file)

  def read_encoder_config(self) -> bert.BertConfig:
    """Reads the sizes of the encoder; a damaged file raises a UserError."""
    try:
      return bert.BertConfig(**files.read_object(self.encoder_file))
    except TypeError as e:  # a field too many or too few
      raise errors.UserError(f'{self.encoder_file}: {e}') from None

  def read_metrics(self) -> list[dict[str, Any]]:
    """Reads the rows of metrics.jsonl, but not a torn last row."""
    if not self.metrics_file.is_file():
      return []
    *lines, _ = files.read_text(self.metrics_file).split('\n')
    return [files.parse_object(line, self.metrics_file) for line in lines]

  def resolve_step(self, which: str) -> int:
    """Returns the step of the checkpoint 'best', 'last' or a number."""
    with self._open_checkpoints() as store:
      return store.resolve(which)

  def read_parameters(self, which: str, shapes: Any) -> Any:
    """Restores parameters of a checkpoint onto the first local device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with self._open_checkpoints() as store:
      return store.restore_params(store.resolve(which), jax.tree.map(
          lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
          shapes))

  def _open_checkpoints(self) -> contextlib.closing[manager.Checkpoints]:
    return contextlib.closing(
        manager.Checkpoints(self.checkpoints, read_only=True))

  def write(self, config: config_lib.Config, encoder: bert.BertConfig,
            tokenizer: tokenizer_lib.Tokenizer, record: Mapping[str, Any]
            ) -> None:
    """Writes the files of a run before its first step, config.json last."""
    tokenizer.save(self.tokenizer)
    files.write_json(self.encoder_file, dataclasses.asdict(encoder))
    files.write_json(self.record_file, record)
    files.write_json(self.config_file, config.to_dict())

  def check_config(self, config: config_lib.Config) -> None:
    """Checks that the directory is empty or holds the run of this config.

    Raises:
      UserError: it is a file, holds something else than a run, cannot be
        written, or its run has another config; the message lists the fields.
    """
    if self.path.exists() and not self.path.is_dir():
      raise errors.UserError(
          f'--workdir={self.path} is a file, not a directory')
    files.check_writable(self.config_file)
    if not self.config_file.is_file():
      if self.path.is_dir() and any(self.path.iterdir()):
        raise errors.UserError(
            f'--workdir={self.path} is not empty and not a run; choose another')
      return
    stored = self._read_config().to_dict()  # compared; none of it is run
    changed = [row for row in config_lib.differences(stored, config.to_dict())
               if row[0] not in FREE_FIELDS]
    if changed:
      width = max(len(field) for field, _, _ in changed)
      rows = '\n'.join(f'  {field:{width}}  {old!r} → {new!r}'
                       for field, old, new in changed)
      raise errors.UserError(
          f'{self.path} was trained with another config (stored → given); '
          f'choose another --workdir or undo:\n{rows}')


def evaluation_name(spec: str) -> str:
  """Returns the folder name of an evaluation on the data SPEC.

  A path counts by its last part, without the ending of its format.
  """
  parts = [spec] if '(' in spec else [
      p.strip().rstrip('/').rsplit('/', 1)[-1] for p in spec.split('+')]
  stem = '_'.join(re.sub(r'\.(jsonl?|csv|parquet|arrow)(\.gz)?$', '', p)
                  for p in parts)
  return re.sub(r'[^A-Za-z0-9.-]+', '_', stem).strip('._-')[:80] or 'data'
