"""A sweep of searches, null rules and merges: two trainings a seed.

  python -m experiments.sweep --config=configs/sweep_decoders.py:tiny \
      --workdir=runs/decoders
  python -m experiments.report --workdir=runs/decoders

No decode field changes what is learned, so trials that differ in them alone
share one training and are only evaluated. The null rules classifier and product
need a head with a null score of its own, and so a training of theirs. SQuAD 2.0
with minilm_l6; tiny is a rehearsal on the generated corpus.
"""

import ml_collections

from configs import common

SEARCHES = (  # the first is the default; dense and banded equal it
    'two_stage', 'dense', 'banded', 'top_k(k=20)', 'top_k(k=5)', 'argmax',
    'beam(width=5)', 'beam(width=1)')
CLASSIFIER = {'model.head': 'answerability', 'objective': 'answerability'}


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  return common.sweep_config(variant, 'sweep_decoders.py')


def sweep():
  for search in SEARCHES:
    yield {'decode.search': search}
  for null_rule in ('never', 'margin', 'posterior'):
    yield {'decode.null_rule': null_rule}
  for null_rule in ('classifier', 'product'):
    yield {**CLASSIFIER, 'decode.null_rule': null_rule}
  for longest in (5, 15):
    yield {'decode.max_answer_length': longest}
  yield {'decode.merge': 'surface_form'}
