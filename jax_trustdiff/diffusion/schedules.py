"""Where samplers step: noise levels, and the time and scale along which they step (Karras et al. 2022, table 1).

Everything here runs on the host in float64; a schedule is a handful of numbers for each step.
"""

import dataclasses

import numpy as np

from jax_trustdiff.diffusion.processes import IDDPM
from jax_trustdiff.types import InputError

DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm", "table")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")
EPSILON_S = 1e-3  # the earliest time of the VP discretization
# the range of sigma that each was made for (Karras et al. 2022, table 1)
SIGMA_RANGES = {
  "vp": (
    float(np.sqrt(np.expm1(0.5 * 19.9 * EPSILON_S**2 + 0.1 * EPSILON_S))),
    float(np.sqrt(np.expm1(10.05))),
  ),
  "ve": (0.02, 100.0),
  "iddpm": (0.002, 81.0),
  "edm": (0.002, 80.0),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """sigma(t), its derivative and inverse: 'vp', 've' (sigma = sqrt(t)) or 'linear' (sigma = t); t = 0 has sigma 0."""

  name: str
  beta_d: float = 19.9  # of 'vp'
  beta_min: float = 0.1

  def sigma(self, t: np.ndarray) -> np.ndarray:
    t = np.asarray(t, np.float64)
    if self.name == "vp":
      return np.sqrt(np.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))
    return np.sqrt(t) if self.name == "ve" else t

  def slope(self, t: np.ndarray) -> np.ndarray:
    sigma = self.sigma(t)
    if self.name == "vp":
      return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)
    return 1 / (2 * sigma) if self.name == "ve" else np.ones_like(sigma)

  def t_of_sigma(self, sigma: np.ndarray) -> np.ndarray:
    sigma = np.asarray(sigma, np.float64)
    if self.name == "vp":
      total = np.log1p(sigma**2)
      return 2 * total / (np.sqrt(self.beta_min**2 + 2 * self.beta_d * total) + self.beta_min)
    return sigma**2 if self.name == "ve" else sigma


def vp_betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
  """(beta_d, beta_min) of the VP process that has sigma_min at t = 0.001 and sigma_max at t = 1.

  InputError if sigma would not grow from there: sigma_min must be small beside sigma_max.
  """
  low, high = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
  beta_d = 2 * (low / EPSILON_S - high) / (EPSILON_S - 1)
  beta_min = high - beta_d / 2
  if beta_d <= 0 or beta_min + beta_d * EPSILON_S <= 0:
    raise InputError(f"no VP process goes from sigma {sigma_min} at t = {EPSILON_S} to {sigma_max} at t = 1")
  return float(beta_d), float(beta_min)


def scale_of_sigma(scaling: str, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(scale s, its derivative by sigma): 'vp' has s = 1 / sqrt(1 + sigma^2), 'none' s = 1."""
  sigma = np.asarray(sigma, np.float64)
  if scaling == "none":
    return np.ones_like(sigma), np.zeros_like(sigma)
  scale = 1 / np.sqrt(1 + sigma**2)
  return scale, -sigma * scale**3


def noise_levels(
  discretization: str,
  num_steps: int,
  sigma_min: float,
  sigma_max: float,
  rho: float = 7.0,
  table: np.ndarray | None = None,
) -> np.ndarray:
  """sigma at the start of each of `num_steps` steps, from sigma_max down to sigma_min, float64 [num_steps].

  'edm' is Karras et al. 2022, eq. 5 with `rho`; 'vp', 've' and 'iddpm' are the other columns of its table 1. 'table' visits
  the levels of `table`, increasing, that lie in the range: all of them if they are `num_steps`, fewer at the nearest to evenly
  spaced whole times, the first and the last among them: but for rounding and the first, floor(c i), the linear choice of DDIM
  (Song et al. 2021, arXiv:2010.02502). InputError if they are fewer than `num_steps`.
  """
  if discretization not in DISCRETIZATIONS:
    raise InputError(f"unknown discretization {discretization!r}; known: {', '.join(DISCRETIZATIONS)}")
  if num_steps < 2:
    raise InputError(f"num_steps must be at least 2, got {num_steps}")
  if not 0 < sigma_min < sigma_max < np.inf:
    raise InputError(f"needs 0 < sigma_min < sigma_max, both finite, got {sigma_min} and {sigma_max}")
  if rho <= 0:
    raise InputError(f"rho must be positive, got {rho}")
  part = np.arange(num_steps) / (num_steps - 1)
  if discretization == "edm":
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + part * (low - high)) ** rho
  if discretization == "vp":
    return Schedule("vp", *vp_betas(sigma_min, sigma_max)).sigma(1 + part * (EPSILON_S - 1))
  if discretization == "ve":
    return sigma_max * (sigma_min / sigma_max) ** part
  if discretization == "iddpm":
    table = IDDPM().sigmas
  if table is None:
    raise InputError("discretization 'table' needs the process whose table it is: give round_to")
  # bounds may be levels of the table in single precision
  table = table[(table >= sigma_min * (1 - 1e-6)) & (table <= sigma_max * (1 + 1e-6))][::-1]
  if len(table) < 2:
    raise InputError(f"{discretization} has no two noise levels between {sigma_min} and {sigma_max}")
  if discretization == "table" and len(table) < num_steps:
    found = f"{len(table)} noise levels between {sigma_min} and {sigma_max}, fewer than num_steps {num_steps}"
    raise InputError(f"the table has {found}")
  return table[np.rint(part * (len(table) - 1)).astype(int)]


def nearest(sigma: np.ndarray, table: np.ndarray) -> np.ndarray:
  """The value of `table`, increasing, that is nearest to each `sigma`; the smaller of two that are as near."""
  above = np.clip(np.searchsorted(table, sigma), 1, len(table) - 1)
  low, high = table[above - 1], table[above]
  return np.where(sigma - low <= high - sigma, low, high)
