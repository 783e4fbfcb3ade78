"""Where the errors are: candidates, boundaries, slices, risk and coverage.

Glossary of shapes: N questions, K candidates of a question.

Strings and numpy only, from what an evaluation wrote: predictions, n-best
lists in characters, no-answer scores. All shares are percentages. Boundaries,
candidates and slices are about the questions that have an answer.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import re
import sys
from typing import Any

import numpy as np
from scipy import stats

from qa_jax import errors
from qa_jax.data import examples as examples_lib
from qa_jax.data.examples import Example
from qa_jax.io import files
from qa_jax.metrics import selective
from qa_jax.metrics import significance
from qa_jax.metrics import squad

CUTS = (1, 2, 5, 10, 20)  # candidates looked at
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
        len({examples_lib.normalize_answer(t) for t in e.gold_texts})),
    'times the answer stands in the context': lambda e: _few(max(
        e.context.count(t) for t in e.gold_texts)),
    'place of the answer, fifth of the context': lambda e: str(
        1 + 5 * min(a.start for a in e.answers) // max(len(e.context), 1)),
}


def analyse_errors(examples: Sequence[Example],
                   predictions: Mapping[str, str],
                   candidates: Mapping[str, Candidates],
                   *,
                   na_scores: Mapping[str, float] | None = None,
                   windows: Mapping[str, int] | None = None,
                   held_out: float | None = None,
                   seed: int = 0) -> dict[str, Any]:
  """What analysis.json holds.

  `candidates` are best first. `windows` gives the number of windows of a
  question, for a slice of its own; `held_out` is a threshold that was chosen
  on other questions.
  """
  if na_scores is not None:
    squad.check_covers(na_scores, examples)
  scores = np.stack(squad.per_question(examples, predictions))
  articles = np.array([e.article for e in examples])
  answerable = [i for i, e in enumerate(examples) if e.answers]
  out: dict[str, Any] = {
      name: _mean(x[None], articles, seed)
      for name, x in zip(('exact_match', 'f1'), scores, strict=True)}
  if answerable:
    asked = [examples[i] for i in answerable]
    if candidates:
      out['candidates'] = candidate_scores(asked, candidates)
      out['boundaries'] = boundary_errors(asked, candidates)
    by = dict(SLICES)
    if windows is not None:
      by['windows'] = lambda e: _few(windows.get(e.id, 0))
    out['slices'] = {
        name: _slice([part(e) for e in asked], scores[:, answerable],
                     articles[answerable], seed) for name, part in by.items()}
  confidence = {e.id: _confidence(candidates.get(e.id, ()), na_scores, e.id)
                for e in examples}
  always = {e.id: candidates[e.id][0]['text'] if candidates.get(e.id)
            else predictions.get(e.id, '') for e in examples}
  out['coverage'] = selective.risk_coverage(
      np.array([confidence[e.id] for e in examples]),
      squad.per_question(examples, always)[1])
  if na_scores is not None and 0 < len(answerable) < len(examples):
    scores = np.array([na_scores[e.id] for e in examples])
    none = np.array([not e.answers for e in examples])
    silent = np.array([not predictions.get(e.id) for e in examples])
    out['no_answer'] = {
        'accuracy': 100 * float((silent == none).mean()),
        'average_precision': 100 * selective.average_precision(scores, none),
        'precision_recall': selective.precision_recall(scores, none)}
    if candidates:
      out['thresholds'] = selective.thresholds(
          examples, always, na_scores, held_out)
  return out


def compare_predictions(examples: Sequence[Example],
                        predictions: Sequence[Mapping[str, str]],
                        others: Sequence[Mapping[str, str]], *,
                        seed: int) -> dict[str, Any]:
  """What two systems differ by on the same questions, in percentage points.

  Either has a file of predictions for each seed, paired in their order;
  intervals are over seeds, articles and their questions, `p` is over
  questions and `p_articles` over articles. `mcnemar`, of one seed: questions
  that one alone has exactly right, and the exact two-sided test that either is
  as likely (McNemar, 1947).
  """
  articles = [e.article for e in examples]
  ours, theirs = (np.stack([squad.per_question(examples, p) for p in system],
                           axis=1) for system in (predictions, others))
  out: dict[str, Any] = {'seeds': len(predictions)}
  for name, x in zip(('exact_match', 'f1'), ours - theirs, strict=True):
    average = x.mean(axis=0)
    out[name] = {**_mean(x, articles, seed),
                 'p': significance.sign_flip(average, seed=seed),
                 'p_articles': significance.sign_flip(
                     significance.article_sums(average, articles), seed=seed)}
  if len(predictions) == 1:
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
  for where, row in files.read_rows(path):
    answers = row.get('answers')
    if not (isinstance(row.get('id'), str) and isinstance(answers, list)
            and isinstance(row.get('windows'), int)):
      raise errors.UserError(
          f"{where}: expected 'id', 'windows' and 'answers'; evaluate anew")
    if row['id'] in found:
      raise errors.UserError(
          f'{where}: question {row["id"]!r} stands there twice')
    for answer in answers:
      if not (isinstance(answer, dict) and isinstance(answer.get('text'), str)
              and all(isinstance(answer.get(k), int) for k in ('start', 'end'))
              and isinstance(answer.get('score'), int | float)
              and abs(answer['score']) <= sys.float_info.max):
        raise errors.UserError(
            f'{where}: expected answers with text, start, end and a finite '
            'score')
    found[row['id']], windows[row['id']] = answers, row['windows']
  return found, windows


def candidate_scores(examples: Sequence[Example],
                     candidates: Mapping[str, Candidates]
                     ) -> dict[str, dict[str, float]]:
  """The best score among the first k candidates, for every k of CUTS."""
  best = np.zeros((len(examples), 2, max(CUTS)))
  for i, example in enumerate(examples):
    for k, found in enumerate(candidates.get(example.id, ())[:max(CUTS)]):
      best[i, :, k] = squad.score_answer(
          found['text'], example.gold_texts, version='2.0')
  reached = np.maximum.accumulate(best, axis=2).mean(axis=0) * 100
  return {name: {str(k): float(reached[row, k - 1]) for k in CUTS}
          for row, name in enumerate(('exact_match', 'f1'))}


def boundary_errors(examples: Sequence[Example],
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
    right = squad.score_answer(
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


def _confidence(found: Candidates, na_scores: Mapping[str, float] | None,
                key: str) -> float:
  """The no-answer score turned round; without one, the best's lead."""
  if na_scores is not None:
    return -na_scores[key]
  if not found:
    return -np.inf
  scores = np.array([c['score'] for c in found])
  return -float(np.log(np.exp(scores - scores[0]).sum()))


def _slice(parts: Sequence[str], scores: np.ndarray,  # [2, N]
           articles: np.ndarray, seed: int) -> dict[str, Any]:
  out = {}
  for part in sorted(set(parts)):
    rows = np.array([p == part for p in parts])
    em, f1 = (_mean(x[None, rows], articles[rows], seed) for x in scores)
    out[part] = {'total': int(rows.sum()), 'exact_match': em, 'f1': f1}
  return out


def _mean(values: np.ndarray,  # [S, N]
          articles: Sequence[str], seed: int) -> dict[str, float]:
  """The mean with its 95 % interval over seeds, articles and questions, in
  percent."""
  low, high = significance.hierarchical_interval(values, articles, seed=seed)
  return {'mean': 100 * float(values.mean()), 'low': 100 * low,
          'high': 100 * high}
