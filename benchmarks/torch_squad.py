"""The peer program: this fine-tuning recipe in torch + transformers.

Hugging Face's run_qa recipe written against transformers 5 (whose own script is
gone): its feature preparation, loss, length grouping, AdamW groups, linear
warm-up, and n-best post-processing. Nothing of qa_jax is imported, so the two
can disagree.

  pip install -r requirements-peers.txt
  python benchmarks/torch_squad.py --model=DIR --train=train.json \
      --eval=dev.json --seed=0 --output=runs/peer0

Writes OUTPUT/{predictions,na_probs,always_answer,run}.json and OUTPUT/model/;
score the predictions with
`python -m experiments.evaluate --data=dev.json --predictions=...`.
"""

import argparse
import collections
import json
import pathlib
import random
import sys
import time

import numpy as np

try:
  import torch
  import transformers
except ImportError as e:
  sys.exit(f'error: {e.name} is not installed; '
           'pip install -r requirements-peers.txt')


def read_squad(path):
  """Reads a SQuAD JSON file into a flat list of dicts."""
  rows = []
  data = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  for article in data['data']:
    for paragraph in article['paragraphs']:
      for qa in paragraph['qas']:
        rows.append({'id': qa['id'], 'question': qa['question'].lstrip(),
                     'context': paragraph['context'],
                     'answers': qa['answers']})
  return rows


def features(tokenizer, rows, max_length, overlap):
  """Makes features as run_qa's prepare_*_features do, but unpadded."""
  out = []
  for begin in range(0, len(rows), 1000):
    chunk = rows[begin:begin + 1000]
    enc = tokenizer(
        [r['question'] for r in chunk], [r['context'] for r in chunk],
        truncation='only_second', max_length=max_length, stride=overlap,
        return_overflowing_tokens=True, return_offsets_mapping=True)
    for f, row in enumerate(enc['overflow_to_sample_mapping']):
      offsets, sequence = enc['offset_mapping'][f], enc.sequence_ids(f)
      start = end = 0  # [CLS] when the window has no answer
      if chunk[row]['answers']:
        answer = chunk[row]['answers'][0]
        a, b = answer['answer_start'], (
            answer['answer_start'] + len(answer['text']))
        first = sequence.index(1)
        last = len(sequence) - 1 - sequence[::-1].index(1)
        if offsets[first][0] <= a and offsets[last][1] >= b:
          i = first
          while i <= last and offsets[i][0] <= a:
            i += 1
          j = last
          while j >= first and offsets[j][1] >= b:
            j -= 1
          start, end = i - 1, j + 1
      out.append({
          'row': begin + row, 'input_ids': enc['input_ids'][f],
          'token_type_ids': enc['token_type_ids'][f],
          'offsets': [o if s == 1 else None
                      for o, s in zip(offsets, sequence, strict=True)],
          'start': start, 'end': end})
  return out


def collate(batch, pad_to=0):
  """Pads a batch to its longest row, or to `pad_to`."""
  length = pad_to or max(len(f['input_ids']) for f in batch)
  ids = np.zeros((len(batch), length), np.int64)
  types, mask = np.zeros_like(ids), np.zeros_like(ids)
  for i, f in enumerate(batch):
    n = len(f['input_ids'])
    ids[i, :n], types[i, :n], mask[i, :n] = (
        f['input_ids'], f['token_type_ids'], 1)
  return {'input_ids': torch.from_numpy(ids),
          'token_type_ids': torch.from_numpy(types),
          'attention_mask': torch.from_numpy(mask)}


def length_grouped(feats, batch_size, rng, megabatch=50):
  """Orders rows as LengthGroupedSampler does: megabatches sorted by length."""
  order = list(range(len(feats)))
  rng.shuffle(order)
  size = megabatch * batch_size
  megas = [sorted(order[i:i + size],
                  key=lambda k: -len(feats[k]['input_ids']))
           for i in range(0, len(order), size)]
  flat = [k for m in megas for k in m]
  return [flat[i:i + batch_size] for i in range(0, len(flat), batch_size)]


def post_process(rows, feats, starts, ends, n_best=20, max_answer_length=30):
  """Returns answers as run_qa's postprocess_qa_predictions, at threshold 0."""
  by_row = collections.defaultdict(list)
  for k, f in enumerate(feats):
    by_row[f['row']].append(k)
  predictions, answers, na_scores = {}, {}, {}
  for r, row in enumerate(rows):
    spans, null = [], float('inf')
    for k in by_row[r]:
      s, e, offsets = starts[k], ends[k], feats[k]['offsets']
      null = min(null, float(s[0] + e[0]))
      for i in np.argsort(-s)[:n_best]:
        for j in np.argsort(-e)[:n_best]:
          if (i >= len(offsets) or j >= len(offsets) or offsets[i] is None
              or offsets[j] is None or j < i
              or j - i + 1 > max_answer_length):
            continue
          spans.append((float(s[i] + e[j]), offsets[i][0], offsets[j][1]))
    best = max(spans, key=lambda x: x[0], default=(-1e9, 0, 0))
    answers[row['id']] = row['context'][best[1]:best[2]]
    na_scores[row['id']] = null - best[0]
    predictions[row['id']] = '' if null > best[0] else answers[row['id']]
  return predictions, answers, na_scores


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--model', required=True)
  parser.add_argument('--train', required=True)
  parser.add_argument('--eval', required=True)
  parser.add_argument('--output', required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--epochs', type=int, default=2)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--learning_rate', type=float, default=1e-4)
  parser.add_argument('--max_steps', type=int, default=0,
                      help='stop early (timing); 0 trains every epoch')
  parser.add_argument('--pad_to', type=int, default=0,
                      help='384 is run_qa\'s default; 0 pads to the batch')
  parser.add_argument('--threads', type=int, default=2)
  args = parser.parse_args()
  out = pathlib.Path(args.output)
  out.mkdir(parents=True, exist_ok=True)
  torch.set_num_threads(args.threads)
  torch.manual_seed(args.seed)
  random.seed(args.seed)

  tokenizer = transformers.BertTokenizerFast(
      vocab=str(pathlib.Path(args.model) / 'vocab.txt'), do_lower_case=True)
  model = transformers.BertForQuestionAnswering.from_pretrained(args.model)
  rows = read_squad(args.train)
  feats = features(tokenizer, rows, 384, 128)
  no_decay = ('bias', 'LayerNorm.weight')
  groups = [
      {'params': [p for n, p in model.named_parameters()
                  if not n.endswith(no_decay)], 'weight_decay': 0.01},
      {'params': [p for n, p in model.named_parameters()
                  if n.endswith(no_decay)], 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, eps=1e-8)
  total = args.epochs * -(-len(feats) // args.batch_size)
  schedule = transformers.get_linear_schedule_with_warmup(
      optimizer, int(0.1 * total), total)

  rng = random.Random(args.seed)
  log, step, seen = [], 0, 0
  began = time.perf_counter()
  model.train()
  for _ in range(args.epochs):
    for batch in length_grouped(feats, args.batch_size, rng):
      chunk = [feats[k] for k in batch]
      loss = model(**collate(chunk, args.pad_to),
                   start_positions=torch.tensor([f['start'] for f in chunk]),
                   end_positions=torch.tensor([f['end'] for f in chunk])).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
      schedule.step()
      optimizer.zero_grad()
      step, seen = step + 1, seen + len(chunk)
      loss = loss.detach()
      log.append((step, float(loss), seen, time.perf_counter() - began))
      if step % 50 == 0 or step == 1:
        print(f'step {step}/{total} loss {float(loss):.4f} '
              f'{seen / log[-1][-1]:.2f} windows/s', flush=True)
      if args.max_steps and step >= args.max_steps:
        break
    if args.max_steps and step >= args.max_steps:
      break
  train_seconds = time.perf_counter() - began
  run = {'seed': args.seed, 'steps': step, 'train_seconds': train_seconds,
         'cpu_seconds': time.process_time(), 'examples': seen,
         'windows': len(feats), 'torch': torch.__version__,
         'transformers': transformers.__version__, 'log': log}
  (out / 'run.json').write_text(json.dumps(run))
  if args.max_steps:
    return

  model.eval()
  rows = read_squad(args.eval)
  feats = features(tokenizer, rows, 384, 128)
  order = sorted(range(len(feats)), key=lambda k: len(feats[k]['input_ids']))
  starts, ends = [None] * len(feats), [None] * len(feats)
  with torch.no_grad():
    for begin in range(0, len(order), 32):
      chunk = order[begin:begin + 32]
      output = model(**collate([feats[k] for k in chunk], args.pad_to))
      for i, k in enumerate(chunk):
        starts[k] = output.start_logits[i].numpy()
        ends[k] = output.end_logits[i].numpy()
  predictions, answers, na_scores = post_process(rows, feats, starts, ends)
  (out / 'predictions.json').write_text(json.dumps(predictions))
  (out / 'always_answer.json').write_text(json.dumps(answers))
  (out / 'na_probs.json').write_text(json.dumps(na_scores))
  model.save_pretrained(out / 'model')


if __name__ == '__main__':
  main()
