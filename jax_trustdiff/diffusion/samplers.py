"""Samplers: from standard normal noise to images, by a DenoiseFn; pure functions around one diffrax solve.

A sampler is a frozen dataclass, called as `sampler(denoise, noise, keys)`: noise [b h w c] standard normal, keys one typed
key for each image where steps draw noise. The image of a key is the same in every batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion import schedules, solvers
from jax_trustdiff.diffusion.solvers import Draw, PerImageNoise
from jax_trustdiff.types import DenoiseFn, InputError

LARGEST_GAMMA = (
  np.sqrt(2) - 1
)  # no step more than doubles the variance of the noise (Karras et al. 2022, section 4)


@dataclasses.dataclass(frozen=True)
class EDMSampler:
  """The stochastic sampler of Karras et al. 2022 (algorithm 2), generalised over every choice of its table 1.

  discretization ('edm', 'vp', 've', 'iddpm'): the noise levels. schedule ('linear', 'vp', 've') and scaling ('none',
  'vp'): the time and scale in which the probability-flow ODE (eq. 4) is solved. solver: 'heun', the second-order method of
  algorithm 1 with `alpha` (1: Heun, 1/2: midpoint, 2/3: Ralston; appendix, algorithm 3), or 'euler'. The last step is
  Euler's. With discretization, schedule and scaling 'vp' and 'euler' it is DDIM (Song et al. 2021, arXiv:2010.02502).
  churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max, S_noise; with churn 0 nothing is drawn.
  round_sigma: to noise levels that the network knows, on numpy arrays (iDDPM).
  """

  num_steps: int = 18
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  discretization: str = "edm"
  schedule: str = "linear"
  scaling: str = "none"
  solver: str = "heun"
  alpha: float = 1.0
  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = float("inf")
  churn_noise: float = 1.0
  round_sigma: Callable[[np.ndarray], np.ndarray] | None = None

  def __post_init__(self):
    for name, value, known in (
      ("schedule", self.schedule, schedules.SCHEDULES),
      ("scaling", self.scaling, schedules.SCALINGS),
      ("solver", self.solver, ("heun", "euler")),
    ):
      if value not in known:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    if not 0 < self.alpha <= 1:
      raise InputError(f"alpha must lie in (0, 1], got {self.alpha}")
    if self.churn < 0:
      raise InputError(f"churn must not be negative, got {self.churn}")
    self.sigmas  # noqa: B018  raises for a grid that cannot be

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image."""
    return self.num_steps if self.solver == "euler" else 2 * self.num_steps - 1

  @property
  def sigmas(self) -> np.ndarray:
    """Noise level at the start of every step."""
    return schedules.noise_levels(
      self.discretization, self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.round_sigma
    )

  def __call__(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    draw: Draw | None = None,
    trajectory: bool = False,
    checkpoints: int | None = None,
  ) -> Float[Array, "..."]:
    """Images [b h w c] in [-1, 1] from `noise`; with `trajectory` all states [num_steps b h w c], in the scale of the schedule.

    keys: needed if churn > 0. draw: standard normal noise by step number, in place of that of `keys`. checkpoints: states
    kept for a reverse-mode gradient.
    """
    table = self.table()
    draw = _drawn_by(keys, noise, draw, f"a sampler with churn {self.churn}") if self.churn else None
    step = _euler_step if self.solver == "euler" else _second_order_step
    first = self.sigmas[:1]
    x = noise * jnp.asarray(first * schedules.scale_of_sigma(self.scaling, first)[0], noise.dtype)
    return solvers.solve(denoise, step, table, x, draw, None, trajectory, checkpoints)[0]

  def table(self) -> dict[str, Any]:
    """The numbers of every step: see `_slope` and `_second_order_step`."""
    sigma = self.sigmas
    betas = schedules.vp_betas(self.sigma_min, self.sigma_max) if self.schedule == "vp" else ()
    schedule = schedules.Schedule(self.schedule, *betas)
    active = (self.churn_min <= sigma) & (sigma <= self.churn_max)
    gamma = np.where(active, min(self.churn / self.num_steps, LARGEST_GAMMA), 0.0)
    raised = sigma * (1 + gamma)
    # sqrt(raised^2 - sigma^2): the product is exactly 0 without churn, in every precision
    added = sigma * np.sqrt(gamma * (2 + gamma))
    if self.round_sigma is not None:
      raised = np.asarray(self.round_sigma(raised), np.float64)
      added = np.sqrt(np.maximum(raised**2 - sigma**2, 0))
    t, t_next = schedule.t_of_sigma(raised), np.append(schedule.t_of_sigma(sigma)[1:], 0.0)
    scale, scale_raised = (schedules.scale_of_sigma(self.scaling, s)[0] for s in (sigma, raised))
    inner = t + self.alpha * (t_next - t)
    last = np.arange(self.num_steps) == self.num_steps - 1
    return {
      "rescale": scale_raised / scale,
      "noise": added * scale_raised * self.churn_noise,
      "length": t_next - t,
      "here": _slope_row(schedule, self.scaling, t),
      # the last step has no second evaluation; the row is filled so that it holds numbers
      "inner": _slope_row(schedule, self.scaling, np.where(last, t, inner)),
      "to_inner": np.full(self.num_steps, self.alpha),
      "second_part": np.full(self.num_steps, 1 / (2 * self.alpha)),
      "last": last,
    }


def _slope_row(schedule: schedules.Schedule, scaling: str, t: np.ndarray) -> dict[str, np.ndarray]:
  """dx/dt = gain * (ratio * x - D(x / scale; sigma)) at times t: Karras et al. 2022, eq. 81."""
  sigma, slope = schedule.sigma(t), schedule.slope(t)
  scale, by_sigma = schedules.scale_of_sigma(scaling, sigma)
  gain = slope * scale / sigma
  return {
    "sigma": sigma,
    "scale": scale,
    "gain": gain,
    "ratio": (slope / sigma + slope * by_sigma / scale) / gain,
  }


def _slope(denoise: DenoiseFn, x: jax.Array, row: dict[str, jax.Array]) -> jax.Array:
  return row["gain"] * (row["ratio"] * x - denoise(x / row["scale"], row["sigma"]).astype(x.dtype))


def _churned(x: jax.Array, row: dict[str, Any], draw: Draw | None, step: jax.Array) -> jax.Array:
  x = row["rescale"] * x
  return x if draw is None else x + row["noise"] * draw(step).astype(x.dtype)


def _euler_step(denoise, x, memory, row, draw, step):
  x = _churned(x, row, draw, step)
  return x + row["length"] * _slope(denoise, x, row["here"]), memory


def _second_order_step(denoise, x, memory, row, draw, step):
  """x + length * ((1 - second_part) d + second_part d'), d' at x + to_inner * length * d; Euler's in the last step."""
  x = _churned(x, row, draw, step)
  slope = _slope(denoise, x, row["here"])

  def corrected(_):
    inner = _slope(denoise, x + row["to_inner"] * row["length"] * slope, row["inner"])
    return x + row["length"] * ((1 - row["second_part"]) * slope + row["second_part"] * inner)

  return jax.lax.cond(row["last"], lambda _: x + row["length"] * slope, corrected, None), memory


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
  """The part of a sampler that says at which sigmas it steps; after the last it goes to 0.

  discretization, rho, round_sigma: as in `EDMSampler`.
  """

  num_steps: int = 18
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  discretization: str = "edm"
  round_sigma: Callable[[np.ndarray], np.ndarray] | None = None

  def __post_init__(self):
    self.sigmas  # noqa: B018  raises for a grid that cannot be

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image."""
    return self.num_steps

  @property
  def sigmas(self) -> np.ndarray:
    """Noise level at the start of every step."""
    return schedules.noise_levels(
      self.discretization, self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.round_sigma
    )


@dataclasses.dataclass(frozen=True)
class AncestralSampler(NoiseLevels):
  """Ancestral sampling: denoise to less than the next noise level, then add noise up to it.

  x <- x + (down - sigma) (x - D) / sigma + up * noise, up = eta * sigma' sqrt(1 - (sigma' / sigma)^2),
  down = sqrt(sigma'^2 - up^2), with sigma' the next level. With eta = 1 this is the posterior q(x' | x, x0 = D) of DDPM (Ho
  et al. 2020, eq. 7), for every process, since it is that of x / scale; eta = 0 is DDIM (Song et al. 2021, eq. 12 and 16).
  """

  eta: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.eta <= 1:
      raise InputError(f"eta must lie in [0, 1], got {self.eta}")

  def __call__(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    draw: Draw | None = None,
    trajectory: bool = False,
    checkpoints: int | None = None,
  ) -> Float[Array, "..."]:
    """Images from `noise`; arguments as those of `EDMSampler`; keys are needed if eta > 0."""
    sigma = self.sigmas
    following = np.append(sigma[1:], 0.0)
    up = self.eta * following * np.sqrt(1 - (following / sigma) ** 2)
    down = np.sqrt(following**2 - up**2)
    table = {"sigma": sigma, "kept": down / sigma, "up": up}
    draw = _drawn_by(keys, noise, draw, f"ancestral sampling with eta {self.eta}") if self.eta else None
    x = noise * jnp.asarray(sigma[:1], noise.dtype)
    return solvers.solve(denoise, _ancestral_step, table, x, draw, None, trajectory, checkpoints)[0]


def _ancestral_step(denoise, x, memory, row, draw, step):
  x = row["kept"] * x + (1 - row["kept"]) * denoise(x, row["sigma"]).astype(x.dtype)
  return (x if draw is None else x + row["up"] * draw(step).astype(x.dtype)), memory


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M(NoiseLevels):
  """DPM-Solver++(2M), deterministic, two steps of memory (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

  In lambda = -log sigma, h = lambda' - lambda, r = h_before / h: x <- sigma' / sigma x - (e^-h - 1) ((1 + 1/2r) D - 1/2r
  D_before). The first and the last step, to sigma 0, are of first order.
  """

  def __call__(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    trajectory: bool = False,
    checkpoints: int | None = None,
  ) -> Float[Array, "..."]:
    """Images from `noise`; nothing is drawn, keys are not needed; other arguments as those of `EDMSampler`."""
    del keys
    sigma = self.sigmas
    kept = np.append(sigma[1:], 0.0) / sigma
    h = -np.log(kept[:-1])
    extrapolated = np.zeros(self.num_steps)  # 1 / 2r
    extrapolated[1:-1] = h[1:] / (2 * h[:-1])
    table = {"sigma": sigma, "kept": kept, "extrapolated": extrapolated}
    x = noise * jnp.asarray(sigma[:1], noise.dtype)
    before = jnp.zeros_like(x)  # not used by the first step
    found, _ = solvers.solve(
      denoise, _multistep, table, x, memory=before, trajectory=trajectory, checkpoints=checkpoints
    )
    return found


def _multistep(denoise, x, before, row, draw, step):
  found = denoise(x, row["sigma"]).astype(x.dtype)
  mixed = found + row["extrapolated"] * (found - before)
  return row["kept"] * x + (1 - row["kept"]) * mixed, found


def _drawn_by(keys: Any, noise: jax.Array, draw: Draw | None, what: str) -> Draw:
  if draw is not None:
    return draw
  if keys is None:
    raise InputError(f"{what} draws noise: it needs a key for each image")
  return PerImageNoise(keys, noise.shape[1:], noise.dtype)


SAMPLERS = {"edm": EDMSampler, "ancestral": AncestralSampler, "dpmpp_2m": DPMSolverPP2M}
