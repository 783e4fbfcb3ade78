"""Post-processing as in run_qa, then the official SQuAD 2.0 scores."""

import collections
import pathlib
import re
import string
import time

import numpy as np
import torch_squad
import transformers

N_BEST, CAP = 20, 30


class Evaluate:

  def load(self, data, folder, logits):
    tokenizer = transformers.BertTokenizerFast(
        vocab=str(pathlib.Path(folder) / 'vocab.txt'), do_lower_case=True)
    self.rows = torch_squad.read_squad(data)
    self.features = torch_squad.features(tokenizer, self.rows, 384, 128)
    arrays = np.load(logits)
    self.logits = arrays['start'], arrays['end']
    return {'windows': len(self.features)}

  def score(self):
    predictions, na_scores, always = postprocess_qa_predictions(
        self.rows, self.features, *self.logits)
    return squad_v2(self.rows, predictions, na_scores, always)

  def run(self):
    began = time.perf_counter()
    self.score()
    return time.perf_counter() - began


def postprocess_qa_predictions(rows, features, all_starts, all_ends):
  """Returns texts by run_qa's heuristic of 20 best starts times 20 best ends.

  Also returns the margin of null over the best span, and the texts before any
  threshold, which the official search for the best threshold needs.
  """
  features_of = collections.defaultdict(list)
  for k, feature in enumerate(features):
    features_of[feature['row']].append(k)
  predictions, na_scores, always = {}, {}, {}
  for r, row in enumerate(rows):
    null, candidates = None, []
    for k in features_of[r]:
      starts, ends = all_starts[k], all_ends[k]
      offsets = features[k]['offsets']
      score = starts[0] + ends[0]
      if null is None or null['score'] > score:
        null = {'offsets': (0, 0), 'score': score, 'start_logit': starts[0],
                'end_logit': ends[0]}
      for i in np.argsort(starts)[-1:-N_BEST - 1:-1].tolist():
        for j in np.argsort(ends)[-1:-N_BEST - 1:-1].tolist():
          if (i >= len(offsets) or j >= len(offsets) or offsets[i] is None
              or offsets[j] is None):
            continue
          if j < i or j - i + 1 > CAP:
            continue
          candidates.append({
              'offsets': (offsets[i][0], offsets[j][1]),
              'score': starts[i] + ends[j], 'start_logit': starts[i],
              'end_logit': ends[j]})
    best = sorted([*candidates, null], key=lambda x: x['score'],
                  reverse=True)[:N_BEST]
    if not any(x['offsets'] == (0, 0) for x in best):
      best.append(null)
    for x in best:
      x['text'] = row['context'][slice(*x['offsets'])]
    if best[0]['text'] == '' and len(best) == 1:
      best.insert(0, {'text': 'empty', 'start_logit': 0.0, 'end_logit': 0.0,
                      'score': 0.0})
    scores = np.array([x['score'] for x in best])
    shares = np.exp(scores - scores.max())
    for x, share in zip(best, shares / shares.sum(), strict=True):
      x['probability'] = share
    text = next(x for x in best if x['text'] != '')
    margin = null['score'] - text['start_logit'] - text['end_logit']
    na_scores[row['id']] = float(margin)
    always[row['id']] = text['text']
    predictions[row['id']] = '' if margin > 0 else text['text']
  return predictions, na_scores, always


def normalize(text):
  text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def exact(gold, predicted):
  return int(normalize(gold) == normalize(predicted))


def f1(gold, predicted):
  gold, predicted = normalize(gold).split(), normalize(predicted).split()
  if not gold or not predicted:
    return int(gold == predicted)
  same = sum((collections.Counter(gold)
              & collections.Counter(predicted)).values())
  if not same:
    return 0
  precision, recall = same / len(predicted), same / len(gold)
  return 2 * precision * recall / (precision + recall)


def raw_scores(rows, predictions):
  golds = {row['id']: [a['text'] for a in row['answers']
                       if normalize(a['text'])] or [''] for row in rows}
  return [{key: max(metric(gold, predictions[key]) for gold in texts)
           for key, texts in golds.items()} for metric in (exact, f1)]


def squad_v2(rows, predictions, na_scores, always):
  """Returns EM and F1 in percent, and the best over all thresholds."""
  total = len(rows)
  out = {name: 100 * sum(scores.values()) / total for name, scores in zip(
      ('exact_match', 'f1'), raw_scores(rows, predictions), strict=True)}
  has_answer = {row['id']: bool(row['answers']) for row in rows}
  for name, scores in zip(('best_exact_match', 'best_f1'),
                          raw_scores(rows, always), strict=True):
    current = best = sum(not has for has in has_answer.values())
    for key in sorted(na_scores, key=na_scores.get):
      if has_answer[key]:
        current += scores[key]
      elif always[key]:
        current -= 1
      best = max(best, current)
    out[name] = 100 * best / total
  return out


def calls():
  evaluate = Evaluate()
  return {'load': evaluate.load, 'score': evaluate.score,
          'run': evaluate.run}
