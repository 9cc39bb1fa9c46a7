"""How much each shard has to do with an image: the paper's credit, the posterior, its mean over time, and by denoising errors alone.

Golatkar et al. 2024 (arXiv:2308.01937, eq. 6) split the log-likelihood by the probability-flow ODE. In the EDM convention, with
s = sum_i w_i s_i, s_i = (D_i - x) / sigma^2, along dx/dsigma = -sigma s from the image up to sigma_max,

    log p(x0) = log p(x(sigma_max)) + sum_i L_i,   L_i = - integral of sigma div(w_i s_i) dsigma,   C_i = L_i / sum_j L_j

(the paper leaves out the prior's term, and in VP, whose L_i are the same, the drift's). C_i is no probability: L_i may be negative, shards
share the credit of large noise, where every w_i is about lambda_i, and where shards overlap the largest C_i may be another's than the
largest posterior. So three numbers are given.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.cdm.shards import inner, per_image
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.likelihood import PROBES, draw_probes, follow_up
from jax_trustdiff.diffusion.processes import VP, Process
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, PerExample, Sigma, Signed

GRADIENTS = ("posterior", "autodiff")


class Credit(NamedTuple):
  """Of every shard for every image [s b], in the order of the slots; 0 for shards that do not count."""

  paper: jax.Array  # C_i of eq. 6; sums to 1, may be negative
  posterior: jax.Array  # w(x0, i) at sigma_min
  integrated: jax.Array  # mean of w_t(x_t, i) over the times of the process, along the ODE
  parts: jax.Array  # L_i, nats
  log_prob: jax.Array  # [b] log-density of the image, nats, as `likelihood.Likelihood` has it
  z: jax.Array  # [b h w c] x(sigma_max) / sigma_max
  nfe: jax.Array  # [b] evaluations of the mixture, each with one backward pass for every shard and probe


@dataclasses.dataclass(frozen=True)
class PathCredit:
  """Called as `credit(mixture, x, keys)`: the `Credit` of every image.

  mixture: with weights that look at the noisy image alone (`Weights.needs_estimates` is False): exact ones or a classifier's.
  solver: its `invert` follows the ODE up from sigma_min (`likelihood.ODELikelihood` says how exact it is). gradient: of the
  weights; 'posterior', w_i (s_i - s), true of exact weights; 'autodiff', by a backward pass for every shard, which a learned
  classifier needs. trace: of the Jacobians of D_i, 'hutchinson' with `num_probes` draws of `probe`, or 'exact', d backward passes.
  data_std: of the prior N(0, sigma_max^2 + data_std^2). process: whose time the integrated credit is a mean over.
  """

  solver: AdaptiveODESampler | EDMSampler = AdaptiveODESampler(rtol=1e-5, atol=1e-5)
  gradient: str = "autodiff"
  trace: str = "hutchinson"
  num_probes: int = 1
  probe: str = "rademacher"
  data_std: float = 0.5
  process: Process = VP()

  def __post_init__(self):
    for name, known in (
      ("gradient", GRADIENTS),
      ("trace", ("hutchinson", "exact")),
      ("probe", tuple(PROBES)),
    ):
      if getattr(self, name) not in known:
        raise InputError(f"PathCredit: unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
    if self.num_probes < 1:
      raise InputError(f"PathCredit: num_probes must be at least 1, got {self.num_probes}")
    if isinstance(self.solver, EDMSampler) and self.solver.churn:
      raise InputError(f"PathCredit: a sampler with churn {self.solver.churn} has no inverse")

  def __call__(self, mixture: Mixture, x: Signed, keys: Key[Array, "b"] | None = None) -> Credit:
    """The credit for images in [-1, 1]; keys: one for each image, for the probes.

    InputError without keys where probes are drawn, and for weights that need the estimates of the shards.
    """
    if mixture.weights.needs_estimates:
      kind = type(mixture.weights).__name__
      raise InputError(f"PathCredit: {kind} are no function of the noisy image alone; take a classifier's")
    batch, size, capacity = x.shape[0], math.prod(x.shape[1:]), mixture.shards.capacity
    flow = _CreditFlow(mixture, self._probes(x, keys), x.shape[1:], self.gradient, self.process)
    start = jnp.concatenate(
      [x.reshape(batch, 1, 1, size), jnp.zeros((batch, 1, 1, 2 * capacity), x.dtype)], -1
    )
    end, nfe, sigma_min, sigma_max = follow_up(self.solver, flow, start)
    z, rest = end[:, 0, 0, :size], end[:, 0, 0, size:].T * sigma_max
    parts, times = rest[:capacity] * size, rest[capacity:]
    high = sigma_max**2 + self.data_std**2
    squares = jnp.square(z).sum(1) * (sigma_max**2 / high)
    log_prior = -size / 2 * math.log(2 * math.pi * high) - squares / 2
    return Credit(
      paper=parts / parts.sum(0),
      posterior=mixture.weigh(x, jnp.full(batch, sigma_min, x.dtype), None),
      integrated=times / times.sum(0),
      parts=parts,
      log_prob=log_prior + parts.sum(0),
      z=z.reshape(x.shape),
      nfe=nfe,
    )

  def _probes(self, x: jax.Array, keys: Any) -> jax.Array:
    """[n b h w c]: draws, the j-th of an image of its key folded with j, or the d unit vectors times sqrt(d)."""
    if self.trace == "exact":
      size = math.prod(x.shape[1:])
      basis = math.sqrt(size) * jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
      return jnp.broadcast_to(basis, (size, *x.shape))
    return draw_probes("PathCredit", self.probe, self.num_probes, x, keys)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class _CreditFlow:
  """The ODE of (x, L_1 .. L_s, integrals of w_1 .. w_s) as a DenoiseFn: a solver moves y by (y - F(y)) / sigma dsigma.

  L_i are in units of the number of values of an image, so that tolerances mean the same for them as for a pixel.
  """

  mixture: Mixture
  probes: Any  # [n b h w c], of mean square 1
  image_shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})
  gradient: str = dataclasses.field(metadata={"static": True})
  process: Process = dataclasses.field(metadata={"static": True})

  def __call__(self, y: Float[Array, "b 1 1 n"], sigma: Sigma) -> Float[Array, "b 1 1 n"]:
    size, batch = math.prod(self.image_shape), y.shape[0]
    x = y[:, 0, 0, :size].reshape(batch, *self.image_shape)
    found, weights, divergences = self._look(x, sigma)
    # dL/dsigma = -divergence / sigma, with the divergence of w_i (D_i - x); d(integral)/dsigma = w_i dt/dsigma
    _, slope = jax.jvp(self.process.t_of_sigma, (sigma,), (jnp.ones_like(sigma),))
    rest = y[:, 0, 0, size:] + jnp.concatenate([divergences / size, -weights * sigma * slope]).T
    return jnp.concatenate([found.reshape(batch, size), rest], 1)[:, None, None]

  def _look(self, x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(D, weights [s b], div of w_i (D_i - x) [s b]) = w_i (tr J_i - d) + <grad w_i, D_i - x>."""
    mixture, size = self.mixture, math.prod(self.image_shape)

    def of_shard(member, x, sigma):
      found, pull_back = jax.vjp(lambda x: member(x, sigma).astype(x.dtype), x)
      traces = jax.lax.map(lambda v: inner(v, pull_back(v)[0]), self.probes)
      return found, traces.mean(0)

    estimates, traces = mixture.over_shards(of_shard, x, sigma)
    possible = jnp.isfinite(mixture.log_prior(x.shape[0]))
    estimates = jnp.where(per_image(possible, x), estimates, 0)
    traces = jnp.where(possible, traces, 0)
    weights, pull_back = jax.vjp(lambda x: mixture.weigh(x, sigma, None), x)
    found = (per_image(weights, x) * estimates).sum(0)
    if self.gradient == "posterior":
      along = weights * inner(estimates - found, estimates - x) / jnp.square(sigma)
    else:
      rows = jnp.eye(len(weights), dtype=weights.dtype)[:, :, None] * jnp.ones_like(weights)
      along = inner(jax.lax.map(lambda row: pull_back(row)[0], rows), estimates - x)
    return found, weights, weights * (traces - size) + along


def denoising_posterior(
  mixture: Mixture,
  x0: Signed,
  keys: Key[Array, "b"],
  sigmas: Float[Array, "n"],
) -> Float[Array, "s b"]:
  """P(shard | x0) by denoising errors, without a classifier and without an ODE: n evaluations of every shard.

  By `log_densities_of_errors`. All shards are given the same noise, one draw at each noise level, so that its part of the errors, which is
  theirs in common, cancels between them. sigmas: increasing; their ends should lie where shards no longer differ, or cannot be told
  apart any more.
  """
  errors = denoising_errors(mixture, x0, keys, sigmas)
  return mixture_posterior(mixture, log_densities_of_errors(errors, sigmas, math.prod(x0.shape[1:])))


def log_densities_of_errors(
  errors: Float[Array, "n *more"], sigmas: Float[Array, "n"], size: int
) -> Float[Array, "*more"]:
  """log p(x) in nats, by squared errors |D(x + sigma noise; sigma) - x|^2 at increasing noise levels; size: values of an image.

  Kong et al. 2023 (arXiv:2302.03792, eq. 3): -log p(x) = (d/2) log(2 pi e) - 1/2 integral of (d / (1 + snr) - mmse(x, snr)) dsnr, with
  snr = 1 / sigma^2, by the trapezoidal rule in log sigma. Exact for the mean of errors over noise, with many levels from where the density
  no longer changes to where nothing of the data is seen; what lies outside of the levels is left out.
  """
  level = sigmas.reshape(-1, *(1,) * (errors.ndim - 1))
  values = size / (jnp.square(level) + 1) - errors / jnp.square(level)
  steps = jnp.diff(jnp.log(level), axis=0)
  return (steps * (values[1:] + values[:-1]) / 2).sum(0) - size / 2 * math.log(2 * math.pi * math.e)


def denoising_errors(
  mixture: Mixture, x0: Signed, keys: Key[Array, "b"], sigmas: Float[Array, "n"]
) -> Float[Array, "n s b"]:
  """Squared errors of every shard, with the same noise for all, a draw for each image and level."""

  def errors(number_and_sigma):
    number, sigma = number_and_sigma
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, number), x0.shape[1:], x0.dtype)  # noqa: E731
    level = jnp.full(len(x0), sigma, x0.dtype)
    found = mixture.over_shards(lambda member, x: member(x, level), x0 + sigma * jax.vmap(draw)(keys))
    return jnp.square(found - x0).sum((-3, -2, -1))

  return jax.lax.map(errors, (jnp.arange(len(sigmas)), sigmas))


def mixture_posterior(mixture: Mixture, log_densities: Float[Array, "s b"]) -> Float[Array, "s b"]:
  """w_i of log p^i(x) [s b], known up to a constant for each image: eq. 5."""
  log_prior = mixture.log_prior(log_densities.shape[1])
  return jax.nn.softmax(jnp.where(jnp.isfinite(log_prior), log_prior + log_densities, -jnp.inf), axis=0)


def over_data_set(credit: Float[Array, "s n"]) -> tuple[PerExample, PerExample]:
  """(mean, standard error of the mean) over images of each shard's credit."""
  return credit.mean(1), credit.std(1, ddof=1) / math.sqrt(credit.shape[1])


def path_credit_of_set(parts: Float[Array, "s n"]) -> tuple[Float[Array, "s"], Float[Array, "s"]]:
  """(C_i, its standard error) of a set of images: eq. 6 of their joint log-likelihood, sum_n L_i / sum_n sum_j L_j.

  parts: L_i of every image. Single images may have a sum near 0, and then any C_i. The error is that of a ratio, to first order.
  """
  total = parts.sum(0)
  share = parts.sum(1) / total.sum()
  apart = parts - share[:, None] * total
  return share, apart.std(1, ddof=1) / (math.sqrt(parts.shape[1]) * jnp.abs(total.mean()))
