r"""Answers a question with an exported program; qa_jax is not needed.

  python run.py --question="Who …?" --context="…"

What it reads lies beside it. It needs jax, flatbuffers, numpy, safetensors
and tokenizers.

Glossary of shapes: B windows of the question, L window length, K candidates.
"""

import argparse
import hashlib
import json
import pathlib
import sys

import jax.export
import numpy as np
import safetensors.numpy
import tokenizers

FILES = ('program.bin', 'params.safetensors', 'tokenizer.json', 'meta.json')
NO_SPAN = -1e9  # the best score where there is no legal span


def product(null, best, normaliser):
  log_p = min(-np.logaddexp(0, -null).sum(), -1e-300)
  return log_p - np.log(-np.expm1(log_p))


# How sure "no answer" is, from scores [B] of the windows: see null_rules.py.
NULL_RULES = {
    'never': lambda null, best, normaliser: -np.inf,
    'min_null': lambda null, best, normaliser: null.min() - best.max(),
    'margin': lambda null, best, normaliser: (null - best).min(),
    'classifier': lambda null, best, normaliser: null.min(),
    'product': product,
    'posterior': lambda null, best, normaliser: (null - normaliser).min()}


def load_program(directory):
  """(meta, program, params, tokenizer); ValueError if a file is damaged."""
  sums = (directory / 'SHA256SUMS').read_text(errors='replace').split('\n')
  data = {name: (directory / name).read_bytes() for name in FILES}
  for name, content in data.items():
    if f'{hashlib.sha256(content).hexdigest()}  {name}' not in sums:
      raise ValueError(f'{directory / name} is damaged: SHA256SUMS holds '
                       'another checksum; export it again')
  words = tokenizers.Tokenizer.from_str(data['tokenizer.json'].decode())
  words.encode_special_tokens = True  # "[SEP]" in a text is text
  return (json.loads(data['meta.json']),
          jax.jit(jax.export.deserialize(bytearray(data['program.bin'])).call),
          safetensors.numpy.load(data['params.safetensors']), words)


def make_windows(meta, question, context):
  """Token ids of both texts → the program's inputs, as windows.py cuts them."""
  question = question[:meta['max_question_length']]
  first, count = len(question) + 2, len(context)
  room = meta['max_length'] - first - 1
  begin = np.arange(0, max(count - meta['window_overlap'], 1),
                    room - meta['window_overlap'])  # [B]
  end = np.minimum(begin + room, count)
  length = first + (end - begin).max() + 1
  length = max(-(-length // 32) * 32, meta['min_length'])  # few to compile
  length = min(length, meta['max_length'])
  token_ids = np.full((len(begin), length), meta['pad_id'], np.int32)
  for row, b, e in zip(token_ids, begin, end, strict=True):
    row[:first + e - b + 1] = [meta['cls_id'], *question, meta['sep_id'],
                               *context[b:e], meta['sep_id']]
  # A token starts an answer only in the window with the most context around.
  token = np.arange(count)[:, None]
  around = 100 * np.minimum(token - begin, end - 1 - token) + end - begin
  owner = np.where((token >= begin) & (token < end), around, -1).argmax(1)
  edges = np.searchsorted(owner, np.arange(len(begin) + 1))  # ascending
  place = lambda begins, ends: np.stack(
      [begins - begin + first, ends - begin + first], 1).astype(np.int32)
  return (token_ids, place(begin, end), place(edges[:-1], edges[1:]),
          begin - first)


def answer_question(loaded, question, context):
  """`context[start:end] == text`; '' at (0, 0) is "no answer".

  Probabilities are among all spans and no answer, as qa_jax's predict.py says.
  """
  meta, program, params, words = loaded
  asked, passage = words.encode_batch([question, context],
                                      add_special_tokens=False)
  *inputs, shift = make_windows(meta, asked.ids, passage.ids)
  parts = [jax.device_get(program(params, *(x[i:i + 32] for x in inputs)))
           for i in range(0, len(shift), 32)]
  found = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  best = np.maximum(np.float64(found['score'][:, 0]), NO_SPAN)  # [B]
  null, normaliser, mass = (
      np.float64(found[k]) for k in ('null', 'normaliser', 'mass'))
  b = int(best.argmax())
  p, null_p = posteriors(meta, best[b], null.min(), mass)
  sure = NULL_RULES[meta['null_rule']](null, best, normaliser)
  answered, valid = sure <= meta['null_threshold'], found['valid'][b, 0]
  out = {'text': '', 'start': 0, 'end': 0, 'score': float(best[b]),
         'null_score': float(null.min()),
         'probability': p * bool(valid) if answered else null_p,
         'null_probability': null_p}
  if answered and valid:
    start = passage.offsets[found['start'][b, 0] + shift[b]][0]
    end = passage.offsets[found['end'][b, 0] + shift[b]][1]
    out |= {'text': context[start:end], 'start': start, 'end': end}
  return out


def posteriors(meta, best, null, mass):
  """Of the best span and of no answer: see aggregate.py."""
  t = meta['temperature']
  null = -np.inf if meta['null_rule'] == 'never' else null / t
  total = np.logaddexp(null, np.logaddexp.reduce(mass))
  return float(np.exp(min(best / t - total, 0.0))), float(np.exp(null - total))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--question', required=True)
  parser.add_argument('--context', required=True)
  asked = parser.parse_args()
  try:
    loaded = load_program(pathlib.Path(__file__).resolve().parent)
    print(json.dumps(answer_question(loaded, asked.question, asked.context)))
  except (OSError, ValueError) as e:
    sys.exit(f'error: {" ".join(str(e).split())}')


if __name__ == '__main__':
  main()
