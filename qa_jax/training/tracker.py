"""Weights & Biases, if asked for: the rows of metrics.jsonl as they come.

Where it keeps its files, whether it is offline and who is logged in are its own
settings: WANDB_DIR, WANDB_MODE=offline, `wandb login`.
"""

from collections.abc import Mapping
import hashlib
import pathlib
import types
from typing import Any

from qa_jax import errors


def load_wandb(project: str) -> types.ModuleType:
  """wandb, or a UserError that says how to have it."""
  try:
    import wandb
  except ImportError:
    raise errors.UserError(
        f"--wandb_project={project}: wandb is not installed; pip install -e "
        "'.[wandb]'") from None
  return wandb


class Tracker:
  """One run there for each run directory: a resumed run goes on in its own.

  Those of a sweep have its name as their `group`, and before their own.

  Raises:
    UserError: wandb is not installed, or refuses the run.
  """

  def __init__(self, project: str, workdir: pathlib.Path,
               config: Mapping[str, Any], group: str = ''):
    wandb = load_wandb(project)
    number = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    try:
      self._run = wandb.init(
          project=project, group=group or None, id=number, resume='allow',
          name=f'{group}/{workdir.name}' if group else workdir.name,
          config=dict(config))
    except wandb.Error as e:
      raise errors.UserError(
          f'--wandb_project={project}: {" ".join(str(e).split())[:300]}'
      ) from None

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    self._run.log({f'{split}/{name}': value for name, value in values.items()},
                  step=step)

  def close(self) -> None:
    self._run.finish()
