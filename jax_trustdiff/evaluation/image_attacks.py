"""What may happen to an image between two people, done by Pillow and libjpeg to bytes: distortions for measurements.

The grid of An et al. 2024, "WAVES: Benchmarking the Robustness of Image Watermarks" (arXiv:2401.08573, table 1), whose strengths
are here in units of their own; `watermark.distortions` has the differentiable ones that codecs are trained through.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jax_trustdiff.types import InputError

ByteImage = UInt8[np.ndarray, "h w c"]
ByteImages = UInt8[np.ndarray, "n h w c"]


def apply(kind: str, strength: float, images: np.ndarray, seed: int = 0) -> ByteImages:
  """The images, bytes [n h w c], after the attack `kind` of KINDS; what is random in it depends on the seed and the image's position.

  InputError for a kind that is unknown, a strength outside its bounds or too small for images of this size, or images of other than 1 or 3
  channels.
  """
  check(kind, strength, images.shape[1:])
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
    raise InputError(
      f"attacks on images take bytes [n h w c] of 1 or 3 channels, got {images.dtype} {images.shape}"
    )
  attack = KINDS[kind].attack
  rows = [attack(image, strength, np.random.default_rng([seed, i])) for i, image in enumerate(images)]
  return np.stack(rows) if rows else images.copy()


def check(kind: str, strength: float, image_shape: tuple[int, ...] = ()) -> None:
  """InputError unless there is such an attack, it can be as strong, and it changes images of this shape where it is given."""
  if kind not in KINDS:
    raise InputError(f"unknown attack on images {kind!r}; known: {', '.join(KINDS)}")
  low, high = KINDS[kind].bounds
  if not low <= strength <= high:
    raise InputError(f"strengths of the attack {kind!r} lie within {low:g} to {high:g}, got {strength:g}")
  if kind in _SIDES and strength not in (0, 1) and len(image_shape) == 3:
    sides = image_shape[:2]
    if _SIDES[kind](sides, strength) in (sides, (0, 0)):
      raise InputError(
        f"the attack {kind!r} of {strength:g} changes nothing of images of {sides[0]}x{sides[1]}"
      )


def psnr(images: ByteImages, changed: ByteImages) -> Float[np.ndarray, "n"]:
  """Decibels of each changed image to what it was: -10 log10 of the mean square difference of images in [0, 1]; 100 at most."""
  difference = (changed.astype(np.float32) - images) / 255
  return -10 * np.log10(np.maximum(np.square(difference).mean((1, 2, 3)), 1e-10))


def _cropped_sides(sides: tuple[int, ...], share: float) -> tuple[int, ...]:
  return tuple(max(1, round(side * (1 - share))) for side in sides)


def _erased_sides(sides: tuple[int, ...], area: float) -> tuple[int, ...]:
  return tuple(round(side * math.sqrt(area)) for side in sides)


def _resized_sides(sides: tuple[int, ...], factor: float) -> tuple[int, ...]:
  return tuple(max(1, round(side * factor)) for side in sides)


# what sides a strength comes to in whole pixels: those of the image, or none, where it is too small
_SIDES = {"crop": _cropped_sides, "erase": _erased_sides, "resize": _resized_sides}


def _to_pil(image: ByteImage):
  from PIL import Image

  return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _from_pil(picture, channels: int) -> ByteImage:
  return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)


def jpeg(image: ByteImage, quality: float, rng=None) -> ByteImage:
  """Read back from a JPEG file of this quality, with 4:2:0 chroma."""
  from PIL import Image

  file = io.BytesIO()
  _to_pil(image).save(file, "JPEG", quality=round(quality), subsampling="4:2:0")
  file.seek(0)
  return _from_pil(Image.open(file), image.shape[2])


def noise(image: ByteImage, std: float, rng: np.random.Generator) -> ByteImage:
  """Normal noise of this standard deviation, of images in [0, 1], then clipped and rounded."""
  noisy = image / 255 + std * rng.standard_normal(image.shape)
  return np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def crop(image: ByteImage, share: float, rng: np.random.Generator) -> ByteImage:
  """A part at random, each side shorter by this share of it, enlarged bilinearly to the old size."""
  height, width, channels = image.shape
  box_h, box_w = _cropped_sides((height, width), share)
  top, left = rng.integers(height - box_h + 1), rng.integers(width - box_w + 1)
  part = _to_pil(image).crop((left, top, left + box_w, top + box_h))
  return _from_pil(part.resize((width, height), _bilinear()), channels)


def resize(image: ByteImage, factor: float, rng=None) -> ByteImage:
  """At this factor of its size, and back, bilinearly."""
  height, width, channels = image.shape
  small = _to_pil(image).resize(_resized_sides((width, height), factor), _bilinear())
  return _from_pil(small.resize((width, height), _bilinear()), channels)


def rotate(image: ByteImage, degrees: float, rng=None) -> ByteImage:
  """Turned counterclockwise about its middle, bilinearly, black where nothing was."""
  return _from_pil(_to_pil(image).rotate(degrees, _bilinear()), image.shape[2])


def blur(image: ByteImage, radius: float, rng=None) -> ByteImage:
  """Pillow's Gaussian blur of this radius, its standard deviation in pixels."""
  from PIL import ImageFilter

  return _from_pil(_to_pil(image).filter(ImageFilter.GaussianBlur(radius)), image.shape[2])


def brightness(image: ByteImage, factor: float, rng=None) -> ByteImage:
  from PIL import ImageEnhance

  return _from_pil(ImageEnhance.Brightness(_to_pil(image)).enhance(factor), image.shape[2])


def contrast(image: ByteImage, factor: float, rng=None) -> ByteImage:
  from PIL import ImageEnhance

  return _from_pil(ImageEnhance.Contrast(_to_pil(image)).enhance(factor), image.shape[2])


def erase(image: ByteImage, area: float, rng: np.random.Generator) -> ByteImage:
  """A black rectangle of the image's proportions at random, this part of its area."""
  height, width, _ = image.shape
  box_h, box_w = _erased_sides((height, width), area)
  top, left = rng.integers(height - box_h + 1), rng.integers(width - box_w + 1)
  erased = image.copy()
  erased[top : top + box_h, left : left + box_w] = 0
  return erased


def flip(image: ByteImage, strength: float = 1, rng=None) -> ByteImage:
  """Mirrored left to right."""
  return image[:, ::-1]


def _bilinear():
  from PIL import Image

  return Image.Resampling.BILINEAR


class Kind(NamedTuple):
  """An attack (image, strength, rng) -> image, and what strengths it has."""

  attack: Callable[..., ByteImage]
  unit: str
  bounds: tuple[float, float]


KINDS = {
  "jpeg": Kind(jpeg, "quality", (1, 100)),
  "noise": Kind(noise, "std", (0, 1)),
  "crop": Kind(crop, "share of each side cut off", (0, 0.9)),
  "resize": Kind(resize, "factor", (0.05, 1)),
  "rotate": Kind(rotate, "degrees", (-180, 180)),
  "blur": Kind(blur, "radius", (0, 50)),
  "brightness": Kind(brightness, "factor", (0, 4)),
  "contrast": Kind(contrast, "factor", (0, 4)),
  "erase": Kind(erase, "part of the area", (0, 0.9)),
  "flip": Kind(flip, "always 1", (1, 1)),
}
