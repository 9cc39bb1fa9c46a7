"""Augmentations on the device: pure functions (uint8 [b h w c], key) -> uint8 images of the same shape.

    augment = AUGMENTATIONS['pad_crop_flip'](pad=4)
    images = augment(images, key)     # inside jit; one key for the batch, every image has its own draws

Every one is a gather of pixels at drawn places, so it costs the same inside and outside of a loop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jax_trustdiff.types import Bytes

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def none() -> Augment:
  """The images as they are."""
  return lambda images, key: images


def flip() -> Augment:
  """Mirrors each image left to right with probability 1/2."""
  return pad_crop_flip(pad=0)


def pad_crop_flip(pad: int = 4, flip: bool = True) -> Augment:
  """Pads with `pad` zeros on each side, crops the old size at a uniform place, mirrors with probability 1/2.

  The (2 pad + 1)^2 places are equally likely. flip=False leaves out the mirror.
  """

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (len(images), 2), 0, 2 * pad + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images),)) & flip
    return crop_flip(images, offsets, mirrored, pad)

  return augment


def pad_crop_flip_rotate(pad: int = 4, flip: bool = True, degrees: float = 15.0) -> Augment:
  """`pad_crop_flip`, then a rotation by a uniform angle in [-degrees, degrees]: nearest pixel, zeros outside.

  With its defaults the usual augmentation of CIFAR-100.
  """
  crop = pad_crop_flip(pad, flip)

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    crop_key, angle_key = jax.random.split(key)
    angles = jax.random.uniform(angle_key, (len(images),), minval=-degrees, maxval=degrees)
    return rotate(crop(images, crop_key), angles)

  return augment


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {
  "none": none,
  "flip": flip,
  "pad_crop_flip": pad_crop_flip,
  "pad_crop_flip_rotate": pad_crop_flip_rotate,
}


# ---- the transformations, for given draws ----


def crop_flip(images: Bytes, offsets: Int[Array, "b 2"], mirrored: Bool[Array, "b"], pad: int) -> Bytes:
  """Crops at (row, column) `offsets` in [0, 2 pad] of the zero-padded images, then mirrored where asked."""
  height, width = images.shape[1:3]
  rows = jnp.arange(height) + offsets[:, :1] - pad
  columns = jnp.arange(width) + offsets[:, 1:] - pad
  columns = jnp.where(mirrored[:, None], columns[:, ::-1], columns)
  return _pixels(images, rows[:, :, None], columns[:, None, :])


def rotate(images: Bytes, angles: Float[Array, "b"]) -> Bytes:
  """Rotates counter-clockwise by `angles` in degrees about the centre; nearest pixel, zeros outside.

  The output pixel in row i and column j is the input pixel that contains the point

      x = cos(a) (j - cx) - sin(a) (i - cy) + cx + 1/2        cx = (w - 1) / 2
      y = sin(a) (j - cx) + cos(a) (i - cy) + cy + 1/2        cy = (h - 1) / 2

  with coordinates rounded to 1/65536, as PIL's `Image.rotate(angle, NEAREST)` does.
  """
  height, width = images.shape[1:3]
  radians = -jnp.deg2rad(angles)[:, None, None]
  cos, sin = jnp.cos(radians), jnp.sin(radians)
  center_x, center_y = (width - 1) / 2, (height - 1) / 2
  i, j = jnp.arange(height)[:, None], jnp.arange(width)
  first_x = _fixed(center_x + 0.5 - cos * center_x - sin * center_y)
  first_y = _fixed(center_y + 0.5 + sin * center_x - cos * center_y)
  columns = (first_x + _fixed(cos) * j + _fixed(sin) * i) >> 16
  rows = (first_y - _fixed(sin) * j + _fixed(cos) * i) >> 16
  return _pixels(images, rows, columns)


def _fixed(x: jax.Array) -> jax.Array:
  return jnp.floor(x * 65536 + 0.5).astype(jnp.int32)


def _pixels(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """images[b, rows, columns], zero where these are outside; rows and columns broadcast to [b h w]."""
  batch, height, width, channels = images.shape
  inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
  places = jnp.clip(rows, 0, height - 1) * width + jnp.clip(columns, 0, width - 1)
  flat = images.reshape(batch, height * width, channels)
  places = places.reshape(batch, height * width, 1)
  out = jnp.take_along_axis(flat, places, axis=1, mode="promise_in_bounds").reshape(images.shape)
  return jnp.where(inside[..., None], out, 0)
