"""SQuAD 2.0 with a pretrained encoder (Devlin et al., 2019, section 4.3).

  python -m experiments.train --config=configs/squad2.py:base \
      --workdir=runs/squad2

Variants: base, large, minilm_l6 (6 layers of 384 units, for small machines),
and tiny, a rehearsal on the generated corpus in about a minute on two CPU
cores. Offline, set data.train and data.eval to SQuAD's JSON files and
model.init_from to a checkpoint directory.
"""

import ml_collections

from configs import common
from qa_jax import config


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v2.0", split="train")'
  c.data.eval = 'tfds(name="squad/v2.0", split="validation")'
  c.train.batch_size = 48  # with 2 epochs and rate 5e-5: the paper's
  c.train.num_epochs = 2.0
  return common.choose_variant(c, variant, 'squad2.py', impossible=0.3)
