"""A sweep of every span head, with an objective that fits it.

  python -m experiments.sweep --config=configs/sweep_heads.py:tiny \
      --workdir=runs/heads
  python -m experiments.report --workdir=runs/heads

SQuAD 2.0 with minilm_l6; tiny is a rehearsal on the generated corpus, about a
minute a trial on two CPU cores. biased must equal the default, because softmax
cancels its biases. shared, one vector for both ends, should score worst.
independent with span_softmax tells head from objective.
"""

import ml_collections

from configs import common

FITTING = (  # the first is the default
    ('independent', 'cross_entropy'),
    ('biased', 'cross_entropy'),
    ('shared', 'cross_entropy'),
    ('mlp', 'cross_entropy'),
    ('transformed', 'cross_entropy'),
    ('layer_mix', 'cross_entropy'),
    ('conditional', 'conditional'),
    ('conditional(form="electra")', 'conditional'),
    ('independent', 'span_softmax'),
    ('length_prior', 'span_softmax'),
    ('biaffine', 'joint'),
    ('length_prior(base="biaffine")', 'joint'),
    ('trilinear', 'joint'),
    ('mlp_span', 'joint'),
    ('compound', 'compound'),
)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.sweep_config(variant, 'sweep_heads.py')


def sweep():
  for head, objective in FITTING:
    yield {'model.head': head, 'objective': objective}
  yield {'model.head': 'answerability', 'objective': 'answerability',
         'decode.null_rule': 'classifier'}
