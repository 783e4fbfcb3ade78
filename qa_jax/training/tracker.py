"""Tracking of runs with Weights & Biases, which is optional.

It receives the rows of metrics.jsonl. Its files, offline mode and login are set
by wandb itself: WANDB_DIR, WANDB_MODE=offline, `wandb login`.
"""

from collections.abc import Mapping
import hashlib
import pathlib
import types
from typing import Any

from qa_jax import errors


def load_wandb(project: str) -> types.ModuleType:
  """Imports wandb.

  Raises:
    UserError: wandb is not installed.
  """
  try:
    import wandb
  except ImportError:
    raise errors.UserError(
        f"--wandb_project={project}: wandb is not installed; pip install -e "
        "'.[wandb]'") from None
  return wandb


class Tracker:
  """The wandb run of one run directory.

  A resumed run goes on in the same wandb run. The runs of a sweep have the name
  of the sweep as their `group` and as the first part of their name.

  Raises:
    UserError: wandb is not installed, or refuses the run.
  """

  def __init__(self, project: str, workdir: pathlib.Path,
               config: Mapping[str, Any], group: str = ''):
    wandb = load_wandb(project)
    digest = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()
    try:
      self._run = wandb.init(
          project=project, group=group or None, id=digest[:16], resume='allow',
          name=f'{group}/{workdir.name}' if group else workdir.name,
          config=dict(config))
    except wandb.Error as e:
      raise errors.UserError(
          f'--wandb_project={project}: {" ".join(str(e).split())[:300]}'
      ) from None

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes one row of metrics.jsonl."""
    self._run.log({f'{split}/{name}': value for name, value in values.items()},
                  step=step)

  def close(self) -> None:
    """Ends the wandb run in this process."""
    self._run.finish()
