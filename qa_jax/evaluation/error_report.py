"""An analysis → analysis.json, .md, .html with errors, and a curve."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib import figure

from qa_jax.data.examples import Example
from qa_jax.io import documents
from qa_jax.io import files
from qa_jax.io import plots
from qa_jax.metrics import error_analysis
from qa_jax.metrics import selective
from qa_jax.metrics import squad

CURVE = 'analysis_coverage.png'
PRECISION_RECALL = 'analysis_precision_recall.png'
THRESHOLDS = {
    'zero': 'zero', 'held_out': 'held out, chosen on other questions',
    'oracle': 'oracle, chosen on these very questions'}
ERRORS = 100  # shown, evenly spread over the file
AROUND = 60  # characters of the context shown on each side of an answer

BOUNDARIES = {
    'start': 'start is that of a gold answer',
    'end': 'end is that of a gold answer',
    'span': 'both are, of one gold answer',
    'text_elsewhere': 'the text is right, the place is not',
    'splice': 'start of one gold answer, end of another',
    'in_candidates': 'a gold answer is among the candidates',
    'recombined': 'start and end of a gold answer are, of two candidates'}


def write_error_report(found: Mapping[str, Any], examples: Sequence[Example],
                       predictions: Mapping[str, str], output: pathlib.Path,
                       title: str) -> None:
  """Writes all of it into `output`."""
  files.write_json(output / 'analysis.json', found)
  plot_curve(found['coverage']['curve'], output / CURVE, ylabel='F1 (%)',
             xlabel='questions answered, surest first (%)')
  if 'no_answer' in found:
    plot_curve(found['no_answer']['precision_recall'],
               output / PRECISION_RECALL,
               xlabel='recall: unanswerable questions told so (%)',
               ylabel='precision (%)')
  told = error_report_blocks(found, title)
  files.write_text(output / 'analysis.md', documents.to_markdown(told))
  files.write_text(output / 'analysis.html', documents.to_html(
      [*told, *error_rows(examples, predictions)], output))


def error_report_blocks(found: Mapping[str, Any],
                        title: str) -> list[documents.Block]:
  """All but the errors themselves."""
  made: list[documents.Block] = [documents.Title(1, title), documents.Table(
      ['', 'mean', '95 % interval'],
      [[name, *_spread(found[key])] for name, key in (
          ('exact match', 'exact_match'), ('F1', 'f1'))]), documents.Text(
              'Intervals here and below are over articles and their questions.'
          )]
  if 'difference' in found:
    made += _difference(found['difference'])
  if 'no_answer' in found:
    told = found['no_answer']
    made += [documents.Title(2, 'Answer or none'), documents.Table(
        ['', '%'], [['right about whether there is an answer',
                     f'{told["accuracy"]:.2f}'],
                    ['average precision of the no-answer score',
                     f'{told["average_precision"]:.2f}']]),
             documents.Picture('Precision and recall of no answer',
                               PRECISION_RECALL)]
  if 'thresholds' in found:
    made += [documents.Title(2, 'Thresholds of no answer'), documents.Table(
        ['', 'threshold', 'EM', 'F1', 'HasAns F1', 'NoAns'],
        [[THRESHOLDS[name], *(f'{at[k]:.2f}' if k in at else '–' for k in (
            'threshold', 'exact_match', 'f1', 'has_answer_f1',
            'no_answer_exact_match'))]
         for name, at in found['thresholds'].items()])]
  if 'candidates' in found:
    scores = found['candidates']
    made += [
        documents.Title(2, 'The best of the first k candidates'),
        documents.Table(['k', *map(str, error_analysis.CUTS)], [[
            name, *(f'{scores[key][str(k)]:.2f}' for k in error_analysis.CUTS)
        ] for name, key in (('exact match', 'exact_match'), ('F1', 'f1'))])
    ]
    made += [
        documents.Title(2, 'Boundaries of the best candidate'),
        documents.Table(['', '% of answerable questions'],
                        [[words, f'{found["boundaries"][key]:.2f}']
                         for key, words in BOUNDARIES.items()])
    ]
  coverage = found['coverage']
  made += [documents.Title(2, 'Risk and coverage'), documents.Text(
      f'F1 of answering all questions {coverage["score_at_100"]:.2f}, the '
      f'surest {selective.COVERAGE:g} % of them '
      f'{coverage[selective.AT_COVERAGE]:.2f}, mean over all coverages '
      f'{coverage["area"]:.2f}.'), documents.Picture('F1 by coverage', CURVE)]
  for name, parts in found.get('slices', {}).items():
    made += [documents.Title(2, f'By {name}'), documents.Table(
        [name, 'questions', 'EM', '95 % interval', 'F1', '95 % interval'],
        [[part, str(values['total']), *_spread(values['exact_match']),
          *_spread(values['f1'])] for part, values in parts.items()])]
  return made


def _difference(found: Mapping[str, Any]) -> list[documents.Block]:
  rows = [[name, *_spread(found[key], signed=True), f'{found[key]["p"]:.4f}',
           f'{found[key]["p_articles"]:.4f}']
          for name, key in (('exact match', 'exact_match'), ('F1', 'f1'))]
  said = ('p is that of a paired sign-flip permutation test over questions, p '
          '(articles) over articles. ')
  if 'mcnemar' in found:
    mcnemar = found['mcnemar']
    said += (f'Exactly right here alone: {mcnemar["here"]} questions, there '
             f'alone: {mcnemar["there"]}; exact McNemar test '
             f'p = {mcnemar["p"]:.4f}. None of these knows what another seed '
             'would do.')
  else:
    said += (f'Scores of tests are means over {found["seeds"]} seeds; the '
             'interval is over seeds too.')
  return [
      documents.Title(2, f'Less {found["against"]}'),
      documents.Table(['', 'difference', '95 % interval', 'p', 'p (articles)'],
                      rows), documents.Text(said)]


def error_rows(examples: Sequence[Example],
               predictions: Mapping[str, str]) -> list[documents.Block]:
  """Some questions that were not answered exactly, with where the answer is."""
  em, _ = squad.per_question(examples, predictions)
  wrong = [e for e, right in zip(examples, em, strict=True) if not right]
  shown = wrong[::max(1, len(wrong) // ERRORS)][:ERRORS]
  if not shown:
    return []
  return [
      documents.Title(2, f'{len(shown)} of {len(wrong)} errors'),
      documents.Items([
          (e.id,
           f'{e.question} Predicted: {predictions.get(e.id) or "no answer"}.'
           f' Gold: {_gold(e)}') for e in shown
      ])
  ]


def _gold(example: Example) -> str:
  if not example.answers:
    return 'no answer.'
  texts = dict.fromkeys(example.gold_texts)
  first = example.answers[0]
  begin = max(first.start - AROUND, 0)
  end = first.start + len(first.text)
  return (f'{" / ".join(texts)}. … {example.context[begin:first.start]}'
          f'[{first.text}]{example.context[end:end + AROUND]} …')


def plot_curve(points: Sequence[Sequence[float]], path: pathlib.Path, *,
               xlabel: str, ylabel: str) -> None:
  """Draws a curve of two percentages."""
  fig = figure.Figure(figsize=(5, 3.2), layout='constrained')
  axes = fig.subplots()
  axes.plot([x for x, _ in points], [y for _, y in points], plots.START)
  axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 100), ylim=(0, 101))
  plots.save_figure(fig, path)


def _spread(value: Mapping[str, float], signed: bool = False) -> list[str]:
  sign = '+' if signed else ''
  return [f'{value["mean"]:{sign}.2f}',
          f'{value["low"]:{sign}.2f} … {value["high"]:{sign}.2f}']
