"""A sweep of encoders and heads on one recipe.

  python -m experiments.sweep --config=configs/sweep_encoders.py:tiny \
      --workdir=runs/encoders
  python -m experiments.report --workdir=runs/encoders

base fine-tunes a released checkpoint of base size of each architecture on SQuAD
2.0. A checkpoint whose weights are pickles alone is refused with the command
that converts it; put its directory in CHECKPOINTS then. tiny is a rehearsal of
each encoder from scratch on the generated corpus, about a minute a trial on two
CPU cores; from scratch the encoders differ more in what they learn first than
in quality.
"""

import ml_collections

from configs import common

# Entry of ENCODERS → hub id, and whether its vocabulary is lower-cased.
CHECKPOINTS = {
    'bert': ('google-bert/bert-base-uncased', True),  # the default
    'roberta': ('FacebookAI/roberta-base', False),
    'electra': ('google/electra-base-discriminator', True),
    'albert': ('albert/albert-base-v2', True),
    'mpnet': ('sentence-transformers/all-mpnet-base-v2', True),
    'deberta_v2': ('microsoft/deberta-v3-base', False),
    'modernbert': ('answerdotai/ModernBERT-base', False)}
# Entry of ENCODERS → spec string of its rehearsal, if it is not the entry.
REHEARSED = {'electra': 'electra(embedding_size=64)',
             'albert': 'albert(embedding_size=64)'}
HEADS = (  # the first is the default
    ('independent', 'cross_entropy'),
    ('conditional(form="electra")', 'conditional'),
    ('biaffine', 'joint'))


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  # Some encoders have no table of positions to begin with.
  c = common.sweep_config(variant, 'sweep_encoders.py', sizes='base',
                          sooner=False)
  if variant == 'base':
    c.model.preset = ''  # each checkpoint brings its sizes
    c.train.batch_size = 48  # with rate 5e-5: squad2.py
    c.train.num_epochs = 2.0
  return c


def sweep(variant: str = 'base'):
  from qa_jax.models import ENCODERS  # with jax, which --help need not load

  for name in ENCODERS:
    checkpoint, lowercase = CHECKPOINTS[name]
    encoder = {'model.encoder': REHEARSED.get(name, name)}
    if variant == 'base':
      encoder = {'model.init_from': checkpoint, 'data.lowercase': lowercase}
    for head, objective in HEADS:
      yield {**encoder, 'model.head': head, 'objective': objective}
