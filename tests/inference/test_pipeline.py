"""Tests of `qa_jax.pipeline` by recorded results of transformers 4.57."""

import json
import pathlib
import shutil
import types

import numpy as np
import pytest

import qa_jax
from qa_jax import errors
from qa_jax.inference import pipeline
from qa_jax.inference import predict
from qa_jax.inference import pretrained
from tests.common import random_model

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
RECORDED = json.loads((GOLDEN / 'pipeline_golden.json').read_text())
SHORT = RECORDED['cases'][0]['call']


@pytest.fixture(scope='module')
def directory(tmp_path_factory) -> pathlib.Path:
  path = shutil.copytree(GOLDEN / 'tiny_bert',
                         tmp_path_factory.mktemp('hf') / 'tiny')
  (path / 'vocab.txt').write_text('\n'.join(RECORDED['vocab']) + '\n')
  return path


@pytest.fixture(scope='module')
def pipe(directory):
  return qa_jax.pipeline('question-answering', model=str(directory),
                         tokenizer=str(directory), framework=None)


def call(pipe, case):
  options = dict(case)
  args = options.pop('args', [])
  if 'squad_examples' in options:
    args = [[types.SimpleNamespace(question_text=q['question'],
                                   context_text=q['context'])
             for q in options.pop('squad_examples')]]
  if 'generator' in options:
    args = [iter(options.pop('generator'))]
  result = pipe(*args, **options)
  return result if isinstance(result, (dict, list)) else list(result)


def assert_same(ours, theirs):
  """Asserts equal shapes and places, and scores that differ by a factor."""
  assert type(ours) is type(theirs)
  if isinstance(ours, dict):
    ours, theirs = [ours], [theirs]
  if theirs and isinstance(theirs[0], list):  # several questions
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
      assert_same(one, other)
    return
  # transformers fills a list with empty answers at [CLS] whose score is 0.
  theirs = [row for row in theirs if row['score'] > 0]
  place = lambda row: {k: v for k, v in row.items() if k != 'score'}
  assert [place(row) for row in ours] == [place(row) for row in theirs]
  assert all(list(row) == ['score', 'start', 'end', 'answer'] for row in ours)


@pytest.mark.parametrize('case', RECORDED['cases'][:-1],
                         ids=lambda case: str(case['call']))
def test_results_are_those_of_transformers(pipe, case):
  assert_same(call(pipe, case['call']), case['result'])


@pytest.mark.parametrize('number', [2, 3, 4, 5])
def test_scores_of_a_question_differ_from_transformers_by_a_factor(
    pipe, number):
  """Both normalise exp(start + end): over spans, and over starts and ends."""
  case = RECORDED['cases'][number]
  ours, theirs = ([row['score'] for row in rows if row['score'] > 0]
                  for rows in (call(pipe, case['call']), case['result']))
  assert len(ours) >= 3
  np.testing.assert_allclose(np.divide(ours, ours[0]),
                             np.divide(theirs, theirs[0]), rtol=1e-4)


def test_windows_are_compared_by_score_and_not_by_their_own_softmax(
    directory, pipe):
  case = RECORDED['cases'][-1]
  result = pipe(**case['call'])
  best = predict.load(
      directory, max_length=30, window_overlap=9, max_answer_length=4,
      max_question_length=16, null_rule='never').answer(
          case['call']['question'], case['call']['context'])
  assert (result['start'], result['answer']) == (best.start, best.text)
  assert result['answer'] != case['result']['answer']  # best of one window


def test_scores_are_posteriors_and_equal_texts_are_added(pipe):
  rows = pipe('x', 'a B b', top_k=50, handle_impossible_answer=True)
  assert sorted(row['answer'].lower() for row in rows) == [
      '', 'a', 'a b', 'a b b', 'b', 'b b']
  assert sum(row['score'] for row in rows) == pytest.approx(1)


@pytest.mark.slow
def test_repeated_texts_leave_top_k_answers_and_the_score_is_one(pipe):
  """The best spans have few texts, each at many places."""
  ask = lambda **options: pipe('who', 'a b c d e ' * 40,
                               max_answer_len=5, **options)
  rows = ask(top_k=22)
  texts = [row['answer'].lower() for row in rows]
  assert len(texts) == len({*texts}) == 22
  assert ask() == rows[0]
  for k in (2, 5, 12, 20):
    for row, other in zip(ask(top_k=k), rows[:k], strict=True):
      assert row == {**other, 'score': pytest.approx(other['score'])}
  # Up to 5 of the words in a row, beginning with each of the 5.
  assert len(ask(top_k=9999)) == 5 * 5


def test_answers_are_whole_words_by_default(pipe):
  context = 'ships sail to many far off isles'
  words = pipe('who', context, top_k=9)
  parts = pipe('who', context, top_k=9, align_to_words=False)
  whole = lambda row: all(w in context.split() for w in row['answer'].split())
  assert all(map(whole, words)) and not all(map(whole, parts))


@pytest.mark.parametrize('options', [
    {}, {'top_k': 3}, {'handle_impossible_answer': True}], ids=str)
def test_a_context_without_a_token_has_the_empty_answer(pipe, options):
  empty = pipe('a', '  ', **options)
  assert empty == {
      'score': float('handle_impossible_answer' in options), 'start': 0,
      'end': 0, 'answer': ''}
  assert pipe(question=['a', 'b'], context='  ', **options) == [empty, empty]


def test_options_of_the_pipeline_hold_for_its_calls(directory, pipe):
  other = qa_jax.pipeline(model=predict.load(directory), top_k=2, batch_size=1,
                          device='cpu', padding='longest', use_fast=False)
  assert other(**SHORT) == pipe(**SHORT, top_k=2)
  assert other(**SHORT, topk=1) == pipe(**SHORT)
  assert other(**SHORT, topk=3, top_k=1, doc_stride=0) == pipe(**SHORT)
  assert other._prepared(other.options).config.train.eval_batch_size == 1
  assert other.task == 'question-answering' and 'QA(' in repr(other)


class Questions:
  """A data set of torch: a length and items, and no IndexError."""

  def __len__(self):
    return 2

  def __getitem__(self, i):
    return SHORT


def test_columns_and_data_sets_are_several_questions(pipe):
  two = pipe([SHORT, SHORT])
  assert pipe({k: [v] * 2 for k, v in SHORT.items()}) == two
  assert pipe({'question': [SHORT['question']] * 2,
               'context': SHORT['context']}) == two
  assert pipe(Questions()) == pipe(data=Questions()) == two
  assert pipe(X=Questions()) == two and pipe([]) == []


def test_numbers_of_numpy_are_options(pipe):
  assert pipe(**SHORT, top_k=np.int64(2), align_to_words=np.True_) == pipe(
      **SHORT, top_k=2)


def test_options_without_a_value_have_the_documented_ones(directory):
  pipe = qa_jax.pipeline(model=predict.load(directory, window_overlap=3))
  config = pipe._prepared(pipe.options).config.data
  assert (config.max_length, config.window_overlap) == (40, 20)
  long = random_model.random_qa('independent', null_rule='min_null')
  pipe = qa_jax.pipeline(model=long, max_seq_len=384)
  config = pipe._prepared(pipe.options).config.data
  assert (config.window_overlap, config.max_question_length) == (128, 64)


def test_a_vocabulary_that_lost_its_end_is_said(directory, tmp_path,
                                                monkeypatch):
  cut = shutil.copytree(directory, tmp_path / 'cut') / 'vocab.txt'
  words = cut.read_text().splitlines()
  cut.write_text('\n'.join(words[:-3]) + '\n')
  lost = lambda: [note for note in pretrained.read_pretrained(
      str(cut.parent)).notes if 'is a part of it missing' in note]
  spare = 100 - len(words) + 3
  monkeypatch.setattr(pretrained, 'MOST_SPARE', spare)
  assert not lost()
  monkeypatch.setattr(pretrained, 'MOST_SPARE', spare - 1)
  note, = lost()
  assert f'has {len(words) - 3} entries and the embeddings 100' in note


def test_arrays_of_texts_are_lists_of_texts(pipe):
  twice = [SHORT['question']] * 2
  expected = pipe(question=twice, context=SHORT['context'])
  for many in (np.array(twice), np.array(twice, object)):
    assert pipe(question=many, context=SHORT['context']) == expected
    assert pipe({'question': many,
                 'context': np.array([SHORT['context']] * 2)}) == expected


def test_a_generator_is_read_as_far_as_its_answers_are(pipe):
  seen = []

  def questions():
    for n in range(100):
      seen.append(n)
      yield SHORT
  answers = pipe(questions())
  first, alone = next(answers), pipe(**SHORT)
  assert first.pop('score') == pytest.approx(alone.pop('score'), abs=1e-6)
  assert first == alone
  assert len(seen) < 100


@pytest.mark.parametrize(('args', 'options', 'message'), [
    ((), {'question': 'a'}, 'give question=… and context=…'),
    ((), {'question': 'a', 'context': ['b']}, 'context of row 0 is list'),
    ((), {'question': ['a'], 'context': ['b', 'c']},
     '1 question needs one context or 1 of them, and 2 contexts were given'),
    ((), {'question': ['a', 'b'], 'context': 3},
     '2 questions need one context or 2 of them, and int was given'),
    ((), {'question': '', 'context': 'b'}, 'question of row 0 is empty'),
    ((), {'question': 'a', 'context': ''}, 'context of row 0 is empty'),
    ((), {'question': 'a', 'context': None}, 'context of row 0 is NoneType'),
    (('a',), {}, 'row 0 is str'), ((3,), {}, 'row 0 is int'),
    (('a', 'b'), {'question': 'c'}, 'contradict'),
    ((), {**SHORT, 'top_n': 3}, "no argument 'top_n'; did you mean 'top_k'"),
    ((), {**SHORT, 'top_k': 0}, 'top_k=0, expected an integer of at least 1'),
    ((), {**SHORT, 'top_k': 10**6}, 'top_k=1000000, expected at most 10000'),
    ((), {**SHORT, 'top_k': 1.5}, 'top_k=1.5, expected an integer'),
    ((), {**SHORT, 'align_to_words': 1}, 'align_to_words=1, expected bool'),
    ((), {**SHORT, 'padding': 'left'}, "padding='left' is none of"),
    ((), {**SHORT, 'max_seq_len': 41},
     "pipeline: max_seq_len=41 exceeds the encoder's 40 positions"),
    ((), {**SHORT, 'doc_stride': 24, 'max_seq_len': 24},
     'pipeline: doc_stride 24 leaves no step: max_seq_len 24 - max_question_len'
     )],
    ids=str)
def test_a_wrong_call_is_one_line(pipe, args, options, message):
  with pytest.raises(errors.UserError, match=message) as e:
    pipe(*args, **options)
  assert '\n' not in str(e.value)


def test_a_text_in_another_case_is_no_other_answer():
  texts = ['Ada', 'ADA', 'ada', 'Ada', 'ada', 'Bob']

  def answer_batch(rows, n_best=4):
    return [types.SimpleNamespace(n_best=[{'text': t} for t in texts[:n_best]])
            for _ in rows]
  model = types.SimpleNamespace(
      config=types.SimpleNamespace(decode=types.SimpleNamespace(n_best=4)),
      answer_batch=answer_batch)
  answer, = pipeline._candidates(model, pipeline.Options(top_k=2), [{}])
  assert len(answer.n_best) == 6


@pytest.mark.parametrize(('platform', 'fitting', 'others'), [
    ('cpu', (None, -1, 'cpu'), (0, 'cuda', 'tpu:0')),
    ('gpu', (None, 0, 'cuda', 'cuda:0', 'gpu:0'), (-1, 'cpu', 'cuda:1')),
    ('tpu', (None, 0, 'tpu', 'tpu:0'), (-1, 'cpu', 1))])
def test_a_device_names_the_first_one_of_the_platform(
    monkeypatch, platform, fitting, others):
  monkeypatch.setattr(pipeline.jax, 'default_backend', lambda: platform)
  for device in fitting:
    pipeline._check_device(device)
  for device in others:
    with pytest.raises(errors.UserError, match=f'JAX runs on {platform}'):
      pipeline._check_device(device)


@pytest.mark.parametrize(('arguments', 'message'), [
    ({'task': 'summarization'}, "'question-answering' is the only one"),
    ({}, 'model is missing'),
    ({'model': 'x', 'tokenizer': 'y'}, "tokenizer='y'.*leave it out"),
    ({'model': 'x', 'framework': 'pt'}, 'framework has no meaning here'),
    ({'model': 'x', 'torch_dtype': 'auto'}, 'torch_dtype has no meaning'),
    ({'model': 'x', 'device': 0}, 'device=0, but JAX runs on cpu'),
    ({'model': 'x', 'tpo_k': 2}, "no argument 'tpo_k'; did you mean 'top_k'")],
    ids=str)
def test_a_wrong_pipeline_is_one_line(arguments, message):
  with pytest.raises(errors.UserError, match=message):
    qa_jax.pipeline(**arguments)
