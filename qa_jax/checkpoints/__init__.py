"""Run directories, their checkpoints, and the checkpoints of other programs.

`RunDirectory` reads the files of a run, and `Checkpoints` writes its
parameters. `load_parameters` reads a checkpoint directory of Hugging Face or
TensorFlow; `qa_jax.export.write_hugging_face` writes one.
"""

from qa_jax.checkpoints.hugging_face import load_parameters
from qa_jax.checkpoints.hugging_face import read_config
from qa_jax.checkpoints.hugging_face import resolve_source
from qa_jax.checkpoints.manager import Checkpoints
from qa_jax.checkpoints.run_directory import RunDirectory

__all__ = ['Checkpoints', 'RunDirectory', 'load_parameters', 'read_config',
           'resolve_source']
