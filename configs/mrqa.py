"""MRQA 2019: six data sets at once (Fisch et al., 2019).

  python -m experiments.train --config=configs/mrqa.py:base \
      --workdir=runs/mrqa

Fetch the in-domain files of the shared task into data/mrqa/train and
data/mrqa/dev first. Variants: base, large, minilm_l6, and tiny, a rehearsal on
the generated corpus in about a minute on two CPU cores.
"""

import ml_collections

from configs import common
from qa_jax import config

SETS = ('SQuAD', 'NewsQA', 'TriviaQA-web', 'SearchQA', 'HotpotQA',
        'NaturalQuestionsShort')


def mixture(split: str) -> str:
  """Returns the data SPEC of all sets of a split."""
  return ' + '.join(
      f'mrqa(path="data/mrqa/{split}/{name}.jsonl.gz")' for name in SETS)


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  c = config.defaults()
  c.data.train = mixture('train')
  c.data.eval = mixture('dev')
  # A context of thousands of tokens would fill the batches with windows whose
  # label is [CLS].
  c.data.windows_without_answer = 'drop'
  c.decode.null_rule = 'never'  # every question has an answer
  c.train.num_epochs = 2.0
  c.optim.learning_rate = 3e-5  # with 2 epochs: the shared task's baseline
  return common.choose_variant(c, variant, 'mrqa.py', sentences=6)
