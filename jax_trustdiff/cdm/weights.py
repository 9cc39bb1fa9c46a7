"""The weights w_t(x, i) of a mixture of shards: exact ones, those of a classifier, of a path, of nearest centroids, and constant ones.

Golatkar et al. 2024 (arXiv:2308.01937, section 3): with eq. 5 the weights are the posterior of the shard given the noisy image. `Mixture`
turns what is found here into weights: logits, up to a constant for each image, of which those of shards that do not count are set to
-inf before the softmax.

    Exact           log-densities in closed form
    ByClassifier    a network told the noise level, trained on all shards: it has seen their data
    AlongPath       log-densities followed along a reverse SDE: no network, and nothing is learned about other shards' data
    Nearest         distance of the denoised image to centroids of each shard, which are made of that shard alone
    Prior, Equal, Fixed   no look at the image
    Largest         of others, the k largest of each image
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.cdm.shards import inner, per_image, sum_over_shards
from jax_trustdiff.diffusion.solvers import Point
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, PyTree

Logits = Float[Array, "s b"]


@runtime_checkable
class Weights(Protocol):
  """What a `Mixture` asks; a pytree."""

  needs_estimates: bool  # False: the estimates may be None

  def start(self, log_prior: Logits) -> PyTree:
    """The state at the start of a path; None if there is none."""

  def __call__(
    self, x: jax.Array, sigma: jax.Array, estimates: Any, log_prior: Logits, labels: Any, state: PyTree
  ) -> Logits:
    """Unnormalised log w_t(x, i) [s b].

    estimates: D of every shard [s b h w c]. log_prior: log of lambda_i p_i(c), normalised over the shards that count, -inf for
    others. labels: the classes c [b], or None.
    """

  def step(self, state: PyTree, seen: Any, at: Point, start: Point, end: Point) -> PyTree:
    """The state after a step of a sampler (`mixture.Seen`; `solvers.StatefulDenoiser`)."""


class _Stateless:
  """Weights that look at the present image alone."""

  needs_estimates: ClassVar[bool] = False

  def start(self, log_prior: Logits) -> None:
    """No state."""

  def step(self, state: PyTree, seen: Any, at: Point, start: Point, end: Point) -> PyTree:
    """No state."""


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Prior(_Stateless):
  """w_i = lambda_i p_i(c) / sum: naive averaging by the amount of data."""

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    return log_prior


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Equal(_Stateless):
  """w_i = 1/S over the shards that count: the paper's naive averaging, and the score of prod_i p_i^(1/S) at t = 0."""

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    return jnp.zeros_like(log_prior)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Fixed(_Stateless):
  """The user's own proportions in place of lambda_i, whatever the image: a la carte."""

  values: Any  # [s], > 0

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    return jnp.broadcast_to(jnp.log(self.values)[:, None], log_prior.shape)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Exact(_Stateless):
  """Eq. 5 with densities that are known."""

  log_densities: Any  # (x, sigma) -> log p^i(x; sigma) [s b]; a pytree

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    return log_prior + self.log_densities(x, sigma)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ByClassifier(_Stateless):
  """The posterior by a classifier of noisy images, whose least cross-entropy is the exact one (section 3).

  classifier: (x, sigma) -> logits [b s], or for shards with classes [b s*k], shard by shard: those of (shard, class) together, from
  which w_t(x, i | c) follows for every class, and w_t(x, i) as the sum over classes. log_training_prior: log of the frequencies
  that it was trained with, [s] or [s k], -inf for what it never saw; it is exchanged for the present lambda.

  It has seen the data of every shard: when one of them is to be forgotten, so is the classifier.
  """

  classifier: Any  # (x, sigma) -> logits [b s] or [b s*k]
  log_training_prior: Any  # [s] or [s k]

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    logits = self.classifier(x, sigma)
    prior = self.log_training_prior
    if logits.shape[1] != prior.size or len(prior) != len(log_prior):
      raise InputError(
        f"a classifier of {logits.shape[1]} does not fit {len(log_prior)} slots and its prior {list(prior.shape)}"
      )
    if labels is not None and prior.ndim == 1:
      raise InputError(
        "a classifier of shards alone does not know w(x, i | c): train one of shards with classes"
      )
    joint, prior = logits.T.reshape(len(prior), -1, x.shape[0]), prior.reshape(len(prior), -1)
    if labels is None:
      found = jax.nn.logsumexp(jnp.where(jnp.isfinite(prior)[..., None], joint, -jnp.inf), 1)
      prior = jax.nn.logsumexp(prior, 1)[:, None]
    else:
      found = jnp.take_along_axis(joint, labels[None, None], 1)[:, 0]
      prior = prior[:, labels]
    return log_prior + jnp.where(jnp.isfinite(prior), found - prior, -jnp.inf)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
  """A classifier of noisy images of which only some logits are wanted, in this order: that of fewer shards than it was trained on."""

  classifier: Any  # (x, sigma) -> logits [b n]
  columns: Any  # [m] int

  def __call__(self, x: Float[Array, "b h w c"], sigma: Float[Array, "b"]) -> Float[Array, "b m"]:
    return self.classifier(x, sigma)[:, self.columns]


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class AlongPath:
  """The posterior by log-densities that are followed along a reverse SDE, up to what all shards have in common.

  The Ito density estimator (Skreta et al. 2024, arXiv:2412.17762, theorem 1): in the EDM convention, whose SDE has no drift and
  g^2 dt = d(sigma^2), a step from sigma to sigma' with dx moves log p^i by <dx, s_i> - |s_i|^2 Q / 2, Q = sigma^2 - sigma'^2; the
  divergence of s_i, which is unknown, cancels against the curvature of log p^i along the noise. So for every shard at the cost of
  nothing but its D, which the mixture needs anyway. At sigma_max all shards are nearly the same Gaussian, and log p^i starts at 0.

  It is exact as steps get small, for a sampler whose steps add noise of variance near Q: euler_maruyama, reverse_diffusion,
  ancestral with eta 1. Where less is added (EDM without churn, DPM-Solver), or noise that has nothing to do with Q (EDM's churn), the
  rest does not cancel and the weights are wrong: `tasks.cdm_compose` refuses such samplers.
  """

  needs_estimates: ClassVar[bool] = True

  def start(self, log_prior: Logits) -> Logits:
    """0 for every shard and image."""
    return jnp.zeros_like(log_prior)

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    if state is None:
      raise InputError(
        "AlongPath has no weights for an image on its own: give the sampler state=mixture.start(b)"
      )
    return log_prior + state

  def step(self, state: PyTree, seen: Any, at: Point, start: Point, end: Point) -> PyTree:
    """The log-densities less that of the mixture: what they have in common would only cost digits."""
    variance = jnp.square(at.sigma)
    apart = (seen.estimates - seen.found) / per_image(variance, seen.found)  # s_i - s
    q = jnp.square(start.sigma) - jnp.square(end.sigma)
    noise = end.x - start.x - per_image(q / variance, at.x) * (seen.found - at.x)
    moved = inner(apart, noise) - q / 2 * inner(apart, apart)
    return jnp.where(end.sigma > 0, state + moved, state)  # the last step adds no noise


class PreviousWeights(NamedTuple):
  """The state of `Nearest`."""

  weights: jax.Array  # [s b] of the evaluation before
  logits: jax.Array  # [s b] their logarithm
  step: jax.Array  # []


SCHEDULES = ("constant", "noise", "gaussian")
DISTANCES = ("min", "mean")


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Nearest:
  """Softmax of minus the distance of the denoised image to centroids of each shard, in some space of features (section 3).

  features: (images [b h w c] in about [-1, 1]) -> [b f], such as CLIP's; a pytree. centroids: [s k f], made of each shard alone, so that
  nothing is learned about other shards. The denoised image is that of the mixture by the weights of the step before (one evaluation
  of the features), the prior's at first.

  The paper leaves open what follows; the defaults are ours. normalise: to unit length. distance: 'min' or 'mean' over centroids.
  temperature: of the softmax; schedule: 'constant'; 'noise', times 1 + sigma^2, since what is denoised at large sigma is a mean that
  is always nearest to some shard; 'gaussian', d^2 / (2 (spread^2 + sigma^2)) in place of d / temperature. with_prior: adds log
  lambda. warm_up: above this sigma the weights are the prior. every: computed at every so many steps.
  """

  features: Any  # (images [b h w c]) -> [b f]
  centroids: Any  # [s k f]
  temperature: Any = 0.05
  spread: Any = 1.0
  warm_up: Any = float("inf")
  normalise: bool = dataclasses.field(default=True, metadata={"static": True})
  distance: str = dataclasses.field(default="min", metadata={"static": True})
  schedule: str = dataclasses.field(default="constant", metadata={"static": True})
  with_prior: bool = dataclasses.field(default=False, metadata={"static": True})
  every: int = dataclasses.field(default=1, metadata={"static": True})

  needs_estimates: ClassVar[bool] = True

  def __post_init__(self):
    for name, known in (("schedule", SCHEDULES), ("distance", DISTANCES)):
      if getattr(self, name) not in known:
        raise InputError(f"Nearest: unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
    if self.every < 1:
      raise InputError(f"Nearest: every must be at least 1, got {self.every}")

  def start(self, log_prior: Logits) -> PreviousWeights:
    """The prior's weights."""
    return PreviousWeights(jnp.exp(log_prior), log_prior, jnp.zeros((), jnp.int32))

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    if state is None:  # an image on its own
      return self._logits(sigma, estimates, log_prior, jnp.exp(log_prior))
    compute = lambda: self._logits(sigma, estimates, log_prior, state.weights)  # noqa: E731
    if self.every == 1:
      return compute()
    return jax.lax.cond(state.step % self.every == 0, compute, lambda: state.logits)

  def step(self, state: PyTree, seen: Any, at: Point, start: Point, end: Point) -> PreviousWeights:
    """The weights that were just used."""
    logits = jnp.log(seen.weights)  # up to a constant
    return PreviousWeights(seen.weights, logits, state.step + 1)

  def _logits(self, sigma, estimates, log_prior, weights) -> Logits:
    x0 = sum_over_shards(per_image(weights, estimates[0]) * estimates)
    found, centroids = self.features(x0), self.centroids
    if self.normalise:
      tiny = jnp.finfo(found.dtype).tiny  # features that are all 0 stay so
      found, centroids = (
        v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), tiny) for v in (found, centroids)
      )
    squares = jnp.square(found[:, None, None] - centroids).sum(-1)  # [b s k]
    over_centroids = jnp.min if self.distance == "min" else jnp.mean
    variance = jnp.square(sigma)
    if self.schedule == "gaussian":
      logits = -over_centroids(squares, -1).T / (2 * (jnp.square(self.spread) + variance))
    else:
      scale = self.temperature * (1 + variance if self.schedule == "noise" else 1)
      logits = -over_centroids(jnp.sqrt(squares), -1).T / scale
    logits = logits + log_prior if self.with_prior else logits
    return jnp.where(sigma > self.warm_up, log_prior, logits)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Largest:
  """The k largest of other weights in every image, and 0 for the rest; all shards are evaluated (`mixture.TopShards` does not)."""

  weights: Weights
  k: int = dataclasses.field(metadata={"static": True})

  @property
  def needs_estimates(self) -> bool:
    """As the weights they are made of."""
    return self.weights.needs_estimates

  def start(self, log_prior: Logits) -> PyTree:
    """As the weights they are made of."""
    return self.weights.start(log_prior)

  def __call__(self, x, sigma, estimates, log_prior, labels, state) -> Logits:
    logits = self.weights(x, sigma, estimates, log_prior, labels, state)
    logits = jnp.where(jnp.isfinite(log_prior), logits, -jnp.inf)
    chosen = jax.lax.top_k(logits.T, min(self.k, len(logits)))[1]  # [b k]
    kept = jax.nn.one_hot(chosen, len(logits), dtype=bool).any(1).T
    return jnp.where(kept, logits, -jnp.inf)

  def step(self, state: PyTree, seen: Any, at: Point, start: Point, end: Point) -> PyTree:
    """As the weights they are made of."""
    return self.weights.step(state, seen, at, start, end)
