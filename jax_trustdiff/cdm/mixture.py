"""The score of a mixture of data sources is a weighted mean of the scores of each.

"Training Data Protection with Compositional Diffusion Models" (Golatkar et al. 2024, arXiv:2308.01937), eq. 3 to 5: if the data are the
mixture p = sum_i lambda_i p^i, then so are data with noise, p_t = sum_i lambda_i p_t^i, and

    grad log p_t(x) = sum_i w_t(x, i) grad log p_t^i(x),   w_t(x, i) = lambda_i p_t^i(x) / p_t(x) = P(shard i | x_t = x).

Score, noise, v and clean image are affine in one another with factors that depend on t alone, and the weights sum to 1, so the same
mean holds for each of them, and for D(x; sigma) of the EDM convention. A mixture is therefore a DenoiseFn like any other.

For images of class c the density of shard i is p_t^i(x | c) and its proportion lambda_i p_i(c): the weights are
w_t(x, i | c) = lambda_i p_i(c) p_t^i(x | c) / sum, not w_t(x, i). Classifier-free guidance is D_u + g (D_c - D_u) with D_u and D_c each
a mixture by its own weights (`guidance.ClassifierFreeGuidance`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jax_trustdiff.cdm.shards import Shards, log_normalised, per_image, sum_over_shards
from jax_trustdiff.cdm.weights import Weights
from jax_trustdiff.diffusion.guidance import ClassifierFreeGuidance
from jax_trustdiff.diffusion.solvers import Point
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import DenoiseFn, InputError, Labels, PyTree, Sigma, Signed

IMPLEMENTATIONS = ("vmap", "map", "shard_map")


class Seen(NamedTuple):
  """What one evaluation of a mixture found."""

  estimates: jax.Array  # [s b h w c] D of every shard; 0 where it is not used
  found: jax.Array  # [b h w c] D of the mixture
  weights: jax.Array  # [s b]


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Eq. 5 as a DenoiseFn; a pytree whose arrays are arguments, so that other shards compile nothing anew.

  weights: of `cdm.weights`. labels: classes [b], which every shard is told, or None. class_log_prior: log p_i(c) [s k], -inf
  where a shard has no images of a class; None where it is not known and taken for equal. allowed: shards that an image may
  have parts of, bool [s] or [s b]; others count for nothing, not in the weights either, whatever their values are (derivatives
  by x want finite ones). An image whose class or whose access leaves no shard is NaN.

  impl: how shards are evaluated. 'vmap', all at once, or `at_once` of them: for attention and adapters; fewer at once take less memory, and
  less time on CPUs whose caches do not hold the activations of all. 'map', one after the other: for full
  convolutional networks, whose vmap is a grouped convolution; bits do not depend on shards that do not count. 'shard_map', those of
  a device one after the other, over the axis 'shard' of the mesh around it.

  Weights that go along a path (`Weights.start` is not None) need a sampler that carries a state: sampler(mixture, noise, keys,
  state=mixture.start(b)) gives (images, state).
  """

  shards: Shards
  weights: Weights
  labels: Any = None
  class_log_prior: Any = None
  allowed: Any = None
  impl: str = dataclasses.field(default="vmap", metadata={"static": True})
  at_once: int = dataclasses.field(default=0, metadata={"static": True})  # 0: all

  def __post_init__(self):
    if self.impl not in IMPLEMENTATIONS:
      raise InputError(f"unknown impl {self.impl!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if self.at_once < 0 or self.at_once and self.impl != "vmap":
      raise InputError(f"at_once={self.at_once}: a number of shards for impl 'vmap', 0 for all")

  def with_labels(self, labels: Labels) -> "Mixture":
    """The mixture of images of these classes [b]."""
    return dataclasses.replace(self, labels=labels)

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma, state: PyTree = None) -> Any:
    """D(x; sigma); with a state (D, `Seen`), as `solvers.StatefulDenoiser`."""
    seen = self.look(x, sigma, state)
    return seen.found if state is None else (seen.found, seen)

  def look(self, x: Float[Array, "b h w c"], sigma: Sigma, state: PyTree = None) -> Seen:
    """D of the mixture with the weights and the estimates that it was made of."""
    log_prior = self.log_prior(x.shape[0])
    possible = jnp.isfinite(log_prior)
    # a free slot may hold anything, and 0 times NaN is NaN
    estimates = jnp.where(per_image(possible, x), self.over_shards(_evaluate, x, sigma), 0)
    weights = self.weigh(x, sigma, estimates, state)
    return Seen(estimates, self._sum(per_image(weights, x) * estimates), weights)

  def weigh(
    self, x: Float[Array, "b h w c"], sigma: Sigma, estimates: Any, state: PyTree = None
  ) -> Float[Array, "s b"]:
    """The weights, from estimates [s b h w c] or, where they do not need them, None."""
    logits = self.logits(x, sigma, estimates, state)
    rest = jnp.exp(logits - jax.lax.stop_gradient(logits.max(0)))
    return rest / self._sum(rest)

  def logits(
    self, x: Float[Array, "b h w c"], sigma: Sigma, estimates: Any, state: PyTree = None
  ) -> Float[Array, "s b"]:
    """The logarithms of the weights up to a constant for each image; -inf for shards that do not count."""
    log_prior = self.log_prior(x.shape[0])
    found = self.weights(x, sigma, estimates, log_prior, self.labels, state)
    return jnp.where(jnp.isfinite(log_prior), found, -jnp.inf)

  def log_prior(self, batch: int) -> Float[Array, "s b"]:
    """log of lambda_i p_i(c) of every image's class, normalised over what is active and allowed; -inf elsewhere."""
    found = jnp.broadcast_to(self.shards.log_prior[:, None], (self.shards.capacity, batch))
    if self.labels is not None and self.class_log_prior is not None:
      found = found + self.class_log_prior[:, self.labels]
    if self.allowed is not None:
      allowed = self.allowed if self.allowed.ndim == 2 else self.allowed[:, None]
      found = jnp.where(allowed, found, -jnp.inf)
    return log_normalised(found)

  def start(self, batch: int) -> PyTree:
    """The state of the weights at the start of a path; None if they have none."""
    return self.weights.start(self.log_prior(batch))

  def step_state(self, state: PyTree, seen: Seen, at: Point, start: Point, end: Point) -> PyTree:
    """The state of the weights after a step of a sampler: see `solvers.StatefulDenoiser`."""
    return self.weights.step(state, seen, at, start, end)

  def over_shards(self, function: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """function(D of a shard with the labels, *arguments) of every slot, stacked [s ...]: by `impl`, free slots too."""

    def evaluate(common, labels, arguments, own):
      return function(_labelled(common.with_variables(own), labels), *arguments)

    whole = self.shards.common, self.labels, arguments
    if self.impl == "vmap" and self.at_once:
      return jax.lax.map(functools.partial(evaluate, *whole), self.shards.own, batch_size=self.at_once)
    if self.impl == "vmap":
      return jax.vmap(functools.partial(evaluate, *whole))(self.shards.own)
    if self.impl == "map":
      return jax.lax.map(functools.partial(evaluate, *whole), self.shards.own)
    everywhere, of_shards = PartitionSpec(), PartitionSpec("shard")
    mapped = jax.shard_map(
      lambda whole, own: jax.lax.map(functools.partial(evaluate, *whole), own),
      in_specs=(everywhere, of_shards),
      out_specs=of_shards,
      axis_names={"shard"},
      check_vma=False,
    )
    return mapped(whole, self.shards.own)

  def _sum(self, values: Float[Array, "s ..."]) -> Float[Array, "..."]:
    return values.sum(0) if self.impl == "shard_map" else sum_over_shards(values)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class GuidedMixture:
  """Classifier-free guidance after mixing, whose labels are not known yet: D_u + scale (D_c - D_u) of mixtures D_u and D_c.

  (`guidance.Guided` as what shards have in common mixes shards that are guided each on its own, by one set of weights: another thing.)
  Weights that go along a path belong to one mixture, so they are refused.
  """

  mixture: Mixture
  scale: Any
  sigma_min: Any = 0.0
  sigma_max: Any = float("inf")

  def with_labels(self, labels: Labels) -> ClassifierFreeGuidance:
    """The DenoiseFn for integer class labels [b]."""
    if self.mixture.start(len(labels)) is not None:
      kind = type(self.mixture.weights).__name__
      raise InputError(
        f"{kind} weights go along one path: guidance of two mixtures needs weights without a state"
      )
    conditional = self.mixture.with_labels(labels)
    return ClassifierFreeGuidance(conditional, self.mixture, self.scale, self.sigma_min, self.sigma_max)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class RandomShard:
  """A DenoiseFn that evaluates one shard, drawn anew at every noise level: one network's cost.

  Drawn with the proportions lambda, or `uniform`ly as the paper's 'random' is. Over many steps a sampler moves by the mean over
  draws, which is naive averaging (`weights.Prior`, `weights.Equal`), not eq. 5. The draw is a function of the key and of the
  first image's sigma: all images of a batch, and of every batch, have the same shard at the same noise level, so that with few
  steps all resemble the shards of the last ones. Classes that a shard has no images of are asked of it all the same.
  """

  shards: Shards
  key: Any  # typed
  labels: Any = None
  uniform: bool = dataclasses.field(default=False, metadata={"static": True})

  def with_labels(self, labels: Labels) -> "RandomShard":
    """The same for images of these classes [b]."""
    return dataclasses.replace(self, labels=labels)

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    level = jax.lax.bitcast_convert_type(sigma[0].astype(jnp.float32), jnp.uint32)
    logits = jnp.where(self.shards.active, 0.0, -jnp.inf) if self.uniform else self.shards.log_prior
    slot = jax.random.categorical(jax.random.fold_in(self.key, level), logits)
    return _labelled(self.shards.member(slot), self.labels)(x, sigma)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class TopShards:
  """A DenoiseFn that evaluates the k shards of the largest mean weight over the batch, and mixes those: the cost of k networks.

  mixture: whose weights need no estimates (`Weights.needs_estimates`). The shards that are chosen depend on the whole batch, so an
  image is not a function of its key alone (`coupled`); `weights.Largest` keeps the k largest of every image, and costs all. An image that
  may have parts of none of the chosen, such as one of a class that they lack, is NaN.
  """

  mixture: Mixture
  k: int = dataclasses.field(metadata={"static": True})

  coupled = True

  def __post_init__(self):
    if self.mixture.weights.needs_estimates:
      raise InputError(
        f"{type(self.mixture.weights).__name__} need all shards: nothing is saved by choosing k"
      )

  def with_labels(self, labels: Labels) -> "TopShards":
    """The same for images of these classes [b]."""
    return dataclasses.replace(self, mixture=self.mixture.with_labels(labels))

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    mixture, shards = self.mixture, self.mixture.shards
    if not 1 <= self.k <= shards.capacity:
      raise InputError(f"top {self.k} of {shards.capacity} slots")
    if mixture.allowed is not None and mixture.allowed.ndim == 2:
      raise InputError("TopShards chooses shards for the batch: it takes no access rights of single images")
    logits = mixture.logits(x, sigma, None)
    _, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=0).mean(1), self.k)
    few = dataclasses.replace(
      mixture,
      shards=Shards(
        shards.common,
        jax.tree.map(lambda leaf: leaf[chosen], shards.own),
        shards.active[chosen],
        shards.proportions[chosen],
      ),
    )
    kept = jax.nn.softmax(
      logits[chosen], axis=0
    )  # of logits: a weight that rounds to 0 may be all an image has
    estimates = jnp.where(per_image(jnp.isfinite(logits[chosen]), x), few.over_shards(_evaluate, x, sigma), 0)
    return few._sum(per_image(kept, x) * estimates)


class Record(NamedTuple):
  """The state of a `Recorded` mixture."""

  inner: PyTree  # of the weights
  step: jax.Array  # []
  weights: jax.Array  # [n s b] at the first evaluation of every step
  sigma: jax.Array  # [n] where it was


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
  """A mixture that keeps its weights at every step of a sampler: sampler(recorded, noise, keys, state=recorded.start(b, n)).

  What the paper's figure 3 shows. A `solvers.StatefulDenoiser`, also where the weights of the mixture have no state.
  """

  mixture: Mixture

  def with_labels(self, labels: Labels) -> "Recorded":
    """The same for images of these classes [b]."""
    return Recorded(self.mixture.with_labels(labels))

  def start(self, batch: int, num_steps: int) -> Record:
    """An empty record for so many images and steps."""
    prior = self.mixture.log_prior(batch)
    table = jnp.zeros((num_steps, *prior.shape), prior.dtype)
    return Record(
      self.mixture.start(batch), jnp.zeros((), jnp.int32), table, jnp.zeros(num_steps, prior.dtype)
    )

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma, state: Record) -> tuple[Signed, Seen]:
    seen = self.mixture.look(x, sigma, state.inner)
    return seen.found, seen

  def step_state(self, state: Record, seen: Seen, at: Point, start: Point, end: Point) -> Record:
    """The record with the weights of the step."""
    inner = state.inner
    if inner is not None:
      inner = self.mixture.step_state(inner, seen, at, start, end)
    return Record(
      inner,
      state.step + 1,
      state.weights.at[state.step].set(seen.weights),
      state.sigma.at[state.step].set(at.sigma[0]),
    )


def _evaluate(member: DenoiseFn, x: jax.Array, sigma: jax.Array) -> jax.Array:
  return member(x, sigma)


def _labelled(member: Any, labels: Any) -> DenoiseFn:
  return member if labels is None else member.with_labels(labels)
