"""What somebody does who wants to be rid of a mark: to the weights of a model, and to its images with a model or with the decoder.

Noise on weights is the robustness test of Zhao et al. 2023 (arXiv:2303.10137, section 4.2); rounding and pruning are what happens to models
anyway. Regeneration is that of An et al. 2024 (WAVES, arXiv:2401.08573, section 3.2). What happens to files of images is in
`evaluation.image_attacks`.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.attacks import norms, pgd
from jax_trustdiff.diffusion.samplers import NoiseLevels
from jax_trustdiff.types import DenoiseFn, InputError, KeyOrKeys, PyTree, Signed, Unit
from jax_trustdiff.watermark.codec import BoundCodec

# ---- weights ----


def add_noise(
  params: PyTree, key: Key[Array, ""], std: float | Float[Array, ""], relative: bool = False
) -> PyTree:
  """Normal noise of this standard deviation on every weight; relative: of this part of each tensor's root mean square.

  The noise of a tensor depends on the key and on its path alone: of two strengths one is the other, scaled.
  """

  def noisy(path, leaf):
    noise = jax.random.normal(
      jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), leaf.shape, leaf.dtype
    )
    scale = jnp.sqrt(jnp.square(leaf).mean()) if relative else 1.0
    return leaf + std * scale * noise

  return jax.tree_util.tree_map_with_path(noisy, params)


def to_bfloat16(params: PyTree) -> PyTree:
  """Every weight rounded to bfloat16, eight significant bits."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params)


def to_integers(params: PyTree, num_bits: int) -> PyTree:
  """Every weight rounded to one of 2^num_bits - 1 values, evenly spaced from -max|w| to max|w| of its tensor; 2 to 16 bits."""
  if not 2 <= num_bits <= 16:
    raise InputError(f"weights are rounded to integers of 2 to 16 bits, got {num_bits}")
  most = 2 ** (num_bits - 1) - 1

  def rounded(leaf):
    largest = jnp.abs(leaf).max()
    step = jnp.where(largest > 0, largest, 1) / most
    return jnp.round(leaf / step) * step

  return jax.tree.map(rounded, params)


def prune(params: PyTree, share: float) -> PyTree:
  """The smallest |w| of every tensor set to 0, this share of them (Han et al. 2015, arXiv:1506.02626); one-dimensional ones stay."""
  if not 0 <= share <= 1:
    raise InputError(f"the share of weights that are pruned lies between 0 and 1, got {share}")

  def pruned(leaf):
    count = int(share * leaf.size)
    if leaf.ndim < 2 or not count:
      return leaf
    limit = jnp.sort(jnp.abs(leaf).reshape(-1))[count - 1]
    return jnp.where(jnp.abs(leaf) <= limit, 0, leaf)

  return jax.tree.map(pruned, params)


# ---- images ----


def regenerate(
  denoise: DenoiseFn,
  sampler: NoiseLevels,
  x: Signed,
  noise: Float[Array, "b h w c"],
  keys: KeyOrKeys | None = None,
) -> Signed:
  """Images with normal noise, taken back by a sampler that begins at its standard deviation.

  sampler: one of `diffusion.samplers` with noise levels, called as (denoise, start, keys) with a start in units of the first of them.
  """
  return sampler(denoise, x / float(sampler.sigmas[0]) + noise, keys)


def flip_bits(codec: BoundCodec, x: Unit, radius: float, num_steps: int = 40, step_size: float = 0.0) -> Unit:
  """Images within `radius` (Linf, of images in [0, 1]) of x whose bits the decoder reads otherwise, as far as that can be done.

  PGD (Madry et al. 2018) by somebody who has the decoder but not the key: down the logits of all bits, each with the sign it has for x
  until it is -1. (Up the cross-entropy, bits that are wrong already would take over.) step_size 0: 2.5 radius / num_steps.
  """
  sign = jax.lax.stop_gradient(jnp.where(codec.decode(x) > 0, 1, -1))

  def loss(images):
    return -jnp.maximum(sign * codec.decode(images), -1).sum(1)

  step = step_size or 2.5 * radius / num_steps

  def move(images, gradient):
    return images + step * norms.ascend(gradient, "linf")

  return pgd.maximize(loss, x, x, "linf", radius, num_steps, move)


# (params, strength, key) -> params
WEIGHT_ATTACKS: dict[str, Callable[[PyTree, Any, Any], PyTree]] = {
  "weight_noise": lambda params, strength, key: add_noise(params, key, strength),
  "relative_weight_noise": lambda params, strength, key: add_noise(params, key, strength, relative=True),
  "bfloat16": lambda params, strength, key: to_bfloat16(params),
  "weight_bits": lambda params, strength, key: to_integers(params, round(strength)),
  "prune": lambda params, strength, key: prune(params, strength),
}
