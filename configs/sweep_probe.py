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
from qa_jax import config
from qa_jax.sweeps import grid

VARIANTS = ('minilm_l6', 'tiny')
HEADS = (  # the first is the default
    ('independent', 'cross_entropy'),
    ('mlp', 'cross_entropy'),
    ('biaffine', 'joint'),
)
RATES = (3e-3, 1e-2, 3e-2)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  name = variant.removeprefix('rates_')
  if name not in VARIANTS:
    raise ValueError(f'sweep_probe.py:{variant}: choose {", ".join(VARIANTS)} '
                     'or one of them after rates_')
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v1.1", split="train")'
  c.data.eval = 'tfds(name="squad/v1.1", split="validation")'
  common.choose_variant(c, name, 'sweep_probe.py')
  if name != 'tiny':
    c.train.num_epochs = 1.0
    c.precision.compute_dtype = 'bfloat16'
  if name != variant:
    common.score_rates(c)
  c.model.init_head = False
  c.optim.freeze_encoder = True
  return c


def sweep():
  heads, objectives = zip(*HEADS, strict=True)
  return grid.product(
      grid.together(grid.over('model.head', heads),
                    grid.over('objective', objectives)),
      grid.over('optim.learning_rate', RATES))
