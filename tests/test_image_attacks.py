"""Attacks on images by Pillow: what each does, its bounds, its chance."""

import io

import numpy as np
import pytest
from PIL import Image

from jax_trustdiff.evaluation import image_attacks
from jax_trustdiff.types import InputError


@pytest.fixture(scope="module", params=[1, 3])
def images(request):
  """Smooth bytes [3 24 32 c]."""
  down, along = np.meshgrid(np.linspace(0, 1, 24), np.linspace(0, 1, 32), indexing="ij")
  waves = [np.sin(5 * down + i) * np.cos(4 * along - i) for i in range(3 * request.param)]
  return (
    np.rint(127.5 + 100 * np.stack(waves))
    .astype(np.uint8)
    .reshape(3, request.param, 24, 32)
    .transpose(0, 2, 3, 1)
  )


WEAKEST = {
  "noise": 0, "crop": 0, "resize": 1, "rotate": 0, "blur": 0, "brightness": 1, "contrast": 1, "erase": 0,
}  # fmt: skip
STRONG = WEAKEST | {
  "jpeg": 10, "noise": 0.2, "crop": 0.5, "resize": 0.3, "rotate": 30, "blur": 3, "brightness": 2, "contrast": 2,
  "erase": 0.25, "flip": 1,
}  # fmt: skip


@pytest.mark.parametrize("kind", WEAKEST)
def test_the_weakest_changes_nothing(images, kind):
  np.testing.assert_array_equal(image_attacks.apply(kind, WEAKEST[kind], images), images)


@pytest.mark.parametrize("kind", image_attacks.KINDS)
def test_an_attack_is_seen_and_is_the_same_again(images, kind):
  found = image_attacks.apply(kind, STRONG[kind], images, seed=3)
  assert found.shape == images.shape and found.dtype == np.uint8
  assert np.abs(found.astype(int) - images).mean() > 1
  np.testing.assert_array_equal(image_attacks.apply(kind, STRONG[kind], images, seed=3), found)


@pytest.mark.parametrize(
  "kind, is_random", [("noise", True), ("crop", True), ("erase", True), ("jpeg", False)]
)
def test_what_is_random_depends_on_the_seed_and_the_image(images, kind, is_random):
  same = np.repeat(images[:1], 8, axis=0)
  found = image_attacks.apply(kind, STRONG[kind], same, seed=0)
  other = image_attacks.apply(kind, STRONG[kind], same, seed=1)
  assert (len(np.unique(found.reshape(8, -1), axis=0)) > 1) == is_random
  assert np.array_equal(found, other) != is_random


def test_jpeg_is_a_file_of_that_quality(images):
  file = io.BytesIO()
  picture = Image.fromarray(images[0].squeeze())
  picture.save(file, "JPEG", quality=30, subsampling=2)
  wanted = np.asarray(Image.open(file)).reshape(images[0].shape)
  np.testing.assert_array_equal(image_attacks.apply("jpeg", 30, images)[0], wanted)


def test_sizes_of_what_is_done():
  x = np.full((1, 20, 40, 3), 200, np.uint8)
  assert (image_attacks.apply("erase", 0.25, x) == 0).mean() == 0.25
  assert (image_attacks.apply("brightness", 0.5, x) == 100).all()
  noisy = image_attacks.apply("noise", 0.05, np.full((4, 64, 64, 3), 128, np.uint8)) / 255
  assert abs(noisy.std() - 0.05) < 1e-3 and abs(noisy.mean() - 128 / 255) < 2e-3
  ramp = np.tile(np.arange(0, 200, 5, np.uint8)[None, None, :, None], (16, 40, 1, 3))
  cut = image_attacks.apply("crop", 0.25, ramp).astype(int)
  widths = cut[:, 0, -1, 0] - cut[:, 0, 0, 0]  # of 40 columns 30 are left: 29 steps of 5
  assert (np.abs(widths - 29 * 5) <= 2).all()
  np.testing.assert_array_equal(image_attacks.apply("flip", 1, ramp), ramp[:, :, ::-1])


@pytest.mark.parametrize(
  "kind, strength, message",
  [
    ("jpg", 50, "unknown attack on images 'jpg'; known: jpeg"),
    ("jpeg", 0, "lie within 1 to 100, got 0"),
    ("erase", 0.95, "lie within 0 to 0.9"),
  ],
)
def test_attacks_that_are_none(kind, strength, message):
  with pytest.raises(InputError, match=message):
    image_attacks.apply(kind, strength, np.zeros((1, 8, 8, 3), np.uint8))


def test_images_that_are_none():
  for images in (np.zeros((1, 8, 8, 2), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)):
    with pytest.raises(InputError, match="attacks on images take bytes"):
      image_attacks.apply("jpeg", 50, images)
  assert image_attacks.apply("jpeg", 50, np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 8, 8, 3)
