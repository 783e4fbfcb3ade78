"""Tests of span views and their plot by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax import errors
from qa_jax import heads
from qa_jax.io import plots
from qa_jax.models import bert
from tests.common import random_model

NO_S_OR_E = ('conditional', 'mlp_span')  # heads without S or E
SPECS = {name: name for name in heads.HEADS} | {
    'length_prior': 'length_prior(base="biaffine")'}


@functools.cache
def view_of(head: str):
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


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_probabilities_add_up_over_the_spans_of_any_head(spec):
  view = view_of(spec)
  score = {(i, i + d): float(view.band[i, d])
           for i, d in np.argwhere(np.isfinite(view.band))}
  keep = view.context_mask
  if view.joint:
    total = sum(np.exp(s) for s in score.values())
    p_start, p_end = np.zeros(len(keep)), np.zeros(len(keep))
    for (i, j), s in score.items():
      p_start[i] += np.exp(s) / total
      p_end[j] += np.exp(s) / total
  else:
    p_start, p_end = (np.where(keep, np.exp(x), 0) / np.exp(x)[keep].sum()
                      for x in (view.start, view.end))
  np.testing.assert_allclose(view.p_start, p_start, atol=1e-6)
  np.testing.assert_allclose(view.p_end, p_end, atol=1e-6)
  assert view.p_start.sum() == pytest.approx(1, abs=1e-6)
  assert view.p_end.sum() == pytest.approx(1, abs=1e-6)
  assert view.log_normaliser == pytest.approx(
      np.log(sum(np.exp(s) for s in score.values())), abs=1e-5)


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


@pytest.mark.parametrize('spec', ['independent', 'conditional(beam=2)'])
def test_plot_is_drawn_with_any_tokens(spec, tmp_path):
  qa = random_model.random_qa(spec)
  odd = 'Mira $_{ built $ it \\frac{'
  plots.plot_spans([(q, qa.spans(q, odd), '$\\x{') for q in ('$_',)],
                   tmp_path / 'a.png', by_layer=True)
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
  with pytest.raises(errors.UserError, match='no token'):
    plots.plot_spans([('', qa.spans('', ''), '')], tmp_path / 'b.png')
  assert not (tmp_path / 'b.png').exists()
