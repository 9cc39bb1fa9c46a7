"""LPIPS: a distance between images in the features of a classifier (Zhang et al. 2018, arXiv:1801.03924), version 0.1.

The features are those of AlexNet ('alexnet': after the ReLU of every convolution) or of VGG16 ('vgg16': after the last
ReLU of every block), both trained on ImageNet; the heads that weigh their channels were fitted to people's judgements.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, Shaped

from jax_trustdiff.models import layers
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, Variables

# mean and standard deviation of ImageNet's channels, for images in [-1, 1], as published
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
TINY = 1e-20  # beside squared norms, so that features that are all zero stay zero and have a gradient


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class PerceptualDistance:
  """Signed images x, y [b h w c] -> LPIPS distances [b], at least 0; a callable pytree whose leaves are the variables.

  network: 'alexnet' (usual for measuring; height and width at least 31) or 'vgg16' (usual as a loss; at least 16).
  c is 3 (RGB), or 1: grey is repeated. Images are not resized; the heads were fitted to patches of 64 x 64.
  But for rounding the distance is symmetric, 0 between equal images (where its gradient is 0 too), and does
  not depend on the other pairs of the batch. Convolutions are computed in full float32 on accelerators too.
  Raises InputError for images that are not floats, not [b h w c], of another number of channels, too small, or of two
  shapes.
  """

  variables: Variables
  network: str = dataclasses.field(default="alexnet", metadata={"static": True})

  def __post_init__(self):
    check_network(self.network)

  def __call__(self, x: Shaped[Array, "..."], y: Shaped[Array, "..."]) -> Float[Array, "b"]:
    return self.per_layer(x, y).sum(-1)

  def per_layer(self, x: Shaped[Array, "..."], y: Shaped[Array, "..."]) -> Float[Array, "b 5"]:
    """The terms of the sum over l in eq. 1, from the first features to the last."""
    smallest = TRUNKS[self.network].min_size
    for images in (x, y):
      if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
          "LPIPS compares images of floats in [-1, 1] [b h w c] with 1 or 3 channels, "
          f"found {images.dtype} {images.shape}"
        )
    if x.shape != y.shape or min(x.shape[1:3]) < smallest:
      raise InputError(
        f"LPIPS of {self.network} compares images of one shape, at least {smallest} x {smallest}, "
        f"found {x.shape} and {y.shape}"
      )
    return LPIPS(self.network).apply(self.variables, *map(_rgb, (x, y)))


def init(key: Key[Array, ""], network: str) -> Variables:
  """Fresh variables {'params': ...}: of use for their shapes, or for a test of speed."""
  check_network(network)
  images = jnp.zeros((1, *[TRUNKS[network].min_size] * 2, 3))
  return LPIPS(network).init(key, images, images)


def check_network(network: str) -> None:
  """InputError that lists the networks if there is none of this name."""
  if network not in TRUNKS:
    raise InputError(f"LPIPS has no network {network!r}; there are {', '.join(TRUNKS)}")


class LPIPS(nn.Module):
  """The terms of eq. 1: the mean over h, w of sum_c head_c (f_c(x) / |f(x)| - f_c(y) / |f(y)|)^2, for each f.

  `head` is the square of the paper's w_l, a 1x1 convolution to one channel; it is not negative.
  """

  network: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"], y: Float[Array, "b h w 3"]) -> Float[Array, "b 5"]:
    trunk = TRUNKS[self.network](name="trunk")
    # one after the other: as one batch, images sharded over devices would have to move
    features = [trunk(_normalise(images)) for images in (x, y)]
    terms = []
    for i, (f, g) in enumerate(zip(*features, strict=True), 1):
      weighted = _conv(1, 1, f"head{i}", use_bias=False)(jnp.square(_unit(f) - _unit(g)))
      terms.append(weighted.mean((1, 2, 3)))
    return jnp.stack(terms, -1)


class AlexNet(nn.Module):
  """The five convolutions of AlexNet in its form of 2014 (Krizhevsky, arXiv:1404.5997), each after its ReLU."""

  min_size = 31

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[jax.Array, ...]:
    a = nn.relu(_conv(64, 11, "conv1", strides=(4, 4), padding=2)(x))
    b = nn.relu(_conv(192, 5, "conv2", padding=2)(_pool(a, 3)))
    c = nn.relu(_conv(384, 3, "conv3")(_pool(b, 3)))
    d = nn.relu(_conv(256, 3, "conv4")(c))
    e = nn.relu(_conv(256, 3, "conv5")(d))
    return a, b, c, d, e


class VGG16(nn.Module):
  """The five blocks of VGG16 (Simonyan and Zisserman 2015, configuration D), each after its last ReLU."""

  min_size = 16

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[jax.Array, ...]:
    features = []
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
      x = _pool(x, 2) if features else x
      for layer in range(1, depth + 1):
        x = nn.relu(_conv(width, 3, f"conv{block}_{layer}")(x))
      features.append(x)
    return tuple(features)


TRUNKS = {"alexnet": AlexNet, "vgg16": VGG16}


def _rgb(images: jax.Array) -> jax.Array:
  return jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(layers.wide(images.dtype))


def _normalise(x: jax.Array) -> jax.Array:
  return (x - jnp.asarray(SHIFT, x.dtype)) / jnp.asarray(SCALE, x.dtype)


def _unit(f: jax.Array) -> jax.Array:
  """`f` with channels of length 1 at every position."""
  return f * lax.rsqrt(jnp.square(f).sum(-1, keepdims=True) + TINY)


def _conv(width: int, size: int, name: str, **options) -> nn.Conv:
  return nn.Conv(
    width,
    (size, size),
    precision=lax.Precision.HIGHEST,
    kernel_init=layers.conv_init,
    conv_general_dilated=layers.conv_general_dilated,
    name=name,
    **options,
  )


def _pool(x: jax.Array, window: int) -> jax.Array:
  return nn.max_pool(x, (window, window), (2, 2))
