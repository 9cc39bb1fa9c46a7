"""Networks that write a string of bits into an image and read it back.

The codec of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137) is that of Yu et al. 2021,
"Artificial Fingerprinting for Generative Models" (arXiv:2007.08457), a StegaStamp (Tancik et al. 2020, arXiv:1904.05343)
without its distortions, its residual and its spatial transformer. `StampCodec` is that one. `ResidualCodec` adds a bounded
residual to the image, of any size.
"""

import abc
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.models import layers
from jax_trustdiff.models.linen import DTYPES, check, check_choice
from jax_trustdiff.types import Bits, Logits, Unit, Variables

SECRET = 16  # side of the map that the bits become
DOWN = ((32, 1), (32, 2), (64, 2), (128, 2), (256, 2))  # (features, stride) of the encoder's way down
UP = (128, 64, 32, 32)
READ = ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2))  # of the decoder
HIDDEN = 512
LAST_MAP = 8  # the largest side of the map that the better decoder flattens


def conv(x: jax.Array, features: int, size: int, name: str, stride: int = 1, pad: Any = None) -> jax.Array:
  """size x size convolution with bias, initialised as in torch; pad: of both axes, (low, high), half the size if None."""
  init = layers.uniform_init(1 / math.sqrt(size * size * x.shape[-1]))
  pad = (size // 2, size // 2) if pad is None else pad
  module = nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=(pad, pad),
    dtype=x.dtype,
    kernel_init=init,
    bias_init=init,
    conv_general_dilated=layers.conv_general_dilated,
    name=name,
  )
  return module(x)


def linear(x: jax.Array, features: int, name: str) -> jax.Array:
  """A linear layer, initialised as in torch."""
  init = layers.uniform_init(1 / math.sqrt(x.shape[-1]))
  return nn.Dense(features, dtype=x.dtype, kernel_init=init, bias_init=init, name=name)(x)


def enlarge(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c"]:
  """Every pixel `factor` times along both axes."""
  return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


class StampEncoder(nn.Module):
  """A U-Net of the image and the enlarged bits, whose output is the whole marked image."""

  dtype: Any

  @nn.compact
  def __call__(self, x: Unit, bits: Bits) -> Unit:
    b, h, _, c = x.shape
    secret = nn.relu(linear(bits.astype(self.dtype), SECRET * SECRET * c, "secret"))
    secret = enlarge(secret.reshape(b, SECRET, SECRET, c), h // SECRET)
    inputs = jnp.concatenate([secret, x.astype(self.dtype)], axis=-1)
    skips, y = [], inputs
    for i, (features, stride) in enumerate(DOWN):
      y = nn.relu(conv(y, features, 3, f"down{i}", stride))
      skips.append(y)
    skips.pop()
    for i, features in enumerate(UP):
      y = nn.relu(conv(enlarge(y, 2), features, 2, f"up{i}", pad=(0, 1)))
      y = jnp.concatenate([skips.pop(), y] + ([] if skips else [inputs]), axis=-1)
      y = nn.relu(conv(y, features, 3, f"merge{i}"))
    y = nn.relu(conv(y, 32, 3, "last"))
    return nn.sigmoid(conv(y, c, 1, "image").astype(layers.wide(self.dtype)))


class StampDecoder(nn.Module):
  """Seven convolutions and two linear layers: logits of the bits."""

  num_bits: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Unit) -> Logits:
    y = x.astype(self.dtype)
    for i, (features, stride) in enumerate(READ):
      y = nn.relu(conv(y, features, 3, f"conv{i}", stride))
    y = nn.relu(linear(y.reshape(y.shape[0], -1), HIDDEN, "hidden"))
    return linear(y.astype(layers.wide(self.dtype)), self.num_bits, "logits")


@dataclasses.dataclass(frozen=True)
class LinenCodec(abc.ABC):
  """A `types.WatermarkCodec` of two Linen modules; hashable, equal when the fields are.

  num_bits: of a string. image_shape: (h, w, c). dtype: 'float32' or 'bfloat16', in which layers compute; images, logits and
  parameters are float32. 'float64', for tests, needs jax_enable_x64.
  """

  num_bits: int = 64
  image_shape: tuple[int, int, int] = (32, 32, 3)
  dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    kind = type(self).__name__
    check(self.num_bits >= 1, f"{kind}: num_bits must be at least 1, got {self.num_bits}")
    check(
      len(self.image_shape) == 3 and min(self.image_shape) >= 1,
      f"{kind}: image_shape must be (height, width, channels), got {self.image_shape}",
    )
    check_choice(f"{kind}: dtype", self.dtype, DTYPES)

  @property
  @abc.abstractmethod
  def modules(self) -> tuple[nn.Module, nn.Module]:
    """(encoder, decoder); stay inside models/."""

  def init(self, key: Key[Array, ""]) -> Variables:
    """Fresh variables {'params': {'encoder': ..., 'decoder': ...}}, float32."""
    encoder, decoder = self.modules
    first, second = jax.random.split(key)
    x, bits = jnp.zeros((1, *self.image_shape)), jnp.zeros((1, self.num_bits), jnp.int32)
    parts = {"encoder": encoder.init(first, x, bits), "decoder": decoder.init(second, x)}
    return {"params": {name: part["params"] for name, part in parts.items()}}

  def encode(self, variables: Variables, x: Unit, bits: Bits) -> Unit:
    """The images with these bits in them, 0 or 1, [b n]; InputError for images that do not fit."""
    self._check_images(x)
    return self.modules[0].apply({"params": variables["params"]["encoder"]}, x, bits)

  def decode(self, variables: Variables, x: Unit) -> Logits:
    """Logits [b n] of the bits: positive for 1; InputError for images that do not fit."""
    self._check_images(x)
    return self.modules[1].apply({"params": variables["params"]["decoder"]}, x)

  def _check_images(self, x: jax.Array) -> None:
    channels = self.image_shape[-1]
    check(
      x.shape[-1] == channels, f"{type(self).__name__} takes images of {channels} channels, got {x.shape[-1]}"
    )


@dataclasses.dataclass(frozen=True)
class StampCodec(LinenCodec):
  """The codec of Yu et al. 2021 and Zhao et al. 2023.

  The encoder makes the whole image anew (a sigmoid, not the image plus a residual), from the bits as 0 and 1. No normalisation
  layers. Square images whose side 32 divides; the decoder reads those of image_shape alone.
  """

  def __post_init__(self):
    super().__post_init__()
    height, width, _ = self.image_shape
    check(
      height == width and height % 32 == 0,
      f"StampCodec: images must be squares whose side 32 divides, got {height}x{width}",
    )

  @property
  def modules(self) -> tuple[nn.Module, nn.Module]:
    dtype = DTYPES[self.dtype]
    return StampEncoder(dtype), StampDecoder(self.num_bits, dtype)

  def _check_images(self, x: jax.Array) -> None:
    check(
      x.shape[1:] == self.image_shape, f"StampCodec takes images of {self.image_shape}, got {x.shape[1:]}"
    )


class ResidualEncoder(nn.Module):
  """The image plus a residual: a learned pattern for each bit, and what convolutions make of the patterns and the image."""

  sides: tuple[int, int]
  width: int
  num_blocks: int
  strength: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Unit, bits: Bits) -> Unit:
    h, w = self.sides
    b, c = len(x), x.shape[-1]
    inputs = layers.space_to_depth(resized(x, self.sides) - 0.5, 2).astype(self.dtype)
    signs = jnp.where(bits > 0, 1, -1).astype(self.dtype)
    pattern = linear(signs, h * w * c, "pattern").reshape(inputs.shape)
    y = conv(jnp.concatenate([inputs, pattern], -1), self.width, 3, "first")
    for i in range(self.num_blocks):
      y = y + conv(nn.relu(y), self.width, 3, f"block{i}")
    residual = pattern + conv(nn.relu(y), 4 * c, 3, "residual")
    residual = residual.astype(layers.wide(self.dtype)).reshape(b, h // 2, w // 2, 2, 2, c).swapaxes(2, 3)
    residual = self.strength * jnp.tanh(residual.reshape(b, h, w, c))
    return jnp.clip(x + resized(residual, x.shape[1:3]), 0, 1)


class ResidualDecoder(nn.Module):
  """Convolutions down to a map of at most 8x8 positions, two linear layers: logits of the bits."""

  sides: tuple[int, int]
  num_bits: int
  width: int
  num_blocks: int
  dtype: Any

  @nn.compact
  def __call__(self, x: Unit) -> Logits:
    y = layers.space_to_depth(resized(x, self.sides) - 0.5, 2).astype(self.dtype)
    y = nn.relu(conv(y, self.width, 3, "first"))
    for i in range(self.num_blocks):
      y = y + nn.relu(conv(y, self.width, 3, f"block{i}"))
    level = 0
    while level == 0 or max(y.shape[1:3]) > LAST_MAP:
      y = nn.relu(conv(y, 2 * self.width, 3, f"down{level}", 2))
      level += 1
    y = nn.relu(conv(y, 2 * self.width, 3, "wide"))
    y = nn.relu(linear(y.reshape(len(y), -1), 8 * self.width, "hidden"))
    return linear(y.astype(layers.wide(self.dtype)), self.num_bits, "logits")


def resized(x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
  """Images [b h w c] with these sides, by triangles as wide as a pixel of the smaller ones; as they are if they have them."""
  if x.shape[1:3] == tuple(sides):
    return x
  return jax.image.resize(x, (len(x), *sides, x.shape[-1]), "linear")


@dataclasses.dataclass(frozen=True)
class ResidualCodec(LinenCodec):
  """The image plus a residual of at most `strength`, of bits as -1 and 1, for images of any size.

  The residual is made and read at the size image_shape; that of a larger or smaller image is resized to it, as Bui et al. 2023
  do (arXiv:2311.18297). width: channels of the encoder and, at first, of the decoder. num_blocks:
  residual blocks of each.
  """

  width: int = 32
  num_blocks: int = 2
  strength: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    height, width, _ = self.image_shape
    check(
      height % 2 == width % 2 == 0, f"ResidualCodec: image_shape must have even sides, got {height}x{width}"
    )
    check(self.width >= 1, f"ResidualCodec: width must be at least 1, got {self.width}")
    check(self.num_blocks >= 0, f"ResidualCodec: num_blocks must be at least 0, got {self.num_blocks}")
    check(0 < self.strength <= 1, f"ResidualCodec: strength must lie in (0, 1], got {self.strength}")

  @property
  def modules(self) -> tuple[nn.Module, nn.Module]:
    dtype, sides = DTYPES[self.dtype], self.image_shape[:2]
    encoder = ResidualEncoder(sides, self.width, self.num_blocks, self.strength, dtype)
    return encoder, ResidualDecoder(sides, self.num_bits, self.width, self.num_blocks, dtype)
