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
from qa_jax import config
from qa_jax.sweeps import grid

VARIANTS = ('minilm_l6', 'tiny')
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
  name = variant.removeprefix('rates_')
  if name not in VARIANTS:
    raise ValueError(f'sweep_study.py:{variant}: choose {", ".join(VARIANTS)} '
                     'or one of them after rates_')
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v1.1", split="train")'
  c.data.eval = 'tfds(name="squad/v1.1", split="validation")'
  common.choose_variant(c, name, 'sweep_study.py')
  if name != 'tiny':
    c.train.num_epochs = 1.0
    c.precision.compute_dtype = 'bfloat16'
  if name != variant:
    common.score_rates(c)
  return c


def sweep():
  heads, objectives = zip(*HEADS, strict=True)
  return grid.product(
      grid.together(grid.over('model.head', heads),
                    grid.over('objective', objectives)),
      grid.over('optim.learning_rate', RATES))
