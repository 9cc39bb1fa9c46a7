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


def test_rate_of_a_planted_image():
  target, others = images(1, 5)[0], images(99, 6)
  assert memorisation.extraction_rate(np.concatenate([target[None], others]), target, 0.05) == pytest.approx(0.01)
  assert memorisation.extraction_rate(others, target, 0.05) == 0
  assert memorisation.distances_to(others, target).min() > 0.2


def test_images_of_two_shapes():
  with pytest.raises(InputError, match="generated images are"):
    memorisation.copies(images(2, 0), images(2, 0)[:, :4])
