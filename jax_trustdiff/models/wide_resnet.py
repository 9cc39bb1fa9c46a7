"""WideResNet-depth-width (Zagoruyko & Komodakis 2016, arXiv:1605.07146) with its normalisation built in.

The variant used for adversarial training by Gowal et al. 2020 (arXiv:2010.03593) and after them by
Rebuffi et al. 2021 and Wang et al. 2023: pre-activation blocks, SiLU or ReLU, 'SAME' padding.
"""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jax_trustdiff.models import layers
from jax_trustdiff.models.linen import ACTIVATIONS, DTYPES, LinenClassifier, check, normalise


class Block(nn.Module):
  """Two 3x3 convolutions; the shortcut is the input, or a 1x1 convolution of the *activated* input."""

  features: int
  stride: int
  activation: str
  dtype: Any
  bn_groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
    act = ACTIVATIONS[self.activation]
    activated = act(layers.BatchNorm(groups=self.bn_groups, name="norm0")(x, train))
    h = layers.conv(self.features, 3, self.stride, dtype=self.dtype, name="conv0")(activated)
    h = act(layers.BatchNorm(groups=self.bn_groups, name="norm1")(h, train))
    h = layers.conv(self.features, 3, dtype=self.dtype, name="conv1")(h)
    if x.shape[-1] != self.features:
      x = layers.conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(activated)
    return h + x


class WideResNetModule(nn.Module):
  """Unit images -> logits; see `WideResNet` for the fields."""

  config: "WideResNet"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b k"]:
    config = self.config
    dtype = DTYPES[config.dtype]
    block = nn.remat(Block, static_argnums=(2,)) if config.remat else Block
    h = layers.space_to_depth(normalise(x, config.mean, config.std), config.patch).astype(dtype)
    h = layers.conv(16, 3, dtype=dtype, name="conv")(h)
    for i in range(3):
      for j in range((config.depth - 4) // 6):
        h = block(
          features=16 * config.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          activation=config.activation,
          dtype=dtype,
          bn_groups=config.bn_groups,
          name=f"group{i}_block{j}",
        )(h, train)
    h = ACTIVATIONS[config.activation](layers.BatchNorm(groups=config.bn_groups, name="norm")(h, train))
    h = h.astype(layers.wide(dtype)).mean((1, 2))
    return layers.linear(config.num_classes, name="logits", dtype=layers.wide(dtype))(h)


@dataclasses.dataclass(frozen=True)
class WideResNet(LinenClassifier):
  """The classifier WRN-depth-width: a 3x3 convolution to 16 channels, three groups of (depth - 4) / 6 blocks
  of 16, 32 and 64 times `width` channels with strides 1, 2, 2, BatchNorm, activation, mean over all
  positions, linear layer.

  depth: 10, 16, 22, 28, 34, ..., 70. image_shape: (h, w, c), any size.
  activation: 'swish' (SiLU) or 'relu'. mean, std: images become (x - mean) / std inside the network;
  one value per channel, or one for all. dtype: 'float32' or 'bfloat16', the type of convolutions and
  activations; parameters, statistics, normalised images before the cast, and logits are float32. 'float64', for
  tests, needs jax_enable_x64 and widens all but the parameters.
  patch: squares of so many pixels a side are the channels of one position (space to depth); 1: as in the papers.
  With 2 or 4 a step takes about a fourth or a sixteenth of the time, for small machines.
  remat: recompute each block in the backward pass to save memory. bn_groups: ghost batch normalisation
  (Hoffer et al. 2017, algorithm 1) in that many groups of a batch.
  """

  depth: int = 28
  width: int = 10
  num_classes: int = 10
  image_shape: tuple[int, int, int] = (32, 32, 3)
  activation: str = "swish"
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)
  patch: int = 1
  dtype: str = "float32"
  remat: bool = False
  bn_groups: int = 1

  def __post_init__(self):
    super().__post_init__()
    good = self.depth >= 10 and (self.depth - 4) % 6 == 0
    check(good, f"wide_resnet: depth must be 10, 16, 22, 28, ... (4 + 6n), got {self.depth}")
    check(self.width >= 1, f"wide_resnet: width must be at least 1, got {self.width}")
    height, wide, _ = self.image_shape
    whole = self.patch >= 1 and height % self.patch == 0 and wide % self.patch == 0
    check(whole, f"wide_resnet: patch={self.patch} does not divide images of {height}x{wide}")

  @property
  def module(self) -> nn.Module:
    return WideResNetModule(self)
