"""The layout of a run directory, and the reading of a finished run."""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import re
from typing import Any
import unicodedata

import jax

from qa_jax import config as config_lib
from qa_jax import errors
from qa_jax import registry
from qa_jax.checkpoints import manager
from qa_jax.data import sources
from qa_jax.data import tokenizer as tokenizer_lib
from qa_jax.io import files
from qa_jax.models import encoders
from qa_jax.runtime import console
from qa_jax.runtime import processes

# Fields that may differ in a resumed run: values depend on them by rounding at
# most. `checkpointing.restore_state` refuses a number of devices that changes
# the batches.
FREE_FIELDS = ('train.step_timeout_seconds', 'parallel.num_devices')
# In the directory of an evaluation: its data SPEC, and the checkpoint's step.
SPEC = 'data.json'
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
    # step and error of a run that failed while its population went on
    self.failure_file = path / 'failure.json'
    self.tokenizer = path / 'tokenizer'
    self.checkpoints = path / 'checkpoints'

  def evaluation(self, data: str, label: str = '') -> pathlib.Path:
    """Returns the directory of the evaluation on the data SPEC `data`.

    It is eval/NAME, or eval/NAME-HASH if eval/NAME belongs to another SPEC.
    `label` ends the name if the evaluation is not the default one, see
    `evaluation_label`.
    """
    folder = self._folder(data, label)
    return folder.with_name(folder.name + label)

  def _folder(self, data: str, label: str) -> pathlib.Path:
    base = self.path / 'eval' / evaluation_name(data)
    if not data:
      return base
    places = self._places(data)
    # Neither the folder nor the one with the label may be of other data.
    owners = lambda folder: [owner for f in (
        folder, folder.with_name(folder.name + label))
                             if (owner := self._owner(f))]
    for folder in (base, *sorted(base.parent.glob(f'{base.name}-??????'))):
      found = owners(folder)
      if found and all(not {*o}.isdisjoint(places) for o in found):
        return folder
    if not owners(base):
      return base
    digest = hashlib.sha256(places[0].encode('utf-8', 'surrogatepass'))
    return base.with_name(f'{base.name}-{digest.hexdigest()[:6]}')

  def record_evaluation(self, data: str, label: str = '') -> pathlib.Path:
    """Creates the directory of an evaluation with its SPEC, and returns it.

    Only the first process of a job writes it. Nothing is written without data.
    The step of an earlier evaluation stays until `record_step` replaces it, as
    its files do.
    """
    folder = self.evaluation(data, label)
    if not (data and processes.is_first_process()):
      return folder
    base = folder.with_name(evaluation_name(data) + label)
    if folder != base:
      console.say(f'{base} has the results of another data SPEC of this name; '
                  f'the results of {data} go to {folder}')
    absolute, relative = self._places(data)
    _add_fields(folder / SPEC, {
        'data': data, 'absolute': absolute, 'relative_to_run': relative})
    return folder

  def _places(self, data: str) -> tuple[str, str]:
    """Returns a SPEC with absolute paths, and with paths relative to the run.

    An equal one is the same data: the run or the data may have moved, or both.
    """
    parts = [(part, None if sources.is_call(part) else os.path.abspath(part))
             for part in sources.split_mixture(data)]
    return ('+'.join(path or part for part, path in parts),
            '+'.join(os.path.relpath(path, self.path) if path else part
                     for part, path in parts))

  def _owner(self, folder: pathlib.Path) -> tuple[str, str] | None:
    """Returns the `_places` of the SPEC whose evaluation is in `folder`.

    Earlier versions wrote no SPEC. Their evaluation then belongs to the config,
    if its data has this name, and otherwise to no SPEC (None).
    """
    if (folder / SPEC).is_file():
      record = files.read_object(folder / SPEC)
      return str(record.get('absolute')), str(record.get('relative_to_run'))
    if folder.is_dir() and self.config_file.is_file():
      data = self.read_config().data.eval
      if data and evaluation_name(data) == folder.name:
        return self._places(data)
    return None

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
    """Reads run.json: seed, command, git commit, packages, hashes of inputs.

    Raises:
      UserError: it is damaged.
    """
    record = files.read_object(self.record_file)
    for name in ('sha256', 'platform_choices'):
      errors.require(isinstance(record.get(name, {}), dict),
                     f'{self.record_file}: {name}={record.get(name)!r} must be '
                     'a JSON object')
    return record

  def read_encoder_config(self) -> encoders.EncoderConfig:
    """Reads the constants of the encoder; a damaged file raises a UserError."""
    fields = files.read_object(self.encoder_file)
    name = str(fields.pop('encoder', 'bert'))  # runs of older code have BERT's
    registry.check_code(str(self.encoder_file), {'model.encoder': name})
    try:
      return registry.build(
          encoders.ENCODERS, name, what='encoder', kind=encoders.EncoderConfig,
          given=fields)
    except (TypeError, errors.UserError) as e:  # fields that do not fit
      raise errors.UserError(f'{self.encoder_file}: {e}') from None

  def read_metrics(self) -> list[dict[str, Any]]:
    """Reads the rows of metrics.jsonl, but not a torn last row."""
    if not self.metrics_file.is_file():
      return []
    *lines, _ = files.read_text(self.metrics_file).split('\n')
    return [parse_row(line, f'{self.metrics_file}:{number}')
            for number, line in enumerate(lines, 1)]

  def has_checkpoint(self) -> bool:
    """Returns whether the directory is a run that can be resumed."""
    return self.is_run() and self.latest_step() is not None

  def latest_step(self) -> int | None:
    """Returns the step of the last checkpoint, None if there is none."""
    with self._open_checkpoints() as store:
      return store.latest

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

  def write(self, config: config_lib.Config, encoder: encoders.EncoderConfig,
            tokenizer: tokenizer_lib.Tokenizer, record: Mapping[str, Any]
            ) -> None:
    """Writes the files of a run before its first step, config.json last."""
    tokenizer.save(self.tokenizer)
    files.write_json(self.encoder_file, {
        'encoder': encoders.name_of(encoder), **dataclasses.asdict(encoder)})
    _write_ascii(self.record_file, record)
    files.write_json(self.config_file, config.to_dict())

  def check_config(self, config: config_lib.Config) -> None:
    """Checks that the directory is empty or holds the run of this config.

    Raises:
      UserError: it is a file, holds something else than a run, cannot be
        written, its path is not UTF-8, or its run has another config; the
        message lists the fields.
    """
    path = str(self.path.absolute())
    errors.require(not config_lib.SURROGATE.search(path),
                   f'--workdir={path!r} is not UTF-8, which checkpoints need; '
                   'choose another')
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
    # In a run of earlier versions, auto leaves these fields as they are.
    free = [*FREE_FIELDS]
    if self._choices() is None:
      free += [field for field in ('data.packing', 'precision.compute_dtype')
               if operator.attrgetter(field)(config) == 'auto']
    changed = [row for row in config_lib.differences(stored, config.to_dict())
               if row[0] not in free]
    if changed:
      width = max(len(field) for field, _, _ in changed)
      rows = '\n'.join(f'  {field:{width}}  {old!r} → {new!r}'
                       for field, old, new in changed)
      raise errors.UserError(
          f'{self.path} was trained with another config (stored → given); '
          f'choose another --workdir or undo:\n{rows}')

  def settle(self, config: config_lib.Config, platform: str
             ) -> config_lib.Config:
    """Returns `config` with the platform's choices of this run resolved.

    They are those of `platform` for a new run. A run that exists keeps the
    choices with which it began, on any platform.
    """
    own = config_lib.platform_choices(config, platform)
    kept = own
    if self.config_file.is_file():
      kept = self._choices()
      if kept is None:  # a run of earlier versions
        kept = config_lib.platform_choices(self._read_config(), '')
    for field, value in kept.items():
      if value != own.get(field):
        console.say(f'{self.path}: {field} stays {value}, with which the run '
                    f'began; on a {platform} it would be {own.get(field)}')
    try:
      return config_lib.check_config(
          config_lib.override(config.to_dict(), kept))
    except errors.UserError as e:
      raise errors.UserError(f'{self.record_file}: {e}') from None

  def _choices(self) -> dict[str, Any] | None:
    """Reads the platform's choices in run.json; earlier versions wrote none."""
    if not self.record_file.is_file():
      return None
    return self.read_record().get('platform_choices')


def parse_row(line: str, where: str) -> dict[str, Any]:
  """Returns a row of metrics.jsonl.

  A UserError that begins with `where` is raised if it is no object with a step.
  """
  row = files.parse_object(line, where)
  errors.require(type(row.get('step')) is int,
                 f'{where}: step={row.get("step")!r} must be a whole number; '
                 'remove the row')
  return row


def record_step(folder: pathlib.Path, step: int) -> None:
  """Writes the step of the checkpoint whose evaluation is in `folder`.

  Only the first process of a job writes it.
  """
  if processes.is_first_process():
    _add_fields(folder / SPEC, {'step': step})


def read_step(folder: pathlib.Path) -> int | None:
  """Returns the step of the checkpoint whose evaluation is in `folder`.

  It is None for an evaluation of earlier versions, which wrote no step.
  """
  path = folder / SPEC
  return files.read_object(path).get('step') if path.is_file() else None


def _add_fields(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Writes fields into a JSON object, which keeps its other fields."""
  before = files.read_object(path) if path.is_file() else {}
  _write_ascii(path, {**before, **fields})


def _write_ascii(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Writes JSON in ASCII, because the names of files may be no UTF-8."""
  files.write_text(path, json.dumps(fields, indent=2) + '\n')


def evaluation_label(fields: Mapping[str, Any]) -> str:
  """Returns the `label` of an evaluation with these options.

  They are fields of decoding, and `checkpoint` and `calibrated` if they are not
  the default. Reports compare the folders without a label.
  """
  return ''.join(f'.{name}-{re.sub("[^A-Za-z0-9.-]+", "_", str(value))}'
                 for name, value in fields.items())


def evaluation_name(spec: str) -> str:
  """Returns the folder name of an evaluation on the data SPEC.

  A path counts by its last part, without the ending of its format.
  """
  parts = spec.split('+')
  parts = [spec] if any(sources.is_call(p.strip()) and '(' in p
                        for p in parts) else [
      p.strip().rstrip('/').rsplit('/', 1)[-1] for p in parts]
  stem = '_'.join(re.sub(
      r'\.(jsonl?|csv|tsv|parquet|arrow)(\.gz)?$', '', p) for p in parts)
  # Letters, marks and numbers of every script have these categories. The cut
  # leaves room in the 255 bytes that most file systems allow for a name.
  stem = ''.join(c if c in '.-' or unicodedata.category(c)[0] in 'LMN' else '_'
                 for c in stem)
  name = re.sub('_+', '_', stem).strip('._-')[:80]
  return name.encode()[:200].decode(errors='ignore') or 'data'
