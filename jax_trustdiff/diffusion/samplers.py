"""Samplers: from standard normal noise to images, by a DenoiseFn; pure functions around one diffrax solve.

A sampler is a frozen dataclass, called as `sampler(denoise, noise, keys)`: noise [b h w c] standard normal, keys one typed
key for each image where steps draw noise. The image of a key is the same in every batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion import schedules, solvers
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler, AdaptiveSDESampler
from jax_trustdiff.diffusion.inpainting import Known
from jax_trustdiff.diffusion.processes import Process, TableProcess, as_process
from jax_trustdiff.diffusion.sde_samplers import (
  PredictorCorrectorSampler,
  annealed_langevin,
  euler_maruyama,
  reverse_diffusion,
)
from jax_trustdiff.diffusion.solvers import Draw, StatefulDenoiser, drawn_by
from jax_trustdiff.types import DenoiseFn, InputError, PyTree, Signed

LARGEST_GAMMA = (
  np.sqrt(2) - 1
)  # no step more than doubles the variance of the noise (Karras et al. 2022, section 4)


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
  """The part of a sampler that says at which sigmas it steps; after the last it goes to 0.

  discretization: 'edm' (Karras et al. 2022, eq. 5, with `rho`), 'vp', 've' or 'iddpm', the columns of its table 1, or 'table'.
  round_to: a process with a table, or its name as for `processes.as_process`, if the network knows its noise levels alone;
  steps then start at the nearest ones. 'table' steps through those levels themselves, at whole times: all of them from
  sigma_max down to sigma_min if they are num_steps, otherwise as evenly spaced ones as whole times can be, like DDIM's
  (Song et al. 2021, arXiv:2010.02502, the linear choice of times); InputError without round_to, or with fewer levels than steps.
  """

  num_steps: int = 18
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  discretization: str = "edm"
  round_to: Process | str = ""

  def __post_init__(self):
    if self.round_to:
      process = as_process(self.round_to)
      if not isinstance(process, TableProcess):
        raise InputError(f"round_to needs a process with a table, got {type(process).__name__}")
      object.__setattr__(self, "round_to", process)
    self.sigmas  # noqa: B018  raises for a grid that cannot be

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image."""
    return self.num_steps

  @property
  def sigmas(self) -> np.ndarray:
    """Noise level at the start of every step, float64 [num_steps]."""
    table = self.round_to.sigmas if self.round_to else None
    grid = self.num_steps, self.sigma_min, self.sigma_max, self.rho, table
    return self._rounded(schedules.noise_levels(self.discretization, *grid))

  def _rounded(self, sigma: np.ndarray) -> np.ndarray:
    return schedules.nearest(sigma, self.round_to.sigmas) if self.round_to else sigma


@dataclasses.dataclass(frozen=True)
class EDMSampler(NoiseLevels):
  """The stochastic sampler of Karras et al. 2022 (algorithm 2), generalised over every choice of its table 1.

  num_steps, sigma_min, sigma_max, rho, discretization, round_to: the noise levels, see `NoiseLevels`. schedule ('linear',
  'vp', 've') and scaling ('none', 'vp'): the time and scale in which the probability-flow ODE (eq. 4) is solved. solver:
  'heun', the second-order method of algorithm 1 with `alpha` (1: Heun, 1/2: midpoint, 2/3: Ralston; appendix, algorithm 3),
  or 'euler'. The last step is Euler's. With discretization, schedule and scaling 'vp' and 'euler' it is DDIM (Song et al.
  2021, arXiv:2010.02502).
  churn, churn_min, churn_max, churn_noise: S_churn, S_min, S_max, S_noise; with churn 0 nothing is drawn.
  """

  schedule: str = "linear"
  scaling: str = "none"
  solver: str = "heun"
  alpha: float = 1.0
  churn: float = 0.0
  churn_min: float = 0.0
  churn_max: float = float("inf")
  churn_noise: float = 1.0

  def __post_init__(self):
    super().__post_init__()
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

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image."""
    return self.num_steps if self.solver == "euler" else 2 * self.num_steps - 1

  def __call__(
    self,
    denoise: DenoiseFn | StatefulDenoiser,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    draw: Draw | None = None,
    trajectory: bool = False,
    checkpoints: int | None = None,
    state: PyTree = None,
    known: Known | None = None,
  ) -> Float[Array, "..."] | tuple[Float[Array, "..."], PyTree]:
    """Images [b h w c] in [-1, 1] from `noise`; with `trajectory` all states [num_steps b h w c], in the scale of the schedule.

    keys: needed if churn > 0 or for `known`. draw: standard normal noise by step number, in place of that of `keys`.
    checkpoints: states kept for a reverse-mode gradient. state: the first one for a `denoise` that is a StatefulDenoiser; the
    result is then (images, last state). known: pixels that the images must have.
    """
    sigma = self.sigmas
    scale = schedules.scale_of_sigma(self.scaling, sigma)[0]
    draw = drawn_by(keys, noise, draw, f"a sampler with churn {self.churn}") if self.churn else None
    step = _euler_step if self.solver == "euler" else _second_order_step
    x = noise * jnp.asarray(scale[0] * sigma[0], noise.dtype)
    levels = solvers.levels(sigma, scale)
    fixed = denoise, step, self.table(), x, draw, None, trajectory, checkpoints
    return solvers.solve(*fixed, levels=levels, state=state, known=known, keys=keys)

  def invert(
    self, denoise: DenoiseFn, x: Signed, *, checkpoints: int | None = None
  ) -> Float[Array, "b h w c"]:
    """The noise from which the sampler without churn comes to `x`, up to its own error: the ODE from sigma_min up.

    Takes `x` for what it is at sigma_min, where the sampler's last step, to sigma 0, began. Costs `nfe` evaluations less the
    one of that step. With 'euler' this is DDIM inversion. InputError with churn.
    """
    if self.churn:
      raise InputError(f"a sampler with churn {self.churn} draws noise: it has no inverse")
    sigma = self.sigmas[::-1]
    schedule = self._schedule()
    t = schedule.t_of_sigma(sigma)
    table = self._rows(schedule, t[:-1], t[1:], np.zeros(len(t) - 1, bool))
    unchanged = {"rescale": np.ones(len(t) - 1), "noise": np.zeros(len(t) - 1)}
    scale = schedules.scale_of_sigma(self.scaling, sigma)[0]
    step = _euler_step if self.solver == "euler" else _second_order_step
    x = x * jnp.asarray(scale[0], x.dtype)
    found = solvers.solve(denoise, step, table | unchanged, x, checkpoints=checkpoints)
    return found / jnp.asarray(scale[-1] * sigma[-1], x.dtype)

  def _schedule(self) -> schedules.Schedule:
    betas = schedules.vp_betas(self.sigma_min, self.sigma_max) if self.schedule == "vp" else ()
    return schedules.Schedule(self.schedule, *betas)

  def table(self) -> dict[str, Any]:
    """The numbers of every step: see `_slope` and `_second_order_step`."""
    sigma = self.sigmas
    schedule = self._schedule()
    active = (self.churn_min <= sigma) & (sigma <= self.churn_max)
    gamma = np.where(active, min(self.churn / self.num_steps, LARGEST_GAMMA), 0.0)
    raised = sigma * (1 + gamma)
    # sqrt(raised^2 - sigma^2): the product is exactly 0 without churn, in every precision
    added = sigma * np.sqrt(gamma * (2 + gamma))
    if self.round_to:
      raised = self._rounded(raised)
      added = np.sqrt(np.maximum(raised**2 - sigma**2, 0))
    t, t_next = schedule.t_of_sigma(raised), np.append(schedule.t_of_sigma(sigma)[1:], 0.0)
    scale, scale_raised = (schedules.scale_of_sigma(self.scaling, s)[0] for s in (sigma, raised))
    last = np.arange(self.num_steps) == self.num_steps - 1
    return self._rows(schedule, t, t_next, last) | {
      "rescale": scale_raised / scale,
      "noise": added * scale_raised * self.churn_noise,
    }

  def _rows(
    self, schedule: schedules.Schedule, t: np.ndarray, t_next: np.ndarray, last: np.ndarray
  ) -> dict[str, Any]:
    """The numbers of steps of the ODE from times t to t_next, of which those that are `last` are Euler's."""
    inner = t + self.alpha * (t_next - t)
    return {
      "length": t_next - t,
      "here": _slope_row(schedule, self.scaling, t),
      # the last step has no second evaluation; the row is filled so that it holds numbers
      "inner": _slope_row(schedule, self.scaling, np.where(last, t, inner)),
      "to_inner": np.full(len(t), self.alpha),
      "second_part": np.full(len(t), 1 / (2 * self.alpha)),
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
    denoise: DenoiseFn | StatefulDenoiser,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    draw: Draw | None = None,
    trajectory: bool = False,
    checkpoints: int | None = None,
    state: PyTree = None,
    known: Known | None = None,
  ) -> Float[Array, "..."] | tuple[Float[Array, "..."], PyTree]:
    """Images from `noise`; arguments as those of `EDMSampler`; keys are needed if eta > 0 or for `known`."""
    sigma = self.sigmas
    following = np.append(sigma[1:], 0.0)
    up = self.eta * following * np.sqrt(1 - (following / sigma) ** 2)
    down = np.sqrt(following**2 - up**2)
    table = {"sigma": sigma, "kept": down / sigma, "up": up}
    draw = drawn_by(keys, noise, draw, f"ancestral sampling with eta {self.eta}") if self.eta else None
    x = noise * jnp.asarray(sigma[:1], noise.dtype)
    levels = solvers.levels(sigma)
    fixed = denoise, _ancestral_step, table, x, draw, None, trajectory, checkpoints
    return solvers.solve(*fixed, levels=levels, state=state, known=known, keys=keys)


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
    denoise: DenoiseFn | StatefulDenoiser,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    trajectory: bool = False,
    checkpoints: int | None = None,
    state: PyTree = None,
    known: Known | None = None,
  ) -> Float[Array, "..."] | tuple[Float[Array, "..."], PyTree]:
    """Images from `noise`; no step draws, keys are for `known` alone; other arguments as those of `EDMSampler`."""
    sigma = self.sigmas
    kept = np.append(sigma[1:], 0.0) / sigma
    h = -np.log(kept[:-1])
    extrapolated = np.zeros(self.num_steps)  # 1 / 2r
    np.divide(h[1:], 2 * h[:-1], out=extrapolated[1:-1], where=h[:-1] > 0)  # levels that `round_to` made one
    table = {"sigma": sigma, "kept": kept, "extrapolated": extrapolated}
    x = noise * jnp.asarray(sigma[:1], noise.dtype)
    before = jnp.zeros_like(x)  # not used by the first step
    levels = solvers.levels(sigma)
    fixed = denoise, _multistep, table, x, None, before, trajectory, checkpoints
    return solvers.solve(*fixed, levels=levels, state=state, known=known, keys=keys)


def _multistep(denoise, x, before, row, draw, step):
  found = denoise(x, row["sigma"]).astype(x.dtype)
  mixed = found + row["extrapolated"] * (found - before)
  return row["kept"] * x + (1 - row["kept"]) * mixed, found


SAMPLERS = {
  "edm": EDMSampler,
  "ancestral": AncestralSampler,
  "dpmpp_2m": DPMSolverPP2M,
  "predictor_corrector": PredictorCorrectorSampler,
  "euler_maruyama": euler_maruyama,
  "reverse_diffusion": reverse_diffusion,
  "annealed_langevin": annealed_langevin,
  "adaptive_ode": AdaptiveODESampler,
  "adaptive_sde": AdaptiveSDESampler,
}
