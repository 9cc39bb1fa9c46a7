"""Augmentations equal plain numpy and PIL for given draws, and draw what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_trustdiff.data.augment import AUGMENTATIONS, crop_flip, rotate


def random_images(*shape, low=0, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(low, 256, shape).astype(np.uint8))


def crop_flip_numpy(images, offsets, mirrored, pad):
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = images.shape[1:3]
  out = []
  for image, (row, column), mirror in zip(padded, offsets, mirrored, strict=True):
    crop = image[row : row + height, column : column + width]
    out.append(crop[:, ::-1] if mirror else crop)
  return np.stack(out)


@pytest.mark.floor
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crop_flip_is_numpy_s(pad):
  images, rng = random_images(200, 6, 9, 3), np.random.default_rng(1)
  offsets, mirrored = rng.integers(0, 2 * pad + 1, (200, 2)), rng.random(200) < 0.5
  out = jax.jit(crop_flip, static_argnums=3)(images, offsets, mirrored, pad)
  assert out.dtype == jnp.uint8
  np.testing.assert_array_equal(out, crop_flip_numpy(images, offsets, mirrored, pad))


@pytest.mark.parametrize("side", [32, 33, 64])
def test_rotate_is_pil_s(side):
  angles = np.arange(-15, 16)
  images = random_images(len(angles), side, side, 3, low=1)
  out = np.asarray(rotate(images, jnp.asarray(angles, jnp.float32)))
  expected = [
    np.asarray(Image.fromarray(x).rotate(int(a), Image.NEAREST))
    for x, a in zip(np.asarray(images), angles, strict=True)
  ]
  np.testing.assert_array_equal(out, np.stack(expected))
  assert (out[0] == 0).any() and (out[15] == images[15]).all()  # black corners at -15 degrees, identity at 0


def test_every_augmentation_keeps_shape_and_type_and_takes_its_draws_from_the_key():
  images = random_images(64, 32, 32, 1, low=1)
  for name, make in AUGMENTATIONS.items():
    augment = jax.jit(make())
    out = augment(images, jax.random.key(0))
    assert out.shape == images.shape and out.dtype == jnp.uint8
    np.testing.assert_array_equal(out, augment(images, jax.random.key(0)))
    changed = not np.array_equal(out, augment(images, jax.random.key(1)))
    assert changed == (name != "none")
  np.testing.assert_array_equal(AUGMENTATIONS["none"]()(images, jax.random.key(0)), images)


def place_of(out, size, pad):
  """Offsets and mirror of images in which pixel (i, j) has the values (i + 1, j + 1)."""
  rows, columns = np.asarray(out)[..., 0].astype(int), np.asarray(out)[..., 1].astype(int)
  centre = size // 2
  mirrored = columns[:, centre, centre + 1] < columns[:, centre, centre]
  columns = np.where(mirrored[:, None, None], columns[..., ::-1], columns)
  row = rows[:, centre, centre] - 1 - centre + pad
  column = columns[:, centre, centre] - 1 - centre + pad
  return row, column, mirrored


def chi_square(counts):
  expected = counts.sum() / counts.size
  return ((counts - expected) ** 2 / expected).sum() / (counts.size - 1)  # about 1 for uniform draws


def test_places_and_mirrors_are_uniform_and_independent():
  size, pad, number = 16, 4, 16000
  row, column = np.mgrid[1 : size + 1, 1 : size + 1]
  grid = np.stack([row, column, np.zeros_like(row)], -1).astype(np.uint8)
  images = jnp.broadcast_to(jnp.asarray(grid), (number, size, size, 3))
  row, column, mirrored = place_of(AUGMENTATIONS["pad_crop_flip"]()(images, jax.random.key(7)), size, pad)
  assert (row.min(), row.max(), column.min(), column.max()) == (0, 8, 0, 8)
  counts = np.zeros((9, 9, 2))
  np.add.at(counts, (row, column, mirrored.astype(int)), 1)
  assert chi_square(counts) < 1.4  # 161 degrees of freedom: 1.4 is 3.5 standard deviations
  near_miss = counts.copy()
  near_miss[0] *= 0.5  # the outermost row drawn half as often
  assert chi_square(near_miss) > 1.4
  assert not place_of(AUGMENTATIONS["pad_crop_flip"](flip=False)(images, jax.random.key(7)), size, pad)[
    2
  ].any()
  row, column, mirrored = place_of(AUGMENTATIONS["flip"]()(images, jax.random.key(8)), size, 0)
  assert not row.any() and not column.any() and abs(mirrored.mean() - 0.5) < 0.02


def test_rotation_angles_are_uniform():
  number = 2000
  image = np.zeros((65, 65, 1), np.uint8)
  image[32, 64] = 255  # a point at angle 0, radius 32
  augment = AUGMENTATIONS["pad_crop_flip_rotate"](pad=0, flip=False)
  out = np.asarray(augment(jnp.broadcast_to(jnp.asarray(image), (number, 65, 65, 1)), jax.random.key(3)))[
    ..., 0
  ]
  found = out.reshape(number, -1).argmax(1)
  seen = out.reshape(number, -1).max(1) > 0  # a rotated point may fall between pixels
  angles = np.degrees(np.arctan2(32 - found // 65, found % 65 - 32))[seen]
  assert seen.mean() > 0.8
  assert -15.9 < angles.min() < -14 and 14 < angles.max() < 15.9
  assert abs(angles.mean()) < 0.5 and abs(angles.std() - 15 / np.sqrt(3)) < 0.3


def test_same_inside_a_loop():
  images, augment = random_images(16, 8, 8, 3), AUGMENTATIONS["pad_crop_flip_rotate"]()
  key = jax.random.key(5)
  looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: augment(x, jax.random.fold_in(key, i)), x))(
    images
  )
  for i in range(3):
    images = augment(images, jax.random.fold_in(key, i))
  np.testing.assert_array_equal(looped, images)
