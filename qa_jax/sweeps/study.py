"""The Optuna study of a sweep, which samplers, pruners and dashboards read.

One Optuna trial is one run. It has the name and overrides of the run, an
intermediate value for every evaluation while training, and the final F1.

Missing and wrong rows are written again from the run directories at every start
of a sweep. A lost database therefore costs no training; it only loses variants
that a sampler proposed and that have no run yet.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import pathlib
from typing import Any
import urllib.parse

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import sqlalchemy

from qa_jax import errors
from qa_jax.checkpoints.run_directory import RunDirectory
from qa_jax.io import files
from qa_jax.sweeps import plan
from qa_jax.sweeps import pruners

SCORE = 'f1'
LOCK_SECONDS = 10  # longest wait for another process that writes the study


class Study:
  """The study `name` in `storage`, of the sweep in `workdir`."""

  def __init__(self, storage: optuna.storages.BaseStorage, name: str,
               where: str, *, pruner: str = 'none', eval_every_steps: int = 1,
               space: Mapping[str, BaseDistribution] | None = None):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self.where, self._storage, self._pruner = where, storage, pruner
    self._space = dict(space or {})
    self._ids: dict[str, int] = {}  # trial → its row
    self._sizes: dict[str, int] = {}  # trial → bytes of metrics.jsonl read
    self._trials: dict[str, plan.Trial] = {}
    with self.guard():
      self.optuna = optuna.create_study(
          storage=storage, study_name=name, direction='maximize',
          load_if_exists=True,
          pruner=pruners.while_training(pruner, eval_every_steps))
      self._id = storage.get_study_id_from_name(name)
      self._check_space()

  def _check_space(self) -> None:
    """Raises a UserError if an earlier draw had another kind of space."""
    for row in self.optuna.get_trials(deepcopy=False):
      for field in row.distributions.keys() & self._space.keys():
        before, now = row.distributions[field], self._space[field]
        try:
          optuna.distributions.check_distribution_compatibility(before, now)
        except ValueError:
          raise errors.UserError(
              f'search_space(): {field} is {now}, but the search in '
              f'{self.where} began with {before}; give that, or choose another '
              '--workdir') from None

  def register(self, trials: Sequence[plan.Trial]) -> None:
    """Writes a row for every trial that agrees with its run directory."""
    self._trials |= {t.name: t for t in trials}
    with self.guard():
      rows: dict[str, FrozenTrial] = {}
      proposed = []  # rows of a sampler that have no trial yet
      for row in self.optuna.get_trials(deepcopy=False):
        if 'name' in row.user_attrs:
          rows[row.user_attrs['name']] = row  # the latest
        elif row.state == TrialState.RUNNING:
          proposed.append(row)
      for trial in trials:
        self._ids[trial.name] = self._row(trial, rows.get(trial.name), proposed)
        if trial.metrics.is_file():
          self.complete(trial)
        elif trial.pruned.is_file():
          self.prune(trial, '')

  def _row(self, trial: plan.Trial, row: FrozenTrial | None,
           proposed: list[FrozenTrial]) -> int:
    state = (TrialState.COMPLETE if trial.metrics.is_file()
             else TrialState.PRUNED if trial.pruned.is_file() else None)
    if row and (not row.state.is_finished() or row.state == state):
      return self._row_id(row)
    names = {'name': trial.name, 'seed': trial.config.seed,
             'overrides': json.dumps(trial.variant)}
    for asked in proposed:
      if asked.user_attrs.get('overrides') == names['overrides']:
        proposed.remove(asked)
        for key, value in names.items():
          self._storage.set_trial_user_attr(self._row_id(asked), key, value)
        return self._row_id(asked)
    # A range may have become narrower since.
    drawn = trial.variant.keys() == self._space.keys() and all(
        _contains(self._space[field], value)
        for field, value in trial.variant.items())
    return self._storage.create_new_trial(
        self._id, optuna.trial.create_trial(
            state=TrialState.WAITING, user_attrs=names,
            params=trial.variant if drawn else {},
            distributions=self._space if drawn else {}))

  def _row_id(self, row: FrozenTrial) -> int:
    return self._storage.get_trial_id_from_study_id_trial_number(
        self._id, row.number)

  def draw(self, space: Mapping[str, BaseDistribution]) -> optuna.Trial:
    """Returns a new row with a draw of the sampler.

    Optuna would draw for a row that waits. Such a row belongs to a trial, as
    after a stop and a start with fewer seeds.
    """
    for row in self.optuna.get_trials(False, (TrialState.WAITING,)):
      self._storage.set_trial_state_values(
          self._row_id(row), TrialState.RUNNING)
    return self.optuna.ask(dict(space))

  def begin(self, trial: plan.Trial) -> None:
    self._set_state(trial, TrialState.RUNNING)

  def reason_to_skip(self, trial: plan.Trial) -> str:
    """Returns the reason why a trial need not begin, or ''."""
    if self._pruner != 'wilcoxon' or self._is_default(trial):
      return ''
    finished: dict[str, dict[int, float]] = {}  # variant → seed → score
    for other in self._trials.values():
      if other.metrics.is_file():
        finished.setdefault(json.dumps(other.variant), {})[
            other.config.seed] = other.read_metrics()[SCORE]
    return pruners.worse_over_seeds(
        finished.pop(json.dumps(trial.variant), {}), list(finished.values()))

  def reason_to_end(self, trial: plan.Trial) -> str:
    """Records new evaluations of a trial; returns why it should end, or ''."""
    path = RunDirectory(trial.run).metrics_file
    size = path.stat().st_size if path.is_file() else 0
    if size == self._sizes.get(trial.name):
      return ''
    self._sizes[trial.name] = size
    reason = ''
    with self.guard():
      known = self._storage.get_trial(self._ids[trial.name])
      if known.state.is_finished():  # Optuna takes no more values of it
        return ''
      optuna_trial = optuna.Trial(self.optuna, self._ids[trial.name])
      for row in RunDirectory(trial.run).read_metrics():
        if row['split'] != 'eval' or row['step'] in known.intermediate_values:
          continue
        optuna_trial.report(row[SCORE], row['step'])
        if (not reason and optuna_trial.should_prune()
            and not self._is_default(trial)):
          reason = (f'F1 {row[SCORE]:.2f} at step {row["step"]} is not in the '
                    'better half of the trials that came so far')
    return reason

  def complete(self, trial: plan.Trial) -> None:
    """Records the last evaluations and the final F1 of a trial."""
    self.reason_to_end(trial)
    self._set_state(trial, TrialState.COMPLETE,
                    trial.read_metrics()[SCORE])

  def settle(self, trials: Sequence[plan.Trial],
             failed: Mapping[str, str]) -> None:
    """Records the results and failures of trials of any engine."""
    self.register([t for t in trials if t.name not in self._ids])
    for trial in trials:
      if trial.metrics.is_file():
        self.complete(trial)
      elif trial.name in failed:
        self.fail(trial, failed[trial.name])

  def fail(self, trial: plan.Trial, reason: str) -> None:
    self._set_state(trial, TrialState.FAIL, reason=reason)

  def prune(self, trial: plan.Trial, reason: str) -> None:
    """Records in the study and, for ever, in a file that a trial is pruned."""
    if not trial.pruned.is_file():
      files.write_json(trial.pruned, {'reason': reason})
    with self.guard():
      row = self._storage.get_trial(self._ids[trial.name])
      values = row.intermediate_values
    self._set_state(trial, TrialState.PRUNED,
                    values[max(values)] if values else None,
                    files.read_object(trial.pruned).get('reason', ''))

  def _set_state(self, trial: plan.Trial, state: TrialState,
                 value: float | None = None, reason: str = '') -> None:
    row = self._ids[trial.name]
    with self.guard():
      now = self._storage.get_trial(row).state
      if now.is_finished() or now == state:
        return
      if reason:
        self._storage.set_trial_user_attr(row, 'reason', reason)
      self._storage.set_trial_state_values(
          row, state, None if value is None else [value])

  def _is_default(self, trial: plan.Trial) -> bool:
    return trial.variant == next(iter(self._trials.values())).variant

  @contextlib.contextmanager
  def guard(self) -> Iterator[None]:
    """Turns errors of the database into a UserError of one line."""
    try:
      yield
    except errors.UserError:
      raise
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError,
            optuna.exceptions.OptunaError) as e:
      raise _refusal(self.where, e) from None


def _contains(space: BaseDistribution, value: Any) -> bool:
  if isinstance(space, CategoricalDistribution):
    return value in space.choices
  return space.low <= value <= space.high


def _refusal(where: str, e: Exception) -> errors.UserError:
  cause = e.__cause__ or e  # Optuna raises its own error from the database's
  if isinstance(cause, sqlalchemy.exc.ArgumentError):  # of make_url
    return errors.UserError(
        f'{where}: {" ".join(str(cause).split())}; expected '
        'sqlite:///FILE or another URL of SQLAlchemy')
  reason = ' '.join(str(getattr(cause, 'orig', None) or cause)
                    .split('\n')[0].split())
  return errors.UserError(
      f'{where}: no study can be read or written there: {reason}; what has '
      'been trained is safe: ' + (
          'free some space and run the same command again'
          if 'full' in reason else
          'move a broken file away and it is made anew'))


def in_memory() -> Study:
  return Study(optuna.storages.InMemoryStorage(), 'sweep', 'memory')


def _storage(url: str, options: Mapping[str, Any] | None
             ) -> optuna.storages.RDBStorage:
  try:
    return optuna.storages.RDBStorage(url, engine_kwargs=options)
  except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError) as e:
    if 'already exists' not in str(e) and 'UNIQUE' not in str(e):
      raise
  # Another process has made the tables meanwhile.
  return optuna.storages.RDBStorage(url, engine_kwargs=options)


def open_study(workdir: pathlib.Path, url: str = '', *, pruner: str = 'none',
               eval_every_steps: int = 1,
               space: Mapping[str, BaseDistribution] | None = None) -> Study:
  """Opens the sweep's study in WORKDIR/study.db, or in the database at `url`.

  Raises:
    UserError: no study can be read there, or its name is that of another sweep.
  """
  home = workdir.resolve()
  shared, where = bool(url), '--storage' if url else f'{workdir}/study.db'
  try:
    if shared:
      where = sqlalchemy.make_url(url).render_as_string()  # hides a password
    else:
      workdir.mkdir(parents=True, exist_ok=True)
      # As a path, '?' would begin options and '%20' be a space.
      url = f'sqlite:///{urllib.parse.quote(str(home))}/study.db'
    options = ({'connect_args': {'timeout': LOCK_SECONDS}}
               if url.startswith('sqlite') else None)
    storage = _storage(url, options)
  except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError,
          OSError) as e:
    raise _refusal(where, e) from None
  study = Study(storage, home.name if shared else 'sweep', where, pruner=pruner,
                eval_every_steps=eval_every_steps, space=space)
  with study.guard():
    owner = study.optuna.user_attrs.get('workdir', '')
    if not owner:
      study.optuna.set_user_attr('workdir', str(home))
  if shared and owner not in ('', str(home)):
    raise errors.UserError(
        f'--workdir={workdir}: {where} has a study {home.name!r}, that of '
        f'{owner}; choose another name. A sweep that was moved from there goes '
        'on once its directory is renamed: it then gets a study of the new '
        'name, with all its trials')
  return study
