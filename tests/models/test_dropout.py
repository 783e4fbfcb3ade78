"""Tests of dropout masks: rate, scale, keys, independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qa_jax.models import attention
from qa_jax.models import dropout

SIZE = 2**16


def keys_of(seed: int = 0, rows: int = 4) -> dropout.DropoutKeys:
  return dropout.DropoutKeys.from_rows(jax.random.key(seed), jnp.arange(rows))


def masks_of(keys: dropout.DropoutKeys, rate: float = 0.1,
             place: int = 0) -> np.ndarray:  # [B, SIZE] bool
  x = jnp.ones((len(keys.seeds), SIZE))
  return np.asarray(dropout.dropout(x, rate, keys, place)) > 0


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_share_of_dropped_units_is_the_rate(rate):
  masks = masks_of(keys_of(), rate)
  sigma = (rate * (1 - rate) / masks.size) ** 0.5
  assert abs(masks.mean() - (1 - rate)) < 4 * sigma


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_units_are_scaled_or_zero(dtype):
  x = jnp.full((2, 8, 16), 3, dtype)
  y = dropout.dropout(x, 0.25, keys_of(rows=2), 0)
  assert y.dtype == dtype and y.shape == x.shape
  assert set(np.unique(np.asarray(y, np.float32))) == {0.0, 4.0}


def test_units_in_bfloat16_are_scaled_without_bias():
  """1 / 0.9 in bfloat16 is 1.109375: all units would be 0.16 % too small."""
  x = np.random.default_rng(0).normal(size=(1, 4096)).astype(jnp.bfloat16)
  y = np.asarray(dropout.dropout(jnp.asarray(x), 0.1, keys_of(rows=1), 0))
  right = (x.astype(np.float64) / 0.9).astype(jnp.bfloat16)
  np.testing.assert_array_equal(y[y != 0], right[y != 0])
  assert (y != 0).mean() > 0.8


def test_gradient_of_dropped_units_is_zero():
  x = jnp.linspace(1, 2, 256).reshape(2, 128)
  y, pull = jax.vjp(
      lambda x: dropout.dropout(x, 0.1, keys_of(rows=2), 0), x)
  np.testing.assert_allclose(
      pull(jnp.ones_like(x))[0], np.where(y > 0, 1 / 0.9, 0), rtol=1e-6)


def test_mask_under_jit_is_the_mask():
  mask = lambda keys: dropout.unit_mask(
      (len(keys.seeds), 1000), 0.1, keys, dropout.EMBEDDINGS)
  np.testing.assert_array_equal(jax.jit(mask)(keys_of()), mask(keys_of()))


def lowbias32(x: int) -> int:  # Wellons (2018), in whole numbers
  for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
    x = (x ^ x >> shift) * factor % 2**32
  return x


@pytest.mark.parametrize('place', [
    dropout.ATTENTION_WEIGHTS, dropout.CONVOLUTION, dropout.EMBEDDINGS])
def test_masks_are_those_of_the_published_hash(place):
  seeds = [(0, 0), (1, 2**31), (2**32 - 1, 7)]
  keys = dropout.DropoutKeys(jnp.array(seeds, jnp.uint32))
  masks = np.asarray(dropout.unit_mask((3, 8, 5), 0.4, keys, place))
  for row, (mask, pair) in enumerate(zip(masks, seeds, strict=True)):
    first, second = (
        lowbias32(lowbias32((seed + step * place) % 2**32) ^ step)
        for seed, step in zip(pair, (0x9E3779B9, 0x85EBCA6B), strict=True))
    assert mask.ravel().tolist() == [
        lowbias32(lowbias32(unit ^ first) ^ second) >= 0.4 * 2**32
        for unit in range(40)], row
  bits = lowbias32(lowbias32(1))  # at the bound a unit is kept
  one, none = np.uint32([1, 0])[:, None]
  assert dropout.keep_mask(one, none, none, bits / 2**32)
  assert not dropout.keep_mask(one, none, none, (bits + 1) / 2**32)


def test_an_array_that_rows_share_has_one_mask_a_layer_whatever_the_rows():
  def mask(rows, layer):
    keys = dropout.DropoutKeys.from_rows(jax.random.key(0), jnp.array(rows))
    return np.asarray(dropout.unit_mask(
        (1, 64), 0.5, keys.fold(layer).shared(), dropout.POSITIONS))
  np.testing.assert_array_equal(mask([0, 1], 3), mask([5, 6], 3))
  assert (mask([0, 1], 3) != mask([0, 1], 4)).any()


def test_places_have_numbers_of_their_own():
  places = [dropout.ATTENTION_WEIGHTS, dropout.ATTENTION_OUTPUT,
            dropout.MLP_OUTPUT, dropout.POSITIONS, dropout.CONVOLUTION,
            dropout.EMBEDDINGS]
  assert len({*places}) == len(places)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
  return abs(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_other_seeds_places_and_rows_give_uncorrelated_masks():
  mask = masks_of(keys_of())
  bound = 4 / SIZE**0.5
  assert correlation(mask[0], mask[1]) < bound
  assert correlation(mask[0], masks_of(keys_of(1))[0]) < bound
  assert correlation(mask[0], masks_of(keys_of(), place=1)[0]) < bound
  assert correlation(mask[0], masks_of(keys_of().fold(1))[0]) < bound


def test_layers_and_places_of_a_row_give_uncorrelated_masks():
  keys = keys_of(rows=1)
  masks = np.concatenate([
      masks_of(keys.fold(layer), 0.5, place)
      for layer in (*range(24), dropout.EMBEDDINGS) for place in range(3)])
  # The largest of 2,775 correlations exceeds 5.5 deviations by chance in one of
  # ten thousand draws.
  found = np.corrcoef(masks.astype(np.float32)) - np.eye(len(masks))
  assert abs(found).max() < 5.5 / SIZE**0.5


@pytest.mark.parametrize('lag', [1, 2, 3, 4, 8, 32, 64, 384, 768, 4096])
def test_units_of_a_row_are_uncorrelated(lag):
  # The worst of 32 rows exceeds 5 deviations by chance once in 1e5 suites.
  masks = masks_of(keys_of(rows=32)).astype(np.float64) - 0.9
  products = (masks[:, lag:] * masks[:, :-lag]).mean(axis=1) / 0.09
  assert abs(products).max() < 5 / (SIZE - lag) ** 0.5


def test_counts_in_blocks_vary_as_a_binomial_does():
  # The variance would show masks that are too even or clustered.
  counts = masks_of(keys_of(rows=32)).reshape(-1, 64).sum(axis=1)
  expected = 64 * 0.09
  sigma = expected * (2 / counts.size) ** 0.5
  assert abs(counts.var() - expected) < 5 * sigma


def test_a_row_keeps_its_mask_in_another_batch():
  key = jax.random.key(7)
  whole, part = (
      dropout.unit_mask((len(rows), 512), 0.1, dropout.DropoutKeys.from_rows(
          key, rows), dropout.EMBEDDINGS)
      for rows in (jnp.arange(4), jnp.array([3, 1])))
  np.testing.assert_array_equal(part, whole[jnp.array([3, 1])])


def test_a_longer_batch_has_the_masks_of_the_given_lengths():
  keys = keys_of(rows=2)
  longer = attention.Drop(keys.replace(lengths=jnp.array([8, 5])), 0.5).kept(
      (2, 3, 12, 12))
  for row, length in enumerate((8, 5)):
    short = attention.Drop(keys, 0.5).kept((2, 3, length, length))
    np.testing.assert_array_equal(
        longer[row, :, :length, :length], short[row])


def test_without_keys_or_rate_nothing_changes():
  x = jnp.arange(8.0).reshape(2, 4)
  assert dropout.dropout(x, 0.1, None, 0) is x
  assert dropout.dropout(x, 0.0, keys_of(rows=2), 0) is x
