"""Copy protection: the normalised product of models of disjoint data, none of whose samples one model alone would make likely.

Vyas et al. 2023, "On Provable Copyright Protection for Generative Models" (arXiv:2302.10870): with every protected work absent from the data
of at least one of q_1 .. q_S (the one that is `safe` for it), sample from p with KL(p || safe) <= k. For p proportional to prod_i q_i^(1/S)
(algorithm 3, Delta = KL)

    sum_i KL(p || q_i) = -S log Z,   Z = integral of prod_i q_i^(1/S),   so k = -S log Z (two models: -2 log of their Bhattacharyya coefficient)

and for two models and p proportional to min(q_1, q_2) (Delta = max) log p / q_i <= k = -log(1 - TV(q_1, q_2)).

The score of prod_i q_i^(1/S) is the mean of the scores, which is `Mixture` with weights `Equal`: Golatkar et al. 2024 (arXiv:2308.01937) call
it naive averaging and CP-Delta. That is so at sigma = 0 alone: with noise, the product of noisy densities is not the noisy product, and a
sampler that follows the mean of the scores ends elsewhere, unless all q_i are Gaussians of one covariance. Langevin or Hamiltonian steps
at every noise level mend that (Du et al. 2023, arXiv:2302.11552): they leave the product of that level invariant, whatever came before.

The bound is about p, the product itself. A sampler comes near it, and a k of networks is an estimate; neither hinders a user who asks
for a work by its content (Cohen 2025, arXiv:2506.19881).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion import solvers
from jax_trustdiff.diffusion.samplers import NoiseLevels
from jax_trustdiff.diffusion.solvers import Draw
from jax_trustdiff.types import DenoiseFn, InputError

MCMC = ("none", "ula", "hmc")


@dataclasses.dataclass(frozen=True)
class ProductSampler(NoiseLevels):
  """Samples the product whose mean score a DenoiseFn has, such as `Mixture` with weights `Equal`.

  From noise level to noise level by x + (sigma^2 - sigma'^2) score + noise of variance sigma^2 - sigma'^2 (the reverse SDE), and at every new level
  above mcmc_min `mcmc_steps` moves, with eta = step_size * sigma^2:

      'ula'   x + eta score + sqrt(2 eta) noise
      'hmc'   `leapfrogs` steps of length sqrt(2 eta) with unit mass, after the momentum m became damping m + sqrt(1 - damping^2) noise

  Moves are not tested (scores give no densities): their error is of order eta. 'none': the averaged scores alone, whose error is
  not.
  """

  mcmc: str = "ula"
  mcmc_steps: int = 20
  step_size: float = 0.1
  mcmc_min: float = 0.0
  leapfrogs: int = 3
  damping: float = 0.7

  def __post_init__(self):
    super().__post_init__()
    if self.mcmc not in MCMC:
      raise InputError(f"unknown mcmc {self.mcmc!r}; known: {', '.join(MCMC)}")
    if min(self.mcmc_steps, self.leapfrogs) < 1 or self.step_size <= 0 or not 0 <= self.damping < 1:
      raise InputError(
        f"mcmc_steps and leapfrogs must be at least 1, step_size positive and damping in [0, 1), got {self.mcmc_steps}, "
        f"{self.leapfrogs}, {self.step_size} and {self.damping}"
      )

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image."""
    moves = {"none": 0, "ula": self.mcmc_steps, "hmc": self.mcmc_steps * (self.leapfrogs + 1)}[self.mcmc]
    return self.num_steps + int(self._moved().sum()) * moves

  def _moved(self) -> np.ndarray:
    """Whether moves follow a step, bool [num_steps]: not at sigma 0."""
    after = np.append(self.sigmas[1:], 0.0)
    return (after > self.mcmc_min) & (after > 0) & (self.mcmc != "none")

  def __call__(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    draw: Draw | None = None,
    trajectory: bool = False,
  ) -> Float[Array, "..."]:
    """Images [b h w c] from standard normal noise; keys: one for each image; otherwise as `samplers.AncestralSampler`."""
    sigma = self.sigmas
    after = np.append(sigma[1:], 0.0)
    added = np.where(after > 0, np.sqrt(sigma**2 - after**2), 0.0)
    table = {"sigma": sigma, "after": after, "gain": 1 - (after / sigma) ** 2, "noise": added}
    table["moved"] = self._moved()
    draw = solvers.drawn_by(keys, noise, draw, "a sampler of products")
    x = noise * jnp.asarray(sigma[0], noise.dtype)
    return solvers.solve(denoise, self._step, table, x, draw, None, trajectory)

  def _step(self, denoise, x, memory, row, draw, number):
    numbers = number * (
      self.mcmc_steps + 2
    )  # of draws: one of the step, one of the first momentum, those of the moves
    x = x + row["gain"] * (denoise(x, row["sigma"]).astype(x.dtype) - x)
    x = x + row["noise"] * draw(numbers).astype(x.dtype)
    if self.mcmc == "none":
      return x, memory

    def score(x):
      return (denoise(x, row["after"]).astype(x.dtype) - x) / jnp.square(row["after"])

    def noise_of(i):
      return draw(numbers + 2 + i).astype(x.dtype)

    move = self._langevin if self.mcmc == "ula" else self._hamiltonian
    moved = lambda x: move(score, x, self.step_size * jnp.square(row["after"]), noise_of)  # noqa: E731
    return jax.lax.cond(row["moved"], moved, lambda x: x, x), memory

  def _langevin(self, score, x, eta, noise_of):
    def one(i, x):
      return x + eta * score(x) + jnp.sqrt(2 * eta) * noise_of(i)

    return jax.lax.fori_loop(0, self.mcmc_steps, one, x)

  def _hamiltonian(self, score, x, eta, noise_of):
    length = jnp.sqrt(2 * eta)

    def leap(_, state):
      x, momentum, force = state
      momentum = momentum + length / 2 * force
      x = x + length * momentum
      force = score(x)
      return x, momentum + length / 2 * force, force

    def one(i, state):
      x, momentum = state
      momentum = self.damping * momentum + math.sqrt(1 - self.damping**2) * noise_of(i)
      x, momentum, _ = jax.lax.fori_loop(0, self.leapfrogs, leap, (x, momentum, score(x)))
      return x, momentum

    # the first momentum is all noise: damping of a 0 would make it too small
    start = noise_of(-1)
    return jax.lax.fori_loop(0, self.mcmc_steps, one, (x, start))[0]


def kl_bound(log_densities: Float[Array, "s n"]) -> tuple[jax.Array, jax.Array]:
  """(k, standard error): the k = -S log Z of the product of S models, from log q_i(x) at samples x of model 0.

  Z = E_{q_0} prod_i (q_i / q_0)^(1/S), by the mean over samples. Exact as n grows where log_densities are; with those of
  `likelihood.ODELikelihood` it is an estimate, and where q_0 has no samples near the others a bad one.
  """
  count, number = log_densities.shape
  logs = (log_densities - log_densities[0]).mean(0)
  log_z = jax.nn.logsumexp(logs) - math.log(number)
  spread = jnp.exp(logs - log_z).std(ddof=1) / math.sqrt(number)
  return -count * log_z, count * spread


def effective_samples(log_densities: Float[Array, "s n"]) -> jax.Array:
  """(sum of weights)^2 / sum of their squares, of what `kl_bound` averages: with few of n its k and error say nothing."""
  logs = (log_densities - log_densities[0]).mean(0)
  return jnp.exp(2 * jax.nn.logsumexp(logs) - jax.nn.logsumexp(2 * logs))


def kl_limits(of_first: Float[Array, "s n"], of_product: Float[Array, "s m"]) -> tuple[jax.Array, jax.Array]:
  """(low, high) around the k of `kl_bound`, by Jensen's inequality: means of logarithms, which few samples suffice for.

  of_first: log q_i at samples of model 0, high = sum_i KL(q_0 || q_i). of_product: at samples of the product p,
  low = S max_j E_p (log q_j - mean_i log q_i). Limits of k but for the errors of the two means and of the samples of p.
  """
  count = len(of_first)
  high = count * (of_first[0] - of_first.mean(0)).mean()
  low = count * (of_product - of_product.mean(0)).mean(1).max()
  return low, high


def max_bound(of_first: Float[Array, "2 n"], of_second: Float[Array, "2 m"]) -> tuple[jax.Array, jax.Array]:
  """(k, standard error): k = -log(1 - TV(q_1, q_2)), from (log q_1, log q_2) at samples of the first and of the second.

  1 - TV = integral of min(q_1, q_2) = (E_{q_1} min(1, q_2 / q_1) + E_{q_2} min(1, q_1 / q_2)) / 2.
  """
  shares = [jnp.exp(jnp.minimum(0, log[1 - i] - log[i])) for i, log in enumerate((of_first, of_second))]
  common = sum(share.mean() for share in shares) / 2
  variance = sum(share.var(ddof=1) / share.size for share in shares) / 4
  return -jnp.log(common), jnp.sqrt(variance) / common


def divergences(log_product: Float[Array, "n"], log_densities: Float[Array, "s n"]) -> Float[Array, "s"]:
  """Estimates of KL(p || q_i) in nats, by the mean of log p - log q_i over samples of p; log p normalised."""
  return (log_product - log_densities).mean(1)
