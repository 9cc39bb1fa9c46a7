"""Networks that learn on top of a frozen one: low-rank updates of any network's kernels, and a chosen part of its own parameters.

Both are a `types.DiffusionNetwork` whose variables are {'params': what is trained, 'backbone': the frozen network's variables}. The backbone
is no parameter, so no gradient, optimizer state or average of it is kept. Shards of a mixture have 'params' of their own and one backbone
together (Golatkar et al. 2024, arXiv:2308.01937, section 4).
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jax_trustdiff.models.linen import check
from jax_trustdiff.pytrees import leaf_name, leaves_by_name
from jax_trustdiff.types import BACKBONE, DiffusionNetwork, Variables


@dataclasses.dataclass(frozen=True)
class _Adapted:
  """A network with a frozen one inside."""

  backbone: DiffusionNetwork

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c)"""
    return self.backbone.image_shape

  @property
  def num_classes(self) -> int:
    """0: unconditional."""
    return self.backbone.num_classes

  @property
  def num_augment_labels(self) -> int:
    """0: not conditioned on augmentations."""
    return self.backbone.num_augment_labels

  @property
  def dtype(self) -> str:
    """Of the activations."""
    return self.backbone.dtype

  def init(self, key: jax.Array) -> Variables:
    """Fresh adapters on a fresh backbone; `on` puts them on a trained one."""
    return self.on(self.backbone.init(key), jax.random.fold_in(key, 1))

  def apply(self, variables: Variables, x, noise_labels, *arguments, **named) -> jax.Array:
    """F of `types.DiffusionNetwork`."""
    return self.backbone.apply(self.merged(variables), x, noise_labels, *arguments, **named)


@dataclasses.dataclass(frozen=True)
class LoRA(_Adapted):
  """W + (alpha / rank) A B for every kernel W whose path matches `targets`: Hu et al. 2022 (arXiv:2106.09685, section 4.1).

  A kernel [..., out] is taken as the matrix [product of the others, out], so that a convolution's A is a convolution to `rank` channels and B
  one of size 1. A starts uniform in +-1/sqrt(rows), B at 0: at first the outputs are those of the backbone, bit for bit.
  targets: a regular expression for paths such as 'mid_block/attn_qkv/kernel'; only arrays of two or more dimensions are kernels.
  """

  rank: int = 4
  alpha: float = 4.0
  targets: str = r"kernel$"

  def __post_init__(self):
    check(self.rank >= 1, f"LoRA: rank must be at least 1, got {self.rank}")
    check(self.alpha > 0, f"LoRA: alpha must be positive, got {self.alpha}")

  def on(self, backbone: Variables, key: jax.Array) -> Variables:
    """Fresh adapters {'params': {path: {'a', 'b'}}} of these variables, which go with them."""
    found = {}
    for number, (path, kernel) in enumerate(sorted(leaves_by_name(backbone["params"]).items())):
      if kernel.ndim < 2 or not re.search(self.targets, path):
        continue
      rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
      limit = 1 / math.sqrt(rows)
      draw = jax.random.fold_in(key, number)
      found[path] = {
        "a": jax.random.uniform(draw, (rows, self.rank), kernel.dtype, -limit, limit),
        "b": jnp.zeros((self.rank, columns), kernel.dtype),
      }
    check(bool(found), f"LoRA: no kernel's path matches {self.targets!r}")
    return {"params": found, BACKBONE: backbone}

  def merged(self, variables: Variables) -> Variables:
    """Variables of the backbone alone that do the same: what to export."""
    adapters, backbone = variables["params"], variables[BACKBONE]

    def updated(path, kernel):
      adapter = adapters.get(leaf_name(path))
      if adapter is None:
        return kernel
      change = (self.alpha / self.rank) * (adapter["a"] @ adapter["b"])
      return kernel + change.reshape(kernel.shape).astype(kernel.dtype)

    return backbone | {"params": jax.tree_util.tree_map_with_path(updated, backbone["params"])}


@dataclasses.dataclass(frozen=True)
class Partial(_Adapted):
  """A network of which only parameters whose path matches `trained` are; deep prompts of a U-ViT are 'prompts'."""

  trained: str = r"^prompts$"

  def on(self, backbone: Variables, key: jax.Array) -> Variables:
    """The trained part of these variables, taken out of them.

    Parameters that they do not have, such as prompts of a network that was trained without, are drawn.
    """
    fresh = leaves_by_name(jax.eval_shape(self.backbone.init, key)["params"])
    there = leaves_by_name(backbone["params"])
    if missing := [path for path in fresh if path not in there]:
      check(
        all(re.search(self.trained, path) for path in missing),
        f"Partial: the backbone lacks {missing[0]!r}, which is not trained",
      )
      there |= {
        path: leaf for path, leaf in leaves_by_name(self.backbone.init(key)["params"]).items() if path in missing
      }
    chosen = {path: leaf for path, leaf in there.items() if re.search(self.trained, path)}
    check(bool(chosen), f"Partial: no parameter's path matches {self.trained!r}")
    rest = {path: leaf for path, leaf in there.items() if path not in chosen}
    return {"params": _nested(chosen), BACKBONE: backbone | {"params": _nested(rest)}}

  def merged(self, variables: Variables) -> Variables:
    """Variables of the network as one: what to export."""
    backbone = variables[BACKBONE]
    together = leaves_by_name(backbone["params"]) | leaves_by_name(variables["params"])
    return backbone | {"params": _nested(together)}


def none(backbone: DiffusionNetwork) -> DiffusionNetwork:
  """The network itself, all of which is trained."""
  return backbone


ADAPTERS = {"none": none, "lora": LoRA, "partial": Partial}


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
  """The nested dicts of {'a/b/c': leaf}."""
  found: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    place = found
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = leaf
  return found
