"""Error analysis: candidates, boundaries, slices, risk and coverage.

The functions read what an evaluation wrote: predictions, n-best candidates in
characters, and no-answer scores. All shares are percentages. Boundaries,
candidates and slices are about the questions that have an answer.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from qa_jax import errors
from qa_jax.data import alignment
from qa_jax.data import examples as examples_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import selective
from qa_jax.metrics import significance
from qa_jax.metrics import squad

CUTS = (1, 2, 5, 10, 20)  # numbers of candidates that a report looks at
QUESTION_WORDS = (
    'who', 'whom', 'whose', 'what', 'which', 'when', 'where', 'why', 'how')

KINDS = {  # of errors
    'missed': 'no answer was given, but there is one',
    'invented': 'an answer was given, but there is none',
    'boundary': 'the answer overlaps a gold answer',
    'wrong place': 'the answer stands elsewhere in the context',
    'other': 'the answer is no text of the context'}

Candidates = Sequence[Mapping[str, Any]]  # `answers` of a row of nbest.jsonl


def question_word(example: Example) -> str:
  """Returns a question word, 'how many' and 'how much' apart, or 'other'."""
  words = re.findall(r'[a-z]+', example.question.lower())
  for word, following in zip(words, [*words, ''][1:], strict=True):
    if word in QUESTION_WORDS:
      quantity = word == 'how' and following in ('many', 'much')
      return f'how {following}' if quantity else word
  return 'other'


def _ranges(edges: Sequence[int]) -> Callable[[int], str]:
  """Returns number → its range: 'a–b' up to each edge, then 'c and more'."""
  def name(value: int) -> str:
    low = 0
    for edge in edges:
      if value <= edge:
        return str(edge) if edge == low else f'{low}–{edge}'
      low = edge + 1
    return f'{low} and more'
  return name


_small_count = _ranges((0, 1, 2))
_answer_length = _ranges((0, 1, 2, 4, 8))
_context_length = _ranges((99, 149, 199, 299))

# Property of a question → its value. Gold answers are as the annotators gave.
SLICES: dict[str, Callable[[Example], str]] = {
    'question word': question_word,
    'words of the shortest answer': lambda e: _answer_length(
        min(len(t.split()) for t in e.gold_texts)),
    'words of the context': lambda e: _context_length(len(e.context.split())),
    'different answers': lambda e: _small_count(
        len({examples_lib.normalize_answer(t) for t in e.gold_texts})),
    'times the answer stands in the context': lambda e: _small_count(max(
        e.context.count(t) for t in e.gold_texts)),
    'place of the answer, fifth of the context': lambda e: str(
        1 + 5 * min(a.start for a in e.answers) // max(len(e.context), 1)
        ) if e.answers else 'not in the context',
}


def _locate_answers(examples: Sequence[Example]) -> list[Example]:
  """Returns examples whose answers stand where the alignment finds them.

  An answer that does not occur in the context is left out of `answers`, but
  stays in `gold_texts`.
  """
  located = []
  for example in examples:
    places = (alignment.character_span(example.context, answer)[:2]
              for answer in example.answers)
    located.append(dataclasses.replace(
        example, accepted=example.gold_texts, answers=tuple(
            GoldAnswer(example.context[begin:end], begin)
            for begin, end in places if begin < end)))
  return located


def analyse_errors(examples: Sequence[Example],
                   predictions: Mapping[str, str],
                   n_best: Mapping[str, Mapping[str, Any]] | None = None, *,
                   na_scores: Mapping[str, float] | None = None,
                   held_out: float | None = None, seed: int = 0
                   ) -> dict[str, Any]:
  """Computes the entries of analysis.json.

  `n_best` maps a question id to its row of nbest.jsonl. `held_out` is a null
  threshold that was chosen on other questions.
  """
  examples = _locate_answers(examples)
  if na_scores is not None:
    squad.check_covers(na_scores, examples)
  scores = 100 * squad.per_question(examples, predictions)
  articles = np.array([e.article for e in examples])
  answerable = [i for i, e in enumerate(examples) if e.gold_texts]
  candidates = {k: row['answers'] for k, row in (n_best or {}).items()}
  analysis: dict[str, Any] = {
      name: significance.mean_interval(x[None], articles, seed=seed)
      for name, x in zip(('exact_match', 'f1'), scores, strict=True)}
  if answerable:
    questions = [examples[i] for i in answerable]
    if candidates:
      analysis['candidates'] = candidate_scores(questions, candidates)
      analysis['boundaries'] = boundary_errors(questions, candidates)
    properties = dict(SLICES)
    if n_best is not None:
      properties['windows'] = lambda e: _small_count(
          n_best[e.id]['windows'] if e.id in n_best else 0)
    analysis['slices'] = {
        name: _slice([value(e) for e in questions], scores[:, answerable],
                     articles[answerable], seed)
        for name, value in properties.items()}
  answers = predictions_lib.Predictions(
      examples, {e.id: candidates[e.id][0]['text'] if candidates.get(e.id)
                 else predictions.get(e.id, '') for e in examples}, na_scores)
  analysis['coverage'] = selective.risk_coverage(
      np.array([_confidence(candidates.get(e.id, ()), na_scores, e.id)
                for e in examples]), answers.answer_scores[1])
  if na_scores is not None and 0 < len(answerable) < len(examples):
    na_score = np.array([na_scores[e.id] for e in examples])
    unanswerable = np.array([not e.gold_texts for e in examples])
    declined = np.array([not predictions.get(e.id) for e in examples])
    analysis['no_answer'] = {
        'accuracy': 100 * float((declined == unanswerable).mean()),
        'average_precision': 100 * selective.average_precision(
            na_score, unanswerable),
        'precision_recall': selective.precision_recall(na_score, unanswerable)}
    if candidates:
      analysis['thresholds'] = answers.thresholds(held_out)
  return analysis


@dataclasses.dataclass(frozen=True)
class Error:
  """A question whose prediction is no exact match."""

  example: Example  # its answers stand where the alignment finds them
  prediction: str
  kind: str  # one of KINDS
  place: tuple[int, int] | None  # of the prediction in the context
  confidence: float | None  # probability of the prediction; None: unknown


def list_errors(examples: Sequence[Example], predictions: Mapping[str, str],
                n_best: Mapping[str, Mapping[str, Any]] | None = None,
                ) -> list[Error]:
  """Returns the errors, the most confident first.

  The place of a prediction is that of its candidate in `n_best` or, without
  one, its first occurrence in the context. Errors of unknown confidence come
  last.
  """
  examples = _locate_answers(examples)
  exact, _ = squad.per_question(examples, predictions)
  found = []
  for example, right in zip(examples, exact, strict=True):
    if right:
      continue
    text = predictions.get(example.id, '')
    row = (n_best or {}).get(example.id, {'answers': []})
    candidate = next((c for c in row['answers'] if c['text'] == text), None)
    place = None
    if candidate:
      place = candidate['start'], candidate['end']
    elif text and text in example.context:
      place = example.context.index(text), (
          example.context.index(text) + len(text))
    confidence = (candidate or {}).get('probability') if text else row.get(
        'null_probability')
    found.append(Error(example, text, _kind(example, text, place), place,
                       confidence))
  return sorted(found, key=lambda e: (
      e.confidence is None, -(e.confidence or 0.0)))


def _kind(example: Example, text: str, place: tuple[int, int] | None) -> str:
  if not text:
    return 'missed'
  if not example.gold_texts:
    return 'invented'
  if place is None:
    return 'other'
  overlaps = any(place[0] < a.start + len(a.text) and a.start < place[1]
                 for a in example.answers)
  return 'boundary' if overlaps else 'wrong place'


def compare_predictions(examples: Sequence[Example],
                        predictions: Sequence[Mapping[str, str]],
                        others: Sequence[Mapping[str, str]], *, seed: int
                        ) -> dict[str, Any]:
  """Compares two systems on the same questions, in percentage points.

  Each system has one mapping of predictions for each of its seeds; the seeds
  are paired in order. Intervals are over seeds, articles and their questions,
  `p` is over questions and `p_articles` is over articles. With one seed,
  `mcnemar` counts the questions that only one of the systems has exactly right,
  and gives the p-value of the exact two-sided test that both counts are equally
  likely (McNemar, 1947).

  Raises:
    UserError: the systems have different numbers of seeds.
  """
  errors.require(
      len(predictions) == len(others) > 0,
      f'the systems have {len(predictions)} and {len(others)} seeds; give '
      'equally many, since they are compared in pairs')
  from scipy import stats  # lazily: slow to import
  articles = [e.article for e in examples]
  first, second = (np.stack([squad.per_question(examples, p) for p in system],
                            axis=1) for system in (predictions, others))
  comparison: dict[str, Any] = {'seeds': len(predictions)} | {
      name: significance.paired_difference(100 * x, articles, seed=seed)
      for name, x in zip(('exact_match', 'f1'), first - second, strict=True)}
  if len(predictions) == 1:
    here = int((first[0] > second[0]).sum())
    there = int((second[0] > first[0]).sum())
    p = stats.binomtest(here, here + there).pvalue if here + there else 1.0
    comparison['mcnemar'] = {'here': here, 'there': there, 'p': float(p)}
  return comparison


def check_ids(examples: Sequence[Example], predictions: Mapping[str, str],
              where: pathlib.Path) -> None:
  """Raises a UserError if a prediction is for none of the questions.

  A question without a prediction scores 0, as in the official scripts.
  """
  unknown = predictions.keys() - {e.id for e in examples}
  if unknown:
    raise errors.UserError(
        f'{where}: {len(unknown)} of {len(predictions)} predictions are of '
        f'questions that the data does not have, such as {min(unknown)!r}; '
        'give --data what was evaluated on')


def candidate_scores(examples: Sequence[Example],
                     candidates: Mapping[str, Candidates]
                     ) -> dict[str, dict[str, float]]:
  """Computes the best score among the first k candidates, for all k of CUTS."""
  scores = np.zeros((len(examples), 2, max(CUTS)))
  for i, example in enumerate(examples):
    for k, candidate in enumerate(candidates.get(example.id, ())[:max(CUTS)]):
      scores[i, :, k] = squad.score_answer(
          candidate['text'], example.gold_texts, version='2.0')
  best = np.maximum.accumulate(scores, axis=2).mean(axis=0) * 100
  return {name: {str(k): float(best[row, k - 1]) for k in CUTS}
          for row, name in enumerate(('exact_match', 'f1'))}


def boundary_errors(examples: Sequence[Example],
                    candidates: Mapping[str, Candidates]) -> dict[str, float]:
  """Computes how often each boundary of the best candidate is right.

  All values are percentages of the questions:
    start           the start is the start of some gold span
    end             the end is the end of some gold span
    span            both are the boundaries of one gold span
    text_elsewhere  the text is right, but stands at no gold place
    splice          the text is wrong, but its start and its end are those of
                    two different gold spans
    in_candidates   a gold span is among all candidates
    recombined      the best candidate is no gold span, but the start and the
                    end of a gold span are each those of a candidate, so that
                    the search could have combined them
  """
  counts = dict.fromkeys(('start', 'end', 'span', 'text_elsewhere', 'splice',
                          'in_candidates', 'recombined'), 0)
  for example in examples:
    n_best = candidates.get(example.id, ())
    if not n_best:
      continue
    gold = {(a.start, a.start + len(a.text)) for a in example.answers}
    best = n_best[0]['start'], n_best[0]['end']
    right = squad.score_answer(
        n_best[0]['text'], example.gold_texts, version='2.0')[0] == 1
    gold_starts, gold_ends = ({g[side] for g in gold} for side in (0, 1))
    spans = {(c['start'], c['end']) for c in n_best}
    starts, ends = ({span[side] for span in spans} for side in (0, 1))
    counts['start'] += best[0] in gold_starts
    counts['end'] += best[1] in gold_ends
    counts['span'] += best in gold
    counts['text_elsewhere'] += right and best not in gold
    counts['splice'] += (not right and best not in gold
                         and best[0] in gold_starts and best[1] in gold_ends)
    counts['in_candidates'] += bool(gold & spans)
    counts['recombined'] += best not in gold and any(
        start in starts and end in ends for start, end in gold)
  return {name: 100 * count / len(examples) for name, count in counts.items()}


def _confidence(n_best: Candidates, na_scores: Mapping[str, float] | None,
                question_id: str) -> float:
  """Returns -na_score or, without it, the log share of the best candidate."""
  if na_scores is not None:
    return -na_scores[question_id]
  if not n_best:
    return -np.inf
  scores = np.array([c['score'] for c in n_best])
  return -float(np.log(np.exp(scores - scores[0]).sum()))


def _slice(values: Sequence[str], scores: np.ndarray, articles: np.ndarray,
           seed: int) -> dict[str, Any]:
  """Computes EM and F1 of the questions of each value."""
  slices = {}
  for value in sorted(set(values)):
    rows = np.array([v == value for v in values])
    em, f1 = (significance.mean_interval(
        x[None, rows], articles[rows], seed=seed) for x in scores)
    slices[value] = {'total': int(rows.sum()), 'exact_match': em, 'f1': f1}
  return slices
