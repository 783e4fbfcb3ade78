"""Checks exports to transformers and imports from transformers for equality.

  python -m benchmarks.both_ways --run=runs/real --data=SPEC \
      [--peer_python=python] [--questions=64]

Compares, in float32: the logits of every context token and [CLS], the token
ids, and the score of the best span, which a plain loop finds in the logits of
transformers and `predict` finds here. Then transformers writes a checkpoint
whose head has a bias, qa_jax reads it, and the comparison is repeated. Exit
code 0 if all are equal, to 1e-5 of the largest logit.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data import sources
from qa_jax.export import hugging_face
from qa_jax.inference import predict
from qa_jax.models import qa as qa_lib

TOLERANCE = 1e-5
CAP = 30
PEER = '''
import sys
import numpy as np, torch, transformers
source, windows, target, biased = sys.argv[1:]
model = transformers.AutoModelForQuestionAnswering.from_pretrained(source)
if biased:  # a head of transformers' own making
  with torch.no_grad():
    model.qa_outputs.weight.mul_(0.7)
    model.qa_outputs.bias.copy_(torch.tensor([0.3, -0.2]))
  model.save_pretrained(biased)
  transformers.AutoTokenizer.from_pretrained(source).save_pretrained(biased)
words = transformers.AutoTokenizer.from_pretrained(biased or source)
given = dict(np.load(windows))
texts = [words(str(q), str(c))['input_ids'] for q, c in zip(
    given['question'], given['context'], strict=True)]
same = [ids == row[mask > 0].tolist() for ids, row, mask in zip(
    texts, given['token_ids'], given['attention_mask'], strict=True)]
found = {'start': [], 'end': []}
with torch.no_grad():
  for i in range(0, len(texts), 16):
    out = model.eval()(**{name: torch.from_numpy(given[ours][i:i + 16]).long()
        for name, ours in (('input_ids', 'token_ids'),
                           ('token_type_ids', 'token_type_ids'),
                           ('attention_mask', 'attention_mask'))})
    found['start'].append(out.start_logits.numpy())
    found['end'].append(out.end_logits.numpy())
np.savez(target, same=same, **{k: np.concatenate(v) for k, v in found.items()})
'''


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m benchmarks.both_ways')
  parser.add_argument('--run', required=True)
  parser.add_argument('--data', required=True)
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--questions', type=int, default=64)
  options = parser.parse_args()
  if options.questions < 1:
    parser.error(f'--questions={options.questions} must be at least 1')
  examples = sources.load_examples(options.data)
  chosen = examples[::max(1, len(examples) // options.questions)]
  failed = False
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    exported, biased = folder / 'exported', folder / 'biased'
    windows, logits = folder / 'windows.npz', folder / 'logits.npz'
    hugging_face.write_hugging_face(hugging_face.read_source(options.run),
                                    exported)
    rows = _windows(_load(options.run), chosen, windows)
    for what, source, target in (
        ('run → transformers', options.run, ''),
        ('transformers → qa_jax, head with a bias', biased, str(biased))):
      done = subprocess.run(
          [options.peer_python, '-c', PEER, str(exported), str(windows),
           str(logits), target], stderr=subprocess.PIPE, text=True, check=False)
      errors.require(
          not done.returncode, f'--peer_python={options.peer_python}: '
          f'{done.stderr.strip().rpartition(chr(10))[2]}; it needs the '
          'packages of requirements-peers.txt')
      failed |= not _compare(what, _load(source), rows, np.load(logits))
  return int(failed)


def _load(source: str) -> predict.QA:
  qa = predict.load(source, calibrated=False, null_rule='never')
  return dataclasses.replace(
      qa, model=qa.model.clone(compute_dtype=jnp.float32))


def _windows(qa: predict.QA, chosen, target: pathlib.Path):
  """Picks questions that fit one window; writes their windows to `target`."""
  windows = input_pipeline.make_windows(qa.config, chosen, qa.tokenizer)
  alone = np.flatnonzero(np.bincount(windows.example_of) == 1)
  rows = np.flatnonzero(np.isin(windows.example_of, alone))
  batch = windows.gather(rows, int(windows.total_lengths[rows].max()))
  questions = [chosen[i] for i in windows.example_of[rows]]
  np.savez(target, question=[e.question for e in questions],
           context=[e.context for e in questions],
           **{k: batch[k] for k in qa_lib.INPUTS})
  return questions, batch


def _compare(what: str, qa: predict.QA, rows, theirs) -> bool:
  questions, batch = rows
  run = jax.jit(qa.model.apply)
  parts = [jax.device_get(run({'params': qa.params}, **qa_lib.model_inputs(
      {k: v[i:i + 16] for k, v in batch.items()})))
           for i in range(0, len(questions), 16)]
  seen = batch['context_mask'].copy()
  seen[:, 0] = True
  gap = 0.0
  for side in ('start', 'end'):
    ours = np.concatenate([getattr(p, side) for p in parts])
    gap = np.maximum(gap, np.abs(ours - theirs[side])[seen].max()
                     / np.abs(theirs[side][seen]).max())  # keeps a NaN
  answers = qa.answer_batch([
      {'question': e.question, 'context': e.context} for e in questions])
  best = []
  for i in range(len(questions)):
    start, end = (np.where(batch['context_mask'][i], theirs[side][i], -np.inf)
                  for side in ('start', 'end'))
    best.append(max(start[a] + end[b] for a in np.flatnonzero(
        batch['context_mask'][i]) for b in range(a, min(a + CAP, len(end)))))
  largest = max(np.abs(theirs[side][seen]).max() for side in ('start', 'end'))
  equal = sum(abs(a.score - b) <= 2 * TOLERANCE * largest
              for a, b in zip(answers, best, strict=True))
  ids = int(theirs['same'].sum())
  print(f'{what}: {len(questions)} questions, logits apart by {gap:.1e} of the '
        f'largest, token ids equal in {ids}, the best span of a loop over '
        f'their logits as good in {equal}', flush=True)
  return gap <= TOLERANCE and ids == equal == len(questions)


if __name__ == '__main__':
  try:
    sys.exit(main())
  except (errors.UserError, OSError) as e:
    sys.exit(f'error: {e}')
