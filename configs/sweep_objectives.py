"""A sweep of the objectives that fit the independent head.

  python -m experiments.sweep --config=configs/sweep_objectives.py:tiny \
      --workdir=runs/objectives
  python -m experiments.report --workdir=runs/objectives

SQuAD 2.0 with minilm_l6; tiny is a rehearsal on the generated corpus, about a
minute a trial on two CPU cores. reduction="sum" doubles the loss; clipping by
norm and Adam cancel nearly all of that factor. marginal and hard_em equal
span_softmax where a training question has one gold span, as in SQuAD: see
MRQA's files for them.
"""

import ml_collections

from configs import common

OBJECTIVES = (  # the first is the default
    'cross_entropy',
    'cross_entropy(reduction="sum")',
    'cross_entropy(domain="all")',
    'label_smoothing(epsilon=0.1)',
    'boundary_kernel(temperature=1.0)',
    'sigmoid',
    'span_softmax',
    'f1_weighted',
    'marginal',
    'marginal(over="boundary")',
    'hard_em(tau=400.0)',
    'shared_norm',
)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.sweep_config(variant, 'sweep_objectives.py')


def sweep():
  for objective in OBJECTIVES:
    yield {'objective': objective}
