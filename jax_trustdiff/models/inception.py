"""The 2048 pooled features of Inception-v3 (Szegedy et al. 2016) from which the Frechet inception distance is computed.

The network is that of the TensorFlow graph of 2015-12-05, which every published FID uses. It differs from
torchvision's in its weights and in its pooling: averages leave out the padding, and the last block takes maxima.
Modules have torchvision's names ('Mixed_5b', 'branch3x3dbl_2').
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

from jax_trustdiff.models import layers
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, Variables

SIZE = 299
NUM_FEATURES = 2048
EPS = 1e-3

Pool = Callable[[jax.Array], jax.Array]


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class InceptionFeatures:
  """Images uint8 [b h w c] -> features [b 2048] in float32; a callable pytree whose leaves are the variables.

  c is 3 (RGB), or 1: gray is repeated. The images are resized to 299 x 299 by `resize`, then scaled to (x - 128) / 128
  in [-1, 1): the rule of the graph of 2015, which comparable numbers need. Features of an image do not depend on the
  others in its batch but for rounding. Convolutions are computed in full float32 on accelerators too.
  Raises InputError for images that are not uint8, not [b h w c], or of another number of channels.
  """

  variables: Variables

  def __call__(self, images: Shaped[Array, "..."]) -> Float[Array, "b 2048"]:
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
      raise InputError(
        f"features are taken of uint8 images [b h w c] with 1 or 3 channels, found {images.dtype} {images.shape}"
      )
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    return InceptionV3().apply(self.variables, (resize(x, SIZE) - 128) / 128)


def init(key: Key[Array, ""]) -> Variables:
  """Fresh variables {'params': ..., 'batch_stats': ...}: of use for their shapes, or for a test of speed."""
  return InceptionV3().init(key, jnp.zeros((1, SIZE, SIZE, 3)))


def resize(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b {size} {size} c"]:
  """`x` resized to size x size by the bilinear rule of TensorFlow 1.

  Row i is taken at i * height / size in the input, without the shift by half a pixel that later libraries make, and
  without smoothing when the image shrinks; beyond the last row its values are repeated. Columns alike.
  """
  return _interpolate(_interpolate(x, size, 1), size, 2)


def _interpolate(x: jax.Array, size: int, axis: int) -> jax.Array:
  length = x.shape[axis]
  low, rest = np.divmod(np.arange(size) * length, size)
  high = np.minimum(low + 1, length - 1)
  weight = np.expand_dims(rest / size, [i for i in range(x.ndim) if i != axis]).astype(x.dtype)
  a, b = jnp.take(x, low, axis), jnp.take(x, high, axis)
  return a + (b - a) * weight


class InceptionV3(nn.Module):
  """Features from images in [-1, 1): the spatial mean of the last block."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
    x = ConvNorm(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
    x = ConvNorm(32, (3, 3), name="Conv2d_2a_3x3")(x)
    x = ConvNorm(64, (3, 3), padding="SAME", name="Conv2d_2b_3x3")(x)
    x = _halve(x)
    x = ConvNorm(80, (1, 1), name="Conv2d_3b_1x1")(x)
    x = ConvNorm(192, (3, 3), name="Conv2d_4a_3x3")(x)
    x = _halve(x)
    for name, features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = InceptionA(features, name=name)(x)
    x = InceptionB(name="Mixed_6a")(x)
    for name, features in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
      x = InceptionC(features, name=name)(x)
    x = InceptionD(name="Mixed_7a")(x)
    x = InceptionE(_average, name="Mixed_7b")(x)
    x = InceptionE(_maximum, name="Mixed_7c")(x)
    return x.mean((1, 2))


class ConvNorm(nn.Module):
  """Convolution, BatchNorm by the running statistics, ReLU."""

  features: int
  size: tuple[int, int]
  stride: int = 1
  padding: str = "VALID"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    x = nn.Conv(
      self.features,
      self.size,
      strides=(self.stride, self.stride),
      padding=self.padding,
      use_bias=False,
      precision=lax.Precision.HIGHEST,
      kernel_init=layers.conv_init,
      conv_general_dilated=layers.conv_general_dilated,
      name="conv",
    )(x)
    return nn.relu(layers.BatchNorm(eps=EPS, name="bn")(x, False))


class InceptionA(nn.Module):
  """Branches 1x1, 5x5, twice 3x3, and pooling (figure 5 of Szegedy et al. 2016)."""

  pooled: int  # features of the branch that pools

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    a = _same(64, 1, 1, "branch1x1")(x)
    b = _same(48, 1, 1, "branch5x5_1")(x)
    b = _same(64, 5, 5, "branch5x5_2")(b)
    c = _same(64, 1, 1, "branch3x3dbl_1")(x)
    c = _same(96, 3, 3, "branch3x3dbl_2")(c)
    c = _same(96, 3, 3, "branch3x3dbl_3")(c)
    d = _same(self.pooled, 1, 1, "branch_pool")(_average(x))
    return jnp.concatenate([a, b, c, d], -1)


class InceptionB(nn.Module):
  """From 35x35 to 17x17: branches 3x3, twice 3x3, and pooling, each with stride 2 (figure 10)."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    a = ConvNorm(384, (3, 3), 2, name="branch3x3")(x)
    b = _same(64, 1, 1, "branch3x3dbl_1")(x)
    b = _same(96, 3, 3, "branch3x3dbl_2")(b)
    b = ConvNorm(96, (3, 3), 2, name="branch3x3dbl_3")(b)
    return jnp.concatenate([a, b, _halve(x)], -1)


class InceptionC(nn.Module):
  """Branches 1x1, 7x7 and twice 7x7 as products of 1x7 and 7x1, and pooling (figure 6)."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    a = _same(192, 1, 1, "branch1x1")(x)
    b = _same(self.width, 1, 1, "branch7x7_1")(x)
    b = _same(self.width, 1, 7, "branch7x7_2")(b)
    b = _same(192, 7, 1, "branch7x7_3")(b)
    c = _same(self.width, 1, 1, "branch7x7dbl_1")(x)
    c = _same(self.width, 7, 1, "branch7x7dbl_2")(c)
    c = _same(self.width, 1, 7, "branch7x7dbl_3")(c)
    c = _same(self.width, 7, 1, "branch7x7dbl_4")(c)
    c = _same(192, 1, 7, "branch7x7dbl_5")(c)
    d = _same(192, 1, 1, "branch_pool")(_average(x))
    return jnp.concatenate([a, b, c, d], -1)


class InceptionD(nn.Module):
  """From 17x17 to 8x8: branches 3x3, 7x7 then 3x3, and pooling, each with stride 2."""

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    a = _same(192, 1, 1, "branch3x3_1")(x)
    a = ConvNorm(320, (3, 3), 2, name="branch3x3_2")(a)
    b = _same(192, 1, 1, "branch7x7x3_1")(x)
    b = _same(192, 1, 7, "branch7x7x3_2")(b)
    b = _same(192, 7, 1, "branch7x7x3_3")(b)
    b = ConvNorm(192, (3, 3), 2, name="branch7x7x3_4")(b)
    return jnp.concatenate([a, b, _halve(x)], -1)


class InceptionE(nn.Module):
  """Branches 1x1, 3x3 and twice 3x3 that end in 1x3 beside 3x1, and pooling (figure 7)."""

  pool: Pool

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    a = _same(320, 1, 1, "branch1x1")(x)
    b = _same(384, 1, 1, "branch3x3_1")(x)
    b1 = _same(384, 1, 3, "branch3x3_2a")(b)
    b2 = _same(384, 3, 1, "branch3x3_2b")(b)
    c = _same(448, 1, 1, "branch3x3dbl_1")(x)
    c = _same(384, 3, 3, "branch3x3dbl_2")(c)
    c1 = _same(384, 1, 3, "branch3x3dbl_3a")(c)
    c2 = _same(384, 3, 1, "branch3x3dbl_3b")(c)
    d = _same(192, 1, 1, "branch_pool")(self.pool(x))
    return jnp.concatenate([a, b1, b2, c1, c2, d], -1)


def _same(features: int, height: int, width: int, name: str) -> ConvNorm:
  return ConvNorm(features, (height, width), padding="SAME", name=name)


def _halve(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2))


def _average(x: jax.Array) -> jax.Array:
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (1, 1), "SAME")
