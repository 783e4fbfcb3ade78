"""Report of an error analysis: analysis.{json,md,html} and its curves."""

from collections.abc import Mapping, Sequence
import itertools
import pathlib
from typing import Any

from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.metrics import error_analysis
from qa_jax.metrics import selective

COVERAGE_PLOT = 'analysis_coverage.png'
PRECISION_RECALL_PLOT = 'analysis_precision_recall.png'
THRESHOLDS = {
    'zero': 'zero', 'held_out': 'held out, chosen on other questions',
    'oracle': 'oracle, chosen on these very questions'}
NO_ANSWER = {'accuracy': 'right about whether there is an answer',
             'average_precision': 'average precision of the no-answer score'}
ERRORS = 200  # errors shown, the most confident
FEW = 10  # a slice of fewer questions is shown in grey
AROUND = 60  # characters of the context shown on each side of an answer
SCORES = {'exact_match': 'exact match', 'f1': 'F1'}
BOUNDARIES = {
    'start': 'the start is that of a gold answer',
    'end': 'the end is that of a gold answer',
    'span': 'start and end are those of one gold answer',
    'text_elsewhere': 'the text is right, the place is not',
    'splice': 'the start of one gold answer, the end of another',
    'in_candidates': 'a gold answer is among the candidates',
    'recombined': 'start and end of a gold answer are those of two candidates'}


def write_error_report(analysis: Mapping[str, Any],
                       mistakes: Sequence[error_analysis.Error],
                       output: pathlib.Path, title: str) -> None:
  """Writes an analysis of `analyse_errors`: {json,md,html} and the plots.

  `mistakes` are those of `list_errors`.
  """
  files.write_json(output / 'analysis.json', analysis)
  plot_curve(analysis['coverage']['curve'], output / COVERAGE_PLOT,
             xlabel='questions answered, surest first (%)', ylabel='F1 (%)')
  if 'no_answer' in analysis:
    plot_curve(analysis['no_answer']['precision_recall'],
               output / PRECISION_RECALL_PLOT,
               xlabel='recall: unanswerable questions told so (%)',
               ylabel='precision (%)')
  blocks = [*error_report_blocks(analysis, title), *_kinds(mistakes)]
  files.write_text(output / 'analysis.md', documents.to_markdown(blocks))
  files.write_text(output / 'analysis.html', documents.to_html(
      [*blocks, *error_rows(mistakes)], output))


def headline(analysis: Mapping[str, Any]) -> list[str]:
  """Returns the scores with their intervals, and any difference, as lines."""
  def lines(values: Mapping[str, Any], signed: bool) -> list[str]:
    return [f'{name}: {mean}, 95 % interval {interval}' for name, (
        mean, interval) in ((text, _interval(values[key], signed))
                            for key, text in SCORES.items())]

  out = lines(analysis, False)
  if 'difference' in analysis:
    out.append(f'difference from {analysis["difference"]["against"]}:')
    out += [f'  {line}, p {analysis["difference"][key]["p"]:.4f}'
            for key, line in zip(SCORES, lines(analysis['difference'], True),
                                 strict=True)]
  return out


def error_report_blocks(analysis: Mapping[str, Any],
                        title: str) -> list[documents.Block]:
  """Returns the blocks of the report, without the list of errors."""
  blocks: list[documents.Block] = [
      documents.Title(1, title),
      documents.Table(['', 'mean', '95 % interval'], [
          [name, *_interval(analysis[key])] for key, name in SCORES.items()]),
      documents.Text(
          'Intervals here and below are over articles and their questions. '
          'Slices are of answerable questions; those of fewer than '
          f'{FEW} are in grey.')]
  if 'difference' in analysis:
    blocks += _difference(analysis['difference'])
  if 'no_answer' in analysis:
    no_answer = analysis['no_answer']
    blocks += [
        documents.Title(2, 'Answer or none'),
        documents.Table(['', '%'], [[text, f'{no_answer[key]:.2f}']
                                    for key, text in NO_ANSWER.items()]),
        documents.Picture('Precision and recall of no answer',
                          PRECISION_RECALL_PLOT)]
  if 'thresholds' in analysis:
    blocks += [
        documents.Title(2, 'Thresholds of no answer'), documents.Table(
            ['', 'threshold', 'EM', 'F1', 'HasAns F1', 'NoAns'],
            [[THRESHOLDS[name],
              f'{at["threshold"]:.2f}' if 'threshold' in at else 'never answer',
              *(f'{at[k]:.2f}' if k in at else '–' for k in (
                  *SCORES, 'has_answer_f1', 'no_answer_exact_match'))]
             for name, at in analysis['thresholds'].items()])]
  if 'candidates' in analysis:
    scores = analysis['candidates']
    blocks += [
        documents.Title(2, 'The best of the first k candidates, for answerable '
                        'questions'),
        documents.Table(['k', *map(str, error_analysis.CUTS)], [
            [name, *(f'{scores[key][str(k)]:.2f}' for k in error_analysis.CUTS)]
            for key, name in SCORES.items()]),
        documents.Title(2, 'Boundaries of the best candidate'),
        documents.Table(['', '% of answerable questions'], [
            [text, f'{analysis["boundaries"][key]:.2f}']
            for key, text in BOUNDARIES.items()])]
  coverage = analysis['coverage']
  blocks += [
      documents.Title(2, 'Risk and coverage'),
      documents.Text(
          'Each question has its best answer here, whatever the null '
          'threshold. F1 if all questions are answered '
          f'{coverage["score_at_100"]:.2f}, '
          f'if the surest {selective.COVERAGE:g} % are '
          f'{coverage[selective.AT_COVERAGE]:.2f}, '
          f'mean over all coverages {coverage["area"]:.2f}.'),
      documents.Picture('F1 by coverage', COVERAGE_PLOT)]
  for name, slices in analysis.get('slices', {}).items():
    blocks += [documents.Title(2, f'By {name}'), documents.Table(
        [name, 'answerable questions', 'EM', '95 % interval', 'F1',
         '95 % interval'],
        [[value, str(scores['total']), *_interval(scores['exact_match']),
          *_interval(scores['f1'])] for value, scores in slices.items()],
        grey=[i for i, scores in enumerate(slices.values())
              if scores['total'] < FEW])]
  return blocks


def _difference(difference: Mapping[str, Any]) -> list[documents.Block]:
  note = ('p is that of a paired sign-flip permutation test over questions, p '
          '(articles) over articles. ')
  if 'mcnemar' in difference:
    mcnemar = difference['mcnemar']
    note += (f'Exactly right here alone: {mcnemar["here"]} questions, there '
             f'alone: {mcnemar["there"]}; exact McNemar test '
             f'p = {mcnemar["p"]:.4f}. None of these tests knows what another '
             'seed would change.')
  else:
    note += (f'Scores of tests are means over {difference["seeds"]} seeds; the '
             'interval is over seeds too, and p (seeds) is that of a paired '
             't-test over seeds.')
  return [documents.Title(2, f'Difference from {difference["against"]}'),
          difference_table(difference), documents.Text(note)]


def difference_table(difference: Mapping[str, Any]) -> documents.Table:
  """Returns the table of the `paired_difference` of each of SCORES."""
  tests = {p: name for p, name in (
      ('p', 'p'), ('p_articles', 'p (articles)'), ('p_seeds', 'p (seeds)'))
           if p in difference['f1']}
  return documents.Table(
      ['', 'difference', '95 % interval', *tests.values()],
      [[name, *_interval(difference[key], signed=True),
        *(f'{difference[key][p]:.4f}' for p in tests)]
       for key, name in SCORES.items()])


def _kinds(mistakes: Sequence[error_analysis.Error]) -> list[documents.Block]:
  """Returns the table of the numbers of errors of each kind."""
  if not mistakes:
    return []
  count = {kind: sum(e.kind == kind for e in mistakes)
           for kind in error_analysis.KINDS}
  return [documents.Title(2, f'{len(mistakes)} errors'),
          documents.Table(['kind', 'errors', '% of errors'], [
              [f'{kind}: {error_analysis.KINDS[kind]}', str(n),
               f'{100 * n / len(mistakes):.1f}']
              for kind, n in count.items()])]


def error_rows(mistakes: Sequence[error_analysis.Error],
               ) -> list[documents.Block]:
  """Returns the table of the ERRORS most confident errors."""
  if not mistakes:
    return []
  sample = documents.Marked([
      ('gold answer', 'gold'), (', ', ''), ('prediction', 'prediction'),
      (', ', ''), ('both', 'both')])
  return [
      documents.Title(2, f'The {min(ERRORS, len(mistakes))} most confident of '
                      f'{len(mistakes)} errors'),
      documents.Table(
          ['probability', 'kind', 'question', 'prediction', 'gold', 'passage'],
          [['', '', '', '', '', sample]] + [[
              '–' if e.confidence is None else f'{e.confidence:.1%}', e.kind,
              e.example.question, e.prediction or '(no answer)',
              ' / '.join(dict.fromkeys(e.example.gold_texts)) or '(no answer)',
              _passage(e)] for e in mistakes[:ERRORS]], texts=True)]


def _passage(error: error_analysis.Error) -> documents.Marked:
  """Returns the context with marks, without text far from any of them."""
  context = error.example.context
  golds = [(a.start, a.start + len(a.text)) for a in error.example.answers]
  ours = [error.place] if error.place else []
  edges = sorted({0, len(context), *(x for span in golds + ours for x in span)})
  parts = []
  for begin, end in itertools.pairwise(edges):
    gold, prediction = (any(a <= begin < b for a, b in spans)
                        for spans in (golds, ours))
    text = context[begin:end]
    kind = ('both' if gold and prediction else 'gold' if gold
            else 'prediction' if prediction else '')
    if not kind:
      text = _shorten(text, first=begin == 0, last=end == len(context))
    parts.append((text, kind))
  return documents.Marked(parts)


def _shorten(text: str, *, first: bool, last: bool) -> str:
  """Returns the ends of a text that lie beside marks, AROUND characters each.

  A text that is first and last has no mark, and keeps its beginning.
  """
  head = 2 * AROUND if first and last else 0 if first else AROUND
  tail = 0 if last else AROUND
  if len(text) <= head + tail + 3:
    return text
  begin, end = text[:head], text[len(text) - tail:]
  # Cut between words, where there are spaces.
  begin = begin.rpartition(' ')[0] or begin
  end = end.partition(' ')[2] or end
  return f'{begin} … {end}'


def plot_curve(points: Sequence[Sequence[float]], path: pathlib.Path, *,
               xlabel: str, ylabel: str) -> None:
  """Draws a curve of two percentages."""
  from matplotlib import figure  # lazily: matplotlib is slow

  from qa_jax.io import plots
  fig = figure.Figure(figsize=(5, 3.2), layout='constrained')
  axes = fig.subplots()
  axes.plot([x for x, _ in points], [y for _, y in points], plots.START)
  axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 100), ylim=(0, 101))
  plots.save_figure(fig, path)


def _interval(value: Mapping[str, float], signed: bool = False) -> list[str]:
  mean, low, high = (f'{value[k]:{"+" if signed else ""}.2f}'
                     for k in ('mean', 'low', 'high'))
  return [mean, f'{low} … {high}']
