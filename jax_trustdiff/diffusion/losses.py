"""Denoising losses: at which noise levels a network is trained, and how much each counts.

loss(x0) = weight(sigma) * ||D(x0 + sigma * noise; sigma) - x0||^2, summed over pixels and channels (Karras et al. 2022,
arXiv:2206.00364, eq. 2 and table 1), with sigma drawn from the density of the loss.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion.processes import VP
from jax_trustdiff.types import DenoiseFn, InputError, PerExample, Sigma, Signed


@dataclasses.dataclass(frozen=True)
class DenoisingLoss(abc.ABC):
  """What the losses share; callable as loss(denoise, x0, keys)."""

  @abc.abstractmethod
  def sigma_of(self, key: Key[Array, ""]) -> Float[Array, ""]:
    """A noise level drawn from the density of this loss."""

  @abc.abstractmethod
  def weight(self, sigma: Sigma) -> PerExample:
    """The factor of the squared error at noise level sigma."""

  def __call__(self, denoise: DenoiseFn, x0: Signed, keys: Key[Array, "b"]) -> PerExample:
    """The loss of every image; an image's noise level and noise are of its own key."""
    sigma, noise = jax.vmap(lambda key: self._draw(key, x0))(keys)
    sigma, noise = sigma.astype(x0.dtype), noise.astype(x0.dtype)
    error = denoise(x0 + sigma[:, None, None, None] * noise, sigma) - x0
    return self.weight(sigma) * jnp.square(error).sum((1, 2, 3))

  def _draw(self, key, x0):
    level, noise = jax.random.split(key)
    return self.sigma_of(level), jax.random.normal(noise, x0.shape[1:])


@dataclasses.dataclass(frozen=True)
class EDMLoss(DenoisingLoss):
  """Karras et al. 2022: log sigma ~ N(p_mean, p_std^2), weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""

  p_mean: float = -1.2
  p_std: float = 1.2
  sigma_data: float = 0.5

  def __post_init__(self):
    if self.p_std <= 0 or self.sigma_data <= 0:
      raise InputError(
        f"EDMLoss: p_std and sigma_data must be positive, got {self.p_std} and {self.sigma_data}"
      )

  def sigma_of(self, key: Key[Array, ""]) -> Float[Array, ""]:
    return jnp.exp(self.p_mean + self.p_std * jax.random.normal(key))

  def weight(self, sigma: Sigma) -> PerExample:
    return (jnp.square(sigma) + self.sigma_data**2) / jnp.square(sigma * self.sigma_data)


@dataclasses.dataclass(frozen=True)
class VPLoss(DenoisingLoss):
  """Song et al. 2021 as in Karras et al. 2022, table 1: t uniform in [t_min, 1] of the VP process, weight 1 / sigma^2."""

  beta_d: float = 19.9
  beta_min: float = 0.1
  t_min: float = 1e-5

  def __post_init__(self):
    self.process  # noqa: B018  raises for what is no process

  @property
  def process(self) -> VP:
    """The process whose times are drawn."""
    return VP(self.beta_d, self.beta_min, self.t_min)

  def sigma_of(self, key: Key[Array, ""]) -> Float[Array, ""]:
    return self.process.sigma(jax.random.uniform(key, minval=self.t_min))

  def weight(self, sigma: Sigma) -> PerExample:
    return 1 / jnp.square(sigma)


@dataclasses.dataclass(frozen=True)
class VELoss(DenoisingLoss):
  """Song et al. 2021 as in Karras et al. 2022, table 1: log sigma uniform, weight 1 / sigma^2."""

  sigma_min: float = 0.02
  sigma_max: float = 100.0

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max:
      raise InputError(f"VELoss: needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

  def sigma_of(self, key: Key[Array, ""]) -> Float[Array, ""]:
    return self.sigma_min * jnp.exp(np.log(self.sigma_max / self.sigma_min) * jax.random.uniform(key))

  def weight(self, sigma: Sigma) -> PerExample:
    return 1 / jnp.square(sigma)


DIFFUSION_LOSSES = {"edm": EDMLoss, "vp": VPLoss, "ve": VELoss}
