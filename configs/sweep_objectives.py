"""Which objective? Those that fit the independent head, and its own.

  python -m experiments.sweep --config=configs/sweep_objectives.py:tiny \
      --workdir=runs/objectives
  python -m experiments.report --workdir=runs/objectives

SQuAD 2.0 with minilm_l6; tiny is a rehearsal on the generated corpus, about a
minute a trial on two CPU cores. A sum is twice the mean: clipping and Adam
leave little of that. marginal and hard_em equal span_softmax where a training
question has one gold span, as in SQuAD: see MRQA's files for them.
"""

import ml_collections

OBJECTIVES = (  # the first is the default
    'cross_entropy',
    'cross_entropy(reduction="sum")',
    'cross_entropy(domain="all")',
    'label_smoothing(epsilon=0.1)',
    'boundary_kernel(temperature=1.0)',
    'sigmoid',
    'span_softmax',
    'f1_weighted',
    'marginal',
    'marginal(over="boundary")',
    'hard_em(tau=400.0)',
    'shared_norm',
)


def get_config(variant: str = 'minilm_l6') -> ml_collections.ConfigDict:
  if variant not in ('minilm_l6', 'tiny'):
    raise ValueError(f'sweep_objectives.py:{variant}: choose minilm_l6 or tiny')
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
          num_epochs=2.0, num_steps=0, grad_accumulation=1, eval_every_steps=0,
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
  for objective in OBJECTIVES:
    yield {'objective': objective}
