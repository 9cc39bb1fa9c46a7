"""Attacks that are made of runs: what AutoAttack asks of an attack, and the attack as a function of its own.

A run is one restart against one target class. Runs of an image are independent of each other and of the other images, so
whoever calls may leave out the images that an earlier run has broken, share images out over devices, and go on later.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_trustdiff.attacks import norms
from jax_trustdiff.types import (
  AnyLogitsFn,
  InputError,
  KeyOrKeys,
  Labels,
  Logits,
  LogitsFn,
  RandomizedLogitsFn,
  Unit,
)

NEVER = -1
DRAWS = 2**30  # folded into a key, it gives that of the classifier's draws; attacks use smaller numbers


class Found(NamedTuple):
  """What one run found for each image."""

  x_adv: jax.Array  # [b h w c] misclassified where `when` is not NEVER; elsewhere of no use
  when: jax.Array  # int [b] evaluations of the classifier until then; NEVER where it is not broken
  flat: jax.Array  # int [b] evaluations at which the gradient was zero; 0 for an attack without gradients


@dataclasses.dataclass(frozen=True)
class AttackOfRuns(abc.ABC):
  """What the attacks of AutoAttack share. norm: 'linf', 'l2' or 'l1'; radius in [0, 1] pixel units, a length in that norm."""

  norm: str = "linf"
  radius: norms.Scalar = 8 / 255

  def __post_init__(self):
    norms.check_norm(self.norm)
    norms.check_range("attack radius", self.radius)

  @abc.abstractmethod
  def num_runs(self, num_classes: int) -> int:
    """Runs against a classifier of so many classes."""

  @property
  @abc.abstractmethod
  def num_gradients(self) -> int:
    """Gradients that a run takes of an image: what `Found.flat` is counted among."""

  @abc.abstractmethod
  def cost(self, num_classes: int) -> int:
    """Evaluations of the classifier in a run, a gradient counted as two more."""

  @abc.abstractmethod
  def run(
    self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys, index: int | Int[Array, ""]
  ) -> Found:
    """The run `index`, an integer below `num_runs` that may be traced. Images should be classified right.

    key: one for the batch, or one for each image, which makes a run of an image independent of the batch it is in.
    """

  def __call__(self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys) -> Unit:
    """Adversarial images for `x` in float32: of the first run that breaks an image, or `x` where none does.

    Run r draws from fold_in(key, r). Images that are misclassified from the beginning stay as they are.
    """
    x = norms.full_precision(x)
    logits = fixed(logits_fn, key, DRAWS)(x)

    def next_run(index, best):
      x_adv, broken = best
      found = self.run(logits_fn, x, y, norms.fold_in(key, index), index)
      new = (found.when != NEVER) & ~broken
      return jnp.where(per_image(new), found.x_adv, x_adv), broken | new

    wrong = logits.argmax(axis=1) != y
    found = jax.lax.fori_loop(0, self.num_runs(logits.shape[1]), next_run, (x, wrong))[0]
    return jax.lax.stop_gradient(found)


def fixed(logits_fn: AnyLogitsFn, key: KeyOrKeys | None, number: int | Int[Array, ""]) -> LogitsFn:
  """The classifier itself, or one that draws, with the draws of this number; InputError if that has no key."""
  if isinstance(logits_fn, RandomizedLogitsFn):
    if key is None:
      raise InputError("a classifier that draws needs a key")
    return logits_fn.draw(norms.fold_in(norms.fold_in(key, DRAWS), number))
  return logits_fn


def rank_target(logits: Logits, y: Labels, rank: int | Int[Array, ""]) -> Int[Array, "b"]:
  """The class of the given rank, 1 for the likeliest, among those that are not the label."""
  order = jnp.argsort(-logits, axis=1, stable=True)
  others = jnp.argsort(order == y[:, None], axis=1, stable=True)  # the label last
  return jnp.take_along_axis(order, others, axis=1)[:, rank - 1].astype(jnp.int32)


def per_image(value: jax.Array) -> jax.Array:
  """[b] as [b 1 1 1]."""
  return value[:, None, None, None]
