"""From a network's output to a DenoiseFn: preconditionings, and what networks predict in place of the clean image.

All in the convention of Karras et al. 2022 (arXiv:2206.00364): x = x0 + sigma * noise, and D(x; sigma) estimates x0.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.diffusion.processes import IDDPM, VP, Discrete, Process, TableProcess
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import DiffusionNetwork, InputError, Labels, Sigma, Signed, Variables

Coefficient = Float[Array, "..."]


def _x0_by(prediction: str, sigma: Coefficient) -> tuple[Coefficient, Coefficient]:
  """(a, b) of x0 = a x + b * prediction."""
  one = jnp.ones_like(sigma)
  match prediction:
    case "x0":
      return 0 * one, one
    case "noise":  # x = x0 + sigma * noise
      return one, -sigma
    case "score":  # gradient of log p(x; sigma); Tweedie's formula, Karras et al. 2022, eq. 3
      return one, jnp.square(sigma)
    case "v":  # v = alpha * noise - std * x0 (Salimans & Ho 2022, section 4), alpha^2 + std^2 = 1, std = alpha * sigma
      return 1 / (1 + jnp.square(sigma)), -sigma * jax.lax.rsqrt(1 + jnp.square(sigma))
    case "flow":  # noise - x0 along (1 - t) x0 + t * noise (Liu et al. 2023, eq. 1), sigma = t / (1 - t)
      return 1 / (1 + sigma), -sigma / (1 + sigma)
  raise InputError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")


PREDICTIONS = ("x0", "noise", "score", "v", "flow")


def convert(
  value: Float[Array, "b h w c"], x: Float[Array, "b h w c"], sigma: Sigma, source: str, target: str
) -> Float[Array, "b h w c"]:
  """What a network that predicts `target` would have said where one that predicts `source` said `value`.

  source, target: names in PREDICTIONS; x: the noisy images in EDM convention, sigma > 0.
  """
  a, b = _x0_by(source, _per_image(sigma, x))
  c, d = _x0_by(target, _per_image(sigma, x))
  return ((a - c) * x + b * value) / d


class Coefficients(NamedTuple):
  """D(x; sigma) = skip * x + out * F(input * x; noise): Karras et al. 2022, eq. 7. Each of sigma's shape."""

  skip: Any
  out: Any
  input: Any
  noise: Any  # what the network is told


@runtime_checkable
class Preconditioning(Protocol):
  """How a network F becomes a denoiser (Karras et al. 2022, table 1)."""

  sigma_min: float  # the range of sigma the network was made for
  sigma_max: float

  def coefficients(self, sigma: Coefficient) -> Coefficients:
    """At noise levels of any shape."""

  def round_sigma(self, sigma: Coefficient) -> Coefficient:
    """The nearest noise level that the network knows: sigma itself where it knows all."""


@dataclasses.dataclass(frozen=True)
class EDMPreconditioning:
  """Karras et al. 2022, table 1, last column; sigma_data is the standard deviation of the data."""

  sigma_data: float = 0.5
  sigma_min: float = 0.0
  sigma_max: float = float("inf")

  def coefficients(self, sigma: Coefficient) -> Coefficients:
    total = jnp.square(sigma) + self.sigma_data**2
    return Coefficients(
      skip=self.sigma_data**2 / total,
      out=sigma * self.sigma_data * jax.lax.rsqrt(total),
      input=jax.lax.rsqrt(total),
      noise=jnp.log(sigma) / 4,
    )

  def round_sigma(self, sigma: Coefficient) -> Coefficient:
    return sigma


@dataclasses.dataclass(frozen=True)
class VEPreconditioning:
  """NCSN++ of Song et al. 2021 (Karras et al. 2022, table 1): F predicts minus the noise and is told log(sigma / 2)."""

  sigma_min: float = 0.02
  sigma_max: float = 100.0

  def coefficients(self, sigma: Coefficient) -> Coefficients:
    one = jnp.ones_like(sigma)
    return Coefficients(skip=one, out=sigma, input=one, noise=jnp.log(sigma / 2))

  def round_sigma(self, sigma: Coefficient) -> Coefficient:
    return sigma


@dataclasses.dataclass(frozen=True)
class ProcessPreconditioning:
  """A network that sees x_t of `process`, is told time_scale * t, and predicts one of PREDICTIONS.

  VP of Song et al. 2021 (DDPM++, time_scale 999), iDDPM, and Stable Diffusion ('noise' or 'v' of a Discrete process) are
  such networks. With `whole_times` it knows only the whole times of a table: it is told the nearest, and samplers visit
  those noise levels alone. Without, a network is also told times in between (for one trained at whole times, what it has
  not seen), so that its probability flow is defined at every noise level.
  """

  process: Process
  prediction: str = "noise"
  time_scale: float = 1.0
  whole_times: bool = False

  def __post_init__(self):
    if self.prediction not in PREDICTIONS:
      raise InputError(f"unknown prediction {self.prediction!r}; known: {', '.join(PREDICTIONS)}")
    if self.whole_times and not isinstance(self.process, TableProcess):
      raise InputError(f"whole_times needs a process with a table, got {type(self.process).__name__}")

  @property
  def sigma_min(self) -> float:
    return self.process.sigma_min

  @property
  def sigma_max(self) -> float:
    return self.process.sigma_max

  def coefficients(self, sigma: Coefficient) -> Coefficients:
    skip, out = _x0_by(self.prediction, sigma)
    t = (
      self.process.nearest(sigma).astype(sigma.dtype) if self.whole_times else self.process.t_of_sigma(sigma)
    )
    return Coefficients(
      skip=skip, out=out, input=self.process.scale_of_sigma(sigma), noise=self.time_scale * t
    )

  def round_sigma(self, sigma: Coefficient) -> Coefficient:
    return self.process.round_sigma(sigma) if self.whole_times else sigma


def vp_preconditioning(
  beta_d: float = 19.9, beta_min: float = 0.1, t_min: float = 1e-5, num_steps: int = 1000
) -> ProcessPreconditioning:
  """DDPM++ of Song et al. 2021 (Karras et al. 2022, table 1): predicts the noise, is told (num_steps - 1) t."""
  return ProcessPreconditioning(VP(beta_d, beta_min, t_min), "noise", time_scale=num_steps - 1)


def iddpm_preconditioning(
  num_steps: int = 1000, c1: float = 1e-3, c2: float = 8e-3, whole_times: bool = True
) -> ProcessPreconditioning:
  """iDDPM + DDIM (Karras et al. 2022, table 1): predicts the noise, knows `num_steps` noise levels."""
  return ProcessPreconditioning(IDDPM(num_steps, c1, c2), "noise", whole_times=whole_times)


def discrete_preconditioning(
  prediction: str = "noise",
  schedule: str = "scaled_linear",
  beta_start: float = 0.00085,
  beta_end: float = 0.012,
  num_steps: int = 1000,
  whole_times: bool = False,
) -> ProcessPreconditioning:
  """DDPM's discrete times t = 0 .. num_steps - 1, by default with Stable Diffusion's betas; the network is told t.

  Also between whole times, unless `whole_times`.
  """
  process = Discrete(schedule, beta_start, beta_end, num_steps)
  return ProcessPreconditioning(process, prediction, whole_times=whole_times)


PRECONDITIONINGS = {
  "edm": EDMPreconditioning,
  "ve": VEPreconditioning,
  "vp": vp_preconditioning,
  "iddpm": iddpm_preconditioning,
  "discrete": discrete_preconditioning,
}


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
  """A `DenoiseFn` that is a pytree: D(x; sigma) = skip * x + out * F(input * x; noise) (Karras et al. 2022, eq. 7).

  Its leaves are the variables, labels and dropout key; as an argument of a jitted function it recompiles for another
  network, not for other values. Channels of F beyond those of x (learned variances) are not used. Computed in the
  precision of x, at least float32; the network has its own.
  """

  network: DiffusionNetwork = dataclasses.field(metadata={"static": True})
  preconditioning: Preconditioning = dataclasses.field(metadata={"static": True})
  variables: Variables
  class_labels: Any = None  # [b k] one-hot, or None
  augment_labels: Any = None  # [b a], or None
  dropout_key: Any = None  # None: evaluation mode

  @property
  def sigma_min(self) -> float:
    return self.preconditioning.sigma_min

  @property
  def sigma_max(self) -> float:
    return self.preconditioning.sigma_max

  def with_labels(self, labels: Labels) -> "Denoiser":
    """This denoiser for integer class labels, which an unconditional network does not see."""
    classes = self.network.num_classes
    return dataclasses.replace(self, class_labels=jax.nn.one_hot(labels, classes)) if classes else self

  def with_variables(self, own: Variables) -> "Denoiser":
    """This denoiser with the collections of `own` in place of, or beside, its own."""
    return dataclasses.replace(self, variables=self.variables | own)

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    sigma = jnp.asarray(sigma, x.dtype)
    c = self.preconditioning.coefficients(sigma)
    found = self.network.apply(
      self.variables,
      _per_image(c.input, x) * x,
      c.noise,
      self.class_labels,
      self.augment_labels,
      self.dropout_key,
    )[..., : x.shape[-1]]
    return _per_image(c.skip, x) * x + _per_image(c.out, x) * found


def _per_image(value: Array, x: Array) -> Array:
  """[b] as [b 1 1 1], to be multiplied with images."""
  return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))
