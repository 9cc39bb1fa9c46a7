"""Pre-activation ResNet-18 and -34 for small images (He et al. 2016, arXiv:1603.05027), normalisation built in.

With 3x3 shortcuts and SiLU: the variant of Gowal et al. 2020 (arXiv:2010.03593), used by Rebuffi et al. 2021
and Wang et al. 2023. With 1x1 shortcuts: the plain one.
"""

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jax_trustdiff.models import layers
from jax_trustdiff.models.linen import (
  ACTIVATIONS,
  DTYPES,
  LinenClassifier,
  check,
  check_choice,
  normalise,
)

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # blocks per stage
SHORTCUTS = {"3x3": 3, "1x1": 1}


class Block(nn.Module):
  """Two 3x3 convolutions; the shortcut is the input, or its convolution where size or channels change.

  The 3x3 shortcut convolves the raw input, the 1x1 shortcut the activated input.
  """

  features: int
  stride: int
  activation: str
  shortcut: str
  dtype: Any
  bn_groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 c2"]:
    act = ACTIVATIONS[self.activation]
    activated = act(layers.BatchNorm(groups=self.bn_groups, name="norm0")(x, train))
    h = layers.conv(self.features, 3, self.stride, dtype=self.dtype, name="conv0")(activated)
    h = act(layers.BatchNorm(groups=self.bn_groups, name="norm1")(h, train))
    h = layers.conv(self.features, 3, dtype=self.dtype, name="conv1")(h)
    if x.shape[-1] != self.features or self.stride != 1:
      projected = x if self.shortcut == "3x3" else activated
      size = SHORTCUTS[self.shortcut]
      x = layers.conv(self.features, size, self.stride, dtype=self.dtype, name="shortcut")(projected)
    return h + x


class PreActResNetModule(nn.Module):
  """Unit images -> logits; see `PreActResNet` for the fields."""

  config: "PreActResNet"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b k"]:
    config = self.config
    dtype = DTYPES[config.dtype]
    block = nn.remat(Block, static_argnums=(2,)) if config.remat else Block
    h = normalise(x, config.mean, config.std).astype(dtype)
    h = layers.conv(config.width, 3, dtype=dtype, name="conv")(h)
    for i, num_blocks in enumerate(STAGES[config.depth]):
      for j in range(num_blocks):
        h = block(
          features=config.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          activation=config.activation,
          shortcut=config.shortcut,
          dtype=dtype,
          bn_groups=config.bn_groups,
          name=f"group{i}_block{j}",
        )(h, train)
    h = ACTIVATIONS[config.activation](layers.BatchNorm(groups=config.bn_groups, name="norm")(h, train))
    h = h.astype(layers.wide(dtype)).mean((1, 2))
    return layers.linear(config.num_classes, name="logits", dtype=layers.wide(dtype))(h)


@dataclasses.dataclass(frozen=True)
class PreActResNet(LinenClassifier):
  """The classifier PreActResNet-depth: a 3x3 convolution, four stages of 1, 2, 4 and 8 times `width` channels
  with strides 1, 2, 2, 2, BatchNorm, activation, mean over all positions, linear layer.

  depth: 18 or 34. shortcut: '3x3' or '1x1' where size or channels change. The other fields are those
  of `WideResNet`.
  """

  depth: int = 18
  width: int = 64
  num_classes: int = 10
  image_shape: tuple[int, int, int] = (32, 32, 3)
  activation: str = "swish"
  shortcut: str = "3x3"
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)
  dtype: str = "float32"
  remat: bool = False
  bn_groups: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_choice("preact_resnet: depth", self.depth, STAGES)
    check_choice("preact_resnet: shortcut", self.shortcut, SHORTCUTS)
    check(self.width >= 1, f"preact_resnet: width must be at least 1, got {self.width}")

  @property
  def module(self) -> nn.Module:
    return PreActResNetModule(self)
