"""A study of span heads: rates chosen on held-out articles, then seeds.

  python -m experiments.sweep --config=configs/sweep_study.py:rates_tiny \
      --workdir=runs/rates --seeds=1
  python -m experiments.sweep --config=configs/sweep_study.py:tiny \
      --workdir=runs/study --seeds=5 \
      --tuned=optim.learning_rate --tuned_in=runs/rates
  python -m experiments.report --workdir=runs/study

SQuAD 1.1 with MiniLM-L6 for one epoch, or a rehearsal on the generated corpus
(tiny). rates_* trains half as long on four fifths of the articles and scores
the others.
"""

import ml_collections

from configs import common

HEADS = (  # the first is the default
    ('independent', 'cross_entropy'),
    ('shared', 'cross_entropy'),
    ('mlp', 'cross_entropy'),
    ('layer_mix', 'cross_entropy'),
    ('conditional', 'conditional'),
    ('biaffine', 'joint'),
    ('mlp_span', 'joint'),
    ('length_prior', 'span_softmax'),
    ('independent', 'span_softmax'),  # tells a head from its objective
)
RATES = (1e-4, 3e-4, 1e-3)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.study_config(variant, 'sweep_study.py')


def sweep():
  return common.heads_and_rates(HEADS, RATES)
