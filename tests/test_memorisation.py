"""Copies are told from new images, and a planted image from others."""

import numpy as np
import pytest

from jax_trustdiff.evaluation import memorisation
from jax_trustdiff.types import InputError


def images(count, seed):
  return np.random.RandomState(seed).randint(0, 256, (count, 8, 8, 1)).astype(np.uint8)


def test_copies_are_found_and_new_images_are_not():
  training, new = images(200, 0), images(50, 1)
  noise = np.random.RandomState(2).randint(-8, 9, (30, 8, 8, 1))
  near = np.clip(training[40:70].astype(int) + noise, 0, 255).astype(np.uint8)
  found = memorisation.copies(np.concatenate([near, new]), training)
  np.testing.assert_array_equal(found.index[:30], np.arange(40, 70))
  assert (found.ratio[:30] < 1).all() and (found.ratio[30:] > 1).all()
  wanted = np.sqrt(np.square((near[0].astype(float) - training[40]) / 255).mean())
  assert found.distance[0] == pytest.approx(wanted, rel=1e-5)
  few = memorisation.copies(new[:2], training[:3])
  assert few.ratio.shape == (2,) and (few.ratio > 1).all()


def test_copies_of_an_image_that_was_planted_many_times():
  """Its duplicates are no neighbours of it: they would make the distance a usual one."""
  training = np.concatenate([images(100, 0), np.repeat(images(1, 5), 80, 0), images(100, 1)])
  near = np.clip(images(1, 5).astype(int) + 4, 0, 255).astype(np.uint8)
  found = memorisation.copies(near, training)
  assert found.ratio[0] < 0.2 and found.index[0] == 100
  others = memorisation.copies(training[[3, 190]], training)
  np.testing.assert_array_equal(others.index, [3, 190])


def test_distances_to_a_planted_image():
  target, others = images(1, 5)[0], images(99, 6)
  found = memorisation.distances_to(np.concatenate([target[None], others]), target)
  assert found[0] == 0 and found[1:].min() > 0.2


def test_images_of_two_shapes():
  with pytest.raises(InputError, match="generated images are"):
    memorisation.copies(images(2, 0), images(2, 0)[:, :4])
