"""SQuAD 1.1 with a pretrained encoder (Devlin et al., 2019, section 4.2).

  python -m experiments.train --config=configs/squad1.py:base \
      --workdir=runs/squad1

Variants: base and large (the paper reports EM 80.8 / F1 88.5 and 84.1 / 90.9),
minilm_l6 (6 layers of 384 units, for small machines), and tiny, a rehearsal on
the generated corpus in about a minute on two CPU cores. Offline, set data.train
and data.eval to SQuAD's JSON files and model.init_from to a checkpoint
directory.
"""

import ml_collections

from configs import common
from qa_jax import config


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v1.1", split="train")'
  c.data.eval = 'tfds(name="squad/v1.1", split="validation")'
  c.decode.null_rule = 'never'  # every question has an answer
  c.train.num_epochs = 3.0  # with rate 5e-5 and batch 32: the paper's
  return common.choose_variant(c, variant, 'squad1.py')
