"""What the Linen classifiers share: `types.Classifier` over a module, checks of their fields, normalisation."""

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.models import layers
from jax_trustdiff.types import InputError, Logits, PyTree, Unit, Variables

ACTIVATIONS = {"swish": nn.silu, "relu": nn.relu}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class LinenClassifier(abc.ABC):
  """A `types.Classifier` whose fields describe a Linen module; hashable, equal when the fields are.

  The modules take (x, train), keep running statistics in 'batch_stats' and store the moments of a
  training batch in 'moments'. Batch normalisation (Ioffe and Szegedy 2015) is that of their algorithm 1 in training,
  and by running statistics in evaluation.
  """

  def __post_init__(self):
    for name in ("image_shape", "mean", "std"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    kind = type(self).__name__
    channels = self.image_shape[-1]
    check(
      len(self.image_shape) == 3 and min(self.image_shape) >= 1,
      f"{kind}: image_shape must be (height, width, channels), got {self.image_shape}",
    )
    check(self.num_classes >= 2, f"{kind}: num_classes must be at least 2, got {self.num_classes}")
    check(self.bn_groups >= 1, f"{kind}: bn_groups must be at least 1, got {self.bn_groups}")
    check_choice(f"{kind}: activation", self.activation, ACTIVATIONS)
    check_choice(f"{kind}: dtype", self.dtype, DTYPES)
    for name in ("mean", "std"):
      value = getattr(self, name)
      check(len(value) in (1, channels), f"{kind}: {name} must hold 1 or {channels} numbers, got {value}")
    check(min(self.std) > 0, f"{kind}: std must be positive, got {self.std}")

  @property
  @abc.abstractmethod
  def module(self) -> nn.Module:
    """The Linen module; stays inside models/."""

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables {'params': ..., 'batch_stats': ...}, all float32."""
    return self.module.init(key, jnp.zeros((1, *self.image_shape)), False)

  def logits(self, variables: Variables, x: Unit) -> Logits:
    """Logits in float32 by the running statistics."""
    return self.module.apply(variables, x, False)

  def train_logits(self, variables: Variables, x: Unit) -> tuple[Logits, PyTree]:
    """Logits in float32 by the statistics of this batch, and its moments (unbiased variances).

    The moments have the structure of variables['batch_stats']; see `types.Classifier`.
    """
    logits, updates = self.module.apply(variables, x, True, mutable=["moments"])
    return logits, updates["moments"]


def normalise(
  x: Float[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
  """`(x - mean) / std` per channel in float32, or in float64 for float64 images."""
  return (x.astype(layers.wide(x.dtype)) - jnp.array(mean)) / jnp.array(std)


def check(good: bool, message: str):
  """Raises InputError with `message` unless `good`."""
  if not good:
    raise InputError(message)


def check_choice(what: str, value: Any, choices: Iterable):
  """Raises InputError that lists the choices unless `value` is one of them."""
  check(value in choices, f"{what} must be one of {', '.join(map(str, choices))}; got {value!r}")
