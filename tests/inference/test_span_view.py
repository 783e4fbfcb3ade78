"""Tests of span views and their plot by brute force."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import errors
from qa_jax import heads
from qa_jax.inference import span_view
from qa_jax.io import plots
from qa_jax.metrics import calibration
from qa_jax.models.encoders import bert
from tests.common import random_model

NO_S_OR_E = ('conditional', 'mlp_span')  # heads without S or E
SPECS = {name: name for name in heads.HEADS} | {
    'length_prior': 'length_prior(base="biaffine")'}


@functools.cache
def view_of(head: str) -> span_view.SpanView:
  return random_model.random_qa(head).spans(random_model.QUESTION,
                                            random_model.CONTEXT)


def layers_of(qa, view):
  """Returns the outputs [1 + N, L, D] of the encoder's layers."""
  ids = jnp.array([[qa.tokenizer.index[t] for t in view.tokens]])
  first = view.tokens.index('[SEP]') + 1
  types = (jnp.arange(ids.shape[1]) >= first).astype(jnp.int32)[None]
  encoder = bert.BertEncoder(qa.model.config)
  layers = encoder.apply({'params': qa.params['encoder']}, ids, types,
                         jnp.ones_like(ids))
  return np.stack(layers)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['never', 'min_null'])
@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_probabilities_add_up_over_null_and_the_spans_of_any_head(spec, rule):
  qa = dataclasses.replace(
      random_model.random_qa(spec, null_rule=rule),
      calibration=calibration.Calibration(0.0, 0.5, '', '', 9, 0, {}))
  view = qa.spans(random_model.QUESTION, random_model.CONTEXT)
  weight = {(i, i + d): np.exp(float(view.band[i, d]) / 0.5)
            for i, d in np.argwhere(np.isfinite(view.band))}
  null = np.exp(view.null_score / 0.5) if rule == 'min_null' else 0.0
  total = sum(weight.values()) + null
  p_start, p_end = np.zeros((2, len(view.tokens)))
  for (i, j), w in [*weight.items(), ((0, 0), null)]:
    p_start[i] += w / total
    p_end[j] += w / total
  np.testing.assert_allclose(view.p_start, p_start, atol=1e-5)
  np.testing.assert_allclose(view.p_end, p_end, atol=1e-5)
  answer = qa.answer(question=random_model.QUESTION,
                     context=random_model.CONTEXT)
  assert view.null_probability == pytest.approx(
      answer.null_probability, abs=1e-6)
  for c in answer.n_best:
    i, j = view.locate(c['start'], c['end'])
    assert view.p_band[i, j - i] == pytest.approx(c['probability'], rel=1e-4)


@pytest.mark.parametrize('rule', ['never', 'min_null'])
def test_a_long_passage_is_viewed_in_the_window_of_its_best_span(rule):
  context = 'Oslo built it. ' * 30 + random_model.CONTEXT
  qa = random_model.random_qa('independent', null_rule=rule,
                              null_threshold=1e9)
  view = qa.spans(random_model.QUESTION, context)
  answer = qa.answer(question=random_model.QUESTION, context=context)
  assert view.windows > 2 and view.locate(answer.start, answer.end)
  i, j = view.locate(answer.start, answer.end)
  assert view.p_band[i, j - i] == pytest.approx(answer.probability, rel=1e-4)
  assert 0 < view.p_start.sum() < 1  # the rest is in other windows
  assert view.null_score == pytest.approx(answer.null_score, abs=1e-5)


def test_focus_tokens_are_near_the_best_spans_of_all_questions():
  view = view_of('independent')
  count = int(view.context_mask.sum())
  np.testing.assert_array_equal(
      span_view.focus_tokens([view], count)[0], np.arange(count))
  first = int(view.context_mask.argmax())
  band = np.full_like(view.band, -np.inf)
  band[first:first + count, 0] = -9
  left, right = band.copy(), band.copy()
  left[first, 0] = right[first + count - 1, 0] = 9
  views = [dataclasses.replace(view, band=b, log_partition=10.0)
           for b in (left, right)]
  for tokens in span_view.focus_tokens(views, 6):
    assert list(tokens) == [0, 1, 2, count - 3, count - 2, count - 1]
  alone = span_view.focus_tokens(views[:1], 3)[0]
  assert list(alone) == [0, 1, 2]
  band[first + 3, 1] = 9  # a span of two tokens, with all around it or cut
  for most in (6, 4):
    tokens, = span_view.focus_tokens([dataclasses.replace(
        view, band=band, log_partition=10.0)], most)
    assert list(tokens) == [*range(1, 1 + most)]


@pytest.mark.parametrize('spec', ['independent', 'conditional'])
def test_best_spans_of_the_band_are_the_n_best_of_the_search(spec):
  qa = random_model.random_qa(spec)
  view, answer = view_of(spec), qa.answer(
      question=random_model.QUESTION, context=random_model.CONTEXT)
  best = np.sort(view.band[np.isfinite(view.band)])[::-1][:6]
  np.testing.assert_allclose(
      [c['score'] for c in answer.n_best[:len(best)]], best, atol=1e-5)
  for c in answer.n_best[:len(best)]:
    i, j = view.locate(c['start'], c['end'])
    assert view.band[i, j - i] == pytest.approx(c['score'], abs=1e-5)
  assert view.null_score == pytest.approx(answer.null_score, abs=1e-5)


@pytest.mark.parametrize('head', ['independent', 'biaffine'])
def test_each_layer_is_read_with_the_same_s_and_e(head):
  qa = random_model.random_qa(head)
  view = view_of(head)
  hidden = layers_of(qa, view)
  assert len(hidden) == 2
  for name, layer_scores in (('start', view.start_by_layer),
                      ('end', view.end_by_layer)):
    vector = np.asarray(qa.params['head'][name]['kernel'])[:, 0]
    np.testing.assert_allclose(layer_scores, hidden @ vector, atol=1e-5)


def test_layer_mix_scores_are_the_weighted_scores_of_the_layers():
  qa = random_model.random_qa('layer_mix')
  view = view_of('layer_mix')
  weights = np.asarray(jax.nn.softmax(qa.params['head']['alpha']))
  np.testing.assert_allclose(weights @ view.start_by_layer, view.start,
                             atol=1e-5)
  assert np.ptp(weights) > 0.01 and np.ptp(view.start_by_layer, axis=0).max()


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_layer_scores_need_a_head_with_s_and_e(spec):
  view = view_of(spec)
  left_out = spec in NO_S_OR_E
  assert (view.start_by_layer is None) == left_out
  assert (view.end_by_layer is None) == left_out
  if not left_out and spec != 'layer_mix':
    np.testing.assert_allclose(view.start_by_layer[-1], view.start, atol=1e-5)


def test_starts_outside_a_beam_have_no_score():
  band = view_of('conditional(beam=2)').band
  assert np.isfinite(band).any(axis=1).sum() == 2
  assert band[np.isfinite(band)].min() > -100


def test_offsets_cut_the_context_where_the_tokens_are():
  view = view_of('independent')
  for token, (begin, end), inside in zip(
      view.tokens, view.offsets, view.context_mask, strict=True):
    expected = token.removeprefix('##') if inside else ''
    assert random_model.CONTEXT[begin:end].lower() == expected


def test_the_square_has_each_span_of_context_tokens():
  view = view_of('independent')
  keep, width = np.flatnonzero(view.context_mask), view.band.shape[1]
  assert width < len(keep)
  np.testing.assert_array_equal(view.square, [
      [view.start[i] + view.end[j] if 0 <= j - i < width else -np.inf
       for j in keep] for i in keep])


def test_a_span_beyond_the_longest_answer_has_no_place():
  view = view_of('independent')
  first = view.tokens.index('[SEP]') + 1
  assert [view.locate(view.offsets[first, 0], view.offsets[first + d, 1])
          for d in (3, 4)] == [(first, first + 3), None]


def test_a_view_without_a_span_and_null_has_no_probability():
  view = random_model.random_qa('independent').spans('', '')
  assert not view.p_start.any() and not view.p_end.any()


@pytest.mark.parametrize('spec', ['independent', 'conditional(beam=2)'])
def test_plot_is_drawn_with_any_tokens(spec, tmp_path):
  qa = random_model.random_qa(spec)
  odd = 'Mira $_{ built $ it \\frac{'
  plots.plot_spans([(q, qa.spans(q, odd), '$\\x{') for q in ('$_',)],
                   tmp_path / 'a.png', by_layer=True)
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
  with pytest.raises(errors.UserError, match='no token'):
    plots.plot_spans([('', qa.spans('', ''), '')], tmp_path / 'b.png')
  qa = random_model.random_qa(spec, max_answer_length=1, whole_words=True)
  with pytest.raises(errors.UserError, match='no legal span'):
    plots.plot_spans([('', qa.spans('', 'banner'), '')], tmp_path / 'b.png')
  assert not (tmp_path / 'b.png').exists()
