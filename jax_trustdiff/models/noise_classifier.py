"""A classifier of noisy images that is told the noise level, for classifier guidance (Dhariwal & Nichol 2021, section 4).

The encoder half of ADM's U-Net (arXiv:2105.05233), mean over all positions, and a linear layer. Group normalisation: no running
statistics, and the logits of an image do not depend on its batch.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.models import layers
from jax_trustdiff.models.edm_unet import Keys, Layers, UNetBlock, positional_embedding
from jax_trustdiff.models.linen import DTYPES, check, check_choice
from jax_trustdiff.types import Logits, Variables


@dataclasses.dataclass(frozen=True)
class NoiseClassifier:
  """A `types.NoiseConditionalClassifier`; hashable, equal when the fields are.

  channel_mult: widths of the levels, each of half the resolution of the one before, in units of model_channels.
  attention_resolutions: sizes with self-attention. dtype: of convolutions and attention; parameters, the embedding, statistics
  and logits are float32. remat: blocks are computed again in the backward pass.
  """

  num_classes: int = 10
  image_shape: tuple[int, int, int] = (32, 32, 3)
  model_channels: int = 64
  channel_mult: tuple[int, ...] = (1, 2, 2)
  num_blocks: int = 2
  attention_resolutions: tuple[int, ...] = (8,)
  channels_per_head: int = 64
  dropout: float = 0.0
  dtype: str = "float32"
  remat: bool = False

  def __post_init__(self):
    for name in ("image_shape", "channel_mult", "attention_resolutions"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    halvings = 2 ** (len(self.channel_mult) - 1)
    check(
      len(self.image_shape) == 3 and min(self.image_shape) >= 1,
      f"noise_classifier: image_shape must be (height, width, channels), got {self.image_shape}",
    )
    check(
      not any(size % halvings for size in self.image_shape[:2]),
      f"noise_classifier: height and width must be divisible by {halvings} for {len(self.channel_mult)} levels, "
      f"got {self.image_shape}",
    )
    check(self.num_classes >= 2, f"noise_classifier: num_classes must be at least 2, got {self.num_classes}")
    check(
      self.model_channels >= 8 and self.model_channels % 4 == 0,
      f"noise_classifier: model_channels must be a multiple of 4 of at least 8, got {self.model_channels}",
    )
    check(self.num_blocks >= 1, f"noise_classifier: num_blocks must be at least 1, got {self.num_blocks}")
    check(0 <= self.dropout < 1, f"noise_classifier: dropout must lie in [0, 1), got {self.dropout}")
    check_choice("noise_classifier: dtype", self.dtype, DTYPES)

  def init(self, key: Key[Array, ""]) -> Variables:
    """Fresh variables {'params': ...}, all float32."""
    return NoiseClassifierModule(self).init(key, jnp.zeros((1, *self.image_shape)), jnp.ones(1), None)

  def apply(
    self,
    variables: Variables,
    x: Float[Array, "b h w c"],
    noise_labels: Float[Array, "b"],
    dropout_key: Key[Array, ""] | None = None,
  ) -> Logits:
    """Logits of noisy images, scaled to about unit variance; noise_labels as a U-Net is told them."""
    return NoiseClassifierModule(self).apply(variables, x, noise_labels, dropout_key)


class NoiseClassifierModule(nn.Module):
  """See `NoiseClassifier` for the fields."""

  config: NoiseClassifier

  @nn.compact
  def __call__(self, x, noise_labels, key):
    config, dtype = self.config, DTYPES[self.config.dtype]
    make, keys = Layers(dtype, torch_default=True), Keys(key)
    kind = nn.remat(UNetBlock) if config.remat else UNetBlock
    width = 4 * config.model_channels
    embedding = positional_embedding(
      noise_labels.astype(layers.wide(dtype)), config.model_channels, endpoint=False
    )
    embedding = nn.silu(make.linear(embedding, width, "map_layer0"))
    embedding = nn.silu(make.linear(embedding, width, "map_layer1"))

    def block(x, features, name, attention=False, resample=""):
      return kind(
        features,
        max(features // config.channels_per_head, 1) if attention else 0,
        make,
        resample,
        project=False,
        adaptive_scale=True,
        dropout=config.dropout,
        name=name,
      )(x, embedding, keys())

    x = make.conv(x.astype(dtype), config.channel_mult[0] * config.model_channels, 3, "conv")
    for level, mult in enumerate(config.channel_mult):
      attention = config.image_shape[0] >> level in config.attention_resolutions
      if level:
        x = block(x, x.shape[-1], f"level{level}_down", resample="down")
      for i in range(config.num_blocks):
        x = block(x, mult * config.model_channels, f"level{level}_block{i}", attention)
    h = nn.silu(make.norm(x, 1e-5, "norm")).astype(layers.wide(dtype)).mean((1, 2))
    return make.linear(h, config.num_classes, "logits")
