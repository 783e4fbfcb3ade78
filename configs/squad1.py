"""SQuAD 1.1 with a pretrained encoder (Devlin et al., 2019, section 4.2).

  python -m experiments.train --config=configs/squad1.py:base \
      --workdir=runs/squad1

Variants: base and large (3 epochs, 5e-5, batch 32, the paper's: EM 80.8 / F1
88.5 and 84.1 / 90.9), minilm_l6 (6 layers of 384, made for small machines),
and tiny, a rehearsal on the generated corpus in about a minute on two CPU
cores. Offline, point data.train and data.eval at SQuAD's JSON files and
model.init_from at a checkpoint directory.
"""

import ml_collections

ENCODERS = {
    'base': 'google-bert/bert-base-uncased',
    'large': 'google-bert/bert-large-uncased',
    'minilm_l6': 'sentence-transformers/all-MiniLM-L6-v2', 'tiny': ''}


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  if variant not in ENCODERS:
    raise ValueError(f'squad1.py:{variant}: choose {", ".join(ENCODERS)}')
  tiny, mini = variant == 'tiny', variant == 'minilm_l6'
  c = ml_collections.ConfigDict
  return c(dict(
      seed=0,
      model=c(dict(
          preset=variant, hidden_size=0, num_layers=0,
          num_heads=4 if tiny else 0, mlp_size=0,
          dropout=0.0 if tiny else 0.1,
          attention_dropout=0.0 if tiny else 0.1, attention='auto',
          initializer_range=0.09 if tiny else 0.02,
          init_from=ENCODERS[variant], init_head=True,
          head='independent')),
      objective='cross_entropy',
      decode=c(dict(
          max_answer_length=30, n_best=20, search='two_stage',
          null_rule='never', null_threshold=0.0, merge='none')),
      data=c(dict(
          train='synthetic(seed=0, size=8000, paraphrases=1)' if tiny
          else 'tfds(name="squad/v1.1", split="train")',
          eval='synthetic(seed=1, size=500, paraphrases=1, split="eval")'
          if tiny else 'tfds(name="squad/v1.1", split="validation")',
          max_length=80 if tiny else 384, window_overlap=8 if tiny else 128,
          max_question_length=20 if tiny else 64, lowercase=True, vocab='',
          vocab_size=1500, buckets=(48, 64) if tiny
          else (96, 128, 160, 192, 224, 256, 320),
          packing=False, windows_without_answer='cls',
          cache='auto')),
      train=c(dict(
          batch_size=16 if mini else 32, eval_batch_size=0,
          num_epochs=2.0 if tiny or mini else 3.0, num_steps=0,
          grad_accumulation=1, eval_every_steps=0,
          checkpoint_every_steps=500, log_every_steps=50,
          max_skipped=10, step_timeout_seconds=1800.0)),
      optim=c(dict(
          learning_rate=1e-3 if tiny else 1e-4 if mini else 5e-5,
          warmup_fraction=0.1, schedule='linear', weight_decay=0.01,
          clip_norm=1.0, skip_norm=0.0, layer_decay=1.0,
          bias_correction=True, eps=1e-8)),
      parallel=c(dict(
          mode='pmap', num_devices=0, mesh=c(dict(data=-1, fsdp=1)))),
      precision=c(dict(compute_dtype='float32')),
  ))
