"""Augmentations on the device: pure functions (uint8 [b h w c], key) -> uint8 images of the same shape.

    augment = AUGMENTATIONS['pad_crop_flip'](pad=4)
    images = augment(images, key)     # inside jit; one key for the batch, every image has its own draws

Every one is a few gathers of pixels at drawn places, so it costs the same inside and outside of a loop. The
policies beyond cropping and mirroring are in `policies`, here they are put together with these as Wang et al. 2023
(arXiv:2302.04638, section 4.4) compare them; `policies.cutmix`, which mixes labels as well, is not one of them.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Key

from jax_trustdiff.data import policies
from jax_trustdiff.data.image_ops import crop_flip, rotate
from jax_trustdiff.data.policies import Augment, chain
from jax_trustdiff.types import Bytes


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


def cutout(length: int = 18, pad: int = 4, flip: bool = True) -> Augment:
  """`pad_crop_flip`, then a zero square of side `length` (`policies.cutout`)."""
  return chain(pad_crop_flip(pad, flip), policies.cutout(length))


def auto_augment(length: int = 18, pad: int = 4, flip: bool = True) -> Augment:
  """`pad_crop_flip`, the policy for CIFAR-10 (`policies.auto_augment`), then a zero square of side `length`."""
  return chain(pad_crop_flip(pad, flip), policies.auto_augment(), policies.cutout(length))


def rand_augment(
  num_ops: int = 2, magnitude: float = 14.0, translate: float = 100.0, pad: int = 4, flip: bool = True
) -> Augment:
  """Random operations of one magnitude (`policies.rand_augment`), then `pad_crop_flip`."""
  return chain(policies.rand_augment(num_ops, magnitude, translate), pad_crop_flip(pad, flip))


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {
  "none": none,
  "flip": flip,
  "pad_crop_flip": pad_crop_flip,
  "pad_crop_flip_rotate": pad_crop_flip_rotate,
  "cutout": cutout,
  "auto_augment": auto_augment,
  "rand_augment": rand_augment,
  "idbh": policies.idbh,
}
