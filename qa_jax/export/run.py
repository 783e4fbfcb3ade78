r"""Answers a question with an exported program, without qa_jax.

  python run.py --question="Who …?" --context="…"

The files of the export are beside this script. It needs jax, flatbuffers,
numpy, safetensors and tokenizers. In shapes, B is the number of windows, L
their length and T the number of context tokens.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import sys
import unicodedata

import jax.export
import numpy as np
import safetensors.numpy
import tokenizers

FILES = ('program.bin', 'params.safetensors', 'tokenizer.json', 'meta.json')
NO_SPAN = -1e9  # stands for the score of a window without any legal span


def product(null, best, normaliser):
  """Returns the log odds that no window holds the answer."""
  log_p = min(-np.logaddexp(0, -null).sum(), -1e-300)
  return log_p - np.log(-np.expm1(log_p))


# No-answer scores from the null scores, the best span scores and the
# log-partitions [B] of the windows: see qa_jax/decoding/null_rules.py.
NULL_RULES = {
    'never': lambda null, best, normaliser: -np.inf,
    'min_null': lambda null, best, normaliser: null.min() - best.max(),
    'margin': lambda null, best, normaliser: (null - best).min(),
    'classifier': lambda null, best, normaliser: null.min(),
    'product': product,
    'posterior': lambda null, best, normaliser: (null - normaliser).min()}


def load_program(directory):
  """Reads (meta, program, params, tokenizer); ValueError: a damaged file."""
  sums = (directory / 'SHA256SUMS').read_text(errors='replace').split('\n')
  data = {name: (directory / name).read_bytes() for name in FILES}
  for name, content in data.items():
    if f'{hashlib.sha256(content).hexdigest()}  {name}' not in sums:
      raise ValueError(f'{directory / name} is damaged: SHA256SUMS holds '
                       'another checksum; export it again')
  tokenizer = tokenizers.Tokenizer.from_str(data['tokenizer.json'].decode())
  # "[SEP]" in a question or context is plain text, not a separator.
  tokenizer.encode_special_tokens = True
  return (json.loads(data['meta.json']),
          jax.jit(jax.export.deserialize(bytearray(data['program.bin'])).call),
          safetensors.numpy.load(data['params.safetensors']), tokenizer)


def make_windows(meta, question, context, may_start, may_end):
  """Returns the program's inputs and the offset of each window's positions.

  `question` and `context` are token ids, the windows those of
  qa_jax/data/windows.py. Context token t of a window is at t - offset. The
  masks `may_start` and `may_end`, [T] bool, are of tokens at which an answer
  may start and end. The inputs are token ids [B, L], the context tokens of the
  windows as [begin, end), [B, 2], and masks [B, L] of starts and ends.
  """
  question = question[:meta['max_question_length']]
  between = [meta['sep_id']] * meta['separators']
  first, count = 1 + len(question) + len(between), len(context)
  room = meta['max_length'] - first - 1
  begin = np.arange(0, max(count - meta['window_overlap'], 1),
                    room - meta['window_overlap'])  # [B]
  end = np.minimum(begin + room, count)
  # The program is compiled once a length, so there are few lengths.
  length = -(-(first + (end - begin).max() + 1) // 32) * 32
  length = min(max(length, meta['min_length']), meta['max_length'])
  token_ids = np.full((len(begin), length), meta['pad_id'], np.int32)
  for row, b, e in zip(token_ids, begin, end, strict=True):
    row[:first + e - b + 1] = [meta['cls_id'], *question, *between,
                               *context[b:e], meta['sep_id']]
  # Only owned tokens start an answer: each token is owned by the window in
  # which it has the most context on both sides.
  token = np.arange(count)[:, None]
  around = 100 * np.minimum(token - begin, end - 1 - token) + end - begin
  owner = np.where((token >= begin) & (token < end), around, -1).argmax(1)
  starts, ends = np.zeros((2, *token_ids.shape), bool)
  for n, (b, e) in enumerate(zip(begin, end, strict=True)):
    starts[n, first:first + e - b] = may_start[b:e] & (owner[b:e] == n)
    ends[n, first:first + e - b] = may_end[b:e]
  inside = np.stack([np.full_like(begin, first), first + end - begin], 1)
  return token_ids, inside.astype(np.int32), starts, ends, begin - first


def answer_question(loaded, question, context):
  """Returns the answer as a dict with text, start, end and scores.

  `text` is `context[start:end]`. "No answer" is '' with start and end 0.
  `score` is None if the context has no legal span.
  Probabilities are posteriors among all spans and null, as in
  qa_jax/inference/predict.py. `loaded` comes from `load_program`.
  """
  meta, program, params, tokenizer = loaded
  query, passage = tokenizer.encode_batch([question.lstrip(), context],
                                          add_special_tokens=False)
  legal = legal_tokens(meta, context, passage)
  *inputs, offset = make_windows(meta, query.ids, passage.ids, *legal)
  parts = [jax.device_get(program(params, *(x[i:i + 32] for x in inputs)))
           for i in range(0, len(offset), 32)]
  spans = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  best = np.maximum(np.float64(spans['score'][:, 0]), NO_SPAN)  # [B]
  null, normaliser, log_partition = (
      np.float64(spans[k]) for k in ('null', 'normaliser', 'log_partition'))
  b = int(best.argmax())
  p, null_p = posteriors(meta, best[b], null.min(), log_partition)
  no_answer = NULL_RULES[meta['null_rule']](null, best, normaliser)
  answered, valid = no_answer <= meta['null_threshold'], spans['valid'][b, 0]
  out = {'text': '', 'start': 0, 'end': 0,
         'score': float(best[b]) if valid else None,
         'null_score': float(null.min()),
         'probability': p * bool(valid) if answered else null_p,
         'null_probability': null_p}
  if answered and valid:
    start, end = char_range(
        context, passage.offsets, spans['start'][b, 0] + offset[b],
        spans['end'][b, 0] + offset[b])
    out |= {'text': context[start:end], 'start': start, 'end': end}
  return out


def char_range(context, offsets, first, last):
  """Returns the characters [start, end) of the tokens `first` to `last`.

  They include the characters beside the tokens that are in no token, such as
  marks that the normaliser removes, and no space at their ends, as in
  qa_jax/data/tokenizer.py. Tokens of spaces alone have no characters.
  """
  def end_of(token):  # with its marks
    end = offsets[token][1]
    limit = offsets[token + 1][0] if token + 1 < len(offsets) else len(context)
    while end < limit and not context[end].isspace():
      end += 1
    return end

  start, end = offsets[first][0], end_of(last)
  previous = end_of(first - 1) if first else 0
  while start > previous and not context[start - 1].isspace():
    start -= 1
  while start < end and context[start].isspace():
    start += 1
  while start < end and context[end - 1].isspace():
    end -= 1
  return start, end


def legal_tokens(meta, context, passage):
  """Returns the masks [T] of tokens at which an answer may start and end.

  An answer may not start at a token of spaces alone. If meta['whole_words'], it
  starts and ends with a word, as in qa_jax/data/tokenizer.py.
  """
  may_start, may_end = np.ones((2, len(passage.ids)), bool)
  if meta['wordpiece']:
    inside = np.array([t.startswith('##') and len(t) > 2
                       for t in passage.tokens], bool)
  else:
    begin, end = np.array([
        char_range(context, passage.offsets, i, i)
        for i in range(len(passage.ids))], int).reshape(-1, 2).T
    may_start = begin < end
    inside = inside_words(context)[begin]
    inside[1:] |= begin[1:] < end[:-1]
  if meta['whole_words']:
    may_start = may_start & ~inside
    may_end = np.append(~inside[1:], True)[:len(inside)]
  return may_start, may_end


def inside_words(text):
  """Returns whether a word goes on from character i - 1 to i, [len(text) + 1].

  Words are those of BERT's pre-tokenizer, as in qa_jax/data/tokenizer.py.
  """
  letters = [False, *(not (
      c.isspace() or (c.isascii() and not c.isalnum())
      or unicodedata.category(c)[0] == 'P'
      or unicodedata.name(c, '').startswith('CJK ')) for c in text), False]
  return np.array([a and b for a, b in itertools.pairwise(letters)])


def posteriors(meta, best, null, log_partition):
  """Returns the posteriors of best span and null (decoding/answers.py)."""
  t = meta['temperature']
  null = -np.inf if meta['null_rule'] == 'never' else null / t
  total = np.logaddexp(null, np.logaddexp.reduce(log_partition))
  return float(np.exp(min(best / t - total, 0.0))), float(np.exp(null - total))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--question', required=True)
  parser.add_argument('--context', required=True)
  flags = parser.parse_args()
  try:
    for text in flags.question, flags.context:
      text.encode()  # what is no UTF-8 is a ValueError
    loaded = load_program(pathlib.Path(__file__).resolve().parent)
    print(json.dumps(answer_question(loaded, flags.question, flags.context)))
  except (OSError, ValueError) as e:
    sys.exit(f'error: {" ".join(str(e).split())}')


if __name__ == '__main__':
  main()
