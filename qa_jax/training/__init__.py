"""Training: the train step, the loop of a run, and populations of runs."""

from qa_jax.training.population import train_members as train_members
from qa_jax.training.step import TrainState as TrainState
from qa_jax.training.step import train_step as train_step
from qa_jax.training.train import run_loop as run_loop
from qa_jax.training.trainer import Trainer as Trainer
from qa_jax.training.trainer import build_trainer as build_trainer
