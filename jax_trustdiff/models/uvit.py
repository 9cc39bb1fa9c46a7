"""U-ViT: the noise label, the condition and patches of the image are all tokens of one transformer with long skips.

Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models" (arXiv:2209.12152), section 3.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.models import layers
from jax_trustdiff.models.attention import attention
from jax_trustdiff.models.linen import DTYPES, check, check_choice
from jax_trustdiff.types import Variables

SIZES = {  # table 1 of the paper; 'S_deep' is that of its text-to-image experiments, 'tiny' is for tests
  "tiny": dict(embed_dim=64, depth=4, num_heads=4),
  "S": dict(embed_dim=512, depth=12, num_heads=8),
  "S_deep": dict(embed_dim=512, depth=16, num_heads=8),
  "M": dict(embed_dim=768, depth=16, num_heads=12),
  "L": dict(embed_dim=1024, depth=20, num_heads=16),
  "H": dict(embed_dim=1152, depth=28, num_heads=16, final_conv=False),
}


def uvit(
  size: str = "S",
  *,
  image_shape: tuple[int, int, int],
  num_classes: int = 0,
  patch_size: int = 2,
  embed_dim: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_ratio: int = 4,
  context_shape: tuple[int, ...] = (),
  mlp_time_embed: bool = False,
  final_conv: bool | None = None,
  label_dropout: float = 0.0,
  prompt_length: int = 0,
  prompts_per_class: bool = False,
  dtype: str = "float32",
  remat: bool = False,
) -> "UViT":
  """The `UViT` of a size in SIZES; what is not None replaces what the size says."""
  check_choice("uvit: size", size, SIZES)
  given = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, final_conv=final_conv)
  return UViT(
    image_shape=image_shape,
    num_classes=num_classes,
    patch_size=patch_size,
    mlp_ratio=mlp_ratio,
    context_shape=context_shape,
    mlp_time_embed=mlp_time_embed,
    label_dropout=label_dropout,
    prompt_length=prompt_length,
    prompts_per_class=prompts_per_class,
    dtype=dtype,
    remat=remat,
    **SIZES[size] | {name: value for name, value in given.items() if value is not None},
  )


@dataclasses.dataclass(frozen=True)
class UViT:
  """A `types.DiffusionNetwork`, hashable, equal when the fields are: depth / 2 blocks, one in the middle, and depth / 2
  blocks that first merge in the output of their counterpart.

  image_shape: (h, w, c), height and width divisible by patch_size; for latent models that of the latents.
  context_shape: (tokens, channels) of a text given to `apply`, or () for none; excludes num_classes.
  mlp_time_embed: two layers between the embedding of the noise label and its token. final_conv: a 3x3 convolution of the
  assembled image. label_dropout: the part of class labels that are set to zero in training, for classifier-free guidance.
  Released guidance models were trained with a label of their own for 'no class', the last: give its one-hot, not zeros.
  prompt_length: tokens that are added to every block and are parameters ('prompts'; Golatkar et al. 2024, arXiv:2308.01937, section 4): what a
  frozen network is adapted by. prompts_per_class: one set for every class, of which an image has that of its label, or with a label of
  zeros one of zeros; else one for all.
  dtype: of tokens and attention; parameters, embeddings, statistics, softmax and the output layers are float32. remat:
  blocks are computed again in the backward pass. There is no dropout of activations.
  """

  image_shape: tuple[int, int, int]
  num_classes: int = 0
  patch_size: int = 2
  embed_dim: int = 512
  depth: int = 12
  num_heads: int = 8
  mlp_ratio: int = 4
  context_shape: tuple[int, ...] = ()
  mlp_time_embed: bool = False
  final_conv: bool = True
  label_dropout: float = 0.0
  prompt_length: int = 0
  prompts_per_class: bool = False
  dtype: str = "float32"
  remat: bool = False

  num_augment_labels: ClassVar[int] = 0

  def __post_init__(self):
    for name in ("image_shape", "context_shape"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    check(
      len(self.image_shape) == 3 and min(self.image_shape) >= 1,
      f"UViT: image_shape must be (height, width, channels), got {self.image_shape}",
    )
    for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
      check(getattr(self, name) >= 1, f"UViT: {name} must be at least 1, got {getattr(self, name)}")
    check(
      not any(size % self.patch_size for size in self.image_shape[:2]),
      f"UViT: height and width must be divisible by patch_size {self.patch_size}, got {self.image_shape}",
    )
    check(self.depth % 2 == 0, f"UViT: depth must be even, got {self.depth}")
    check(
      self.embed_dim >= 4 and self.embed_dim % 2 == 0 and self.embed_dim % self.num_heads == 0,
      f"UViT: embed_dim must be even and divisible by num_heads {self.num_heads}, got {self.embed_dim}",
    )
    check(self.num_classes >= 0, f"UViT: num_classes must not be negative, got {self.num_classes}")
    check(
      len(self.context_shape) in (0, 2) and min(self.context_shape, default=1) >= 1,
      f"UViT: context_shape must be (tokens, channels) or (), got {self.context_shape}",
    )
    check(
      not (self.num_classes and self.context_shape),
      f"UViT: takes classes or a context, got num_classes {self.num_classes} and context_shape "
      f"{self.context_shape}",
    )
    check(self.prompt_length >= 0, f"UViT: prompt_length must not be negative, got {self.prompt_length}")
    check(
      not self.prompts_per_class or min(self.prompt_length, self.num_classes) > 0,
      f"UViT: prompts_per_class needs classes and a prompt_length, got {self.num_classes} and {self.prompt_length}",
    )
    check(0 <= self.label_dropout < 1, f"UViT: label_dropout must lie in [0, 1), got {self.label_dropout}")
    check_choice("UViT: dtype", self.dtype, DTYPES)

  @property
  def module(self) -> nn.Module:
    """The Linen module; stays inside models/."""
    return UViTModule(self)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

  @property
  def num_extras(self) -> int:
    """Tokens that are no patches: the noise label's, and those of the condition."""
    return 1 + bool(self.num_classes) + (self.context_shape[0] if self.context_shape else 0)

  def init(self, key: Key[Array, ""]) -> Variables:
    """Fresh variables {'params': ...}, all float32."""
    labels = jnp.zeros((1, self.num_classes)) if self.num_classes else None
    context = jnp.zeros((1, *self.context_shape)) if self.context_shape else None
    return self.module.init(key, jnp.zeros((1, *self.image_shape)), jnp.ones(1), labels, context)

  def apply(
    self,
    variables: Variables,
    x: Float[Array, "b h w c"],
    noise_labels: Float[Array, "b"],
    class_labels: Float[Array, "b k"] | None = None,
    augment_labels: Float[Array, "b a"] | None = None,
    dropout_key: Key[Array, ""] | None = None,
    context: Float[Array, "b n e"] | None = None,
  ) -> Float[Array, "b h w c"]:
    """F of `types.DiffusionNetwork`; the paper's weights want noise_labels in [0, 1000].

    context: [b, *context_shape], there where the network has one. InputError for conditions that the network does not
    take, or of another shape.
    """
    arguments = self._checked(x, class_labels, augment_labels, dropout_key, context)
    return self.module.apply(variables, x, noise_labels, *arguments)

  def middle(
    self,
    variables: Variables,
    x: Float[Array, "b h w c"],
    noise_labels: Float[Array, "b"],
    class_labels: Float[Array, "b k"] | None = None,
  ) -> Float[Array, "b n d"]:
    """The tokens after the block in the middle, those that are no patches first: features at half the cost."""
    arguments = self._checked(x, class_labels, None, None, None)
    return UViTModule(self, until_middle=True).apply(variables, x, noise_labels, *arguments)

  def _checked(self, x, class_labels, augment_labels, dropout_key, context):
    """(class labels, context) as the module takes them."""
    check(
      x.shape[1:] == self.image_shape, f"UViT: takes images of shape {self.image_shape}, got {x.shape[1:]}"
    )
    check(augment_labels is None, "UViT: takes no augmentation labels")
    width = 0 if class_labels is None else class_labels.shape[-1]
    check(
      class_labels is None or width == self.num_classes,
      f"UViT: takes {self.num_classes} class labels, got {width}",
    )
    given = () if context is None else context.shape[1:]
    check(
      given == self.context_shape, f"UViT: takes a context of shape {self.context_shape}, got {tuple(given)}"
    )
    if self.num_classes and class_labels is None:
      class_labels = jnp.zeros((x.shape[0], self.num_classes))
    if self.num_classes and self.label_dropout and dropout_key is not None:
      kept = jax.random.bernoulli(dropout_key, 1 - self.label_dropout, (x.shape[0], 1))
      class_labels = class_labels * kept
    return class_labels, context


class UViTModule(nn.Module):
  """See `UViT` for the fields; until_middle: returns the tokens after the block in the middle."""

  config: UViT
  until_middle: bool = False

  @nn.compact
  def __call__(self, x, noise_labels, class_labels, context):
    config, dtype = self.config, DTYPES[self.config.dtype]
    wide = layers.wide(dtype)
    extras = self._extras(noise_labels.astype(wide), class_labels, context)
    tokens = _conv(x, config.embed_dim, config.patch_size, dtype, "patch_embed", stride=config.patch_size)
    tokens = tokens.reshape(x.shape[0], -1, config.embed_dim)
    tokens = jnp.concatenate([*(extra.astype(wide) for extra in extras), tokens.astype(wide)], 1)
    positions = self.param("pos_embed", NORMAL, (1, tokens.shape[1], config.embed_dim))
    h = (tokens + positions).astype(dtype)

    block = functools.partial(
      nn.remat(Block) if config.remat else Block, config.num_heads, config.mlp_ratio, dtype
    )
    prompts = self._prompts(class_labels)
    skips = []
    for i in range(config.depth // 2):
      h = block(name=f"in_block{i}")(h, None, prompts.pop(0))
      skips.append(h)
    h = block(name="mid_block")(h, None, prompts.pop(0))
    if self.until_middle:
      return h
    for i in range(config.depth // 2):
      h = block(name=f"out_block{i}")(h, skips.pop(), prompts.pop(0))

    h = _norm(h, wide, "norm")[:, config.num_extras :]
    h = _linear(h, config.patch_size**2 * config.image_shape[-1], wide, "decoder_pred")
    image = self._assemble(h)
    return _conv(image, image.shape[-1], 3, wide, "final_layer") if config.final_conv else image

  def _extras(self, noise_labels, class_labels, context) -> list[jax.Array]:
    """The tokens before the patches: [class], noise, [context]."""
    config, wide = self.config, noise_labels.dtype
    found = time_embedding(noise_labels, config.embed_dim)
    if config.mlp_time_embed:
      found = nn.silu(_linear(found, 4 * config.embed_dim, wide, "time_embed_0"))
      found = _linear(found, config.embed_dim, wide, "time_embed_2")
    tokens = [found[:, None]]
    if config.num_classes:
      table = self.param("label_embed", nn.initializers.normal(1.0), (config.num_classes, config.embed_dim))
      tokens.insert(0, (class_labels @ table)[:, None])
    if config.context_shape:
      tokens.append(_linear(context, config.embed_dim, wide, "context_embed"))
    return tokens

  def _prompts(self, class_labels) -> list[jax.Array | None]:
    """Of every block, the tokens that are added to it: [1 l d] or, of each image's class, [b l d]."""
    config = self.config
    if not config.prompt_length:
      return [None] * (config.depth + 1)
    sets = config.num_classes if config.prompts_per_class else 1
    limit = math.sqrt(6 / (config.image_shape[-1] * config.patch_size**2 + config.embed_dim))
    shape = (sets, config.depth + 1, config.prompt_length, config.embed_dim)
    table = self.param("prompts", layers.uniform_init(limit), shape)
    if config.prompts_per_class:
      table = jnp.einsum("bk,knld->bnld", class_labels, table)
    return [table[:, i] for i in range(config.depth + 1)]

  def _assemble(self, patches: jax.Array) -> jax.Array:
    """[b, rows * columns, p * p * c] -> [b h w c]; a patch's values are ordered (row, column, channel)."""
    (rows, columns), p = self.config.grid, self.config.patch_size
    patches = patches.reshape(-1, rows, columns, p, p, self.config.image_shape[-1])
    return patches.swapaxes(2, 3).reshape(-1, *self.config.image_shape)


class Block(nn.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)); a skip is first merged into x by a linear layer.

  prompts: tokens that go through the block with those of x and are dropped behind it.
  """

  num_heads: int
  mlp_ratio: int
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    skip: Float[Array, "b n d"] | None = None,
    prompts: Float[Array, "p l d"] | None = None,
  ) -> Float[Array, "b n d"]:
    kept, d = x.shape[1:]
    if skip is not None:
      x = _linear(jnp.concatenate([x, skip], -1), d, self.dtype, "skip_linear")
    if prompts is not None:
      prompts = jnp.broadcast_to(prompts.astype(self.dtype), (len(x), *prompts.shape[1:]))
      x = jnp.concatenate([x, prompts], 1)
    b, n, _ = x.shape
    qkv = _linear(_norm(x, self.dtype, "norm1"), 3 * d, self.dtype, "attn_qkv", use_bias=False)
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads), 2, 0)
    x = x + _linear(attention(q, k, v).reshape(b, n, d), d, self.dtype, "attn_proj")
    h = _linear(_norm(x, self.dtype, "norm2"), self.mlp_ratio * d, self.dtype, "mlp_fc1")
    return (x + _linear(nn.gelu(h, approximate=False), d, self.dtype, "mlp_fc2"))[:, :kept]


def time_embedding(t: Float[Array, "b"], channels: int) -> Float[Array, "b c"]:
  """[cos, sin] of t times 10000^(-k / (channels/2)), k = 0, ..., channels/2 - 1."""
  half = channels // 2
  frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=t.dtype) / half)
  angles = t[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)


NORMAL = nn.initializers.normal(0.02)  # the paper's code truncates at 100 standard deviations


def _linear(x: jax.Array, features: int, dtype: Any, name: str, use_bias: bool = True) -> jax.Array:
  return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=NORMAL, name=name)(x)


def _norm(x: jax.Array, dtype: Any, name: str) -> jax.Array:
  """Layer normalisation in float32, returned in `dtype`."""
  module = nn.LayerNorm(epsilon=1e-5, dtype=layers.wide(dtype), use_fast_variance=False, name=name)
  return module(x).astype(dtype)


def _conv(x: jax.Array, features: int, size: int, dtype: Any, name: str, stride: int = 1) -> jax.Array:
  """size x size convolution with bias, of patches (stride = size) or else of the same size, as a product: `_patch_product`.

  Initial values as torch's: kernel and bias uniform in +-1 / sqrt(fan in).
  """
  limit = 1 / math.sqrt(size * size * x.shape[-1])
  module = nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding="VALID" if stride > 1 else "SAME",
    dtype=dtype,
    kernel_init=layers.uniform_init(limit),
    bias_init=layers.uniform_init(limit),
    conv_general_dilated=_patch_product,
    name=name,
  )
  return module(x)


def _patch_product(
  x: Float[Array, "b h w c"], kernel: Float[Array, "p p c d"], strides, padding, *, precision=None, **numbers
) -> Float[Array, "b m n d"]:
  """What `lax.conv_general_dilated` gives for strides p, or 1 and the same size: the product of all patches and the kernel.

  With the few channels of an image it costs no more, and its `vmap` over kernels is a batched product, where that of a
  convolution is a grouped one, which takes 3 to 6 times as long as the convolutions one by one.
  """
  size, (b, h, w, c) = kernel.shape[0], x.shape
  if strides[0] == size:
    patches = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
  else:
    before = (size - 1) // 2
    x = jnp.pad(x, ((0, 0), *2 * ((before, size - 1 - before),), (0, 0)))
    offsets = itertools.product(range(size), repeat=2)
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i, j in offsets], -1)
  rows, columns = h // strides[0], w // strides[0]
  patches = patches.reshape(b, rows, columns, size * size * c)
  return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision)
