"""Probes: heads that are trained alone, on an encoder that keeps its weights.

  python -m experiments.sweep --config=configs/sweep_probe.py:rates_minilm_l6 \
      --workdir=runs/rates --seeds=1 --config.model.init_from=ENCODER
  python -m experiments.sweep --config=configs/sweep_probe.py \
      --workdir=runs/probes --seeds=3 --config.model.init_from=ENCODER \
      --tuned=optim.learning_rate --tuned_in=runs/rates
  python -m experiments.report --workdir=runs/probes

SQuAD 1.1 for one epoch. ENCODER is a checkpoint or a run of train, whose head
is not used; by default it is the pretrained MiniLM-L6. rates_* scores rates as
in sweep_study.py. tiny is a rehearsal on the generated corpus.
"""

import ml_collections

from configs import common

HEADS = (  # the first is the default
    ('independent', 'cross_entropy'),
    ('mlp', 'cross_entropy'),
    ('biaffine', 'joint'),
)
RATES = (3e-3, 1e-2, 3e-2)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.probe_config(variant, 'sweep_probe.py')


def sweep():
  return common.heads_and_rates(HEADS, RATES)
