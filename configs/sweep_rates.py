"""A sweep of rates: a grid of two, or a search over four.

  python -m experiments.sweep --config=configs/sweep_rates.py:tiny \
      --workdir=runs/rates --seeds=1 --sampler=tpe --trials=20 --pruner=halving
  python -m experiments.report --workdir=runs/rates

SQuAD 2.0 with minilm_l6; tiny is a rehearsal on the generated corpus, about a
minute a trial on two CPU cores. Without --sampler it is the grid.
"""

import ml_collections

from configs import common
from qa_jax.sweeps import grid


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  c = common.sweep_config(variant, 'sweep_rates.py')
  # Often enough for a pruner: four evaluations of a rehearsal.
  c.train.eval_every_steps = 125 if variant == 'tiny' else 2000
  return c


def sweep():
  return grid.product(
      grid.over('optim.learning_rate', (1e-3, 3e-4, 1e-4)),
      grid.over('optim.layer_decay', (1.0, 0.8)))


def search_space():
  return {
      'optim.learning_rate': (2e-5, 5e-3, 'log'),
      'optim.layer_decay': (0.6, 1.0),
      'optim.warmup_fraction': (0.0, 0.3),
      'optim.weight_decay': [0.0, 0.01, 0.1]}
