"""Stacks of shards: diffusion models of one network, each trained on data of its own, as one pytree with room for more.

A stack has `capacity` slots, of which those that are `active` hold a shard. Parameters, slots in use and proportions are all arguments
of a compiled function: shards are added, dropped and masked without compiling anything again, until the capacity is used up.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_trustdiff.pytrees import register_pytree, shapes_by_name
from jax_trustdiff.types import DenoiseFn, InputError, PyTree


@runtime_checkable
class WithVariables(Protocol):
  """What becomes a DenoiseFn with the variables of a shard, such as `diffusion.denoisers.Denoiser`; a pytree."""

  def with_variables(self, own: PyTree) -> DenoiseFn:
    """The denoiser with these variables, beside those it has."""


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
  """`capacity` denoisers of one structure.

  common: what all have, such as a frozen backbone; its variables are not stacked. own: variables of each, every leaf with a leading
  axis [s]; whole networks, or adapters of the backbone. active: whether a slot holds a shard; what a free slot holds is never seen.
  proportions: lambda_i > 0 of the data that shard i stands for, up to a factor (the number of its images); those of free slots do
  not count.
  """

  common: WithVariables
  own: PyTree
  active: Any  # bool [s]
  proportions: Any  # [s]

  @property
  def capacity(self) -> int:
    """Number of slots."""
    return self.active.shape[0]

  @property
  def log_prior(self) -> Float[Array, "s"]:
    """log lambda_i, normalised over the active slots; -inf for free ones."""
    return log_normalised(jnp.where(self.active, jnp.log(self.proportions), -jnp.inf))

  def member(self, slot: int | jax.Array) -> DenoiseFn:
    """The denoiser of a slot, which may be traced: only its variables are read."""
    own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), self.own)
    return self.common.with_variables(own)

  def put(self, slot: int | jax.Array, own: PyTree, proportion: float | jax.Array) -> "Shards":
    """The stack with a shard in a slot, whatever was there; others keep their bits."""
    return dataclasses.replace(
      self,
      own=jax.tree.map(lambda leaf, new: leaf.at[slot].set(new), self.own, own),
      active=self.active.at[slot].set(True),
      proportions=self.proportions.at[slot].set(proportion),
    )

  def drop(self, slot: int | jax.Array) -> "Shards":
    """The stack without the shard of a slot, whose variables are overwritten with zeros; copies elsewhere, on disks too, stay."""
    return dataclasses.replace(
      self,
      own=jax.tree.map(lambda leaf: leaf.at[slot].set(0), self.own),
      active=self.active.at[slot].set(False),
      proportions=self.proportions.at[slot].set(1.0),
    )

  def restricted(self, allowed: Bool[Array, "s"]) -> "Shards":
    """The stack in which only shards that are `allowed` are active; their variables stay where they are."""
    return dataclasses.replace(self, active=self.active & allowed)


def stack(
  common: WithVariables,
  own: Sequence[PyTree],
  proportions: Sequence[float] | None = None,
  capacity: int | None = None,
) -> Shards:
  """The stack of shards with these variables, in the first slots.

  proportions: of their data, by default equal. capacity: number of slots, by default as many as shards; free ones hold zeros. InputError
  for no shard, for more than there are slots, for proportions that are not positive, and for shards of another structure or shape.
  """
  capacity = len(own) if capacity is None else capacity
  proportions = [1.0] * len(own) if proportions is None else list(proportions)
  if not 0 < len(own) <= capacity:
    raise InputError(f"{len(own)} shards do not fit {capacity} slots: at least one, and no more than slots")
  if len(proportions) != len(own) or min(proportions) <= 0:
    raise InputError(f"each of {len(own)} shards needs a positive proportion, got {proportions}")
  wanted = shapes_by_name(own[0])
  for number, one in enumerate(own):
    if (found := shapes_by_name(one)) != wanted:
      name = next(k for k in sorted(wanted | found) if wanted.get(k) != found.get(k))
      raise InputError(
        f"shard {number} has another network than shard 0: {name} is {found.get(name)}, not {wanted.get(name)}"
      )
  free = capacity - len(own)

  def stacked(*leaves):
    rows = jnp.stack(leaves)
    return jnp.concatenate([rows, jnp.zeros((free, *rows.shape[1:]), rows.dtype)]) if free else rows

  return Shards(
    common,
    jax.tree.map(stacked, *own),
    jnp.arange(capacity) < len(own),
    jnp.array(proportions + [1.0] * free, float),
  )


def with_capacity(shards: Shards, capacity: int) -> Shards:
  """The stack with more slots, the new ones free; functions are compiled anew for it. InputError for fewer."""
  more = capacity - shards.capacity
  if more < 0:
    raise InputError(f"a stack of {shards.capacity} slots cannot have {capacity}")

  def padded(leaf, value=0):
    return jnp.concatenate([leaf, jnp.full((more, *leaf.shape[1:]), value, leaf.dtype)])

  return dataclasses.replace(
    shards,
    own=jax.tree.map(padded, shards.own),
    active=padded(shards.active, False),
    proportions=padded(shards.proportions, 1.0),
  )


def log_normalised(logits: Float[Array, "s ..."]) -> Float[Array, "s ..."]:
  """`logits` less the logarithm of the sum of their exponentials over shards: -inf between two changes no bit."""
  logits = logits - jax.lax.stop_gradient(logits.max(0))
  return logits - jnp.log(sum_over_shards(jnp.exp(logits)))


def sum_over_shards(values: Float[Array, "s ..."]) -> Float[Array, "..."]:
  """One after the other in a loop, so that a 0 between two changes no bit.

  Written out as a + b + c the compiler may contract each sum with the product before it, and another one where there are more of them.
  """
  return jax.lax.scan(lambda total, value: (total + value, None), jnp.zeros_like(values[0]), values)[0]


def per_image(value: jax.Array, x: jax.Array) -> jax.Array:
  """[... b] as [... b 1 1 1], to be multiplied with images like `x` [b h w c]."""
  return value.reshape(value.shape + (1,) * (x.ndim - 1))


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
  """Inner product of images over their last three axes: [s b h w c] with [b h w c] or its like -> [s b]."""
  return (a * b).sum((-3, -2, -1))
