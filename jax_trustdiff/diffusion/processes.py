"""Diffusion processes: x_t = scale(t) * (x0 + sigma(t) * noise), each with its own time t.

Karras et al. 2022 ("Elucidating the Design Space of Diffusion-Based Generative Models", arXiv:2206.00364, section 2 and
table 1) write every process by scale and sigma alone; the SDE of Song et al. 2021 (arXiv:2011.13456) follows,
dx = drift(t) x dt + diffusion(t) dw. A DenoiseFn knows only sigma, so a process is needed where a time is: for schedules
in t, for networks that are told t, and for samplers that are defined by their SDE.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jax_trustdiff.types import InputError, Signed

Times = Float[Array, "..."]
TimesLike = Float[ArrayLike, "..."]


@dataclasses.dataclass(frozen=True)
class Process(abc.ABC):
  """What every process has; times and sigmas are of any shape, floats in and floats of the same width out."""

  @abc.abstractmethod
  def scale(self, t: TimesLike) -> Times:
    """The factor of the clean image at time t."""

  @abc.abstractmethod
  def sigma(self, t: TimesLike) -> Times:
    """Standard deviation of the noise at time t over scale(t), in units of [-1, 1] images; increasing in t."""

  @abc.abstractmethod
  def t_of_sigma(self, sigma: TimesLike) -> Times:
    """The time at which the noise is `sigma`."""

  def scale_of_sigma(self, sigma: TimesLike) -> Times:
    """The factor of the clean image where the noise is `sigma`."""
    return self.scale(self.t_of_sigma(sigma))

  @property
  @abc.abstractmethod
  def t_range(self) -> tuple[float, float]:
    """The earliest time that samplers and losses visit, and the time of the prior."""

  @functools.cached_property
  def sigma_min(self) -> float:
    """sigma at the earliest time."""
    return self._sigma_at(self.t_range[0])

  @functools.cached_property
  def sigma_max(self) -> float:
    """sigma at the time of the prior."""
    return self._sigma_at(self.t_range[1])

  def drift(self, t: TimesLike) -> Times:
    """f(t) of the SDE dx = f(t) x dt + g(t) dw: scale'(t) / scale(t)."""
    scale, slope = _with_slope(self.scale, t)
    return slope / scale

  def diffusion(self, t: TimesLike) -> Times:
    """g(t) of the SDE dx = f(t) x dt + g(t) dw: scale(t) sqrt(2 sigma'(t) sigma(t))."""
    sigma, slope = _with_slope(self.sigma, t)
    return self.scale(t) * jnp.sqrt(2 * slope * sigma)

  def diffuse(
    self, x0: Signed, t: Float[Array, "b"], noise: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    """x_t of the clean images `x0` under standard normal `noise`: scale(t) (x0 + sigma(t) noise)."""
    column = (slice(None),) + (None,) * (x0.ndim - 1)
    return self.scale(t)[column] * (x0 + self.sigma(t)[column] * noise)

  def _sigma_at(self, t: float) -> float:
    with jax.ensure_compile_time_eval():
      return float(self.sigma(jnp.asarray(t)))


@dataclasses.dataclass(frozen=True)
class VP(Process):
  """Variance preserving (Song et al. 2021, eq. 11; DDPM in continuous time), t in [t_min, 1].

  beta(t) = beta_min + beta_d t; sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, scale = 1 / sqrt(1 + sigma^2).
  """

  beta_d: float = 19.9
  beta_min: float = 0.1
  t_min: float = 1e-5

  def __post_init__(self):
    _check_betas(self)

  def scale(self, t: TimesLike) -> Times:
    return jnp.exp(-_integrated_beta(self, t) / 2)

  def sigma(self, t: TimesLike) -> Times:
    return jnp.sqrt(jnp.expm1(_integrated_beta(self, t)))

  def t_of_sigma(self, sigma: TimesLike) -> Times:
    return _time_of_integrated_beta(self, jnp.log1p(jnp.square(sigma)))

  def scale_of_sigma(self, sigma: TimesLike) -> Times:
    return jax.lax.rsqrt(1 + jnp.square(sigma))

  @property
  def t_range(self) -> tuple[float, float]:
    return self.t_min, 1.0


@dataclasses.dataclass(frozen=True)
class SubVP(Process):
  """Sub-VP (Song et al. 2021, appendix C): the drift of VP, variance (1 - scale^2)^2; t in [t_min, 1]."""

  beta_d: float = 19.9
  beta_min: float = 0.1
  t_min: float = 1e-3

  def __post_init__(self):
    _check_betas(self)

  def scale(self, t: TimesLike) -> Times:
    return jnp.exp(-_integrated_beta(self, t) / 2)

  def sigma(self, t: TimesLike) -> Times:
    return 2 * jnp.sinh(_integrated_beta(self, t) / 2)  # (1 - scale^2) / scale

  def t_of_sigma(self, sigma: TimesLike) -> Times:
    return _time_of_integrated_beta(self, 2 * jnp.arcsinh(sigma / 2))

  @property
  def t_range(self) -> tuple[float, float]:
    return self.t_min, 1.0


@dataclasses.dataclass(frozen=True)
class VE(Process):
  """Variance exploding (Song et al. 2021, eq. 9): sigma(t) = lowest (highest / lowest)^t, t in [t_min, 1], scale 1."""

  lowest: float = 0.01
  highest: float = 50.0
  t_min: float = 1e-5

  def __post_init__(self):
    if not 0 < self.lowest < self.highest:
      raise InputError(f"VE: needs 0 < lowest < highest, got {self.lowest} and {self.highest}")

  def scale(self, t: TimesLike) -> Times:
    return jnp.ones_like(t)

  def sigma(self, t: TimesLike) -> Times:
    return self.lowest * (self.highest / self.lowest) ** jnp.asarray(t)

  def t_of_sigma(self, sigma: TimesLike) -> Times:
    return jnp.log(sigma / self.lowest) / math.log(self.highest / self.lowest)

  @property
  def t_range(self) -> tuple[float, float]:
    return self.t_min, 1.0


@dataclasses.dataclass(frozen=True)
class EDM(Process):
  """The process of Karras et al. 2022: sigma(t) = t, scale 1; t in [lowest, highest]."""

  lowest: float = 0.002
  highest: float = 80.0

  def __post_init__(self):
    if not 0 < self.lowest < self.highest:
      raise InputError(f"EDM: needs 0 < lowest < highest, got {self.lowest} and {self.highest}")

  def scale(self, t: TimesLike) -> Times:
    return jnp.ones_like(t)

  def sigma(self, t: TimesLike) -> Times:
    return jnp.asarray(t)

  def t_of_sigma(self, sigma: TimesLike) -> Times:
    return jnp.asarray(sigma)

  @property
  def t_range(self) -> tuple[float, float]:
    return self.lowest, self.highest


@dataclasses.dataclass(frozen=True)
class TableProcess(Process):
  """A variance-preserving process known at whole times t = 0 .. n-1; log sigma is linear in between.

  scale = 1 / sqrt(1 + sigma^2) is the square root of the product of (1 - beta) up to t.
  """

  @property
  @abc.abstractmethod
  def sigmas(self) -> np.ndarray:
    """sigma at t = 0 .. n-1, increasing, float64 [n]."""

  @property
  def sigma_min(self) -> float:
    return float(self.sigmas[0])

  @property
  def sigma_max(self) -> float:
    return float(self.sigmas[-1])

  def scale(self, t: TimesLike) -> Times:
    return self.scale_of_sigma(self.sigma(t))

  def scale_of_sigma(self, sigma: TimesLike) -> Times:
    return jax.lax.rsqrt(1 + jnp.square(sigma))

  def sigma(self, t: TimesLike) -> Times:
    table = self._table(t)
    return jnp.exp(jnp.interp(t, jnp.arange(len(table), dtype=table.dtype), jnp.log(table)))

  def t_of_sigma(self, sigma: TimesLike) -> Times:
    table = self._table(sigma)
    return jnp.interp(jnp.log(sigma), jnp.log(table), jnp.arange(len(table), dtype=table.dtype))

  def nearest(self, sigma: TimesLike) -> Array:
    """The whole time, int32, whose sigma is nearest."""
    table = self._table(sigma)
    above = jnp.clip(jnp.searchsorted(table, sigma), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    return (above - (sigma - low <= high - sigma)).astype(jnp.int32)

  def round_sigma(self, sigma: TimesLike) -> Times:
    """The nearest sigma of the table."""
    return self._table(sigma)[self.nearest(sigma)]

  @property
  def t_range(self) -> tuple[float, float]:
    return 0.0, float(len(self.sigmas) - 1)

  def _table(self, like: TimesLike) -> Float[Array, "n"]:
    """In the precision of `like`, at least float32; for whole numbers that of jax."""
    return jnp.asarray(self.sigmas, jnp.promote_types(jnp.result_type(like, float), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Discrete(TableProcess):
  """DDPM (Ho et al. 2020) with `num_steps` betas: 'linear', or 'scaled_linear' (linear in sqrt(beta)).

  The defaults are those of Stable Diffusion (Rombach et al. 2022); Ho et al. have linear betas from 1e-4 to 0.02.
  """

  schedule: str = "scaled_linear"
  beta_start: float = 0.00085
  beta_end: float = 0.012
  num_steps: int = 1000

  def __post_init__(self):
    if self.schedule not in ("linear", "scaled_linear"):
      raise InputError(f"Discrete: schedule must be linear or scaled_linear; got {self.schedule!r}")
    if not 0 < self.beta_start < self.beta_end < 1:
      raise InputError(
        f"Discrete: needs 0 < beta_start < beta_end < 1, got {self.beta_start} and {self.beta_end}"
      )

  @functools.cached_property
  def sigmas(self) -> np.ndarray:
    power = 1.0 if self.schedule == "linear" else 0.5
    betas = np.linspace(self.beta_start**power, self.beta_end**power, self.num_steps) ** (1 / power)
    # 1 / prod(1 - beta) - 1 without cancellation
    return np.sqrt(np.expm1(-np.cumsum(np.log1p(-betas))))


@dataclasses.dataclass(frozen=True)
class IDDPM(TableProcess):
  """The cosine schedule of Nichol & Dhariwal 2021 as Karras et al. 2022 (table 1, eq. 209) tabulate it.

  u_M = 0, u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, c1) - 1), abar_j = sin^2(pi j / (2 M (c2 + 1))); time t
  has sigma u_{M-1-t}.
  """

  num_steps: int = 1000
  c1: float = 1e-3
  c2: float = 8e-3

  @functools.cached_property
  def sigmas(self) -> np.ndarray:
    abar = np.sin(0.5 * np.pi * np.arange(self.num_steps + 1) / (self.num_steps * (self.c2 + 1))) ** 2
    found, u = [], 0.0
    for j in range(self.num_steps, 0, -1):
      u = np.sqrt((u**2 + 1) / max(abar[j - 1] / abar[j], self.c1) - 1)
      found.append(u)
    return np.array(found)


PROCESSES = {"vp": VP, "sub_vp": SubVP, "ve": VE, "edm": EDM, "iddpm": IDDPM, "discrete": Discrete}


def as_process(process: Process | str) -> Process:
  """The process of a text such as 'vp', 've:lowest=0.02,highest=100' or 'discrete:schedule=linear'; a Process as it is.

  A name in PROCESSES and values for its fields, as a config can hold them. InputError for a name, field or value that is not
  known.
  """
  if isinstance(process, Process):
    return process
  name, _, rest = process.partition(":")
  if name not in PROCESSES:
    raise InputError(f"unknown process {name!r}; known: {', '.join(PROCESSES)}")
  types = {field.name: type(field.default) for field in dataclasses.fields(PROCESSES[name])}
  values = {}
  for part in filter(None, rest.split(",")):
    key, _, value = part.partition("=")
    if key not in types:
      raise InputError(f"process {name!r} does not take {key!r}; it takes: {', '.join(types)}")
    try:
      values[key] = types[key](value)
    except ValueError:
      raise InputError(f"{key} of process {name!r} must be {types[key].__name__}, got {value!r}") from None
  return PROCESSES[name](**values)


def _with_slope(function: Callable[[Times], Times], t: TimesLike) -> tuple[Times, Times]:
  """function(t) and its derivative, each time on its own."""
  t = jnp.asarray(t)
  return jax.jvp(function, (t,), (jnp.ones_like(t),))


def _integrated_beta(process: VP | SubVP, t: TimesLike) -> Times:
  return 0.5 * process.beta_d * jnp.square(t) + process.beta_min * t


def _time_of_integrated_beta(process: VP | SubVP, total: TimesLike) -> Times:
  root = jnp.sqrt(process.beta_min**2 + 2 * process.beta_d * total)
  return 2 * total / (root + process.beta_min)  # (root - beta_min) / beta_d without cancellation


def _check_betas(process: VP | SubVP) -> None:
  name = type(process).__name__
  if process.beta_d <= 0 or process.beta_min <= 0:
    raise InputError(
      f"{name}: beta_d and beta_min must be positive, got {process.beta_d} and {process.beta_min}"
    )
  if not 0 < process.t_min < 1:
    raise InputError(f"{name}: t_min must lie between 0 and 1, got {process.t_min}")
