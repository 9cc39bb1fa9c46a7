"""A classifier of noisy images on the features of a frozen U-ViT: a linear layer and an attention block on its middle tokens.

Golatkar et al. 2024 (arXiv:2308.01937, section 3) weigh shards by such a classifier. Only the first half of the backbone is evaluated. The
widths, the layer norm and the mean over tokens at the end are ours, as the paper gives none.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.models.linen import check
from jax_trustdiff.models.uvit import Block, UViT
from jax_trustdiff.types import BACKBONE, Logits, Variables


@dataclasses.dataclass(frozen=True)
class UViTHead:
  """A `types.NoiseConditionalClassifier` with variables {'params': the head's, 'backbone': the frozen network's}; hashable.

  backbone: a `UViT` or its fields, without prompts; with the classes or the context that it may have it is not told any.
  embed_dim: channels of the tokens in the head. The head computes in float32.
  """

  backbone: UViT | Mapping[str, Any]
  image_shape: tuple[int, int, int]
  num_classes: int
  embed_dim: int = 128
  num_heads: int = 4

  def __post_init__(self):
    if isinstance(self.backbone, Mapping):
      fields = {name: tuple(v) if isinstance(v, list) else v for name, v in self.backbone.items()}
      object.__setattr__(self, "backbone", UViT(**fields))
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    check(
      self.image_shape == self.backbone.image_shape,
      f"uvit_head: the backbone is of images of {self.backbone.image_shape}, not {self.image_shape}",
    )
    check(not self.backbone.prompt_length, "uvit_head: the backbone must be one without prompts")
    check(
      not self.backbone.context_shape, "uvit_head: the backbone wants a context, which a classifier has not"
    )
    check(self.num_classes >= 2, f"uvit_head: num_classes must be at least 2, got {self.num_classes}")
    check(
      min(self.embed_dim, self.num_heads) >= 1 and self.embed_dim % self.num_heads == 0,
      f"uvit_head: embed_dim must be divisible by num_heads {self.num_heads}, got {self.embed_dim}",
    )

  def init(self, key: Key[Array, ""]) -> Variables:
    """A fresh head on a fresh backbone."""
    backbone = self.backbone.init(key)
    tokens = jax.eval_shape(self.backbone.middle, backbone, jnp.zeros((1, *self.image_shape)), jnp.ones(1))
    params = _Head(self).init(jax.random.fold_in(key, 1), jnp.zeros(tokens.shape, tokens.dtype))
    return {**params, BACKBONE: backbone}

  def apply(
    self,
    variables: Variables,
    x: Float[Array, "b h w c"],
    noise_labels: Float[Array, "b"],
    dropout_key: Key[Array, ""] | None = None,
  ) -> Logits:
    """Logits of noisy images, scaled and told as the backbone is; there is no dropout."""
    tokens = self.backbone.middle(variables[BACKBONE], x, noise_labels)
    return _Head(self).apply({"params": variables["params"]}, tokens)


class _Head(nn.Module):
  config: UViTHead

  @nn.compact
  def __call__(self, tokens: Float[Array, "b n d"]) -> Logits:
    config = self.config
    h = nn.Dense(config.embed_dim, name="project")(tokens.astype(jnp.float32))
    h = Block(config.num_heads, 4, h.dtype, name="block")(h)
    h = nn.LayerNorm(name="norm")(h).mean(1)
    return nn.Dense(config.num_classes, kernel_init=nn.initializers.zeros, name="logits")(h)
