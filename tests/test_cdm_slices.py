"""The order of a shard's images hangs on their contents: without some of them the others keep their slices, order and keys."""

import numpy as np
import pytest
import scipy.stats

from jax_trustdiff.cdm import slices
from jax_trustdiff.types import InputError


def images(count, seed=0):
  rng = np.random.RandomState(seed)
  return rng.randint(0, 256, (count, 4, 4, 1)).astype(np.uint8), rng.randint(0, 10, count)


def test_contents_are_told_apart_by_pixels_label_and_shape():
  x, y = images(3)
  one = slices.content_ids(x, y)
  assert one == slices.content_ids(x[::-1], y[::-1])[::-1]
  changed = x.copy()
  changed[1, 0, 0, 0] ^= 1
  for other in (slices.content_ids(changed, y), slices.content_ids(x, y + [0, 1, 0])):
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True]
  assert not set(one) & set(slices.content_ids(x.reshape(3, 2, 8, 1), y))


def test_slices_and_shards_are_even_and_do_not_move():
  ids = slices.content_ids(*images(4000))
  for assign in (slices.slice_of, slices.shard_of):
    found = assign(ids, 5, seed=3)
    assert scipy.stats.chisquare(np.bincount(found, minlength=5)).pvalue > 1e-3
    np.testing.assert_array_equal(assign(ids[1000:], 5, seed=3), found[1000:])
    assert (assign(ids, 5, seed=4) != found).mean() > 0.7
  together = scipy.stats.chi2_contingency(
    np.histogram2d(slices.slice_of(ids, 4), slices.shard_of(ids, 4), (4, 4))[0]
  )
  assert together.pvalue > 1e-3


def test_an_epoch_without_an_image_is_the_same_for_all_others():
  ids = slices.content_ids(*images(500))
  order, keys = slices.epoch_order(ids, b"seed 0, shard a, stage 1, epoch 2")
  assert sorted(order) == list(range(500))
  kept = np.delete(np.arange(500), [7, 100])
  shorter, fewer = slices.epoch_order([ids[i] for i in kept], b"seed 0, shard a, stage 1, epoch 2")
  there = ~np.isin(order, [7, 100])
  np.testing.assert_array_equal(kept[shorter], order[there])
  np.testing.assert_array_equal(fewer, keys[there])
  other, other_keys = slices.epoch_order(ids, b"seed 0, shard a, stage 1, epoch 3")
  assert abs(scipy.stats.spearmanr(np.argsort(order), np.argsort(other)).statistic) < 0.15
  assert not (keys[:, None] == other_keys).all(-1).any()
  assert keys.dtype == np.uint32 and len(np.unique(keys, axis=0)) == 500


@pytest.mark.parametrize("epochs, count", [(10, 1), (10, 4), (7, 3), (20, 10), (100, 7)])
def test_stages_cost_what_was_asked_for(epochs, count):
  found = slices.epochs_of_stages(epochs, count)
  cost = sum(e * (r + 1) / count for r, e in enumerate(found))
  assert len(found) == count and min(found) >= 1 and max(found) - min(found) <= 1
  assert abs(cost - epochs) < 1.0


def test_too_few_epochs_for_the_slices():
  with pytest.raises(InputError, match="take more epochs"):
    slices.epochs_of_stages(2, 8)


@pytest.mark.parametrize("shards, count", [(8, 1), (4, 2), (3, 10)])
def test_expected_cost_of_a_deletion(shards, count):
  """The closed form, the sum over shards and slices, and a simulation of deletions."""
  share = slices.expected_share(shards, count)
  assert slices.expected_share_of([[30] * count] * shards, [[1] * count] * shards) == pytest.approx(share)
  rng = np.random.RandomState(0)
  total = shards * sum(r + 1 for r in range(count))
  again = [sum(r + 1 for r in range(hit, count)) / total for hit in rng.randint(0, count, 20_000)]
  assert np.mean(again) == pytest.approx(share, abs=4 * np.std(again) / np.sqrt(20_000) + 1e-12)


def test_paper_has_no_slices():
  """Eight shards: an eighth, 'eight times faster'."""
  assert slices.expected_share(8, 1) == pytest.approx(1 / 8)
  assert slices.expected_share(1, 10_000) == pytest.approx(2 / 3, abs=1e-4)
