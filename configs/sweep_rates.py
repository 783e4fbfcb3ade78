"""Which rates? A grid of two, or a search over four.

  python -m experiments.sweep --config=configs/sweep_rates.py:tiny \
      --workdir=runs/rates --seeds=1 --sampler=tpe --trials=20 --pruner=halving
  python -m experiments.report --workdir=runs/rates

SQuAD 2.0 with minilm_l6; tiny is a rehearsal on the generated corpus, about a
minute a trial on two CPU cores. Without --sampler it is the grid.
"""

import ml_collections

from qa_jax.sweeps import grid


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  if variant not in ('minilm_l6', 'tiny'):
    raise ValueError(f'sweep_rates.py:{variant}: choose minilm_l6 or tiny')
  tiny = variant == 'tiny'
  c = ml_collections.ConfigDict
  return c(dict(
      seed=0,
      model=c(dict(
          preset=variant, hidden_size=0, num_layers=0,
          num_heads=4 if tiny else 0, mlp_size=0,
          dropout=0.0 if tiny else 0.1,
          attention_dropout=0.0 if tiny else 0.1, attention='auto',
          initializer_range=0.09 if tiny else 0.02,
          init_from='' if tiny else 'sentence-transformers/all-MiniLM-L6-v2',
          init_head=True,
          head='independent')),
      objective='cross_entropy',
      decode=c(dict(
          max_answer_length=30, n_best=20, search='two_stage',
          null_rule='min_null', null_threshold=0.0, merge='none')),
      data=c(dict(
          train='synthetic(seed=0, size=8000, paraphrases=1, '
          'impossible=0.3)' if tiny
          else 'tfds(name="squad/v2.0", split="train")',
          eval='synthetic(seed=1, size=1000, paraphrases=1, '
          'impossible=0.3, split="eval")'
          if tiny else 'tfds(name="squad/v2.0", split="validation")',
          max_length=80 if tiny else 384, window_overlap=8 if tiny else 128,
          max_question_length=20 if tiny else 64, lowercase=True, vocab='',
          vocab_size=1500, buckets=(48, 64) if tiny
          else (96, 128, 160, 192, 224, 256, 320),
          packing=False, windows_without_answer='cls',
          cache='auto')),
      train=c(dict(
          batch_size=32 if tiny else 16, eval_batch_size=0,
          num_epochs=2.0, num_steps=0, grad_accumulation=1,
          eval_every_steps=125 if tiny else 2000,
          checkpoint_every_steps=500, log_every_steps=50,
          max_skipped=10, step_timeout_seconds=1800.0)),
      optim=c(dict(
          learning_rate=1e-3 if tiny else 1e-4,
          warmup_fraction=0.1, schedule='linear', weight_decay=0.01,
          clip_norm=1.0, skip_norm=0.0, layer_decay=1.0,
          bias_correction=True, eps=1e-8)),
      parallel=c(dict(
          mode='pmap', num_devices=0, mesh=c(dict(data=-1, fsdp=1)))),
      precision=c(dict(compute_dtype='float32')),
  ))


def sweep():
  return grid.product(
      grid.over('optim.learning_rate', (1e-3, 3e-4, 1e-4)),
      grid.over('optim.layer_decay', (1.0, 0.8)))


def search_space():
  return {
      'optim.learning_rate': (2e-5, 5e-3, 'log'),
      'optim.layer_decay': (0.6, 1.0),
      'optim.warmup_fraction': (0.0, 0.3),
      'optim.weight_decay': [0.0, 0.01, 0.1]}
