"""Augmentation policies: pure functions (uint8 [b h w c], key) -> uint8 images of the same shape, and CutMix.

What they draw is that of the papers named; the pixels are those of Pillow (`image_ops`). One key serves the batch, and
every image has its own draws, but for CutMix, which draws one box for a batch.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from jax_trustdiff.data import image_ops
from jax_trustdiff.types import Bytes, InputError

Augment = Callable[[jax.Array, jax.Array], jax.Array]

_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")  # mirrored with probability 1/2


def chain(*augments: Augment) -> Augment:
  """One after the other, each with its own key."""

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    for one, its_key in zip(augments, jax.random.split(key, len(augments)), strict=True):
      images = one(images, its_key)
    return images

  return augment


# ---- boxes ----


def cutout(length: int = 18) -> Augment:
  """A zero square of side `length` whose centre is uniform over the pixels, clipped at the borders.

  DeVries & Taylor 2017 (arXiv:1708.04552). It covers rows r - length // 2 to r - length // 2 + length - 1 of a centre
  in row r; the authors' code makes an odd length one shorter. InputError where the square would hide every image whole.
  """
  if length < 1:
    raise InputError(f"cutout takes a length of at least 1 pixel, found {length}")

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    sizes = images.shape[1:3]
    if length - length // 2 >= max(sizes):
      raise InputError(f"a cutout of length {length} hides all of an image of {sizes[0]} x {sizes[1]} pixels")
    start = jax.random.randint(key, (len(images), 2), 0, jnp.array(sizes)) - length // 2
    return image_ops.fill_box(images, start, start + length)

  return augment


def random_erasing(
  probability: float = 0.5, area: tuple[float, float] = (0.02, 0.33), ratio: tuple[float, float] = (0.3, 3.3)
) -> Augment:
  """With `probability` a zero rectangle inside the image, at a uniform place.

  Zhong et al. 2020 (arXiv:1708.04896), algorithm 1, with the distribution of torchvision's RandomErasing: the share of
  the area is uniform in `area`, the ratio of height to width log-uniform in `ratio`, sides are rounded, and of ten
  draws the first counts that is smaller than the image in both directions; without one the image stays.
  """

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    batch, height, width = images.shape[:3]
    coin, area_key, ratio_key, row_key, column_key = jax.random.split(key, 5)
    areas = jax.random.uniform(area_key, (batch, 10), minval=area[0], maxval=area[1]) * height * width
    log_ratios = (math.log(ratio[0]), math.log(ratio[1]))
    ratios = jnp.exp(jax.random.uniform(ratio_key, (batch, 10), minval=log_ratios[0], maxval=log_ratios[1]))
    sides = jnp.stack([jnp.sqrt(areas * ratios), jnp.sqrt(areas / ratios)], -1).round().astype(jnp.int32)
    fits = (sides < jnp.array([height, width])).all(-1)
    sides = jnp.take_along_axis(sides, fits.argmax(1)[:, None, None], axis=1)[:, 0]
    erased = fits.any(1) & jax.random.bernoulli(coin, probability, (batch,))
    rows = jax.random.randint(row_key, (batch,), 0, jnp.maximum(height - sides[:, 0], 0) + 1)
    columns = jax.random.randint(column_key, (batch,), 0, jnp.maximum(width - sides[:, 1], 0) + 1)
    start = jnp.stack([rows, columns], -1)
    return image_ops.fill_box(images, start, jnp.where(erased[:, None], start + sides, 0))

  return augment


# ---- RandAugment ----

# Name -> value at magnitude 0 and at 30.
_RANDAUGMENT: dict[str, tuple[float, float]] = {
  "autocontrast": (0, 0),
  "equalize": (0, 0),
  "invert": (0, 0),
  "rotate": (0, 30),
  "posterize": (0, 4),
  "solarize": (0, 256),
  "solarize_add": (0, 110),
  "color": (0.1, 1.9),
  "contrast": (0.1, 1.9),
  "brightness": (0.1, 1.9),
  "sharpness": (0.1, 1.9),
  "shear_x": (0, 0.3),
  "shear_y": (0, 0.3),
  "cutout_abs": (0, 40),
  "translate_x": (0, 100),
  "translate_y": (0, 100),
}


def rand_augment(num_ops: int = 2, magnitude: float = 14.0, translate: float = 100.0) -> Augment:
  """`num_ops` operations one after the other, each one of sixteen with replacement, all of one magnitude.

  Cubuk et al. 2020 (arXiv:1909.13719). The table is that of the usual PyTorch implementation: value = magnitude / 30
  (highest - lowest) + lowest, whole numbers for posterize, of which one bit is the least, and solarize_add; the sign of
  rotate, shear and translate is random. Its peculiarities: a higher magnitude posterizes and solarizes less; the four
  enhancements are the identity at 15 (other implementations draw 1 +- magnitude); and the paper has neither invert,
  solarize_add nor cutout_abs, but the identity.

  magnitude: 0 to 30. translate: pixels that magnitude 30 translates by. With 100, as in that implementation, magnitude 14
  moves an image of 32 x 32 out of sight: 23 % of the images are black after two operations. With 30 it moves by 14.
  """
  if num_ops < 1:
    raise InputError(f"rand_augment takes at least 1 operation, found num_ops={num_ops}")
  if not 0 <= magnitude <= 30:
    raise InputError(f"rand_augment takes a magnitude from 0 to 30, found {magnitude}")
  ranges = _RANDAUGMENT | {"translate_x": (0, translate), "translate_y": (0, translate)}
  values = {name: magnitude / 30 * (high - low) + low for name, (low, high) in ranges.items()}
  values["posterize"] = max(1, int(values["posterize"]))
  values["solarize_add"] = int(values["solarize_add"])
  operation = _random_operation(values)

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    keys = jax.random.split(key, num_ops)
    return jax.lax.fori_loop(0, num_ops, lambda i, x: operation(x, keys[i]), images)

  return augment


def _random_operation(values: dict[str, float]) -> Augment:
  """One of `values`, each as likely."""
  side = values["cutout_abs"]
  names = tuple(name for name in values if name != "cutout_abs")  # which = len(names) is cutout_abs
  table = np.array([values[name] for name in names] + [0.0], np.float32)
  signed = np.array([name in _SIGNED for name in names] + [False])

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    batch = len(images)
    which_key, sign_key, center_key = jax.random.split(key, 3)
    which = jax.random.randint(which_key, (batch,), 0, len(table))
    negative = jax.random.bernoulli(sign_key, 0.5, (batch,)) & jnp.asarray(signed)[which]
    drawn = jnp.asarray(table)[which]
    images = image_ops.apply(images, names, which, jnp.where(negative, -drawn, drawn))
    centers = jax.random.uniform(center_key, (batch, 2)) * jnp.array(images.shape[1:3])
    return image_ops.cutout_abs(images, centers, jnp.where(which == len(names), side, -1.0))

  return augment


# ---- AutoAugment ----

# Two operations for each sub-policy: name, probability, magnitude from 0 to 9 (None: not used).
AUTOAUGMENT_CIFAR10 = (
  (("invert", 0.1, None), ("contrast", 0.2, 6)),
  (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
  (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
  (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.5, None), ("equalize", 0.9, None)),
  (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
  (("color", 0.4, 3), ("brightness", 0.6, 7)),
  (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
  (("equalize", 0.6, None), ("equalize", 0.5, None)),
  (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
  (("color", 0.7, 7), ("translate_x", 0.5, 8)),
  (("equalize", 0.3, None), ("autocontrast", 0.4, None)),
  (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
  (("brightness", 0.9, 6), ("color", 0.2, 8)),
  (("solarize", 0.5, 2), ("invert", 0.0, None)),
  (("equalize", 0.2, None), ("autocontrast", 0.6, None)),
  (("equalize", 0.2, None), ("equalize", 0.6, None)),
  (("color", 0.9, 9), ("equalize", 0.6, None)),
  (("autocontrast", 0.8, None), ("solarize", 0.2, 8)),
  (("brightness", 0.1, 3), ("color", 0.7, 0)),
  (("solarize", 0.4, 5), ("autocontrast", 0.9, None)),
  (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
  (("autocontrast", 0.9, None), ("solarize", 0.8, 3)),
  (("equalize", 0.8, None), ("invert", 0.1, None)),
  (("translate_y", 0.7, 9), ("autocontrast", 0.9, None)),
)


def auto_augment() -> Augment:
  """The policy for CIFAR-10 of AutoAugment: one of 25 sub-policies, its two operations with their probabilities.

  Cubuk et al. 2019 (arXiv:1805.09501), policies and ranges of the appendix: magnitude m of 0 to 9 is a rotation by
  30 m / 9 degrees, a shear by 0.3 m / 9, a translation by 150 / 331 m / 9 of the side, round(8 - 4 m / 9) bits,
  solarizing from 256 (1 - m / 9), a factor of 1 +- 0.9 m / 9. Signs are random. Outside is 128, and shears are bicubic,
  other maps take the nearest pixel, as in the usual PyTorch implementation, which rotates counter-clockwise alone;
  torchvision's takes the nearest pixel in shears as well.
  """
  operations = [
    operation for pair in AUTOAUGMENT_CIFAR10 for operation in pair
  ]  # 2 p and 2 p + 1 are of policy p
  names = tuple(dict.fromkeys(name for name, _, _ in operations))
  which_of = np.array([names.index(name) for name, _, _ in operations])
  probabilities = np.array([probability for _, probability, _ in operations], np.float32)

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    policy_key, key = jax.random.split(key)
    policies = jax.random.randint(policy_key, (len(images),), 0, len(AUTOAUGMENT_CIFAR10))
    positive, negative = (
      jnp.array([_policy_value(name, m, sign, images.shape) for name, _, m in operations], jnp.float32)
      for sign in (1, -1)
    )

    def step(i, images):
      coin_key, sign_key = jax.random.split(jax.random.fold_in(key, i))
      operation = 2 * policies + i
      coins = jax.random.bernoulli(coin_key, jnp.asarray(probabilities)[operation])
      signs = jax.random.bernoulli(sign_key, 0.5, (len(images),))
      values = jnp.where(signs, negative[operation], positive[operation])
      which = jnp.where(coins, jnp.asarray(which_of)[operation], -1)
      return image_ops.apply(images, names, which, values, fill=128, bicubic_shear=True)

    return jax.lax.fori_loop(0, 2, step, images)

  return augment


_ENHANCEMENTS = ("color", "contrast", "brightness", "sharpness")


def _policy_value(name: str, magnitude: int | None, sign: int, shape: tuple[int, ...]) -> float:
  share = (magnitude or 0) / 9
  if name in _ENHANCEMENTS:
    return 1 + sign * 0.9 * share
  highest = {
    "rotate": 30,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331 * shape[2],
    "translate_y": 150 / 331 * shape[1],
  }
  if name in highest:
    return sign * highest[name] * share
  return {"posterize": round(8 - 4 * share), "solarize": 256 * (1 - share)}.get(name, 0.0)


# ---- IDBH ----


@dataclasses.dataclass(frozen=True)
class Idbh:
  """What one kind of IDBH is made of."""

  max_shift: int  # of `crop_shift`
  mode: str  # of `color_shape`
  erasing: float  # probability of `random_erasing`
  area: tuple[float, float]  # of `random_erasing`


IDBH_KINDS = {
  "cifar10-weak": Idbh(10, "color", 0.5, (0.02, 0.33)),
  "cifar10-strong": Idbh(10, "color", 1.0, (0.02, 0.33)),
  "svhn": Idbh(8, "shape", 1.0, (0.02, 0.5)),
}


def idbh(kind: str = "cifar10-weak", flip: bool = True) -> Augment:
  """Improved diversity and balanced hardness: mirror and `crop_shift`, `color_shape`, `random_erasing`.

  Li & Spratling 2023 (arXiv:2301.09879). kind: of IDBH_KINDS; 'cifar10-strong' erases every image where 'cifar10-weak'
  erases one of two. flip=False leaves out the mirror, which digits do not survive. InputError for an unknown kind.
  """
  if kind not in IDBH_KINDS:
    raise InputError(f"no IDBH {kind!r}; known: {', '.join(IDBH_KINDS)}")
  parts = IDBH_KINDS[kind]
  return chain(
    crop_shift(parts.max_shift, flip), color_shape(parts.mode), random_erasing(parts.erasing, parts.area)
  )


def crop_shift(max_shift: int = 10, flip: bool = False) -> Augment:
  """A window of the image at another place of it, zeros around; with `flip` mirrored with probability 1/2 before.

  CropShift of Li & Spratling 2023 (arXiv:2301.09879): s of 0 to max_shift, s_x of 0 to s, s_y = s - s_x; the window
  leaves out s_y rows and s_x columns, and its old and its new place are any at which it is inside. All are uniform.
  InputError for images that it could cut away.
  """

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    batch, height, width = images.shape[:3]
    if max_shift >= min(height, width):
      raise InputError(f"CropShift cuts off up to {max_shift} pixels, and images have {height} x {width}")
    flip_key, total_key, columns_key, place_key, offset_key = jax.random.split(key, 5)
    total = jax.random.randint(total_key, (batch,), 0, max_shift + 1)
    columns = jax.random.randint(columns_key, (batch,), 0, total + 1)
    cuts = jnp.stack([total - columns, columns], -1)
    places = jax.random.randint(place_key, (batch, 2), 0, cuts + 1)
    offsets = jax.random.randint(offset_key, (batch, 2), 0, cuts + 1)
    mirrored = jax.random.bernoulli(flip_key, 0.5, (batch,)) & flip
    return image_ops.flip_crop_shift(images, mirrored, cuts, places, offsets)

  return augment


# Operation: lowest and highest size of its value (by mode), probability in mode "color" and in mode "shape".
_COLOR_SHAPE = {
  "color": (0.1, 1.9, 1 / 8, 0.08),
  "brightness": (0.5, 1.9, 1 / 8, 0.08),
  "contrast": (0.5, 1.9, 1 / 8, 0.04),
  "sharpness": (0.1, 1.9, 1 / 8, 0.08),
  "autocontrast": (0.0, 0.0, 1 / 8, 0.04),
  "equalize": (0.0, 0.0, 1 / 8, 0.08),
  "rotate": (1, {"color": 10, "shape": 30}, 1 / 8, 0.3),
  "shear_x_centered": (0.05, {"color": 0.15, "shape": 0.35}, 1 / 16, 0.15),
  "shear_y_centered": (0.05, {"color": 0.15, "shape": 0.35}, 1 / 16, 0.15),
}


def color_shape(mode: str = "color") -> Augment:
  """One of eight operations, of color or of shape, on each image: ColorShape of Li & Spratling 2023 (arXiv:2301.09879).

  In mode 'color' each with probability 1/8: saturation or sharpness by a factor of 0.1 to 1.9, brightness or contrast by
  0.5 to 1.9, autocontrast, equalize, a shear of the rows or the columns about the centre by 0.05 to 0.15 radians, a
  rotation by a whole number of 1 to 10 degrees; signs are random, maps take the nearest pixel and zero outside. In mode
  'shape' shears reach 0.35 and rotations 30, with 0.3 each; contrast and autocontrast have 0.04, the others 0.08.
  """
  if mode not in ("color", "shape"):
    raise InputError(f"no mode {mode!r} of color_shape; known: color, shape")
  names = tuple(_COLOR_SHAPE)
  probabilities = np.array([row[2 if mode == "color" else 3] for row in _COLOR_SHAPE.values()], np.float32)
  lows = np.array([row[0] for row in _COLOR_SHAPE.values()], np.float32)
  highs = [row[1][mode] if isinstance(row[1], dict) else row[1] for row in _COLOR_SHAPE.values()]
  highs = np.array(highs, np.float32)
  rotation = names.index("rotate")
  sheared, signed = (
    np.array([name.startswith(these) for name in names]) for these in ("shear", ("shear", "rotate"))
  )

  def augment(images: Bytes, key: Key[Array, ""]) -> Bytes:
    batch = len(images)
    which_key, value_key, degree_key, sign_key = jax.random.split(key, 4)
    which = jax.random.choice(which_key, len(names), (batch,), p=jnp.asarray(probabilities))
    low, high = jnp.asarray(lows)[which], jnp.asarray(highs)[which]
    values = low + (high - low) * jax.random.uniform(value_key, (batch,))
    values = jnp.where(jnp.asarray(sheared)[which], jnp.tan(values), values)
    degrees = jax.random.randint(degree_key, (batch,), int(lows[rotation]), int(highs[rotation]) + 1)
    values = jnp.where(which == rotation, degrees, values)
    negative = jax.random.bernoulli(sign_key, 0.5, (batch,)) & jnp.asarray(signed)[which]
    return image_ops.apply(images, names, which, jnp.where(negative, -values, values))

  return augment


# ---- CutMix ----


def cutmix(
  images: Bytes, labels: Float[Array, "b k"], key: Key[Array, ""], repeats: int = 4
) -> tuple[UInt8[Array, "n h w c"], Float[Array, "n k"]]:
  """`repeats` times the batch, each with a box of other images of it pasted in: images [r b h w c], labels [r b k].

  Yun et al. 2019 (arXiv:1905.04899), algorithm 1: lambda ~ U(0, 1), a box of sides int(h sqrt(1 - lambda)) and
  int(w sqrt(1 - lambda)) about a uniform pixel, clipped at the borders, one box and one permutation of the batch for
  each repeat. The box reaches side // 2 to both sides of its centre, so an odd side loses a pixel. The labels are mixed
  by the shares of the pixels: (1 - box / (h w)) labels + box / (h w) labels[permutation].

  labels: one-hot or soft. In the order of repeats: rows 0 to b - 1 are the first. InputError for repeats < 1.
  """
  if repeats < 1:
    raise InputError(f"cutmix takes at least 1 repeat, found {repeats}")
  mixed = [_cutmix_once(images, labels.astype(jnp.float32), k) for k in jax.random.split(key, repeats)]
  return jnp.concatenate([x for x, _ in mixed]), jnp.concatenate([y for _, y in mixed])


def _cutmix_once(images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  side_key, center_key, partner_key = jax.random.split(key, 3)
  sizes = jnp.array(images.shape[1:3])
  share = 1 - jax.random.uniform(side_key)
  half = (sizes * jnp.sqrt(share)).astype(jnp.int32) // 2
  center = jax.random.randint(center_key, (2,), 0, sizes)
  start, stop = jnp.clip(center - half, 0, sizes), jnp.clip(center + half, 0, sizes)
  rows, columns = (
    (jnp.arange(size) >= start[axis]) & (jnp.arange(size) < stop[axis])
    for axis, size in enumerate(images.shape[1:3])
  )
  partners = jax.random.permutation(partner_key, len(images))
  inside = (rows[:, None] & columns)[..., None]
  pasted = jnp.prod((stop - start).astype(jnp.float32)) / math.prod(images.shape[1:3])
  mixed = (1 - pasted) * labels + pasted * labels[partners]
  return jnp.where(inside, images[partners], images), mixed
