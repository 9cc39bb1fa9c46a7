"""Augmentations on the device, and AutoAugment beside Pillow, which takes one image after the other on one core."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jax_trustdiff import config as config_lib
from jax_trustdiff.data import policies
from jax_trustdiff.data.augment import AUGMENTATIONS
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

CUTMIX = "cutmix"  # beside AUGMENTATIONS: it mixes labels as well
POLICY = "auto_augment"  # the one that Pillow does too
_GREY = (128,) * 3


def augment(names: Sequence[str], image_size: int, batch_size: int, rounds: int, batches_per_round: int):
  """The benchmark: `<name>/images_per_second` of each augmentation of random RGB images, compiled, by its defaults.

  names: of AUGMENTATIONS, and 'cutmix', whose images are those that come out. Every batch is of the same images and a new key. 'auto_augment' has the peer Pillow, on one core.
  InputError for an unknown name.
  """
  if unknown := [name for name in names if name not in (*AUGMENTATIONS, CUTMIX)]:
    raise InputError(f"no augmentation {unknown[0]!r}; known: {', '.join((*AUGMENTATIONS, CUTMIX))}")

  def run(workdir: Workdir) -> dict[str, float]:
    images = np.random.RandomState(0).randint(0, 256, (batch_size, image_size, image_size, 3), dtype=np.uint8)
    programs = {
      name: tools.timed(_step(name, jnp.asarray(images)), None, jax.random.key(0)) for name in names
    }
    if POLICY in names:
      programs["pillow"] = _pillow_program(images)
    seconds = tools.in_turns(programs, rounds, batches_per_round)
    figures = {f"{name}/images_per_second": batch_size / float(np.median(seconds[name])) for name in names}
    if CUTMIX in names:
      figures[f"{CUTMIX}/images_per_second"] *= _repeats(images)
    if POLICY in names:
      figures[f"{POLICY}/pillow_images_per_second"] = batch_size / float(np.median(seconds["pillow"]))
      figures |= tools.ratio_figures(POLICY, seconds[POLICY], seconds["pillow"])
    return figures

  return run


def _step(name: str, images: jax.Array) -> Callable:
  """(what the last batch gave, key) -> (augmented images, of CutMix with their labels, the next key)."""

  @jax.jit
  def augmented(images, key):
    key, its_key = jax.random.split(key)
    if name == CUTMIX:
      return policies.cutmix(images, jnp.eye(10)[jnp.arange(len(images)) % 10], its_key), key
    return config_lib.build(AUGMENTATIONS, {"name": name})(images, its_key), key

  return lambda _, key: augmented(images, key)


def _repeats(images: np.ndarray) -> int:
  """How many images CutMix makes of one."""
  labels = jax.ShapeDtypeStruct((len(images), 10), jnp.float32)
  mixed, _ = jax.eval_shape(policies.cutmix, images, labels, jax.random.key(0))
  return len(mixed) // len(images)


# ---- Pillow ----

_ENHANCE = {
  "color": ImageEnhance.Color,
  "contrast": ImageEnhance.Contrast,
  "brightness": ImageEnhance.Brightness,
  "sharpness": ImageEnhance.Sharpness,
}


def _pillow_program(images: np.ndarray) -> Callable[[int], float]:
  """n -> the seconds of n batches through `pillow_auto_augment`."""
  rng = np.random.default_rng(0)

  def program(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
      for image in images:
        pillow_auto_augment(image, rng)
    return time.perf_counter() - start

  return program


def pillow_auto_augment(image: np.ndarray, rng: np.random.Generator, length: int = 18, pad: int = 4):
  """AUGMENTATIONS['auto_augment'] of one image uint8 [h w 3]: crop and mirror, two operations, a square cut out."""
  height, width = image.shape[:2]
  top, left = rng.integers(0, 2 * pad + 1, 2)
  image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[top : top + height, left : left + width]
  if rng.random() < 0.5:
    image = image[:, ::-1]
  picture = Image.fromarray(np.ascontiguousarray(image))
  for name, probability, magnitude in policies.AUTOAUGMENT_CIFAR10[rng.integers(25)]:
    if rng.random() < probability:
      picture = _operation(picture, name, (magnitude or 0) / 9, int(rng.choice((-1, 1))))
  image = np.array(picture)
  top, left = rng.integers(0, (height, width)) - length // 2
  image[max(top, 0) : top + length, max(left, 0) : left + length] = 0
  return image


def _operation(picture: Image.Image, name: str, share: float, sign: int) -> Image.Image:
  """An operation of AutoAugment at `share` of its highest magnitude."""
  if name in _ENHANCE:
    return _ENHANCE[name](picture).enhance(1 + sign * 0.9 * share)
  if name == "rotate":
    return picture.rotate(sign * 30 * share, fillcolor=_GREY)
  if name == "posterize":
    return ImageOps.posterize(picture, round(8 - 4 * share))
  if name == "solarize":
    return ImageOps.solarize(picture, 256 * (1 - share))
  width, height = picture.size
  matrices = {
    "shear_y": (1, 0, 0, sign * 0.3 * share, 1, 0),
    "translate_x": (1, 0, sign * 150 / 331 * width * share, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, sign * 150 / 331 * height * share),
  }
  if name in matrices:
    resample = Image.Resampling.BICUBIC if name == "shear_y" else Image.Resampling.NEAREST
    return picture.transform(picture.size, Image.Transform.AFFINE, matrices[name], resample, fillcolor=_GREY)
  return {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
  }[name](picture)
