"""Error analysis against enumeration and the definitions of other libraries."""

import itertools

import numpy as np
import pytest
import sklearn.metrics

from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.evaluation import error_report
from qa_jax.io import files
from qa_jax.metrics import error_analysis
from qa_jax.metrics import predictions
from qa_jax.metrics import selective
from tests.common import commands
from tests.common.refusals import refusal

CONTEXT = 'Ada met Bob in Rome and Bob met Eve in Bonn.'


def example(number: int, *answers: str, question: str = 'Who met Bob?',
            last: bool = False) -> Example:
  find = CONTEXT.rindex if last else CONTEXT.index
  return Example(str(number), question, CONTEXT, tuple(
      GoldAnswer(a, find(a)) for a in answers), impossible=not answers)


def spans(*texts: str) -> list[dict]:
  return [{'text': t, 'start': CONTEXT.index(t),
           'end': CONTEXT.index(t) + len(t), 'score': -float(k)}
          for k, t in enumerate(texts)]


@pytest.mark.parametrize(('question', 'word'), [
    ('Who met Bob?', 'who'), ('In what year?', 'what'),
    ('How many people met?', 'how many'), ('how did they meet', 'how'),
    ('Name a city.', 'other'), ('By whom was it?', 'whom'),
    ('Somewhere, where?', 'where'), ('how', 'how'), ('Which many?', 'which'),
    ('中国的首都是哪里？', 'other'), ('Кто?', 'other'), ('1987?', 'other'),
    ('', 'other')])
def test_a_question_is_sorted_by_its_first_question_word(question, word):
  assert error_analysis.question_word(example(0, 'Ada',
                                              question=question)) == word


@pytest.mark.parametrize(('name', 'golds', 'value'), [
    ('words of the shortest answer', ['Ada met Bob in', 'Ada'], '1'),
    ('words of the shortest answer', ['Ada met Bob in'], '3–4'),
    ('words of the shortest answer', [CONTEXT], '9 and more'),
    ('words of the context', ['Ada'], '0–99'),
    ('different answers', ['Bonn', 'Bonn.'], '1'),
    ('different answers', ['Ada', 'Bob', 'Eve'], '3 and more'),
    ('times the answer stands in the context', ['Ada', 'Bob'], '2'),
    ('place of the answer, fifth of the context', ['Bonn'], '5'),
    ('place of the answer, fifth of the context', ['Bonn', 'Rome'], '2')])
def test_a_question_is_in_the_slice_of_its_golds(name, golds, value):
  assert error_analysis.SLICES[name](example(0, *golds)) == value


def test_more_candidates_reach_the_answer():
  scores = error_analysis.candidate_scores(
      [example(0, 'Ada'), example(1, 'Rome'), example(2, 'Eve'), example(3)],
      {'0': spans('Bob', 'Ada'), '1': spans('Rome'),
       '2': spans(*['Bob'] * 19, 'Eve')})
  assert scores['exact_match'] == {
      '1': 25, '2': 50, '5': 50, '10': 50, '20': 75}
  assert scores['f1']['1'] == 25


@pytest.mark.parametrize(('golds', 'candidates', 'true'), [
    (['Ada'], ['Ada'], {'start', 'end', 'span', 'in_candidates'}),
    (['Ada met Bob'], ['Ada', 'Bob', 'Ada met Bob'],
     {'start', 'in_candidates', 'recombined'}),
    (['Ada met Bob'], ['Ada', 'Bob'], {'start', 'recombined'}),
    (['Ada met', 'met Bob'], ['Ada met Bob'], {'start', 'end', 'splice'}),
    (['Rome'], [], set())])
def test_boundaries_of_one_question(golds, candidates, true):
  shares = error_analysis.boundary_errors(
      [example(0, *golds)], {'0': spans(*candidates)})
  assert {name for name, share in shares.items() if share} == true
  assert set(shares.values()) <= {0.0, 100.0}


def test_right_text_at_the_wrong_place_is_an_error_of_its_own():
  shares = error_analysis.boundary_errors(
      [example(0, 'Bob', last=True)], {'0': spans('Bob')})
  assert shares['text_elsewhere'] == 100 and shares['span'] == 0


def test_a_right_text_between_two_gold_answers_is_no_splice():
  context = 'the Ada the cat'
  asked = Example('0', 'Who?', context, (
      GoldAnswer('the Ada', 0), GoldAnswer('Ada the', 4)))
  shares = error_analysis.boundary_errors([asked], {'0': [
      {'text': 'the Ada the', 'start': 0, 'end': 11, 'score': 0.0}]})
  assert (shares['start'], shares['end'], shares['span']) == (100, 100, 0)
  assert (shares['text_elsewhere'], shares['splice']) == (100, 0)


def test_risk_and_coverage_equal_the_mean_over_all_orders_of_ties():
  confidence = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
  score = np.array([1.0, 1.0, 0.0, 0.5, 0.0])
  coverage = selective.risk_coverage(confidence, score)
  at_80, areas = [], []
  for ties in itertools.permutations([1, 2, 3]):
    running = np.cumsum(score[[0, *ties, 4]]) / np.arange(1, 6) * 100
    at_80.append(running[3])
    areas.append(running.mean())
  np.testing.assert_allclose(coverage['score_at_80'], np.mean(at_80))
  np.testing.assert_allclose(coverage['area'], np.mean(areas))
  assert coverage['score_at_100'] == pytest.approx(50)
  assert coverage['curve'][-1] == [100, pytest.approx(50)]


@pytest.mark.parametrize('count', [1, 7, 100, 143])
def test_a_point_of_the_curve_has_the_fewest_questions_of_its_coverage(count):
  # The score of the n surest questions is 100 / n: only the first is right.
  coverage = selective.risk_coverage(
      -np.arange(count, dtype=float), np.arange(count) == 0)
  for percent in range(1, 101):
    number = next(n for n in range(1, count + 1) if 100 * n >= percent * count)
    assert coverage['curve'][percent - 1] == [
        percent, pytest.approx(100 / number)]
  assert coverage['score_at_80'] == coverage['curve'][79][1]


def test_average_precision_is_the_area_under_its_steps():
  """The scores are 0.9, 0.8, 0.8, 0.3; all but one 0.8 are positive."""
  precision = selective.average_precision(
      np.array([0.8, 0.9, 0.3, 0.8]), np.array([True, True, True, False]))
  assert precision == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4)


@pytest.mark.parametrize('count', [30, 5000])
def test_precision_and_recall_are_those_of_sklearn(count):
  rng = np.random.default_rng(count)
  positive = rng.random(count) < 0.4
  score = np.round(positive + rng.normal(0, 1, count), 1 + (count > 99) * 4)
  assert selective.average_precision(score, positive) == pytest.approx(
      sklearn.metrics.average_precision_score(positive, score))
  precision, recall, _ = sklearn.metrics.precision_recall_curve(
      positive, score)
  points = {(round(100 * r, 9), round(100 * p, 9))
            for r, p in zip(recall, precision, strict=True)}
  curve = selective.precision_recall(score, positive)
  assert {(round(r, 9), round(p, 9)) for r, p in curve} <= points
  assert curve == sorted(curve, key=lambda point: point[0])
  assert curve[-1][0] == 100 and (len(curve) <= 101 or count == 30)
  assert np.diff([r for r, _ in curve]).max() < 5 or count == 30


def test_thresholds_are_zero_held_out_and_the_official_best():
  table = predictions.Predictions(
      [example(0, 'Ada'), example(1, 'Rome'), example(2), example(3)],
      {'0': 'Ada', '1': 'Rome', '2': 'Bob', '3': 'Eve'},
      {'0': -2.0, '1': 1.0, '2': 0.5, '3': 3.0}).thresholds(0.5)
  at = lambda name: (table[name]['threshold'], table[name]['f1'])
  assert table['zero'] == {  # question 1 wrongly gets no answer
      'threshold': 0, 'exact_match': 75, 'f1': 75, 'has_answer_f1': 50,
      'no_answer_exact_match': 100}
  # Question 2 wrongly gets an answer too: its score equals the threshold.
  assert at('held_out') == (0.5, 50)
  assert at('oracle') == (-2.0, 75)  # the first of the best thresholds


@pytest.mark.parametrize(('text', 'oracle'), [
    ('Bob', {'exact_match': 50, 'f1': 50}),
    # Only the exact match is best if no question is answered.
    ('Ada met', {'exact_match': 50, 'f1': pytest.approx(100 * (2 / 3 + 1) / 2),
                 'threshold': -1})])
def test_an_oracle_that_answers_nothing_has_no_threshold(text, oracle):
  table = predictions.Predictions(
      [example(0, 'Ada'), example(1)], {'0': text, '1': 'Eve'},
      {'0': -1.0, '1': 1.0}).thresholds(None)
  assert table['oracle'] == oracle


@pytest.fixture
def analysis() -> dict:
  """Returns the analysis of three answerable questions and another."""
  examples = [example(0, 'Ada'), example(1, 'Rome', question='Where?'),
              example(2, 'Bob', 'met Bob', question='Whom?'), example(3)]
  return error_analysis.analyse_errors(
      examples, {'0': 'Ada', '1': 'Bonn', '2': 'met Bob', '3': ''},
      {key: {'answers': spans(text), 'windows': windows}
       for key, text, windows in (('0', 'Ada', 1), ('1', 'Bonn', 1),
                                  ('2', 'met Bob', 2), ('3', 'Eve', 1))},
      na_scores={'0': -1, '1': 0, '2': -2, '3': 1})


def test_a_report_draws_its_curves_and_greys_slices_of_few(
    analysis, tmp_path, monkeypatch):
  drawn, plot = {}, error_report.plot_curve

  def plot_curve(points, path, **labels):
    drawn[path.name] = points
    plot(points, path, **labels)

  monkeypatch.setattr(error_report, 'plot_curve', plot_curve)
  error_report.write_error_report(analysis, [], tmp_path, 'title')
  assert drawn == {
      error_report.COVERAGE_PLOT: analysis['coverage']['curve'],
      error_report.PRECISION_RECALL_PLOT: analysis['no_answer'][
          'precision_recall']}
  monkeypatch.setattr(error_report, 'FEW', 2)
  blocks = error_report.error_report_blocks(analysis, 'title')
  tables = [block for block in blocks
            if 'answerable questions' in getattr(block, 'head', ())]
  assert {len(table.rows) for table in tables} >= {1, 2}
  for table in tables:
    assert [*table.grey] == [
        i for i, row in enumerate(table.rows) if int(row[1]) < 2]


def test_each_number_of_a_report_stands_beside_its_name(analysis):
  analysis['thresholds'] = {'zero': dict(zip(
      ('threshold', 'exact_match', 'f1', 'has_answer_f1',
       'no_answer_exact_match'), (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))}
  analysis['boundaries'] = {
      name: float(n) for n, name in enumerate(error_report.BOUNDARIES)}
  analysis['coverage'] |= {'score_at_100': 91.0, selective.AT_COVERAGE: 92.0,
                           'area': 93.0}
  blocks = error_report.error_report_blocks(analysis, 'title')
  tables = {tuple(b.head): b.rows for b in blocks if hasattr(b, 'head')}
  assert tables['', 'threshold', 'EM', 'F1', 'HasAns F1', 'NoAns'] == [
      [error_report.THRESHOLDS['zero'], '1.00', '2.00', '3.00', '4.00', '5.00']]
  assert tables['', '% of answerable questions'] == [
      [text, f'{n}.00'] for n, text in enumerate(
          error_report.BOUNDARIES.values())]
  text, = [b.text for b in blocks if 'surest' in getattr(b, 'text', '')]
  assert text.endswith('all questions are answered 91.00, if the surest 80 % '
                       'are 92.00, mean over all coverages 93.00.')


def test_slices_add_up_to_the_whole(analysis):
  assert set(analysis['slices']) == {*error_analysis.SLICES, 'windows'}
  for parts in analysis['slices'].values():
    total = sum(p['total'] for p in parts.values())
    right = sum(p['total'] * p['exact_match']['mean'] for p in parts.values())
    assert total == 3
    assert right / total == pytest.approx(200 / 3)
  assert analysis['no_answer'] == {'accuracy': 100, 'average_precision': 100,
                                'precision_recall': [
                                    [100, 100], [100, 50], [100, 100 / 3],
                                    [100, 25]]}
  exact = analysis['exact_match']
  assert exact['low'] <= exact['mean'] == 75 <= exact['high']


def test_without_no_answer_scores_confidence_is_the_share_of_the_best():
  examples = [example(0, 'Ada'), example(1, 'Rome')]
  sure, unsure = spans('Ada', 'Bob'), spans('Bonn', 'Rome')
  sure[1]['score'], unsure[1]['score'] = -9.0, -0.1
  analysis = error_analysis.analyse_errors(
      examples, {'0': 'Ada', '1': 'Bonn'}, {
          key: {'answers': answers, 'windows': 1}
          for key, answers in (('0', sure), ('1', unsure))})
  assert analysis['coverage']['curve'][49][1] == 100  # question 0 alone
  assert 'no_answer' not in analysis


def test_an_answer_is_the_surer_the_lower_its_no_answer_score():
  analysis = error_analysis.analyse_errors(
      [example(0, 'Ada'), example(1, 'Rome')], {'0': 'Ada', '1': 'Bonn'},
      na_scores={'0': -2.0, '1': -1.0})
  assert analysis['coverage']['curve'][49][1] == 100  # question 0 alone


def test_a_question_is_declined_where_the_prediction_is_empty():
  analysis = error_analysis.analyse_errors(
      [example(0, 'Ada'), example(1)], {'0': 'Ada', '1': ''},
      na_scores={'0': -2.0, '1': -1.0})
  assert analysis['no_answer']['accuracy'] == 100


def test_a_question_without_candidates_has_its_prediction_and_no_window():
  """Its F1, of two words with one, is the last in the order of confidence."""
  analysis = error_analysis.analyse_errors(
      [example(0, 'Ada'), example(1, 'Rome')], {'0': 'Ada met', '1': 'Rome'},
      {'1': {'answers': spans('Rome', 'Bonn'), 'windows': 1}})
  assert analysis['coverage']['curve'][49][1] == 100
  assert analysis['coverage']['score_at_100'] == pytest.approx(
      100 * (1 + 2 / 3) / 2)
  assert {name: part['total'] for name, part in analysis['slices'][
      'windows'].items()} == {'0': 1, '1': 1}


def test_mcnemar_counts_questions_that_one_system_alone_has_right():
  examples = [example(i, 'Ada') for i in range(9)]
  right = {**{str(i): 'Ada' for i in range(7)}, '7': 'Bob', '8': 'Ada met'}
  wrong = {'6': 'Ada', '7': 'Ada', '8': 'Bob'}  # '8' is wrong in both
  difference = error_analysis.compare_predictions(
      examples, [right], [wrong], seed=0)
  assert difference['exact_match']['mean'] == pytest.approx(500 / 9)
  # Six or more heads, or tails, of seven coins: 2 (1 + 7) of 128 patterns, of
  # which the sign-flip test has the same.
  assert difference['mcnemar'] == {'here': 6, 'there': 1, 'p': 16 / 128}
  assert difference['exact_match']['p'] == pytest.approx(16 / 128)
  # All questions are about one context, and one article shows nothing.
  assert difference['exact_match']['p_articles'] == 1


def test_seeds_are_compared_in_pairs():
  """The first system is better with one seed, the second with the other."""
  examples = [example(i, 'Ada') for i in range(4)]
  right, wrong = {str(i): 'Ada' for i in range(4)}, {}
  difference = error_analysis.compare_predictions(
      examples, [right, wrong], [wrong, right], seed=0)
  exact = difference['exact_match']
  assert (exact['low'], exact['mean'], exact['high']) == (-100, 0, 100)
  assert exact['p'] == 1 and difference['seeds'] == 2
  assert 'mcnemar' not in difference
  for ours, theirs in (([right], [wrong, right]), ([], [])):
    assert 'equally many' in refusal(
        lambda ours=ours, theirs=theirs: error_analysis.compare_predictions(
            examples, ours, theirs, seed=0))


@pytest.mark.parametrize(('text', 'start'), [
    ('Bob', -1), ('Bob', 7), (' Bob', 7), ('Bob  met\tEve', 24)])
def test_answers_stand_where_the_alignment_finds_them(text, start):
  """No offset, a wrong offset, and white space that is not the context's."""
  asked = Example('0', 'Who?', CONTEXT, (GoldAnswer(text, start),))
  right = ' '.join(text.split())
  n_best = lambda text: {'0': {'windows': 1, 'answers': spans(text)}}
  analysis = error_analysis.analyse_errors([asked], {'0': right}, n_best(right))
  assert analysis['exact_match']['mean'] == 100
  assert analysis['boundaries'] == {
      'start': 100, 'end': 100, 'span': 100, 'text_elsewhere': 0, 'splice': 0,
      'in_candidates': 100, 'recombined': 0}
  fifth = str(1 + 5 * CONTEXT.index(right) // len(CONTEXT))
  assert [*analysis['slices']['place of the answer, fifth of the context']
          ] == [fifth]
  wider = f'{right} in'
  error, = error_analysis.list_errors([asked], {'0': wider}, n_best(wider))
  assert error.kind == 'boundary'
  marked = error_report.error_rows([error])[1].rows[1][-1]
  assert [part for part in marked.parts if part[1]] == [
      (right, 'both'), (' in', 'prediction')]


def test_an_answer_that_is_not_in_the_context_is_an_answer():
  """MRQA lists answers of which none was detected in the context."""
  examples = [Example('0', 'Who?', CONTEXT, accepted=('Ada Lovelace',)),
              example(1, 'Ada')]
  predicted, na_scores = {'0': 'Bob', '1': 'Ada'}, {'0': -1.0, '1': -2.0}
  analysis = error_analysis.analyse_errors(
      examples, predicted, {
          key: {'windows': 1, 'answers': spans(text)}
          for key, text in predicted.items()}, na_scores=na_scores)
  assert not {'no_answer', 'thresholds'} & analysis.keys()
  assert {name: part['total'] for name, part in analysis['slices'][
      'place of the answer, fifth of the context'].items()} == {
          '1': 1, 'not in the context': 1}
  assert analysis['boundaries']['span'] == 50
  error, = error_analysis.list_errors(examples, predicted)
  assert (error.example.id, error.kind) == ('0', 'wrong place')


def test_the_coverage_of_a_report_is_that_of_answers_to_all_questions():
  examples = [example(0, 'Ada'), example(1)]
  analysis = error_analysis.analyse_errors(
      examples, {'0': 'Ada', '1': ''},
      {key: {'windows': 1, 'answers': spans('Ada')} for key in '01'},
      na_scores={'0': -3.0, '1': 3.0})
  assert analysis['f1']['mean'] == 100
  text, = [block.text for block in error_report.error_report_blocks(
      analysis, 'title') if 'surest' in getattr(block, 'text', '')]
  assert 'whatever the null threshold' in text
  assert 'F1 if all questions are answered 50.00' in text


@pytest.mark.parametrize(('golds', 'text', 'kind'), [
    (['Ada'], '', 'missed'), ([], 'Bob', 'invented'),
    (['Ada met'], 'met Bob', 'boundary'), (['Ada'], 'met', 'wrong place'),
    (['Ada'], ' met', 'wrong place'), (['met'], 'Ada ', 'wrong place'),
    (['Ada'], 'Zoe', 'other')])
def test_kinds_of_errors(golds, text, kind):
  error, = error_analysis.list_errors([example(0, *golds)], {'0': text})
  assert (error.kind, error.confidence) == (kind, None)


def test_errors_are_sorted_by_the_probability_of_the_prediction(monkeypatch):
  examples = [example(0, 'Ada'), example(1, 'Ada'), example(2, 'Ada'),
              example(3, 'Ada'), example(4, 'Ada')]
  candidate = {'text': 'Bob', 'start': 28, 'end': 31}
  found = error_analysis.list_errors(
      examples, {'0': 'Bob', '1': '', '2': 'Bob', '3': 'Ada', '4': 'Bonn'},
      {'0': {'answers': [{**candidate, 'probability': 0.2}]},
       '1': {'answers': [], 'null_probability': 0.5},
       '2': {'answers': [{**candidate, 'probability': 0.9}]}})
  assert [(e.example.id, e.confidence) for e in found] == [
      ('2', 0.9), ('1', 0.5), ('0', 0.2), ('4', None)]
  assert found[0].place == (28, 31)  # the second Bob, that of the candidate
  rows = error_report.error_rows(found)[1].rows[1:]  # below the legend
  assert [(row[0], row[3]) for row in rows] == [
      ('90.0%', 'Bob'), ('50.0%', '(no answer)'), ('20.0%', 'Bob'),
      ('–', 'Bonn')]
  monkeypatch.setattr(error_report, 'ERRORS', 3)
  title, table = error_report.error_rows(found)
  assert title.text == 'The 3 most confident of 4 errors'
  assert table.rows[1:] == rows[:3]


def test_a_long_passage_keeps_only_the_text_around_marks():
  far = 'far away ' * 30
  context = f'{far}Ada met Bob in {far}Rome. {far}'
  question = Example('0', 'Who?', context, (
      GoldAnswer('Ada', context.index('Ada')),), impossible=False)
  table = error_report.error_rows(error_analysis.list_errors(
      [question], {'0': 'Rome'}))[1]
  parts = table.rows[1][-1].parts
  assert [p for p in parts if p[1]] == [('Ada', 'gold'),
                                        ('Rome', 'prediction')]
  before, between, after = (text for text, kind in parts if not kind)
  assert before.startswith(' … ') and before.endswith('far away ')
  assert between.startswith(' met Bob in far') and between.endswith('away ')
  assert after.startswith('. far away') and after.endswith(' … ')
  for text in (before, between, after):
    assert len(text) < 2 * error_report.AROUND + 5
    assert set(text.split()) <= {*context.split(), '…', '.'}
  # Without a mark it is the beginning, which is as long as two sides.
  invented = Example('0', 'Who?', context, impossible=True)
  (text, kind), = error_report.error_rows(error_analysis.list_errors(
      [invented], {'0': 'Zoe'}))[1].rows[1][-1].parts
  assert not kind and context.startswith(text.removesuffix('… '))
  assert text.endswith(' … ')
  assert 1.5 * error_report.AROUND < len(text) < 2 * error_report.AROUND + 5


def test_a_passage_without_spaces_keeps_the_text_around_marks():
  context = '甲' * 200 + '巴黎' + '乙' * 200
  table = error_report.error_rows(error_analysis.list_errors(
      [Example('0', '谁?', context, (GoldAnswer('巴黎', 200),))], {}))[1]
  assert table.rows[1][-1].parts == [
      (' … ' + '甲' * error_report.AROUND, ''), ('巴黎', 'gold'),
      ('乙' * error_report.AROUND + ' … ', '')]


@pytest.fixture(scope='module')
def evaluation(tmp_path_factory):
  """Returns a directory with the files of an evaluation, and its data."""
  folder = tmp_path_factory.mktemp('evaluation')
  files.write_json(folder / 'data.json', {'version': '1.1', 'data': [{
      'title': 'T', 'paragraphs': [{'context': CONTEXT, 'qas': [
          {'id': '0', 'question': 'Who met <b>Bob</b>?', 'answers': [
              {'text': 'Ada', 'answer_start': 0}]},
          {'id': '1', 'question': 'Where?', 'answers': [
              {'text': 'Rome', 'answer_start': 15}]}]}]}]})
  files.write_json(folder / 'predictions.json', {'0': 'Bob', '1': 'Rome'})
  files.write_jsonl(folder / 'nbest.jsonl', [
      {'id': '0', 'windows': 1, 'answers': spans('Bob', 'Ada')},
      {'id': '1', 'windows': 2, 'answers': spans('Rome')}])
  files.write_json(folder / 'other.json', {'0': 'Ada', '1': 'Rome'})
  return folder


def analyze(folder, *arguments, evaluation=None):
  return commands.command(
      'analyze', f'--data={folder}/data.json',
      f'--evaluation={evaluation or folder}', *arguments)


def test_the_command_writes_tables_and_a_page_of_errors(evaluation):
  result = analyze(evaluation, f'--against={evaluation}/other.json')
  assert result.code == 0, result.err
  em, _, other, difference, _, where = result.out.splitlines()
  assert em == 'exact match: 50.00, 95 % interval 0.00 … 100.00'
  assert other == f'difference from {evaluation}/other.json:'
  assert difference.startswith(
      '  exact match: -50.00, 95 % interval -100.00 … +0.00, p ')
  assert f'{evaluation}/analysis.md' in where
  text = (evaluation / 'analysis.md').read_text()
  assert '| exact match | 50.00 |' in text
  assert '| exact match | 50.00 | 100.00 | 100.00 |' in text  # by k
  assert text.count('| answerable questions |') == len(
      error_analysis.SLICES) + 1  # and the number of windows
  assert 'of the first k candidates, for answerable questions\n' in text
  assert '| exact match | -50.00 | -100.00 … +0.00 |' in text
  html = (evaluation / 'analysis.html').read_text()
  assert ('<mark class="gold">Ada</mark> met '
          '<mark class="prediction">Bob</mark>') in html
  assert '<tr class="grey"><td>who</td>' in html  # one question
  assert '<td data-name="prediction">Bob</td>' in html  # on a narrow screen
  assert '| *who* | *1* |' in text
  assert '| wrong place: the answer stands elsewhere' in text
  assert '| 1 | 100.0 |' in text  # it is the only error
  assert 'Who met &lt;b&gt;Bob' in html and '<b>' not in html
  analysis = files.read_object(evaluation / 'analysis.json')
  assert analysis['slices']['windows']['1']['f1']['mean'] == 0


def test_questions_without_a_prediction_are_counted(evaluation, tmp_path):
  files.write_json(tmp_path / 'some.json', {'0': 'Ada'})
  result = analyze(evaluation, f'--against={tmp_path}/some.json',
                   f'--output={tmp_path}')
  assert result.code == 0 and result.err == (
      f'warning: {tmp_path}/some.json has no prediction for 1 of 2 questions, '
      'which score 0\n')
  assert f'difference from {tmp_path}/some.json' in result.out


def test_texts_may_hold_any_line_separator(tmp_path):
  answer = {'text': 'a\u2028b\x85c', 'start': 0, 'end': 5, 'score': 0.0}
  files.write_jsonl(tmp_path / 'nbest.jsonl', [
      {'id': '0', 'windows': 1, 'answers': [answer]}])
  rows = predictions.read_n_best(tmp_path / 'nbest.jsonl')
  assert rows['0']['answers'] == [answer]


def test_an_evaluation_that_is_not_there_is_named(evaluation, tmp_path):
  """Also without --output, which a directory does not need."""
  missing = tmp_path / 'evl'
  for result in (analyze(evaluation, evaluation=missing),
                 analyze(evaluation, f'--against={missing}')):
    assert result.code == 1
    assert result.err.startswith(f'error: {missing}: no such evaluation; give')


def test_the_command_takes_seeds(evaluation, tmp_path):
  there = f'{evaluation}/other.json'
  result = analyze(evaluation, f'--against={there},{there}',
                   f'--output={tmp_path}', evaluation=f'{there},{evaluation}')
  assert result.code == 0, result.err
  assert 'means over 2 seeds' in (tmp_path / 'analysis.md').read_text()
  result = analyze(evaluation, f'--against={there}', f'--output={tmp_path}',
                   evaluation=f'{there},{evaluation}')
  assert result.code == 1
  assert 'the systems have 2 and 1 seeds; give equally many' in result.err


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('predictions.json', {'0': 'Ada', 'x': 'Bob'}, "such as 'x'; give --data"),
    ('nbest.jsonl', {'id': '0', 'windows': 1, 'answers': [{'text': 'Ada'}]},
     'nbest.jsonl:1: expected answers with'),
    ('nbest.jsonl', {'id': '0', 'answers': []}, "'windows'"),
    ('nbest.jsonl', {'id': [], 'answers': [], 'windows': 1}, "'id'"),
    ('nbest.jsonl', {'id': '0', 'windows': 1, 'answers': [
        {'text': 'a', 'start': 0, 'end': 1, 'score': 10**400}]}, 'finite'),
    ('nbest.jsonl', {'id': '0', 'windows': 1, 'answers': [
        {'text': 'a', 'start': 0, 'end': 1, 'score': -10**400}]}, 'finite'),
    ('nbest.jsonl', [{'id': '0', 'windows': 1, 'answers': []}] * 2,
     "nbest.jsonl:2: question '0' stands there twice"),
    ('na_probs.json', {'0': 1.0}, 'questions have no na_score')])
def test_a_mistake_is_one_line(evaluation, tmp_path, name, content, message):
  files.write_json(tmp_path / 'predictions.json', {'0': 'Ada', '1': ''})
  write = files.write_json if name.endswith('.json') else (
      lambda path, row: files.write_jsonl(
          path, row if isinstance(row, list) else [row]))
  write(tmp_path / name, content)
  result = analyze(evaluation, evaluation=tmp_path)
  assert result.code == 1 and not (tmp_path / 'analysis.json').exists()
  assert message in result.err and result.err.count('\n') == 1
