"""Quickstart: a tiny BERT from scratch on the generated corpus.

No download. Train and held-out passages share no invented name, so the model
has to learn to read: to find the sentence that the question asks about.

  python -m experiments.train --config=configs/quickstart.py \
      --workdir=runs/quickstart

Expected: exact match of 98 to 100 after 3 to 7 minutes of training on two
cores; see RESULTS.md, "Quickstart", for seeds and for how it was found. The
variant tiny trains for a fifth of the updates, with a schedule of that length.
"""

import ml_collections

from configs import common
from qa_jax import config
from qa_jax import errors


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  if variant not in ('', 'tiny'):
    raise errors.UserError(
        f'quickstart.py: unknown variant {variant!r}; the only variant is tiny')
  c = config.defaults()
  common.small_from_scratch(c)
  # Half of the passages state two facts: one sentence to find among two is
  # learned sooner than among four, and these windows are short. One epoch: a
  # model that sees passages again learns some of them by heart.
  corpus = 'size=38400, paraphrases=1, repeats=0.0'
  c.data.train = (f'synthetic(seed=0, {corpus})'
                  f' + synthetic(seed=2, {corpus}, facts=2)')
  c.data.eval = ('synthetic(seed=1, size=1000, paraphrases=1, repeats=0.0, '
                 'split="eval")')
  c.data.vocab_size = 1500
  c.data.buckets = (32, 48, 64)
  c.model.num_layers = 3
  c.model.num_heads = 8
  c.model.mlp_size = 256
  common.attend_sooner(c)
  c.decode.max_answer_length = 10
  c.decode.n_best = 10
  c.decode.null_rule = 'never'  # every question has an answer
  c.train.num_steps = 480 if variant else 2400  # 32 windows each
  c.train.eval_batch_size = 64
  c.train.eval_every_steps = 400
  c.train.log_every_steps = 100
  c.optim.learning_rate = 1e-3
  return c
