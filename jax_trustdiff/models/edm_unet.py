"""The U-Nets of "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al. 2022, appendix F).

SongUNet is the family of Song et al. 2021 (arXiv:2011.13456): DDPM++ and NCSN++. DhariwalUNet is ADM (Dhariwal & Nichol
2021, arXiv:2105.05233). Both are the raw network F(x; noise label); a preconditioning makes a denoiser of it.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jax_trustdiff.models import layers
from jax_trustdiff.models.attention import attention
from jax_trustdiff.models.linen import DTYPES, check, check_choice
from jax_trustdiff.types import Variables


def _uniform(limit: Callable[[int, int], float]) -> nn.initializers.Initializer:
  """Uniform in +-limit(fan_in, fan_out)."""

  def init(key, shape, dtype=jnp.float32):
    area = math.prod(shape[:-2])
    bound = limit(area * shape[-2], area * shape[-1])
    return layers.uniform_init(bound)(key, shape, dtype)

  return init


@dataclasses.dataclass(frozen=True)
class Layers:
  """How a family makes its layers: `conv` and `linear` differ in their initial values alone."""

  dtype: Any
  torch_default: bool  # ADM: kernel and bias uniform in +-1 / sqrt(fan_in); else Xavier uniform and no bias

  def conv(
    self, x: jax.Array, features: int, size: int, name: str, gain: float = 1.0, pad: int | None = None
  ):
    """size x size convolution with bias; pad on every side (None: the size stays)."""
    pad = size // 2 if pad is None else pad
    module = nn.Conv(
      features,
      (size, size),
      padding=((pad, pad), (pad, pad)),
      dtype=self.dtype,
      kernel_init=self._kernel(gain),
      bias_init=self._bias(size * size * x.shape[-1], gain),
      conv_general_dilated=layers.conv_general_dilated,
      name=name,
    )
    return module(x)

  def linear(self, x: jax.Array, features: int, name: str, use_bias: bool = True, kernel_init: Any = None):
    """A linear layer in float32: embeddings are small and feed every block."""
    module = nn.Dense(
      features,
      use_bias=use_bias,
      dtype=layers.wide(self.dtype),
      kernel_init=kernel_init or self._kernel(1.0),
      bias_init=self._bias(x.shape[-1], 1.0),
      name=name,
    )
    return module(x)

  def norm(self, x: jax.Array, eps: float, name: str) -> jax.Array:
    """Group normalisation with min(32, channels / 4) groups, computed in float32."""
    module = nn.GroupNorm(
      num_groups=min(32, x.shape[-1] // 4),
      epsilon=eps,
      dtype=layers.wide(self.dtype),
      use_fast_variance=False,
      name=name,
    )
    return module(x).astype(self.dtype)

  def _kernel(self, gain: float) -> nn.initializers.Initializer:
    if self.torch_default:
      return _uniform(lambda fan_in, fan_out: gain / math.sqrt(fan_in))
    return _uniform(lambda fan_in, fan_out: gain * math.sqrt(6 / (fan_in + fan_out)))

  def _bias(self, fan_in: int, gain: float) -> nn.initializers.Initializer:
    if not self.torch_default:
      return nn.initializers.zeros
    bound = gain / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def downsample(x: Float[Array, "b h w c"], taps: Sequence[float], pad: int | None = None) -> jax.Array:
  """Every second pixel of `x` filtered by the outer product of `taps`, of sum one, with itself.

  pad on every side (None: half of the taps, so that the size is halved). [1, 1] is the mean of 2x2 pixels.
  """
  pad = (len(taps) - 1) // 2 if pad is None else pad
  for axis in (1, 2):
    x = _filter(x, axis, [tap / sum(taps) for tap in taps], pad, pad, stride=2)
  return x


def upsample(x: Float[Array, "b h w c"], taps: Sequence[float]) -> jax.Array:
  """Twice the size: zeros between the pixels of `x`, filtered by the outer product of `taps`, of sum two, with itself.

  [1, 1] repeats every pixel.
  """
  after = (len(taps) - 1) // 2
  before = len(taps) - 1 - after
  for axis in (1, 2):
    spread = jnp.stack([x, jnp.zeros_like(x)], axis + 1)
    x = spread.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
    # a transposed convolution is a correlation with the mirrored filter
    x = _filter(x, axis, [2 * tap / sum(taps) for tap in reversed(taps)], before, after)
  return x


def _filter(
  x: jax.Array, axis: int, taps: Sequence[float], before: int, after: int, stride: int = 1
) -> jax.Array:
  """The correlation of one axis with `taps`, as shifted slices: unlike a depth-wise convolution fast in every loop."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (before, after)
  x = jnp.pad(x, widths)
  last = x.shape[axis] - len(taps)
  return sum(tap * lax.slice_in_dim(x, k, k + last + 1, stride, axis) for k, tap in enumerate(taps))


class UNetBlock(nn.Module):
  """Two convolutions with the noise embedding between them, a shortcut, and self-attention if there are heads.

  adaptive_scale: the embedding scales and shifts (ADM) rather than shifts alone. resample: 'up', 'down' or ''.
  project: whether a shortcut that resamples has a 1x1 convolution even if the channels stay.
  """

  features: int
  num_heads: int  # 0: no attention
  layers: Layers
  resample: str = ""
  taps: tuple[float, ...] = (1, 1)
  project: bool = True
  adaptive_scale: bool = False
  skip_scale: float = 1.0
  eps: float = 1e-5
  zero_gain: float = 0.0
  qkv_gain: float = 1.0
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], embedding: Float[Array, "b e"], key: Any) -> jax.Array:
    make, features = self.layers, self.features
    h = self._resample(nn.silu(make.norm(x, self.eps, "norm0")))
    h = make.conv(h, features, 3, "conv0")
    width = 2 * features if self.adaptive_scale else features
    condition = make.linear(embedding, width, "affine")[:, None, None].astype(h.dtype)
    if self.adaptive_scale:
      scale, shift = jnp.split(condition, 2, -1)
      h = nn.silu(shift + make.norm(h, self.eps, "norm1") * (scale + 1))
    else:
      h = nn.silu(make.norm(h + condition, self.eps, "norm1"))
    h = make.conv(_dropout(h, self.dropout, key), features, 3, "conv1", gain=self.zero_gain)
    shortcut = self._resample(x)
    if x.shape[-1] != features or (self.resample and self.project):
      shortcut = make.conv(shortcut, features, 1, "skip")
    x = (h + shortcut) * self.skip_scale
    return self._attention(x) * self.skip_scale if self.num_heads else x

  def _resample(self, x: jax.Array) -> jax.Array:
    if not self.resample:
      return x
    return upsample(x, self.taps) if self.resample == "up" else downsample(x, self.taps)

  def _attention(self, x: jax.Array) -> jax.Array:
    """x + self-attention over pixels.

    The channels of qkv are ordered (head, channel, q k v), as in released weights.
    """
    b, h, w, c = x.shape
    qkv = self.layers.conv(self.layers.norm(x, self.eps, "norm2"), 3 * c, 1, "qkv", gain=self.qkv_gain)
    q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.num_heads, c // self.num_heads, 3), -1, 0)
    mixed = attention(q, k, v).reshape(b, h, w, c)
    return self.layers.conv(mixed, c, 1, "proj", gain=self.zero_gain) + x


def positional_embedding(t: Float[Array, "b"], channels: int, endpoint: bool) -> Float[Array, "b c"]:
  """[cos, sin] of t times 10000^(-k / (channels/2)); with `endpoint` the last frequency is 1/10000."""
  half = channels // 2
  frequencies = (1 / 10000) ** (jnp.arange(half, dtype=t.dtype) / (half - endpoint))
  angles = t[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)


def _dropout(x: jax.Array, rate: float, key: Any) -> jax.Array:
  if key is None or rate == 0:
    return x
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Keys:
  """A dropout key for every block in turn; None throughout in evaluation mode."""

  def __init__(self, key: Any):
    self._key, self._count = key, 0

  def __call__(self) -> Any:
    self._count += 1
    return None if self._key is None else jax.random.fold_in(self._key, self._count)


@dataclasses.dataclass(frozen=True)
class EDMUNet(abc.ABC):
  """What both families share: a `types.DiffusionNetwork`, hashable, equal when the fields are.

  channel_mult: widths of the levels, each of half the resolution of the one before, in units of model_channels.
  attention_resolutions: sizes with self-attention. label_dropout: the part of class labels that are set to zero in
  training, for classifier-free guidance. dtype: of convolutions and attention; parameters, embeddings and statistics
  are float32. remat: blocks are computed again in the backward pass. out_channels: 0 for those of the image; the networks
  of iDDPM have twice as many.
  """

  image_shape: tuple[int, int, int]
  num_classes: int = 0
  num_augment_labels: int = 0
  model_channels: int = 128
  channel_mult: tuple[int, ...] = (2, 2, 2)
  num_blocks: int = 4
  attention_resolutions: tuple[int, ...] = (16,)
  dropout: float = 0.0
  label_dropout: float = 0.0
  dtype: str = "float32"
  remat: bool = False
  out_channels: int = 0

  def __post_init__(self):
    for name in ("image_shape", "channel_mult", "attention_resolutions"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    kind, halvings = type(self).__name__, 2 ** (len(self.channel_mult) - 1)
    check(
      len(self.image_shape) == 3 and min(self.image_shape) >= 1,
      f"{kind}: image_shape must be (height, width, channels), got {self.image_shape}",
    )
    check(
      not any(size % halvings for size in self.image_shape[:2]),
      f"{kind}: height and width must be divisible by {halvings} for {len(self.channel_mult)} levels, "
      f"got {self.image_shape}",
    )
    check(
      self.model_channels >= 8 and self.model_channels % 4 == 0,
      f"{kind}: model_channels must be a multiple of 4 of at least 8, got {self.model_channels}",
    )
    check(self.num_blocks >= 1, f"{kind}: num_blocks must be at least 1, got {self.num_blocks}")
    for name in ("dropout", "label_dropout"):
      check(0 <= getattr(self, name) < 1, f"{kind}: {name} must lie in [0, 1), got {getattr(self, name)}")
    for name in ("num_classes", "num_augment_labels", "out_channels"):
      check(getattr(self, name) >= 0, f"{kind}: {name} must not be negative, got {getattr(self, name)}")
    check_choice(f"{kind}: dtype", self.dtype, DTYPES)

  @property
  @abc.abstractmethod
  def module(self) -> nn.Module:
    """The Linen module; stays inside models/."""

  def init(self, key: Key[Array, ""]) -> Variables:
    """Fresh variables: 'params', and 'constants' with the frequencies of a Fourier embedding; all float32."""
    labels = jnp.zeros((1, self.num_classes)) if self.num_classes else None
    augment = jnp.zeros((1, self.num_augment_labels)) if self.num_augment_labels else None
    return self.module.init(key, jnp.zeros((1, *self.image_shape)), jnp.ones(1), labels, augment, None)

  def apply(
    self,
    variables: Variables,
    x: Float[Array, "b h w c"],
    noise_labels: Float[Array, "b"],
    class_labels: Float[Array, "b k"] | None = None,
    augment_labels: Float[Array, "b a"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
  ) -> Float[Array, "b h w o"]:
    """F of `types.DiffusionNetwork`. InputError for labels where the network takes none, or of another width."""
    for name, given, width in (
      ("class", class_labels, self.num_classes),
      ("augmentation", augment_labels, self.num_augment_labels),
    ):
      check(
        given is None or given.shape[-1] == width,
        f"{type(self).__name__}: takes {width} {name} labels, got {0 if given is None else given.shape[-1]}",
      )
    if self.num_classes and class_labels is None:
      class_labels = jnp.zeros((x.shape[0], self.num_classes))
    return self.module.apply(variables, x, noise_labels, class_labels, augment_labels, dropout_key)

  def level_size(self, level: int) -> tuple[int, int]:
    """Height and width at a level of the U."""
    return self.image_shape[0] >> level, self.image_shape[1] >> level

  def attends(self, level: int) -> bool:
    """Whether the blocks of a level may have self-attention."""
    return self.level_size(level)[0] in self.attention_resolutions

  def drop_labels(self, labels: jax.Array, keys: Keys) -> jax.Array:
    """Class labels, in training the part `label_dropout` of them zero."""
    key = keys()
    if key is None or not self.label_dropout:
      return labels
    return labels * jax.random.bernoulli(key, 1 - self.label_dropout, (labels.shape[0], 1))


EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")


@dataclasses.dataclass(frozen=True)
class SongUNet(EDMUNet):
  """DDPM++ and NCSN++ (Song et al. 2021, appendix H) as reimplemented by Karras et al. 2022; see `ddpmpp`, `ncsnpp`.

  embedding: of the noise label, 'positional' or 'fourier'. encoder: 'standard', or the image at every size added ('skip')
  or carried along ('residual'). decoder: 'standard', or the sum of images of every size ('skip'). taps: the filter of
  up- and downsampling. noise_channel_mult: width of the embedding in units of model_channels.
  """

  embedding: str = "positional"
  encoder: str = "standard"
  decoder: str = "standard"
  taps: tuple[float, ...] = (1, 1)
  noise_channel_mult: int = 1
  embedding_channel_mult: int = 4

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "taps", tuple(self.taps))
    check_choice("SongUNet: embedding", self.embedding, EMBEDDINGS)
    check_choice("SongUNet: encoder", self.encoder, ENCODERS)
    check_choice("SongUNet: decoder", self.decoder, DECODERS)
    check(
      len(self.taps) >= 2 and len(self.taps) % 2 == 0 and sum(self.taps) != 0,
      f"SongUNet: taps must be an even number of values with a sum, got {self.taps}",
    )

  @property
  def module(self) -> nn.Module:
    return SongUNetModule(self)


@dataclasses.dataclass(frozen=True)
class DhariwalUNet(EDMUNet):
  """ADM (Dhariwal & Nichol 2021) as reimplemented by Karras et al. 2022: attention with 64 channels a head."""

  model_channels: int = 192
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (32, 16, 8)
  channels_per_head: int = 64
  embedding_channel_mult: int = 4

  @property
  def module(self) -> nn.Module:
    return DhariwalUNetModule(self)


class SongUNetModule(nn.Module):
  """See `SongUNet` for the fields."""

  config: SongUNet

  @nn.compact
  def __call__(self, x, noise_labels, class_labels, augment_labels, key):
    config, dtype = self.config, DTYPES[self.config.dtype]
    make, keys = Layers(dtype, torch_default=False), Keys(key)
    embedding = self._embedding(make, noise_labels, class_labels, augment_labels, keys)
    kind = nn.remat(UNetBlock) if config.remat else UNetBlock

    def block(x, features, name, attention=False, resample=""):
      return kind(
        features,
        int(attention),
        make,
        resample,
        config.taps,
        skip_scale=math.sqrt(0.5),
        eps=1e-6,
        zero_gain=1e-5,
        qkv_gain=math.sqrt(0.2),
        dropout=config.dropout,
        name=name,
      )(x, embedding, keys())

    channels = config.image_shape[-1]
    x = aux = x.astype(dtype)
    x = make.conv(x, config.model_channels, 3, f"enc_{_size(config, 0)}_conv")
    skips = [x]
    for level, mult in enumerate(config.channel_mult):
      size = _size(config, level)
      if level:
        x = block(x, x.shape[-1], f"enc_{size}_down", resample="down")
        if config.encoder == "skip":
          aux = downsample(aux, config.taps)
          x = x + make.conv(aux, x.shape[-1], 1, f"enc_{size}_aux_skip")
        elif config.encoder == "residual":
          # The convolution comes before the filter, with the padding of both.
          pad = 1 + (len(config.taps) - 1) // 2
          aux = make.conv(aux, x.shape[-1], 3, f"enc_{size}_aux_residual", pad=pad)
          x = aux = (x + downsample(aux, config.taps, pad=0)) * math.sqrt(0.5)
        skips.append(x)
      for i in range(config.num_blocks):
        x = block(x, mult * config.model_channels, f"enc_{size}_block{i}", config.attends(level))
        skips.append(x)

    aux = None
    for level, mult in reversed(list(enumerate(config.channel_mult))):
      size = _size(config, level)
      if level == len(config.channel_mult) - 1:
        x = block(x, x.shape[-1], f"dec_{size}_in0", attention=True)
        x = block(x, x.shape[-1], f"dec_{size}_in1")
      else:
        x = block(x, x.shape[-1], f"dec_{size}_up", resample="up")
      for i in range(config.num_blocks + 1):
        attention = i == config.num_blocks and config.attends(level)
        x = jnp.concatenate([x, skips.pop()], -1)
        x = block(x, mult * config.model_channels, f"dec_{size}_block{i}", attention)
      if config.decoder == "skip" or level == 0:
        h = nn.silu(make.norm(x, 1e-6, f"dec_{size}_aux_norm"))
        h = make.conv(h, config.out_channels or channels, 3, f"dec_{size}_aux_conv", gain=1e-5)
        aux = h if aux is None else h + upsample(aux, config.taps)
    return aux.astype(layers.wide(dtype))

  def _embedding(self, make, noise_labels, class_labels, augment_labels, keys):
    config = self.config
    width = config.noise_channel_mult * config.model_channels
    noise_labels = noise_labels.astype(layers.wide(make.dtype))
    if config.embedding == "positional":
      found = positional_embedding(noise_labels, width, endpoint=True)
    else:
      draw = lambda: 16 * jax.random.normal(self.make_rng("params"), (width // 2,))  # noqa: E731
      angles = 2 * jnp.pi * noise_labels[:, None] * self.variable("constants", "freqs", draw).value
      found = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)
    found = jnp.concatenate(jnp.split(found, 2, 1)[::-1], 1)  # sin first, as in released weights
    if config.num_classes:
      labels = config.drop_labels(class_labels, keys) * math.sqrt(config.num_classes)
      found = found + make.linear(labels, width, "map_label")
    if config.num_augment_labels and augment_labels is not None:
      found = found + make.linear(augment_labels, width, "map_augment", use_bias=False)
    wide = config.embedding_channel_mult * config.model_channels
    found = nn.silu(make.linear(found, wide, "map_layer0"))
    return nn.silu(make.linear(found, wide, "map_layer1"))


class DhariwalUNetModule(nn.Module):
  """See `DhariwalUNet` for the fields."""

  config: DhariwalUNet

  @nn.compact
  def __call__(self, x, noise_labels, class_labels, augment_labels, key):
    config, dtype = self.config, DTYPES[self.config.dtype]
    make, keys = Layers(dtype, torch_default=True), Keys(key)
    embedding = self._embedding(make, noise_labels, class_labels, augment_labels, keys)
    kind = nn.remat(UNetBlock) if config.remat else UNetBlock

    def block(x, features, name, attention=False, resample=""):
      heads = max(features // config.channels_per_head, 1) if attention else 0
      return kind(
        features,
        heads,
        make,
        resample,
        project=False,
        adaptive_scale=True,
        dropout=config.dropout,
        name=name,
      )(x, embedding, keys())

    x = x.astype(dtype)
    skips = []
    for level, mult in enumerate(config.channel_mult):
      size, features = _size(config, level), mult * config.model_channels
      if level:
        x = block(x, x.shape[-1], f"enc_{size}_down", resample="down")
      else:
        x = make.conv(x, features, 3, f"enc_{size}_conv")
      skips.append(x)
      for i in range(config.num_blocks):
        x = block(x, features, f"enc_{size}_block{i}", config.attends(level))
        skips.append(x)
    for level, mult in reversed(list(enumerate(config.channel_mult))):
      size = _size(config, level)
      if level == len(config.channel_mult) - 1:
        x = block(x, x.shape[-1], f"dec_{size}_in0", attention=True)
        x = block(x, x.shape[-1], f"dec_{size}_in1")
      else:
        x = block(x, x.shape[-1], f"dec_{size}_up", resample="up")
      for i in range(config.num_blocks + 1):
        x = jnp.concatenate([x, skips.pop()], -1)
        x = block(x, mult * config.model_channels, f"dec_{size}_block{i}", config.attends(level))
    h = nn.silu(make.norm(x, 1e-5, "out_norm"))
    h = make.conv(h, config.out_channels or config.image_shape[-1], 3, "out_conv", gain=0.0)
    return h.astype(layers.wide(dtype))

  def _embedding(self, make, noise_labels, class_labels, augment_labels, keys):
    config = self.config
    found = positional_embedding(
      noise_labels.astype(layers.wide(make.dtype)), config.model_channels, endpoint=False
    )
    if config.num_augment_labels and augment_labels is not None:
      found = found + make.linear(augment_labels, config.model_channels, "map_augment", use_bias=False)
    wide = config.embedding_channel_mult * config.model_channels
    found = nn.silu(make.linear(found, wide, "map_layer0"))
    found = make.linear(found, wide, "map_layer1")
    if config.num_classes:
      labels = config.drop_labels(class_labels, keys)
      normal = nn.initializers.normal(1.0)
      found = found + make.linear(labels, wide, "map_label", use_bias=False, kernel_init=normal)
    return nn.silu(found)


def _size(config: EDMUNet, level: int) -> str:
  height, width = config.level_size(level)
  return f"{height}x{width}"


# The networks of Karras et al. 2022, table 1, by the names of their papers; fields as the class.
ddpmpp = SongUNet
ncsnpp = functools.partial(
  SongUNet, embedding="fourier", encoder="residual", taps=(1, 3, 3, 1), noise_channel_mult=2
)
adm = DhariwalUNet
