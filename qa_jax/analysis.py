"""Where the errors are: candidates, boundaries, slices, risk and coverage.

Glossary of shapes: N questions, K candidates of a question.

Strings and numpy only, from what an evaluation wrote: predictions, n-best
lists in characters, no-answer scores. All shares are percentages. Boundaries,
candidates and slices are about the questions that have an answer.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import pathlib
import re
from typing import Any

import numpy as np
from scipy import stats

from qa_jax import errors
from qa_jax import files
from qa_jax import metrics
from qa_jax import significance
from qa_jax.data.examples import Example

CUTS = (1, 2, 5, 10, 20)  # candidates looked at
COVERAGE = 80.0  # percent of the questions answered, of one figure
AT_COVERAGE = f'score_at_{COVERAGE:.0f}'
CURVE_POINTS = 101
WORDS = ('who', 'whom', 'whose', 'what', 'which', 'when', 'where', 'why', 'how')

Candidates = Sequence[Mapping[str, Any]]  # as nbest.jsonl has them


def question_word(example: Example) -> str:
  """The first question word there is; "how many" and "how much" apart."""
  words = re.findall(r'[a-z]+', example.question.lower())
  for word, following in zip(words, [*words[1:], ''], strict=True):
    if word in WORDS:
      quantity = word == 'how' and following in ('many', 'much')
      return f'how {following}' if quantity else word
  return 'other'


def _steps(edges: Sequence[int]) -> Callable[[int], str]:
  """A number → the name of its range: 'a–b' up to each edge, 'more'."""
  def name(value: int) -> str:
    low = 0
    for edge in edges:
      if value <= edge:
        return str(edge) if edge == low else f'{low}–{edge}'
      low = edge + 1
    return f'{low} and more'
  return name


_few, _answer, _context = _steps((0, 1, 2)), _steps((0, 1, 2, 4, 8)), _steps(
    (99, 149, 199, 299))

# What a question is sorted by → its part; golds are as the annotators gave.
SLICES: dict[str, Callable[[Example], str]] = {
    'question word': question_word,
    'words of the shortest answer': lambda e: _answer(
        min(len(t.split()) for t in e.gold_texts)),
    'words of the context': lambda e: _context(len(e.context.split())),
    'different answers': lambda e: _few(
        len({metrics.normalize_answer(t) for t in e.gold_texts})),
    'times the answer stands in the context': lambda e: _few(max(
        e.context.count(t) for t in e.gold_texts)),
    'place of the answer, fifth of the context': lambda e: str(
        1 + 5 * min(a.start for a in e.answers) // max(len(e.context), 1)),
}


def analyse(examples: Sequence[Example], predictions: Mapping[str, str],
            candidates: Mapping[str, Candidates], *,
            na_scores: Mapping[str, float] | None = None,
            windows: Mapping[str, int] | None = None,
            seed: int = 0) -> dict[str, Any]:
  """What analysis.json holds.

  `candidates` are best first. `windows` gives the number of windows of a
  question, for a slice of its own.
  """
  if na_scores is not None:
    metrics.check_covers(na_scores, examples)
  em, f1 = metrics.per_question(examples, predictions)
  answerable = [i for i, e in enumerate(examples) if e.answers]
  out: dict[str, Any] = {
      'exact_match': _mean(em, seed), 'f1': _mean(f1, seed)}
  if answerable:
    asked = [examples[i] for i in answerable]
    if candidates:
      out['candidates'] = candidate_scores(asked, candidates)
      out['boundaries'] = boundaries(asked, candidates)
    by = dict(SLICES)
    if windows is not None:
      by['windows'] = lambda e: _few(windows.get(e.id, 0))
    out['slices'] = {
        name: _slice([part(e) for e in asked], em[answerable],
                     f1[answerable], seed) for name, part in by.items()}
  confidence = {e.id: _confidence(candidates.get(e.id, ()), na_scores, e.id)
                for e in examples}
  out['coverage'] = risk_coverage(
      np.array([confidence[e.id] for e in examples]), _always(
          examples, candidates, predictions))
  if na_scores is not None and 0 < len(answerable) < len(examples):
    scores = np.array([na_scores[e.id] for e in examples])
    none = np.array([not e.answers for e in examples])
    silent = np.array([not predictions.get(e.id) for e in examples])
    out['no_answer'] = {
        'accuracy': 100 * float((silent == none).mean()),
        'average_precision': 100 * average_precision(scores, none)}
  return out


def difference(examples: Sequence[Example], predictions: Mapping[str, str],
               others: Mapping[str, str], *, seed: int) -> dict[str, Any]:
  """What two systems differ by on the same questions, in percentage points.

  `mcnemar`: questions that one alone has exactly right, and the exact
  two-sided test that either is as likely (McNemar, 1947).
  """
  out: dict[str, Any] = {}
  ours, theirs = (metrics.per_question(examples, p)
                  for p in (predictions, others))
  for name, a, b in zip(('exact_match', 'f1'), ours, theirs, strict=True):
    out[name] = {**_mean(a - b, seed), 'p': significance.sign_flip(
        a - b, seed=seed)}
  here, there = (int((x > y).sum()) for x, y in (
      (ours[0], theirs[0]), (theirs[0], ours[0])))
  p = stats.binomtest(here, here + there).pvalue if here + there else 1.0
  out['mcnemar'] = {'here': here, 'there': there, 'p': float(p)}
  return out


def check_ids(examples: Sequence[Example], predictions: Mapping[str, str],
              where: pathlib.Path) -> None:
  """Raises a UserError if predictions are of other questions than these.

  Some without a prediction are wrong, as the official scripts have it.
  """
  known = {e.id for e in examples}
  unknown = predictions.keys() - known
  if unknown:
    raise errors.UserError(
        f'{where}: {len(unknown)} of {len(predictions)} predictions are of '
        f'questions that the data does not have, such as '
        f'{min(unknown)!r}; give --data what was evaluated on')


def read_nbest(path: pathlib.Path
               ) -> tuple[dict[str, Candidates], dict[str, int]]:
  """nbest.jsonl → each question's candidates, and its number of windows.

  Raises:
    UserError: unreadable, or of another shape.
  """
  found: dict[str, Candidates] = {}
  windows: dict[str, int] = {}
  for number, line in enumerate(files.read_text(path).splitlines(), 1):
    where = f'{path}:{number}'
    row = files.parse_object(line, where)
    answers, windows[row.get('id')] = row.get('answers'), row.get('windows')
    if not (isinstance(row.get('id'), str) and isinstance(answers, list)
            and isinstance(row.get('windows'), int)):
      raise errors.UserError(
          f"{where}: expected 'id', 'windows' and 'answers'; evaluate anew")
    for answer in answers:
      if not (isinstance(answer, dict) and isinstance(answer.get('text'), str)
              and all(isinstance(answer.get(k), int) for k in ('start', 'end'))
              and isinstance(answer.get('score'), int | float)
              and math.isfinite(answer['score'])):
        raise errors.UserError(
            f'{where}: expected answers with text, start, end and a finite '
            'score')
    found[row['id']] = answers
  return found, windows


def candidate_scores(examples: Sequence[Example],
                     candidates: Mapping[str, Candidates]
                     ) -> dict[str, dict[str, float]]:
  """The best score among the first k candidates, for every k of CUTS."""
  best = np.zeros((len(examples), 2, max(CUTS)))
  for i, example in enumerate(examples):
    for k, found in enumerate(candidates.get(example.id, ())[:max(CUTS)]):
      best[i, :, k] = metrics.score_answer(
          found['text'], example.gold_texts, version='2.0')
  reached = np.maximum.accumulate(best, axis=2).mean(axis=0) * 100
  return {name: {str(k): float(reached[row, k - 1]) for k in CUTS}
          for row, name in enumerate(('exact_match', 'f1'))}


def boundaries(examples: Sequence[Example],
               candidates: Mapping[str, Candidates]) -> dict[str, float]:
  """Which ends of the best candidate are right; percent of the questions.

  `start`, `end`: equal to that of some gold span; `span`: both, of one gold.
  `text_elsewhere`: right text that is at no gold place. `splice`: the text is
  wrong, but its start and its end are those of two different golds.
  `in_candidates`: a gold span is among all candidates. `recombined`: it is not
  the best one, but its start and its end are each that of a candidate, which
  the search could have put together.
  """
  names = ('start', 'end', 'span', 'text_elsewhere', 'splice',
           'in_candidates', 'recombined')
  counts = dict.fromkeys(names, 0)
  for example in examples:
    found = candidates.get(example.id, ())
    if not found:
      continue
    gold = {(a.start, a.start + len(a.text)) for a in example.answers}
    best = found[0]['start'], found[0]['end']
    right = metrics.score_answer(
        found[0]['text'], example.gold_texts, version='2.0')[0] == 1
    starts, ends = ({g[side] for g in gold} for side in (0, 1))
    spans = {(c['start'], c['end']) for c in found}
    offered = [{span[side] for span in spans} for side in (0, 1)]
    counts['start'] += best[0] in starts
    counts['end'] += best[1] in ends
    counts['span'] += best in gold
    counts['text_elsewhere'] += right and best not in gold
    counts['splice'] += (not right and best not in gold
                         and best[0] in starts and best[1] in ends)
    counts['in_candidates'] += bool(gold & spans)
    counts['recombined'] += best not in gold and any(
        g[0] in offered[0] and g[1] in offered[1] for g in gold)
  return {name: 100 * count / len(examples) for name, count in counts.items()}


def risk_coverage(confidence: np.ndarray,  # [N]
                  score: np.ndarray,  # [N] of answering, 0 … 1
                  ) -> dict[str, Any]:
  """What answering only the surest questions gains.

  El-Yaniv and Wiener (2010). `score_at_80` is the mean score, in percent, of
  the COVERAGE percent answered with the most confidence, `area` the mean over
  all coverages 1/N … 1 (100 - AURC); questions of equal confidence are taken
  together, each at their mean score.
  """
  order = np.argsort(-confidence, kind='stable')
  _, group = np.unique(-confidence[order], return_inverse=True)
  mean = np.bincount(group, score[order]) / np.bincount(group)
  reached = np.cumsum(mean[group]) / np.arange(1, len(score) + 1) * 100
  at = lambda percent: max(int(np.ceil(percent / 100 * len(score))), 1) - 1
  coverage = np.linspace(0, 100, CURVE_POINTS)[1:]
  return {AT_COVERAGE: float(reached[at(COVERAGE)]),
          'score_at_100': float(reached[-1]), 'area': float(reached.mean()),
          'curve': [[float(c), float(reached[at(c)])] for c in coverage]}


def average_precision(score: np.ndarray,  # [N], higher: surer it is positive
                      positive: np.ndarray,  # [N] bool
                      ) -> float:
  """Σ (recall step · precision) over thresholds, ties at once; 0 … 1."""
  values, group = np.unique(-score, return_inverse=True)
  hits = np.bincount(group, positive, len(values))
  found, taken = np.cumsum(hits), np.cumsum(np.bincount(group))
  return float((hits / positive.sum() * found / taken).sum())


def _always(examples: Sequence[Example],
            candidates: Mapping[str, Candidates],
            predictions: Mapping[str, str]) -> np.ndarray:  # [N]
  """F1 of the best candidate of each question, whatever the null rule says."""
  answers = {e.id: candidates[e.id][0]['text'] if candidates.get(e.id)
             else predictions.get(e.id, '') for e in examples}
  return metrics.per_question(examples, answers)[1]


def _confidence(found: Candidates, na_scores: Mapping[str, float] | None,
                key: str) -> float:
  """The no-answer score turned round; without one, the best's lead."""
  if na_scores is not None:
    return -na_scores[key]
  if not found:
    return -np.inf
  scores = np.array([c['score'] for c in found])
  return -float(np.log(np.exp(scores - scores[0]).sum()))


def _slice(parts: Sequence[str], em: np.ndarray, f1: np.ndarray,
           seed: int) -> dict[str, Any]:
  out = {}
  for part in sorted(set(parts)):
    rows = np.array([p == part for p in parts])
    out[part] = {'total': int(rows.sum()),
                 'exact_match': _mean(em[rows], seed),
                 'f1': _mean(f1[rows], seed)}
  return out


def _mean(values: np.ndarray, seed: int) -> dict[str, float]:
  """The mean with its 95 % bootstrap interval over questions, in percent."""
  same = bool((values == values[0]).all())  # a degenerate bootstrap is NaN
  low, high = (values[0], values[0]) if same else significance.interval(
      values, seed=seed)
  return {'mean': 100 * float(values.mean()), 'low': 100 * float(low),
          'high': 100 * float(high)}
