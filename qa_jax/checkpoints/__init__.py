"""Run directories, their checkpoints, and the checkpoints of other programs.

`RunDirectory` reads the files of a run, and `Checkpoints` writes its
parameters. `load_parameters` reads a checkpoint directory of Hugging Face or
TensorFlow; `qa_jax.export.write_hugging_face` writes one.
"""

from qa_jax.checkpoints.hugging_face import load_parameters as load_parameters
from qa_jax.checkpoints.hugging_face import read_config as read_config
from qa_jax.checkpoints.hugging_face import resolve_source as resolve_source
from qa_jax.checkpoints.manager import Checkpoints as Checkpoints
from qa_jax.checkpoints.run_directory import RunDirectory as RunDirectory
