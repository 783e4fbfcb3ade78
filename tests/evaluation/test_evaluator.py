"""Evaluation against plain loops over windows; the model is a lookup table."""

import collections
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import errors
from qa_jax.checkpoints import run_directory
from qa_jax.data import examples as examples_lib
from qa_jax.data import store
from qa_jax.data import windows as windows_lib
from qa_jax.data.examples import Example
from qa_jax.data.examples import GoldAnswer
from qa_jax.decoding import answers as answers_lib
from qa_jax.decoding import candidates as candidates_lib
from qa_jax.decoding import null_rules
from qa_jax.decoding import search as search_lib
from qa_jax.evaluation import evaluator
from qa_jax.inference import decode as decode_lib
from qa_jax.inference import predict
from qa_jax.io import files
from qa_jax.metrics import predictions as predictions_lib
from qa_jax.metrics import squad
from qa_jax.models import qa as qa_lib
from qa_jax.runtime import console
from qa_jax.runtime import devices as devices_lib
from tests.common import lookup


def cut(examples):
  return windows_lib.make_windows(examples, lookup.TOKENIZER, max_length=20,
                                  window_overlap=6, max_question_length=4)


EXAMPLES = lookup.make_examples()
WINDOWS = cut(EXAMPLES)


def model_for(rule):
  return lookup.Lookup(null_field='null' in null_rules.NULL_RULES[rule].needs)


def run(model=None,
        params=lookup.PARAMS,
        windows=WINDOWS,
        output=None,
        mesh=None,
        **config):
  config = lookup.make_config(**config)
  model = model or model_for(config.decode.null_rule)
  return evaluator.Evaluator(model, windows, config, mesh).evaluate(
      params, output=output)


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# --- one answer per question, by loops


def score_of(kind, letter):
  return float(lookup.PARAMS[kind][lookup.TOKENIZER.index[letter]])


def loop_windows(e, longest=4):
  """Returns null score, spans and log-partition of each window of question e.

  Spans are (score, first word, last word) of those that start at an owned
  token; the log-partition is over all spans. test_windows tests which tokens a
  window has and owns.
  """
  example, out = EXAMPLES[e], []
  context, question = example.context.split(), example.question.split()
  for n in np.flatnonzero(WINDOWS.example_of == e):
    a, b = WINDOWS.begin[n], WINDOWS.begin[n] + WINDOWS.length[n]
    row = ['[CLS]', *question, '[SEP]', *context[a:b], '[SEP]']
    null = float(sum(lookup.TOKENIZER.index[t] for t in row) % 7)
    spans = [(score_of('start', context[i]) + score_of('end', context[j]),
              i, j) for i in range(a, b) for j in range(i, min(i + longest, b))]
    owned = [s for s in spans if WINDOWS.best_begin[n] <= s[1]
             < WINDOWS.best_end[n]]
    out.append((null, owned, math.log(sum(math.exp(s) for s, _, _ in spans))
                if spans else candidates_lib.NO_SPAN))
  return out


def loop_answers(e, n_best):
  example = EXAMPLES[e]
  ranked = sorted((-score, n, i, j) for n, (_, spans, _) in enumerate(
      loop_windows(e)) for score, i, j in spans)[:n_best]
  return [{'text': example.context[2 * i:2 * j + 1], 'start': 2 * i,
           'end': 2 * j + 1, 'score': -s} for s, _, i, j in ranked]


def without_probability(candidates):
  return [{k: v for k, v in c.items() if k != 'probability'}
          for c in candidates]


def odds(p):
  return math.log(p / (1 - p))


def loop_na_score(rule, windows):
  best = [max((s for s, _, _ in spans), default=candidates_lib.NO_SPAN)
          for _, spans, _ in windows]
  null = [null for null, _, _ in windows]
  return {
      'never': lambda: -math.inf,
      'min_null': lambda: min(null) - max(best),
      'margin': lambda: min(n - b for n, b in zip(null, best, strict=True)),
      'classifier': lambda: min(null),
      'product': lambda: odds(math.prod(
          1 / (1 + math.exp(-n)) for n in null)),
      # of p(null) = exp(null) / (exp(null) + Σ exp(span))
      'posterior': lambda: min(n - z for n, _, z in windows),
  }[rule]()


@pytest.mark.parametrize(('rule', 'n_best'), [
    *((rule, 5) for rule in null_rules.NULL_RULES),
    ('min_null', 1), ('min_null', 400)])
def test_answers_are_those_of_loops_over_windows(rule, n_best):
  answers = decode_lib.answer_questions(
      model_for(rule), lookup.PARAMS, WINDOWS,
      lookup.make_config(n_best=n_best, null_rule=rule))
  assert (WINDOWS.example_of == 4).sum() == 5
  for e, example in enumerate(EXAMPLES):
    windows = loop_windows(e)
    rows = answers_lib.n_best_rows(example, answers, e)
    assert without_probability(rows) == loop_answers(e, n_best)
    assert answers.null_score[e] == min(null for null, _, _ in windows)
    assert answers.na_score[e] == pytest.approx(loop_na_score(rule, windows),
                                              rel=1e-6, abs=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 0.3, 4.0])
@pytest.mark.parametrize('rule', ['min_null', 'posterior', 'never'])
@pytest.mark.parametrize('merge', answers_lib.MERGES)
def test_probabilities_are_posteriors_over_all_windows_and_null(
    rule, temperature, merge):
  answers = decode_lib.answer_questions(
      lookup.Lookup(), lookup.PARAMS, WINDOWS,
      lookup.make_config(n_best=999, null_rule=rule, merge=merge),
      temperature=temperature)
  for e, example in enumerate(EXAMPLES):
    windows = loop_windows(e)
    spans = [s for _, owned, _ in windows for s in owned]
    null = 0.0 if rule == 'never' else math.exp(
        min(n for n, _, _ in windows) / temperature)
    total = null + sum(math.exp(s / temperature) for s, _, _ in spans)
    form = lambda text, begin, end: (
        (begin, end) if merge == 'none'
        else examples_lib.normalize_answer(text))
    expected = collections.defaultdict(float)
    for s, i, j in spans:
      begin, end = 2 * i, 2 * j + 1
      expected[form(example.context[begin:end], begin, end)] += (
          math.exp(s / temperature) / total)
    rows = answers_lib.n_best_rows(example, answers, e)
    assert len(rows) == len(expected)
    for c in rows:
      assert c['probability'] == pytest.approx(
          expected[form(c['text'], c['start'], c['end'])], rel=1e-5)
    if total:
      null_probability = math.exp(answers.null_log_p[e])
      assert null_probability == pytest.approx(null / total, rel=1e-5)
      assert sum(c['probability'] for c in rows) + null_probability == (
          pytest.approx(1, rel=1e-5))


def test_no_probability_is_above_1_though_a_log_partition_is_rounded():
  """A log-partition in float32 may be below the only score that it has."""
  spans = decode_lib.score_windows(
      lookup.Lookup(), lookup.PARAMS, WINDOWS, lookup.make_config(),
      temperatures=(1.0,))
  best = np.where(spans.valid[:, :1], spans.score[:, :1], -1e30)
  answers = answers_lib.merge_windows(
      WINDOWS, dataclasses.replace(spans, log_partition=best - 0.25),
      n_best=1, null_rule='never')
  assert len(answers.log_p) == 5 and (answers.log_p <= 0).all()
  assert (answers.log_p == 0).any()


def test_a_gold_span_is_scored_once_though_windows_overlap():
  """Gold spans are every third word, and one span that is too long."""
  words = EXAMPLES[4].context.split()
  places = [(i, i) for i in range(0, len(words), 3)] + [(3, 7)]
  windows = cut([dataclasses.replace(EXAMPLES[4], answers=tuple(
      GoldAnswer(EXAMPLES[4].context[2 * i:2 * j + 1], 2 * i)
      for i, j in places))])
  spans = decode_lib.score_windows(
      lookup.Lookup(), lookup.PARAMS, windows, lookup.make_config(), golds=True)
  assert (windows.gold_spans[:, :, 0] > 0).sum() > len(places) + 5
  scores = spans.gold_scores
  assert sorted(scores[scores > -1e30].tolist()) == sorted(
      score_of('start', words[i]) + score_of('end', words[j])
      for i, j in places[:-1])


def test_the_confidence_is_that_of_the_best_span_or_of_no_answer():
  answers = answers_lib.Answers(
      *np.zeros((4, 3)), ptr=np.array([0, 2, 2, 3, 3]),
      null_score=np.zeros(4), na_score=np.zeros(4),
      log_p=np.log([0.5, 0.2, 0.6]), null_log_p=np.log([0.1, 0.2, 0.3, 0.4]))
  declined = np.array([False, False, True, True])
  np.testing.assert_allclose(evaluator.confidence(answers, declined),
                             [0.5, 0.0, 0.3, 0.4])


def test_histograms_are_of_each_windows_valid_mass_and_best_scores():
  """Both are over context and [CLS], whose scores are half of null each."""
  histograms = {}
  evaluator.Evaluator(lookup.Lookup(), WINDOWS, lookup.make_config()).evaluate(
      lookup.PARAMS, show=histograms.__setitem__)
  for n, e in enumerate(WINDOWS.example_of):
    words = EXAMPLES[e].context.split()[
        WINDOWS.begin[n]:WINDOWS.begin[n] + WINDOWS.length[n]]
    batch = WINDOWS.gather(np.array([n]), 20)
    null = (batch['token_ids'] * batch['attention_mask']).sum() % 7
    start, end = ([null / 2, *(score_of(kind, w) for w in words)]
                  for kind in ('start', 'end'))
    spans = [(0, 0), *((i, j) for i in range(1, len(start))
                       for j in range(i, min(i + 4, len(start))))]
    expected = (sum(math.exp(start[i] + end[j]) for i, j in spans)
                / sum(map(math.exp, start)) / sum(map(math.exp, end)))
    assert histograms['valid_mass'][n] == pytest.approx(expected, rel=1e-5)
    assert histograms['start_score'][n] == max(start)
    assert histograms['end_score'][n] == max(end)


def test_every_legal_span_is_found_once_though_windows_overlap():
  answers = decode_lib.answer_questions(
      lookup.Lookup(), lookup.PARAMS, WINDOWS, lookup.make_config(n_best=999))
  for e, example in enumerate(EXAMPLES):
    part = slice(answers.ptr[e], answers.ptr[e + 1])
    spans = list(zip(answers.begin[part] // 2, (answers.end[part] - 1) // 2,
                     strict=True))
    length = len(example.context.split())
    assert sorted(spans) == [(i, j) for i in range(length)
                             for j in range(i, min(i + 4, length))]


def test_equal_scores_are_ordered_by_window_then_start_then_length():
  zero = {k: np.zeros_like(v) for k, v in lookup.PARAMS.items()}
  answers = decode_lib.answer_questions(
      lookup.Lookup(), zero, WINDOWS, lookup.make_config(n_best=999))
  part = slice(answers.ptr[4], answers.ptr[5])
  keys = list(zip(answers.window[part], answers.begin[part], answers.end[part],
                  strict=True))
  assert keys == sorted(keys) and len(keys) > 100


@pytest.mark.parametrize('rule', null_rules.NULL_RULES)
def test_empty_context_has_an_empty_answer_in_finite_files(rule, tmp_path):
  windows = cut(EXAMPLES[1:2])
  values = run(windows=windows, output=tmp_path, null_rule=rule)
  assert values['exact_match'] == 100
  assert files.read_object(tmp_path / 'predictions.json') == {'q1': ''}
  assert read_lines(tmp_path / 'nbest.jsonl')[0]['answers'] == []


def test_no_question_is_refused_to_evaluate_and_no_trouble_to_answer():
  with pytest.raises(errors.UserError, match='has no question'):
    run(windows=cut([]))
  answers = decode_lib.answer_questions(
      lookup.Lookup(), lookup.PARAMS, cut([]), lookup.make_config())
  assert answers.ptr.tolist() == [0] and not len(answers.na_score)


# --- null rules


def scores(null, best, first=(0,)):
  return null_rules.WindowScores(
      np.float64(null), np.float64(best), np.array(first), np.float64(best))


def na_score(rule, *args):
  return null_rules.NULL_RULES[rule].score(scores(*args)).tolist()


def test_min_of_differences_is_not_difference_of_mins():
  args = [5, 1, 2], [6, 0, 9], (0, 2)
  assert na_score('min_null', *args) == [1 - 6, 2 - 9]
  assert na_score('margin', *args) == [min(5 - 6, 1 - 0), 2 - 9]


def test_doubts_add_up_in_the_product_alone():
  args = [1, 1, 1, 1], [0, 0, 0, 0]
  assert na_score('classifier', *args) == [1]
  assert na_score('product', *args) == pytest.approx(
      [odds((1 / (1 + math.exp(-1))) ** 4)])


@pytest.mark.parametrize('null', [-1e9, -800, 0, 800, 1e9])
def test_product_of_extreme_nulls_is_finite_and_in_order(null):
  assert np.isfinite(na_score('product', [null, null], [0, 0])).all()
  assert na_score('product', [null], [0]) <= na_score(
      'product', [null + 1], [0])


@pytest.mark.parametrize('rule', [r for r in null_rules.NULL_RULES
                                  if r != 'never'])
def test_more_null_is_less_answer(rule):
  rng = np.random.default_rng(2)
  for _ in range(50):
    null, best = rng.normal(0, 3, (2, 6))
    low, high = (na_score(rule, x, best, (0, 4)) for x in (null, null + 1))
    assert high[0] > low[0] and high[1] > low[1]


@pytest.mark.parametrize('rule', [r for r in null_rules.NULL_RULES
                                  if r != 'never'])
def test_threshold_turns_an_answer_into_none_only_above_it(rule, tmp_path):
  run(null_rule=rule, output=tmp_path)
  na = files.read_object(tmp_path / 'na_probs.json')
  threshold = na['q0']
  for at, declined in ((threshold, False),
                       (float(np.nextafter(threshold, -np.inf)), True)):
    run(null_rule=rule, null_threshold=at, output=tmp_path)
    predictions = files.read_object(tmp_path / 'predictions.json')
    assert (predictions['q0'] == '') == declined


# --- files


def with_best_answer_as_gold(e):
  """Returns question e with its best span as the gold answer."""
  best = loop_answers(e, 1)[0]
  return dataclasses.replace(EXAMPLES[e], answers=(
      GoldAnswer(best['text'], best['start']),), impossible=False)


def test_an_evaluation_that_fails_leaves_no_files_of_another(
    tmp_path, monkeypatch):
  (tmp_path / 'reliability.png').write_text('of a calibration')
  run(output=tmp_path)
  assert (tmp_path / 'metrics.json').is_file()
  assert not (tmp_path / 'reliability.png').exists()

  def full(*_):
    raise errors.UserError('no space')
  monkeypatch.setattr(predictions_lib.files, 'write_jsonl', full)
  with pytest.raises(errors.UserError, match='no space'):
    run(output=tmp_path)
  assert not (tmp_path / 'metrics.json').exists()


@pytest.mark.parametrize('name', search_lib.SEARCHES)
@pytest.mark.parametrize('scores', ['null', 'candidates'])
def test_scores_that_are_not_finite_are_refused(scores, name):
  letter = lookup.TOKENIZER.index['a']
  nan = jnp.float32(jnp.nan)

  class Diverged(lookup.Lookup):

    def apply(self, variables, **inputs):
      good = super().apply(variables, **inputs)
      if scores == 'null':
        return good.replace(start=good.start.at[:, 0].set(nan))
      return good.replace(start=jnp.where(
          inputs['token_ids'] == letter, nan, good.start))

  windows = cut([Example('x', 'b', 'a b'), Example('y', 'b', 'b b')])
  which = {'null': '2 of 2 windows', 'candidates': '1 of 2 windows'}[scores]
  with pytest.raises(errors.NotFiniteError, match=which):
    run(Diverged(), windows=windows, search=name)


def test_the_programs_of_a_bucket_are_all_that_its_windows_run():
  model, config = lookup.Lookup(name='bucket'), lookup.make_config()
  for count in range(1, 20):
    windows = cut([Example(f'{n}', 'a', 'b c') for n in range(count)])
    decode_lib.answer_questions(model, lookup.PARAMS, windows, config)
  ran = {shape for name, shape in lookup.TRACED if name == 'bucket'}
  ready = {arguments[1]['token_ids'].shape for length in (12, 16, 20)
           for _, arguments in decode_lib.calls_of_bucket(
               model, lookup.PARAMS, config, windows, length)}
  assert {(6, 12), (1, 12)} <= ran <= ready


def test_files_are_consistent_with_each_other_and_the_metrics(tmp_path):
  examples = [e if e.impossible else with_best_answer_as_gold(n)
              for n, e in enumerate(EXAMPLES)]
  threshold = -5.0
  windows = cut(examples)
  values = run(windows=windows, output=tmp_path, null_threshold=threshold)
  assert {p.name for p in tmp_path.iterdir()} == {
      'metrics.json', 'predictions.json', 'na_probs.json', 'nbest.jsonl'}
  assert files.read_object(tmp_path / 'metrics.json') == values
  predictions = predictions_lib.read_predictions(tmp_path / 'predictions.json')
  na = predictions_lib.read_na_probs(tmp_path / 'na_probs.json')
  rows = read_lines(tmp_path / 'nbest.jsonl')
  assert [e.id for e in examples] == [*predictions] == [*na] == [
      r['id'] for r in rows]
  owners = [examples[e].id for e in windows.example_of]
  assert [r['windows'] for r in rows] == [owners.count(r['id']) for r in rows]
  assert len(owners) > len(rows)
  always = {}
  for example, row in zip(examples, rows, strict=True):
    for answer in row['answers']:
      assert example.context[answer['start']:answer['end']] == answer['text']
    always[row['id']] = row['answers'][0]['text'] if row['answers'] else ''
    assert predictions[row['id']] == (
        '' if na[row['id']] > threshold else always[row['id']])
  official = squad.squad_metrics(examples, predictions)
  assert {k: v for k, v in values.items() if 'best' not in k} == official
  best = squad.squad_metrics(examples, always, na_scores=na)
  assert {k: v for k, v in values.items() if 'best' in k} == {
      k: v for k, v in best.items() if 'best' in k}
  # Some right answer is withheld here, which the best threshold gives back.
  assert values['best_f1'] > values['f1']


def test_without_a_null_rule_there_are_no_na_probs(tmp_path):
  values = run(output=tmp_path, null_rule='never')
  assert not (tmp_path / 'na_probs.json').exists()
  assert not any('best' in name for name in values)
  predictions = predictions_lib.read_predictions(tmp_path / 'predictions.json')
  assert [k for k, v in predictions.items() if not v] == ['q1']


@pytest.mark.parametrize(('which', 'rule', 'said'), [
    ('answered', 'min_null', '1 of 3 questions are declined'),
    ('answered', 'never', ''), ('all', 'min_null', ''),
    ('blind', 'min_null', '')])
def test_declined_answers_are_said_if_all_questions_have_one(
    which, rule, said, capsys):
  examples = {'all': EXAMPLES, 'answered': EXAMPLES[::2], 'blind': [
      dataclasses.replace(e, answers=()) for e in EXAMPLES[::2]]}[which]
  config = lookup.make_config(null_rule=rule, null_threshold=-4.0)
  qa = predict.QA(model_for(rule), lookup.PARAMS, lookup.TOKENIZER, config)
  evaluator.evaluate_windows(qa, cut(examples), output=None)
  err = capsys.readouterr().err
  assert (said in err and '--decode.null_rule=never' in err) if said else (
      'declined' not in err)


@pytest.mark.parametrize(('which', 'rule', 'said'), [
    ('all', 'never', True), ('answered', 'never', False),
    ('all', 'min_null', False)])
def test_unanswerable_questions_that_are_all_answered_are_counted(
    which, rule, said, capsys):
  examples = EXAMPLES if which == 'all' else [
      e for e in EXAMPLES if not e.impossible]
  count = sum(e.impossible for e in examples)
  console.say_once.cache_clear()
  evaluator.Evaluator(model_for(rule), cut(examples),
                      lookup.make_config(null_rule=rule))
  assert capsys.readouterr().err == (
      f'decode.null_rule=never answers all {count} unanswerable questions of '
      'the evaluation data; min_null can decline them\n' if said else '')
  assert bool(count) == (which == 'all')


@pytest.mark.parametrize(('spec', 'name'), [
    ('data/dev-v2.0.json', 'dev-v2.0'), ('NQ.jsonl.gz', 'NQ'),
    ('tfds(name="squad/v2.0", split="validation")',
     'tfds_name_squad_v2.0_split_validation'),
    ('x/a.json+y/b.jsonl', 'a_b'), ('x/a.json + y/b.csv.gz', 'a_b'),
    ('dev.parquet', 'dev'), ('dev.v2.arrow', 'dev.v2'), ('dev.csv', 'dev'),
    ('saved/dev/', 'dev'), ('../..', 'data'), ('///', 'data')])
def test_data_has_a_folder_name(spec, name):
  assert run_directory.evaluation_name(spec) == name


def test_fingerprint_is_of_what_is_asked_and_expected():
  prints = {store.fingerprint([e]) for e in (
      EXAMPLES[0], *(dataclasses.replace(EXAMPLES[0], **{k: v}) for k, v in (
          ('id', 'x'), ('question', 'x'), ('context', 'x'), ('answers', ()),
          ('accepted', ('x',)))))}
  assert len(prints) == 6
  assert store.fingerprint(EXAMPLES) == store.fingerprint(
      lookup.make_examples())


# --- batches, buckets, devices


LOOKUP = lookup.Lookup()


def spans_of(model=LOOKUP, windows=WINDOWS, mesh=None, **config):
  return decode_lib.score_windows(
      model, lookup.PARAMS, windows,
      lookup.make_config(null_rule='posterior', **config), mesh=mesh)


@pytest.fixture(scope='module')
def spans():
  return spans_of()


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(a),
               dataclasses.asdict(b))


@pytest.mark.parametrize(('eval_batch_size', 'buckets', 'devices'), [
    (1, (), 0), (3, (11, 12, 19), 0), (1000, (12,), 1), (5, (12, 16), 2),
    (1000, (), 8)])
def test_evaluation_does_not_depend_on_batches_buckets_and_devices(
    spans, eval_batch_size, buckets, devices):
  mesh = jax.make_mesh((devices,), ('data',), devices=jax.devices()[:devices],
                       axis_types=(jax.sharding.AxisType.Auto,)
                       ) if devices else None
  other = spans_of(eval_batch_size=eval_batch_size, buckets=buckets, mesh=mesh)
  # The log-partition may add up in another order and is no small integer.
  np.testing.assert_allclose(other.normaliser, spans.normaliser, rtol=1e-6)
  assert_equal(dataclasses.replace(other, normaliser=None),
               dataclasses.replace(spans, normaliser=None))


def test_other_text_in_one_window_changes_no_other():
  before = EXAMPLES[4]
  after = dataclasses.replace(before, context=before.context[:-1] + 'z')
  changed = cut([after if e is before else e for e in EXAMPLES])
  a, b = (spans_of(windows=w, n_best=40) for w in (WINDOWS, changed))
  last = np.flatnonzero(WINDOWS.example_of == 4)[-1]
  rest = np.arange(len(WINDOWS)) != last
  for field in ('start', 'end', 'score', 'valid', 'null', 'normaliser'):
    np.testing.assert_array_equal(getattr(a, field)[rest],
                                  getattr(b, field)[rest])
  assert (a.score[last] != b.score[last]).any()


@pytest.mark.parametrize('search', ['two_stage', 'beam'])
def test_only_n_best_spans_leave_the_devices(monkeypatch, search):
  shapes, push = set(), devices_lib.RunAhead.push

  def spy(self, item, outputs):
    shapes.update(x.shape for x in jax.tree.leaves(outputs))
    return push(self, item, outputs)

  monkeypatch.setattr(devices_lib.RunAhead, 'push', spy)
  decode_lib.answer_questions(
      lookup.Lookup(), lookup.PARAMS, WINDOWS,
      lookup.make_config(search=search, n_best=3, eval_batch_size=4,
                         buckets=()))
  assert shapes == {(4, 3), (4,), (4, 1)}


@pytest.mark.parametrize('search', ['two_stage', 'beam'])
def test_devices_exchange_nothing(search):
  mesh = devices_lib.make_mesh(jax.devices()[:2], {'data': 2})
  program = decode_lib.build_program(
      lookup.Lookup(), lookup.make_config(search=search).decode, mesh)
  batch = WINDOWS.gather(np.arange(4), 20)
  text = program.lower(lookup.PARAMS, devices_lib.put_rows(
      {k: batch[k] for k in (*qa_lib.INPUTS, 'start_mask')}, mesh),
                       np.zeros(0, np.float32)).compile().as_text()
  assert 'top' in text.lower()
  for exchange in ('all-gather', 'all-reduce', 'all-to-all', 'permute'):
    assert exchange not in text, exchange


@pytest.mark.parametrize(('block', 'count'), [(1, 6), (4, 3)])
def test_blocks_of_questions_change_nothing(monkeypatch, block, count):
  config = lookup.make_config(null_rule='posterior', search='beam(width=2)')
  answer = lambda: decode_lib.answer_at_temperatures(
      lookup.Lookup(), lookup.PARAMS, WINDOWS, config, (1.0, 2.0))
  whole = answer()
  monkeypatch.setattr(decode_lib, 'BLOCK', block)
  assert len(WINDOWS.blocks(block)) == count
  assert [len(WINDOWS.blocks(len(WINDOWS) - n)) for n in (0, 1)] == [1, 2]
  parts = answer()
  for one, other in zip(whole, parts, strict=True):
    for name, value in vars(one).items():
      np.testing.assert_allclose(getattr(other, name), value, rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_windows(monkeypatch):
  """40 questions are about documents of a few windows each, or of dozens."""
  monkeypatch.setattr(decode_lib, 'BLOCK', 64)
  score_windows, block_bytes = decode_lib.score_windows, []
  size = lambda arrays: sum(
      x.nbytes for x in vars(arrays).values() if isinstance(x, np.ndarray))

  def spy(*args, **options):
    spans = score_windows(*args, **options)
    block_bytes.append(size(spans))
    return spans

  monkeypatch.setattr(decode_lib, 'score_windows', spy)
  answer_bytes, count = [], []
  for length in (40, 320):
    windows = cut(lookup.make_examples(lengths=(length,) * 40))
    block_bytes.clear()
    answer_bytes.append(size(decode_lib.answer_questions(
        lookup.Lookup(), lookup.PARAMS, windows, lookup.make_config())))
    # A window has 5 candidates of 13 bytes, a null score and a log-partition;
    # a block may be half as large again.
    assert max(block_bytes) <= 1.5 * 64 * (5 * 13 + 4 + 4)
    count.append(len(windows))
  assert count[1] >= 8 * count[0] > 40 * 8 * 3
  assert answer_bytes[0] == answer_bytes[1]


def test_one_compilation_per_bucket():
  model = lookup.Lookup(name='counted')
  for _ in range(2):
    spans_of(model=model, eval_batch_size=2, buckets=(12, 17))
  traced = {k: v for k, v in lookup.TRACED.items() if k[0] == 'counted'}
  assert traced == {('counted', shape): 1
                    for shape in ((3, 12), (2, 17), (2, 20))}


def test_thresholds_and_merges_share_one_program():
  model = lookup.Lookup(name='shared')
  for decode in ({}, {'null_threshold': 3.0}, {'merge': 'surface_form'},
                 {'null_rule': 'margin'}):
    run(model, buckets=(), **decode)
  assert lookup.TRACED['shared', (4, 20)] == 1


# --- searches that are not exact


@dataclasses.dataclass(frozen=True)
class ByPlace(lookup.Lookup):
  """A lookup whose scores also depend on the place of a token in the window.

  The first tokens of a window score highest. In later windows these tokens are
  owned by the window before, so that they may start no span.
  """

  def apply(self, variables, token_ids, *inputs, **named):
    scores = super().apply(variables, token_ids, *inputs, **named)
    column = jnp.arange(token_ids.shape[1])[None]
    place = jnp.where(column > 0, 3.0 * (20 - column), 0.0)
    return scores.replace(start=scores.start + place)


def best_scores(search, model):
  answers = decode_lib.answer_questions(
      model, lookup.PARAMS, WINDOWS, lookup.make_config(search=search))
  return [answers.score[a] if a < b else None
          for a, b in zip(answers.ptr[:-1], answers.ptr[1:], strict=True)]


@pytest.mark.parametrize('model', [lookup.Lookup(), ByPlace()])
@pytest.mark.parametrize('search', ['top_k(k=2)', 'top_k', 'argmax'])
def test_regret_is_the_difference_of_two_evaluations(search, model):
  exact, inexact = (best_scores(s, model) for s in ('two_stage', search))
  missed = [e - i for e, i in zip(exact, inexact, strict=True)
            if i is not None]
  values = run(model, search=search)
  assert values['decode_regret'] == pytest.approx(
      sum(missed) / (len(missed) + 1))  # and 0 for the empty context
  assert values['decode_regret_share'] == pytest.approx(
      100 * sum(e != i for e, i in zip(exact, inexact, strict=True))
      / len(EXAMPLES))
  assert (values['decode_regret_share'] == 0) == (search == 'top_k')


def test_regret_of_a_search_that_finds_nothing_is_a_share_alone():
  assert evaluator.decode_regret(np.array([np.inf, np.inf])) == {
      'decode_regret_share': 100.0}


def test_a_question_without_a_span_is_in_the_share_but_not_in_the_mean():
  assert evaluator.decode_regret(np.array([np.inf, 0.0, 0.0, 0.0])) == {
      'decode_regret': 0.0, 'decode_regret_share': 25.0}


def test_an_exact_search_has_no_regret_to_report():
  for search in ('dense', 'banded', 'two_stage'):
    assert not any('regret' in k for k in run(search=search))


# --- merging


def loop_merged(candidates):
  groups = collections.defaultdict(list)
  for c in candidates:
    groups[examples_lib.normalize_answer(c['text'])].append(c)
  merged = [{**group[0], 'score': math.log(sum(
      math.exp(c['score']) for c in group))} for group in groups.values()]
  return sorted(merged, key=lambda c: -c['score'])


@pytest.mark.parametrize('n_best', [5, 400])
def test_merged_candidates_are_those_of_a_loop(n_best):
  answers = decode_lib.answer_questions(
      lookup.Lookup(), lookup.PARAMS, WINDOWS,
      lookup.make_config(n_best=n_best, merge='surface_form'))
  merged = 0
  for e, example in enumerate(EXAMPLES):
    candidates = loop_answers(e, n_best)
    expected = loop_merged(candidates)
    merged += len(candidates) - len(expected)
    values = without_probability(answers_lib.n_best_rows(example, answers, e))
    # Sums that are equal but for rounding may come in another order.
    assert sorted(c['text'] for c in values) == sorted(
        c['text'] for c in expected)
    np.testing.assert_allclose([c['score'] for c in values],
                               [c['score'] for c in expected], rtol=1e-12)
    by_text = {c['text']: c for c in expected}
    for c in values:
      assert c == {**by_text[c['text']], 'score': c['score']}
  assert (merged > 0) == (n_best == 400)


def candidates(texts, scores, context):
  begin = np.array([context.index(t) for t in texts])
  return answers_lib.Answers(
      begin=begin, end=begin + [len(t) for t in texts],
      score=np.array(scores), window=np.arange(len(texts)),
      ptr=np.array([0, len(texts)]), null_score=np.zeros(1),
      na_score=np.zeros(1))


def test_merging_lets_two_halves_overtake_the_best():
  context = 'the cat, a dog! The  Cats'
  example = Example('q', '', context)
  merged = answers_lib.merge_surface_forms([example], candidates(
      ['a dog!', 'the cat', 'Cat', 'dog'], [2.0, 1.9, 1.8, -50.0], context))
  assert answers_lib.answer_texts([example], merged) == {'q': 'the cat'}
  assert merged.score == pytest.approx(
      [math.log(math.exp(1.9) + math.exp(1.8)), 2.0])
  assert merged.window.tolist() == [1, 0]
  assert merged.ptr.tolist() == [0, 2]


def test_a_merged_probability_is_at_most_1():
  context = 'Ada ' * 40
  posteriors = np.float32(np.random.default_rng(0).dirichlet(
      np.ones(40), size=200))
  answers = candidates(['Ada'] * 40, [0.0] * 40, context)
  merged = [answers_lib.merge_surface_forms(
      [Example('q', '', context)], dataclasses.replace(
          answers, log_p=np.log(np.float64(p)))).log_p[0] for p in posteriors]
  assert np.log(np.float64(posteriors)).shape == (200, 40)
  assert max(np.float64(p).sum() for p in posteriors) > 1  # by rounding
  assert max(merged) == 0 and min(merged) > -1e-5


def test_merged_ties_keep_their_order_and_huge_scores_stay_finite():
  context = 'x y z'
  merged = answers_lib.merge_surface_forms(
      [Example('q', '', context)], candidates(
          ['z', 'x', 'y'], [1e30, 1e30, -3e38], context))
  assert merged.window.tolist() == [0, 1, 2]
  assert merged.score.tolist() == [1e30, 1e30, -3e38]


def test_merging_changes_no_null_score(tmp_path):
  for merge in answers_lib.MERGES:
    run(merge=merge, output=tmp_path / merge)
  one, other = (files.read_object(tmp_path / merge / 'na_probs.json')
                for merge in answers_lib.MERGES)
  assert one == other
