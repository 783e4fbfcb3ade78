"""Probes by depth: S and E are trained alone on the first layers of an encoder.

  python -m experiments.sweep --config=configs/sweep_layers.py:rates_minilm_l6 \
      --workdir=runs/rates --seeds=1 --config.model.init_from=RUN
  python -m experiments.sweep --config=configs/sweep_layers.py \
      --workdir=runs/layers --seeds=3 --config.model.init_from=RUN \
      --tuned=optim.learning_rate --tuned_in=runs/rates
  python -m experiments.report --workdir=runs/layers

Data and variants are those of sweep_probe.py.
"""

import ml_collections

from configs import common
from qa_jax.sweeps import grid

LAYERS = (6, 5, 4, 3, 2, 1)  # the first is the default
RATES = (3e-3, 1e-2, 3e-2)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.probe_config(variant, 'sweep_layers.py')


def sweep():
  return grid.product(grid.over('model.num_layers', LAYERS),
                      grid.over('optim.learning_rate', RATES))
