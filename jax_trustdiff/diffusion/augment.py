"""Non-leaky augmentation: random transformations of clean images, and what was done to each as labels for the network.

The pipe of Karras et al. 2022 (arXiv:2206.00364, appendix F.2, table 6), and the transformations of Karras et al. 2020
(arXiv:2006.06676, appendix B) that it leaves off. A network that is told the labels learns the images as they are:
zeros, what a sampler gives it, say that nothing was done.

    pipe = edm_pipe(probability=0.12)
    images, augment_labels = pipe(images, keys)     # inside jit; one key for each image, or one for the batch
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.types import InputError, KeyOrKeys, Signed

Draws = dict[str, jax.Array]  # '<transformation>.<kind>': [b ...]
Values = dict[str, jax.Array]  # '<transformation>': [b] or [b 2]; zero where it is not applied

# sym6 of Daubechies 1992, "Ten Lectures on Wavelets": orthonormal to its own shifts by 2, so that a step up in resolution
# and one down again change nothing.
SYM6 = np.array(
  [
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
  ]
)
_CENTER = 5  # the tap that lies on the pixel

_bit = functools.partial(jax.random.randint, shape=(), minval=0, maxval=2)
_quarter = functools.partial(jax.random.randint, shape=(), minval=0, maxval=4)
_normal = functools.partial(jax.random.normal, shape=())
_u01 = functools.partial(jax.random.uniform, shape=())

# What each transformation draws, beside its coin, for one image; in the order of the labels.
_DRAWS: dict[str, dict[str, Callable]] = {
  "xflip": {"bit": _bit},
  "yflip": {"bit": _bit},
  "rotate_int": {"quarter": _quarter},
  "translate_int": {"u01_xy": functools.partial(jax.random.uniform, shape=(2,))},
  "scale": {"normal": _normal},
  "rotate_frac": {"u01": _u01},
  "aniso": {"normal": _normal, "u01_angle": _u01, "coin_rotate": _u01},
  "translate_frac": {"normal_xy": functools.partial(jax.random.normal, shape=(2,))},
  "brightness": {"normal": _normal},
  "contrast": {"normal": _normal},
  "lumaflip": {"bit": _bit},
  "hue": {"u01": _u01},
  "saturation": {"normal": _normal},
}
TRANSFORMS = tuple(_DRAWS)
_PAIRS = (
  "rotate_int",
  "translate_int",
  "rotate_frac",
  "aniso",
  "translate_frac",
  "hue",
)  # these have two labels
_FRACTIONAL = ("scale", "rotate_frac", "aniso", "translate_frac")
_COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


@dataclasses.dataclass(frozen=True)
class AugmentPipe:
  """(Signed images [b h w c], keys) -> (images, augment labels [b num_labels]); pure, one code path for every draw.

  A transformation is applied to an image with probability min(1, multiplier * probability), on its own coin;
  multiplier 0 leaves it and its labels out. With probability 0 the images come back as they are, with labels of zero. In the order in which they are applied and labelled (w, w_x, w_y standard normal):

      xflip, yflip       mirrored with probability 1/2                                 0 or 1
      rotate_int         a quarter turn 0..3 times; height must equal width            cos a - 1, sin a
      translate_int      round(translate_int_max * width * v_x) pixels to the right,   v_x, v_y uniform in [-1, 1)
                         and down, with mirrored edges
      scale              by 2^(scale_std w)                                            w
      rotate_frac        by a uniform angle of [-pi, pi) * rotate_frac_max             cos a - 1, sin a
      aniso              by 2^(aniso_std w) along an axis at angle r, by the inverse   w cos r, w sin r
                         across it; r = 0, or uniform with probability aniso_rotate_prob
      translate_frac     by translate_frac_std * (width w_x, height w_y) pixels        w_x, w_y
      brightness         adds brightness_std w                                         w
      contrast           times 2^(contrast_std w)                                      w
      lumaflip           mirrors the luma axis (1, 1, 1) with probability 1/2          0 or 1
      hue                rotates about the luma axis by [-pi, pi) * hue_max            cos a - 1, sin a
      saturation         distance from the luma axis times 2^(saturation_std w)        w

  The four from scale to translate_frac are one resampling: edges mirrored once (width - 1 pixels, zeros beyond), twice
  the resolution by the wavelet sym6, bilinear, and down again by sym6. Images of one channel take the colour
  transformations as gray RGB. Results may leave [-1, 1]. float32, or wider where the images are; the resampling needs
  about 40 times the memory of the images.
  """

  probability: float = 1.0
  xflip: float = 0.0
  yflip: float = 0.0
  rotate_int: float = 0.0
  translate_int: float = 0.0
  scale: float = 0.0
  rotate_frac: float = 0.0
  aniso: float = 0.0
  translate_frac: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  lumaflip: float = 0.0
  hue: float = 0.0
  saturation: float = 0.0

  translate_int_max: float = 0.125
  scale_std: float = 0.2
  rotate_frac_max: float = 1.0
  aniso_std: float = 0.2
  aniso_rotate_prob: float = 0.5
  translate_frac_std: float = 0.125
  brightness_std: float = 0.2
  contrast_std: float = 0.5
  hue_max: float = 1.0
  saturation_std: float = 1.0

  def __post_init__(self):
    if not 0 <= self.probability <= 1:
      raise InputError(f"probability of the augment pipe must lie in [0, 1], got {self.probability}")
    for name in TRANSFORMS:
      if not getattr(self, name) >= 0:
        raise InputError(f"{name} of the augment pipe multiplies a probability, got {getattr(self, name)}")

  @property
  def enabled(self) -> tuple[str, ...]:
    """The transformations that can be applied, in order."""
    return tuple(name for name in TRANSFORMS if getattr(self, name) > 0)

  @property
  def num_labels(self) -> int:
    """Augment labels of an image: the network's `num_augment_labels`."""
    return sum(2 if name in _PAIRS else 1 for name in self.enabled)

  def __call__(self, images: Signed, key: KeyOrKeys) -> tuple[Signed, Float[Array, "b a"]]:
    """Augmented images and their labels.

    key: one for each image, which makes the result for an image independent of its batch; one for the batch stands for
    its fold_in with 0, 1, ...
    """
    if not self.probability:
      images = _at_least_float32(images)
      return images, jnp.zeros((len(images), self.num_labels), images.dtype)
    if not key.ndim:
      key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images)))
    return self.apply_draws(images, self.draw(key))

  def draw(self, keys: Key[Array, "b"]) -> Draws:
    """The raw draws of images with these keys: {'scale.normal': [b], 'scale.coin': [b], ...}.

    'normal' is standard normal, 'u01' and 'coin' uniform in [0, 1), 'bit' 0 or 1, 'quarter' 0..3; '_xy' [b 2]. A
    transformation is applied where its coin is below multiplier * probability. Its draws are the same whichever others are
    enabled.
    """

    def one(key):
      draws = {}
      for name in self.enabled:
        own = jax.random.fold_in(key, TRANSFORMS.index(name))
        for i, (kind, sample) in enumerate({"coin": _u01, **_DRAWS[name]}.items()):
          draws[f"{name}.{kind}"] = sample(jax.random.fold_in(own, i))
      return draws

    return jax.vmap(one)(keys)

  def apply_draws(self, images: Signed, draws: Draws) -> tuple[Signed, Float[Array, "b a"]]:
    """The images under given draws, and their labels. InputError if a draw is missing."""
    images = _at_least_float32(images)
    values = self._values(draws, images.dtype)
    images = self._whole_pixels(images, values)
    if any(name in values for name in _FRACTIONAL):
      images = resample(images, self._inverse(values, images))
    if any(name in values for name in _COLOR):
      images = self._recolor(images, values)
    labels = [_labels(name, value) for name, value in values.items()]
    return images, jnp.concatenate([jnp.zeros((len(images), 0), images.dtype), *labels], axis=1)

  def _values(self, draws: Draws, dtype) -> Values:
    """The parameter of each enabled transformation, 0 where its coin says no; angles in radians, aniso (w, r)."""
    values = {}
    for name in self.enabled:
      kinds = [f"{name}.{kind}" for kind in ("coin", *_DRAWS[name])]
      missing = [kind for kind in kinds if kind not in draws]
      if missing:
        raise InputError(f"augment draws lack {', '.join(missing)}")
      coin, value, *rest = (jnp.asarray(draws[kind], dtype) for kind in kinds)
      if name == "translate_int":
        value = 2 * value - 1
      elif name in ("rotate_frac", "hue"):
        value = (2 * value - 1) * jnp.pi * getattr(self, f"{name}_max")
      elif name == "aniso":
        angle, coin_rotate = rest
        angle = (2 * angle - 1) * jnp.pi * (coin_rotate < self.aniso_rotate_prob)
        value = jnp.stack([value, angle], axis=1)
      applied = coin < getattr(self, name) * self.probability
      values[name] = jnp.where(applied[(...,) + (None,) * (value.ndim - 1)], value, 0)
    return values

  def _whole_pixels(self, images: Signed, values: Values) -> Signed:
    """What moves pixels and computes none."""
    if "xflip" in values:
      images = _where(values["xflip"] == 1, images[:, :, ::-1], images)
    if "yflip" in values:
      images = _where(values["yflip"] == 1, images[:, ::-1], images)
    if "rotate_int" in values:
      if images.shape[1] != images.shape[2]:
        raise InputError(f"augment rotate_int needs square images, got {images.shape[1]} x {images.shape[2]}")
      turns = values["rotate_int"]
      images = _where((turns == 1) | (turns == 3), jnp.rot90(images, axes=(1, 2)), images)
      images = _where(turns >= 2, images[:, ::-1, ::-1], images)
    if "translate_int" in values:
      move = values["translate_int"] * self.translate_int_max
      for axis, fraction in ((2, move[:, 0]), (1, move[:, 1])):
        images = _shift(images, jnp.round(fraction * images.shape[axis]).astype(jnp.int32), axis)
    return images

  def _inverse(self, values: Values, images: Signed) -> Float[Array, "b 2 3"]:
    """From centred pixel coordinates (x, y) of the result to those of the image: Karras et al. 2022, table 6."""
    batch, height, width, _ = images.shape
    zero = jnp.zeros(batch, images.dtype)
    linear = _diagonal(zero + 1, zero + 1)
    if "scale" in values:
      factor = jnp.exp2(-self.scale_std * values["scale"])
      linear = _diagonal(factor, factor)
    if "rotate_frac" in values:
      linear = _product(linear, _rotation(values["rotate_frac"]))
    if "aniso" in values:
      stretch, angle = jnp.exp2(self.aniso_std * values["aniso"][:, 0]), values["aniso"][:, 1]
      along = _product(_rotation(-angle), _diagonal(1 / stretch, stretch))
      linear = _product(linear, _product(along, _rotation(angle)))
    move = zero[:, None] + jnp.zeros(2, images.dtype)
    if "translate_frac" in values:
      size = jnp.array([width, height], images.dtype)
      move = -_product(linear, (values["translate_frac"] * self.translate_frac_std * size)[..., None])[..., 0]
    return jnp.concatenate([linear, move[..., None]], axis=2)

  def _recolor(self, images: Signed, values: Values) -> Signed:
    """matrix @ color + offset, composed of the colour transformations."""
    channels = images.shape[-1]
    if channels not in (1, 3):
      raise InputError(f"augment's colour transformations need 1 or 3 channels, got {channels}")
    eye, luma = jnp.eye(3, dtype=images.dtype), jnp.full((3, 3), 1 / 3, images.dtype)
    column = lambda name: values[name][:, None, None]  # noqa: E731
    matrix, offset = jnp.broadcast_to(eye, (len(images), 3, 3)), jnp.zeros((len(images), 3, 1), images.dtype)
    if "brightness" in values:
      offset = offset + self.brightness_std * column("brightness")
    steps = []
    if "contrast" in values:
      steps.append(eye * jnp.exp2(self.contrast_std * column("contrast")))
    if "lumaflip" in values:
      steps.append(eye - 2 * luma * column("lumaflip"))
    if "hue" in values:
      steps.append(_rotation_about_luma(column("hue")))
    if "saturation" in values:
      steps.append(luma + (eye - luma) * jnp.exp2(self.saturation_std * column("saturation")))
    for step in steps:
      matrix, offset = _product(step, matrix), _product(step, offset)
    if channels == 1:
      return images * matrix.sum(2).mean(1)[:, None, None, None] + offset.mean(1)[:, None, None]
    moved = jnp.einsum("bij,bhwj->bhwi", matrix, images, precision="highest")
    return moved + offset[:, None, None, :, 0]


def edm_pipe(probability: float = 0.12) -> AugmentPipe:
  """The pipe EDM trains with, 9 labels: Karras et al. 2022, table 6; 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2.

  x-flips come with probability 1/2 whatever the probability of the others, unless it is 0.
  """
  return AugmentPipe(probability, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def no_pipe() -> AugmentPipe:
  """The pipe without transformations: images as they are, no labels ([b 0])."""
  return AugmentPipe(0.0)


AUGMENT_PIPES = {"none": no_pipe, "edm": edm_pipe, "custom": AugmentPipe}


def resample(images: Signed, inverse: Float[Array, "b 2 3"]) -> Signed:
  """The images under affine maps without aliasing: Karras et al. 2020, appendix B; the identity returns the image.

  inverse: from coordinates (x, y, 1) of the result to (x, y) of the image, in pixels from its centre, x to the right,
  y down. The image is mirrored at its edges, once; zero beyond.
  """
  _, height, width, _ = images.shape
  up_y, down_y = _wavelet(height)
  up_x, down_x = _wavelet(width)
  separable = functools.partial(jnp.einsum, "nh,bhwc,mw->bnmc", precision="highest")
  fine = separable(up_y.astype(images.dtype), images, up_x.astype(images.dtype))
  moved = bilinear(fine, *_places(inverse, height, width))
  return separable(down_y.astype(images.dtype), moved, down_x.astype(images.dtype))


def _wavelet(size: int) -> tuple[np.ndarray, np.ndarray]:
  """(up [n size], down [size 2 size + 10]): to twice the resolution of the mirrored image, and back.

  Sample 2 k + j of the fine grid has tap j of pixel k. `up` pads with size - 1 mirrored pixels, and with a zero sample
  at either end.
  """
  padded = 3 * size - 2
  up, down = np.zeros((2 * padded + 12, size)), np.zeros((size, 2 * size + 10))
  for k in range(padded):
    up[2 * k + 1 : 2 * k + 13, _reflect(k - (size - 1), size)] += SYM6 * np.sqrt(2)
  for k in range(size):
    down[k, 2 * k : 2 * k + 12] = SYM6 / np.sqrt(2)
  return up, down


def _places(inverse: Array, height: int, width: int) -> tuple[Array, Array]:
  """(x, y) on the grid of `up`, for each sample that `down` takes: [b n m] each."""
  x, y = (
    (np.arange(2 * size + 10) - _CENTER) / 2 - (size - 1) / 2 for size in (width, height)
  )  # in pixels from the centre
  x, y = jnp.asarray(x, inverse.dtype), jnp.asarray(y, inverse.dtype)[:, None]
  to = lambda row: sum(inverse[:, row, i, None, None] * part for i, part in enumerate((x, y, 1)))  # noqa: E731
  return tuple(
    2 * to(row) + (3 * size - 3) + _CENTER + 1 for row, size in ((0, width), (1, height))
  )  # the middle of 3 size - 2 pixels, the taps before the centre, and the zero sample


def bilinear(images: Array, x: Array, y: Array) -> Array:
  """images [b h w c], the outermost samples of which are zero, at places (x, y) [b n m]; zero outside."""
  height, width, channels = images.shape[1:]
  x, y = jnp.clip(x, 0, width - 1), jnp.clip(y, 0, height - 1)
  column = jnp.clip(jnp.floor(x), 0, width - 2).astype(jnp.int32)
  row = jnp.clip(jnp.floor(y), 0, height - 2).astype(jnp.int32)
  right, below = (x - column)[..., None], (y - row)[..., None]
  flat = images.reshape(len(images), height * width, channels)

  def at(down, across):
    place = ((row + down) * width + column + across).reshape(len(images), -1, 1)
    return jnp.take_along_axis(flat, place, axis=1, mode="promise_in_bounds").reshape(*x.shape, channels)

  above = at(0, 0) * (1 - right) + at(0, 1) * right
  return above * (1 - below) + (at(1, 0) * (1 - right) + at(1, 1) * right) * below


def _shift(images: Array, pixels: Array, axis: int) -> Array:
  """Each image moved by its number of pixels towards larger indices, with mirrored edges."""
  size = images.shape[axis]
  source = _reflect(jnp.arange(size) - pixels[:, None], size)
  shape = [len(images), 1, 1, 1]
  shape[axis] = size
  return jnp.take_along_axis(images, source.reshape(shape), axis=axis, mode="promise_in_bounds")


def _reflect(index, size: int):
  """The pixel at any index of an image mirrored at its edges again and again, the edge not repeated."""
  last = max(size - 1, 1)
  return (last - abs(last - index % (2 * last))) % size


def _labels(name: str, value: Array) -> Array:
  """[b] or [b 2] as the labels [b 1 or 2] of the transformation."""
  if name in ("rotate_int", "rotate_frac", "hue"):
    angle = value * (jnp.pi / 2) if name == "rotate_int" else value
    return jnp.stack([jnp.cos(angle) - 1, jnp.sin(angle)], axis=1)
  if name == "aniso":
    strength, angle = value[:, 0], value[:, 1]
    return jnp.stack([strength * jnp.cos(angle), strength * jnp.sin(angle)], axis=1)
  return value if value.ndim == 2 else value[:, None]


def _at_least_float32(images: Array) -> Array:
  return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def _where(condition: Array, images: Array, others: Array) -> Array:
  return jnp.where(condition[:, None, None, None], images, others)


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision="highest")


def _diagonal(x: Array, y: Array) -> Array:
  zero = jnp.zeros_like(x)
  return jnp.stack([jnp.stack([x, zero], -1), jnp.stack([zero, y], -1)], -2)


def _rotation(angle: Array) -> Array:
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)


def _rotation_about_luma(angle: Array) -> Array:
  """Rodrigues' formula about (1, 1, 1) / sqrt(3), angle [b 1 1] -> [b 3 3]."""
  axis = np.full(3, 1 / np.sqrt(3))
  cross = jnp.asarray(
    np.cross(axis, np.eye(3)).T, angle.dtype
  )  # times a color: the cross product of axis and color
  luma, eye = jnp.asarray(np.outer(axis, axis), angle.dtype), jnp.eye(3, dtype=angle.dtype)
  return luma + jnp.cos(angle) * (eye - luma) + jnp.sin(angle) * cross
