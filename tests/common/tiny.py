"""The config of a whole run in seconds, which tests of training share."""

import copy
from typing import Any

from qa_jax import config as config_lib

FIELDS: dict[str, Any] = {
    'seed': 3,
    'model': {'preset': '', 'hidden_size': 16, 'num_layers': 1, 'num_heads': 2,
              'mlp_size': 32},
    'decode': {'max_answer_length': 8, 'n_best': 4},
    'data': {'train': 'synthetic(size=36)',
             'eval': 'synthetic(seed=1, size=12, split="eval")',
             'max_length': 64, 'window_overlap': 8, 'max_question_length': 16,
             'vocab_size': 300},
    'train': {'batch_size': 8, 'eval_batch_size': 8, 'num_steps': 7,
              'checkpoint_every_steps': 2, 'log_every_steps': 1},
    'optim': {'learning_rate': 1e-2},
    'parallel': {'num_devices': 2},
}


def config(**changes: dict[str, Any] | Any) -> config_lib.Config:
  """Returns the tiny config with fields updated: config(train={…})."""
  fields = copy.deepcopy(FIELDS)
  for group, values in changes.items():
    if isinstance(values, dict):
      fields[group] = {**fields.get(group, {}), **values}
    else:
      fields[group] = values
  return config_lib.check_config(fields)
