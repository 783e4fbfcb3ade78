"""Training: the train step, the loop of a run, and populations of runs."""

from qa_jax.training.population import train_members
from qa_jax.training.step import TrainState
from qa_jax.training.step import train_step
from qa_jax.training.train import run_loop
from qa_jax.training.trainer import Trainer
from qa_jax.training.trainer import build_trainer

__all__ = ['TrainState', 'Trainer', 'build_trainer', 'run_loop',
           'train_members', 'train_step']
