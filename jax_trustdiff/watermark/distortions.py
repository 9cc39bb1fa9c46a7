"""What happens to a marked image, as differentiable functions on a device.

A codec that is trained through these survives them (Tancik et al. 2020, arXiv:1904.05343, section 4.3; Fernandez et al. 2023,
arXiv:2303.15435, appendix B). A `Distortion` takes (key, x) with Unit images of any size and draws a strength for every image;
the functions after it take strengths. Shapes are static; rounding is passed straight through by gradients (Bengio et al. 2013, arXiv:1308.3432). For measurements use the real
encoders, which these stand for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

from jax_trustdiff.diffusion.augment import bilinear
from jax_trustdiff.types import InputError, PerExample, Unit

# Annex K of ITU-T T.81 at quality 50
LUMINANCE = np.array(
  [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
  ],
  np.float32,
)
CHROMINANCE = np.full((8, 8), 99, np.float32)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_TO_YCBCR = np.array(
  [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], np.float32
)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]], np.float32)
_GREY = _TO_YCBCR[0]
_YIQ = np.array(
  [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]], np.float32
)

_einsum = functools.partial(jnp.einsum, precision="highest")  # a mark is smaller than the rounding of TF32


@dataclasses.dataclass(frozen=True)
class Distortion:
  """Called as (key, x): images [b h w c] after the distortion `kind`, of a strength drawn for each, U(low, high).

  kind: a name in KINDS, which says what its strength is.
  """

  kind: str
  low: float
  high: float

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"unknown distortion {self.kind!r}; known: {', '.join(KINDS)}")
    least, most = KINDS[self.kind].bounds
    if not least <= self.low <= self.high <= most:
      raise InputError(
        f"strengths of the distortion {self.kind!r} rise within {least:g} to {most:g}, got {self.low:g} to {self.high:g}"
      )

  def __call__(self, key: Key[Array, ""], x: Unit) -> Unit:
    if x.dtype not in (jnp.float32, jnp.float64):
      raise InputError(f"distortions take images in float32, got {x.dtype}")
    first, second = jax.random.split(key)
    strength = jax.random.uniform(first, x.shape[:1], x.dtype, self.low, self.high)
    return KINDS[self.kind].apply(second, x, strength)


def one_of(distortions: Sequence[Distortion]) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """(key, x) -> x after one of the distortions, the same for the batch, or after none; each is as likely.

  One for the batch: under `vmap` every image would pay for all of them.
  """
  branches = [lambda key, x: x, *distortions]

  def distort(key: Key[Array, ""], x: Unit) -> Unit:
    first, second = jax.random.split(key)
    return lax.switch(jax.random.randint(first, (), 0, len(branches)), branches, second, x)

  return distort


def straight_through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
  """The value of `exact` with the gradient of `smooth`."""
  return smooth + lax.stop_gradient(exact - smooth)


def quantise(x: Unit) -> Unit:
  """The nearest images of bytes, in [0, 1]; gradients pass through, rounding and clipping alike."""
  return straight_through(jnp.round(jnp.clip(x, 0, 1) * 255) / 255, x)


# ---- with a strength for each image ----


def jpeg(x: Unit, quality: PerExample) -> Unit:
  """JPEG with 4:2:0 chroma and the tables and scaling of libjpeg, quality from 1 to 100.

  Whole qualities, as there. Bytes of photographs within 1.6/255 (mean absolute difference) of Pillow's for qualities from 10
  to 90; of noise up to 3/255. One channel: luminance alone.
  """
  _, h, w, c = x.shape
  if c not in (1, 3):
    raise InputError(f"JPEG takes images of 1 or 3 channels, got {c}")
  x = quantise(x)
  multiple = 16 if c == 3 else 8
  padded = jnp.pad(255 * x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")
  quality = straight_through(jnp.round(quality), quality)
  scale = jnp.where(quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality)
  if c == 1:
    return quantise((_coded(padded[..., 0] - 128, LUMINANCE, scale)[:, :h, :w, None] + 128) / 255)
  planes = _einsum("bhwc,dc->bhwd", padded, _TO_YCBCR)
  grey = _coded(planes[..., 0] - 128, LUMINANCE, scale) + 128
  b, full_h, full_w, _ = planes.shape
  chroma = planes[..., 1:].reshape(b, full_h // 2, 2, full_w // 2, 2, 2).mean((2, 4))
  chroma = jnp.stack([_coded(chroma[..., i], CHROMINANCE, scale) for i in (0, 1)], -1)
  chroma = jax.image.resize(chroma, (b, full_h, full_w, 2), "linear")
  return quantise(
    _einsum("bhwc,dc->bhwd", jnp.concatenate([grey[..., None], chroma], -1), _TO_RGB)[:, :h, :w] / 255
  )


def _coded(plane: Float[Array, "b h w"], table: np.ndarray, scale: PerExample) -> Float[Array, "b h w"]:
  """A plane after its 8x8 blocks were transformed and rounded to multiples of the table."""
  b, h, w = plane.shape
  k = np.arange(8)
  cosines = np.sqrt(0.25) * np.cos((2 * k[None] + 1) * k[:, None] * np.pi / 16)  # [frequency, position]
  cosines[0] /= math.sqrt(2)
  basis = jnp.asarray(cosines, plane.dtype)
  blocks = plane.reshape(b, h // 8, 8, w // 8, 8)
  found = _einsum("ui,bmink,vk->bmnuv", basis, blocks, basis)
  steps = jnp.clip(jnp.floor((table * scale[:, None, None] + 50) / 100), 1, 255)[:, None, None]
  found = straight_through(jnp.round(found / steps), found / steps) * steps
  return _einsum("ui,bmnuv,vk->bmink", basis, found, basis).reshape(b, h, w)


def resample(x: Unit, top_left: Float[Array, "b 2"], extent: Float[Array, "b 2"]) -> Unit:
  """The part of each image from `top_left` on, of this extent, both as shares of the image, enlarged to its size, bilinearly."""
  rows, columns = (
    _bilinear(size, size, top_left[:, i] * size, extent[:, i]) for i, size in enumerate(x.shape[1:3])
  )
  return _einsum("bij,bjkc,blk->bilc", rows, x, columns)


def shrink_and_enlarge(x: Unit, factor: PerExample) -> Unit:
  """Each image at `factor` of its size (below 1), averaged by triangles as Pillow does, and back."""
  matrices = []
  for size in x.shape[1:3]:
    up = _bilinear(size, size, jnp.zeros_like(factor), factor)
    matrices.append(_einsum("bij,bjk->bik", up, _triangles(size, factor)))
  rows, columns = matrices
  return _einsum("bij,bjkc,blk->bilc", rows, x, columns)


def _bilinear(num_out: int, num_in: int, start: PerExample, step: PerExample) -> Float[Array, "b out in"]:
  """Weights of inputs at output i, which looks at start + (i + 1/2) step - 1/2; edges repeat."""
  at = start[:, None] + (jnp.arange(num_out) + 0.5) * step[:, None] - 0.5
  at = jnp.clip(at, 0, num_in - 1)
  return jnp.maximum(0, 1 - jnp.abs(at[:, :, None] - jnp.arange(num_in)))


def _triangles(size: int, factor: PerExample) -> Float[Array, "b out in"]:
  """Weights of inputs in an image of `factor` times the size: triangles of half-width 1 / factor, each of sum 1.

  Outputs beyond the smaller image repeat its last ones, so that `_bilinear` may look at them.
  """
  last = jnp.maximum(jnp.floor(size * factor[:, None]), 1) - 1
  centre = (jnp.minimum(jnp.arange(size), last) + 0.5) / factor[:, None] - 0.5
  weights = jnp.maximum(0, 1 - jnp.abs(centre[:, :, None] - jnp.arange(size)) * factor[:, None, None])
  return weights / weights.sum(2, keepdims=True)


def rotate(x: Unit, degrees: PerExample) -> Unit:
  """Each image turned counterclockwise about its middle, bilinearly, black where nothing was."""
  _, h, w, _ = x.shape
  angle = jnp.deg2rad(degrees)[:, None, None]
  down, along = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")
  rows = jnp.cos(angle) * down + jnp.sin(angle) * along + (h - 1) / 2
  columns = -jnp.sin(angle) * down + jnp.cos(angle) * along + (w - 1) / 2
  framed = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return bilinear(framed, columns + 1, rows + 1)


def blur(x: Unit, sigma: PerExample, reach: int = 6) -> Unit:
  """Each image under a Gaussian of this standard deviation in pixels, cut off at `reach`; edges repeat."""
  offsets = jnp.arange(-reach, reach + 1)
  weights = jnp.exp(-0.5 * jnp.square(offsets / jnp.maximum(sigma, 1e-3)[:, None]))
  weights /= weights.sum(1, keepdims=True)
  for axis in (1, 2):
    size = x.shape[axis]
    at = jnp.clip(jnp.arange(size)[:, None] + offsets, 0, size - 1)  # [out, offset]
    matrix = jnp.zeros((x.shape[0], size, size), x.dtype)
    matrix = matrix.at[:, jnp.arange(size)[:, None], at].add(weights[:, None])
    x = _einsum("bij,bjkc->bikc" if axis == 1 else "bij,bkjc->bkic", matrix, x)
  return x


def brightness(x: Unit, factor: PerExample) -> Unit:
  return jnp.clip(x * _per_image(factor), 0, 1)


def contrast(x: Unit, factor: PerExample) -> Unit:
  """Distances from the mean grey value, in whole bytes as Pillow has it, times `factor`."""
  mean = _grey(x).mean((1, 2, 3), keepdims=True)
  mean = straight_through(jnp.floor(255 * mean + 0.5) / 255, mean)
  return jnp.clip(mean + (x - mean) * _per_image(factor), 0, 1)


def saturation(x: Unit, factor: PerExample) -> Unit:
  """Distances from each pixel's grey value times `factor`; one channel stays."""
  grey = _grey(x)
  return jnp.clip(grey + (x - grey) * _per_image(factor), 0, 1)


def hue(x: Unit, turns: PerExample) -> Unit:
  """Colours turned about the grey axis in YIQ, 1 for all the way round; one channel stays."""
  if x.shape[3] != 3:
    return x
  angle = 2 * jnp.pi * turns
  cosine, sine, zero, one = jnp.cos(angle), jnp.sin(angle), jnp.zeros_like(angle), jnp.ones_like(angle)
  turn = jnp.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], -1).reshape(-1, 3, 3)
  matrix = _einsum("ij,bjk,kl->bil", np.linalg.inv(_YIQ), turn, _YIQ)
  return jnp.clip(_einsum("bhwc,bdc->bhwd", x, matrix), 0, 1)


def erase(x: Unit, top_left: Float[Array, "b 2"], extent: Float[Array, "b 2"]) -> Unit:
  """Black from `top_left` on, over this extent, both as shares of the image."""
  inside = []
  for i, size in enumerate(x.shape[1:3]):
    at, start = (jnp.arange(size) + 0.5) / size, top_left[:, i, None]
    inside.append((at >= start) & (at < start + extent[:, i, None]))
  return jnp.where((inside[0][:, :, None] & inside[1][:, None])[..., None], 0, x)


def _grey(x: Unit) -> Float[Array, "b h w 1"]:
  return _einsum("bhwc,c->bhw", x, _GREY)[..., None] if x.shape[3] == 3 else x.mean(3, keepdims=True)


def _per_image(value: Shaped[Array, "b"]) -> jax.Array:
  return value[:, None, None, None]


def _turned_either_way(key, strength: PerExample) -> PerExample:
  return jnp.where(jax.random.bernoulli(key, 0.5, strength.shape), strength, -strength)


def _cropped(key, x, strength):
  extent = jnp.stack([1 - strength, 1 - strength], 1)
  return resample(x, jax.random.uniform(key, extent.shape, x.dtype) * (1 - extent), extent)


def _erased(key, x, strength):
  extent = jnp.sqrt(jnp.stack([strength, strength], 1))
  return erase(x, jax.random.uniform(key, extent.shape, x.dtype) * (1 - extent), extent)


def _flipped(key, x, strength):
  turned = jax.random.uniform(key, strength.shape) < strength
  return jnp.where(_per_image(turned), x[:, :, ::-1], x)


class Kind(NamedTuple):
  """What a distortion does with a strength for each image, and between which numbers that may lie."""

  apply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (key, x, strength [b]) -> x
  bounds: tuple[float, float]


KINDS = {
  "jpeg": Kind(lambda key, x, s: jpeg(x, s), (1, 100)),  # quality
  "crop": Kind(
    _cropped, (0, 0.9)
  ),  # the part of each side that is cut off at random, then enlarged to the old size
  "resize": Kind(lambda key, x, s: shrink_and_enlarge(x, s), (0.1, 1)),  # factor, and back
  "rotate": Kind(lambda key, x, s: rotate(x, _turned_either_way(key, s)), (0, 180)),  # degrees, either way
  "blur": Kind(lambda key, x, s: blur(x, s), (0, 2)),  # standard deviation in pixels
  "noise": Kind(
    lambda key, x, s: jnp.clip(x + _per_image(s) * jax.random.normal(key, x.shape, x.dtype), 0, 1), (0, 1)
  ),  # its std
  "brightness": Kind(lambda key, x, s: brightness(x, s), (0, 4)),  # factor
  "contrast": Kind(lambda key, x, s: contrast(x, s), (0, 4)),  # factor
  "saturation": Kind(lambda key, x, s: saturation(x, s), (0, 4)),  # factor
  "hue": Kind(lambda key, x, s: hue(x, _turned_either_way(key, s)), (0, 0.5)),  # turns, either way
  "erase": Kind(_erased, (0, 0.9)),  # the part of the image
  "flip": Kind(_flipped, (0, 1)),  # the probability
}
