"""Losses that train a denoiser: weight(sigma) * ||D(x0 + sigma * noise; sigma) - x0||^2, at sigma drawn from a density.

A loss takes a DenoiseFn, so it serves every network and preconditioning; labels and dropout keys are bound in it, and x0
is what the augmentation left. Karras et al. 2022 (arXiv:2206.00364, eq. 8) write all of these losses so.

    loss = EDMLoss()(Denoiser(network, preconditioning, variables, class_labels, augment_labels, key), x0, keys).mean()
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion.processes import VE, VP, Process, TableProcess, as_process
from jax_trustdiff.types import DenoiseFn, InputError, KeyOrKeys, PerExample, Sigma, Signed


@dataclasses.dataclass(frozen=True)
class DenoisingLoss(abc.ABC):
  """(DenoiseFn, clean images, keys) -> loss of each image [b]: the sum over pixels and channels, in float32 or wider."""

  @abc.abstractmethod
  def sample_sigma(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Independent draws from the training density of sigma."""

  @abc.abstractmethod
  def weight(self, sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    """The factor of the squared error at each noise level."""

  def __call__(self, denoise: DenoiseFn, x0: Signed, key: KeyOrKeys) -> PerExample:
    """The loss at one draw of sigma and noise for each image.

    key: one for each image, which makes its sigma and noise independent of its batch; one for the batch stands for its
    fold_in with 0, 1, ...
    """
    return self.at(denoise, x0, *self.draw(key, x0))

  def draw(self, key: KeyOrKeys, x0: Signed) -> tuple[Sigma, Float[Array, "b h w c"]]:
    """(sigma, standard normal noise) of each image; keys as in the call."""
    if not key.ndim:
      key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x0)))
    dtype = jnp.promote_types(x0.dtype, jnp.float32)

    def one(key):
      sigma_key, noise_key = jax.random.split(key)
      sigma = self.sample_sigma(sigma_key, ()).astype(dtype)
      return sigma, jax.random.normal(noise_key, x0.shape[1:], dtype)

    return jax.vmap(one)(key)

  def at(self, denoise: DenoiseFn, x0: Signed, sigma: Sigma, noise: Float[Array, "b h w c"]) -> PerExample:
    """The loss of each image at given noise: weight(sigma) * ||D(x0 + sigma * noise; sigma) - x0||^2."""
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    error = denoise(x0 + sigma[:, None, None, None] * noise, sigma) - x0
    return self.weight(sigma) * jnp.square(error).sum((1, 2, 3))


@dataclasses.dataclass(frozen=True)
class EDMLoss(DenoisingLoss):
  """Karras et al. 2022, table 1, last column: log sigma normal, weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

  sigma_data is the standard deviation of the data; with it the expected loss of a network that has learned nothing is
  the same at every noise level. log_mean and log_std are P_mean and P_std.
  """

  log_mean: float = -1.2
  log_std: float = 1.2
  sigma_data: float = 0.5

  def __post_init__(self):
    if self.log_std <= 0 or self.sigma_data <= 0:
      raise InputError(
        f"EDMLoss: log_std and sigma_data must be positive, got {self.log_std} and {self.sigma_data}"
      )

  def sample_sigma(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.exp(self.log_mean + self.log_std * jax.random.normal(key, shape))

  def weight(self, sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1 / jnp.square(sigma) + 1 / self.sigma_data**2


@dataclasses.dataclass(frozen=True)
class NoiseLoss(DenoisingLoss):
  """The squared error of the predicted noise, ||(D - x0) / sigma||^2, at uniform times of `process`: weight 1 / sigma^2.

  Ho et al. 2020 (arXiv:2006.11239, eq. 14) in continuous time; `DDPMLoss` has their times. `vp_loss` and `ve_loss` are
  those of Karras et al. 2022, table 1. process: a Process, or its name and fields as for `processes.as_process`.
  """

  process: Process | str = "vp"

  def __post_init__(self):
    object.__setattr__(self, "process", as_process(self.process))

  def sample_sigma(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return self.process.sigma(_uniform_time(self.process, key, shape))

  def weight(self, sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1 / jnp.square(sigma)


@dataclasses.dataclass(frozen=True)
class DDPMLoss(NoiseLoss):
  """L_simple of Ho et al. 2020 (arXiv:2006.11239, eq. 14): the `NoiseLoss` at whole times of `process`, each as likely.

  D = x - sigma * predicted noise, so ||noise - predicted noise||^2 is ||D - x0||^2 / sigma^2; like every loss here it is a
  sum over pixels. t = 1 .. 1000 of the paper are the times 0 .. 999 of the process. process: as there; InputError for one
  without a table. The default has the betas of Ho et al.
  """

  process: Process | str = "discrete:schedule=linear,beta_start=0.0001,beta_end=0.02"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.process, TableProcess):
      raise InputError(f"DDPMLoss: needs a process with a table, got {type(self.process).__name__}")

  def sample_sigma(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    table = jnp.asarray(self.process.sigmas, float)
    return table[jax.random.randint(key, shape, 0, len(table))]


def vp_loss(beta_d: float = 19.9, beta_min: float = 0.1, t_min: float = 1e-5) -> NoiseLoss:
  """The loss of DDPM++ (Song et al. 2021) as Karras et al. 2022, table 1, has it: t uniform between t_min and 1."""
  return NoiseLoss(VP(beta_d, beta_min, t_min))


def ve_loss(sigma_min: float = 0.02, sigma_max: float = 100.0) -> NoiseLoss:
  """The loss of NCSN++ (Song et al. 2021) as Karras et al. 2022, table 1, has it: log sigma uniform."""
  return NoiseLoss(VE(sigma_min, sigma_max, t_min=0.0))


@dataclasses.dataclass(frozen=True)
class ScoreMatchingLoss(DenoisingLoss):
  """Denoising score matching at uniform times of `process` (Song et al. 2021, arXiv:2011.13456, eq. 7), halved.

  With std = scale(t) sigma(t) and score = (D - x) / (scale(t) sigma(t)^2) that of the process at x_t = scale(t) x:

      1/2 ||std * score + noise||^2                      weight 1 / (2 sigma^2)
      1/2 g(t)^2 ||score + noise / std||^2               with likelihood_weighting, g(t) the diffusion of the process

  The second, times the length of t_range, bounds the negative log-likelihood up to a constant (Song et al. 2021,
  arXiv:2101.09258, theorem 1); its gradient has a far larger variance. process: a Process, or its name and fields as for
  `processes.as_process`.
  """

  process: Process | str = "vp"
  likelihood_weighting: bool = False

  def __post_init__(self):
    object.__setattr__(self, "process", as_process(self.process))

  def sample_sigma(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    return self.process.sigma(_uniform_time(self.process, key, shape))

  def weight(self, sigma: Float[Array, "..."]) -> Float[Array, "..."]:
    weight = 1 / (2 * jnp.square(sigma))
    if not self.likelihood_weighting:
      return weight
    t = self.process.t_of_sigma(sigma)
    return weight * jnp.square(self.process.diffusion(t) / (self.process.scale(t) * sigma))


LOSSES = {
  "edm": EDMLoss,
  "vp": vp_loss,
  "ve": ve_loss,
  "ddpm": DDPMLoss,
  "score_matching": ScoreMatchingLoss,
}


def _uniform_time(process: Process, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
  first, last = process.t_range
  return jax.random.uniform(key, shape, minval=first, maxval=last)
