"""Samplers of the reverse SDE of a process, on times uniform in t (Song et al. 2021, arXiv:2011.13456).

An update is a predictor's, which takes the images to the next time, or one of a Langevin corrector, which mends their
distribution at the present one (algorithms 1 to 5 there). Both are kept * x + gain * D(x) + spread * noise: the numbers of a
prediction are computed in float64 beforehand, so that the solver has one kind of step with one evaluation. Images are scaled
as the process scales them; the last step always denoises to sigma 0, where the scale is 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion import solvers
from jax_trustdiff.diffusion.inpainting import Known
from jax_trustdiff.diffusion.processes import Process, as_process
from jax_trustdiff.diffusion.solvers import Draw, StatefulDenoiser
from jax_trustdiff.types import DenoiseFn, InputError, PyTree

PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "none")
CORRECTORS = ("langevin", "annealed", "none")
STEP_NORMS = ("image", "batch")
SONG_VP, SONG_VE = "vp:t_min=0.001", "ve"  # with the earliest times that Song et al. sample at


@dataclasses.dataclass(frozen=True)
class PredictorCorrectorSampler:
  """Predictor-corrector sampling of the reverse SDE of `process` (Song et al. 2021, algorithms 2 to 5).

  Steps start at `num_steps` times from t = t_range[1] down to t_range[0]; `corrector_steps` corrections come before every
  prediction. process: a Process, or its name and fields as for `processes.as_process`.
  predictor: 'euler_maruyama', dx = (f x - g^2 score) dt + g dw (eq. 6); 'reverse_diffusion', the same with the process's
  exact transition from time to time for f and g (eq. 46); 'ancestral', the posterior of DDPM (its eq. 4 has the variance of
  'reverse_diffusion' for VP, the posterior's for VE); 'none'.
  corrector: x <- x + step * score + sqrt(2 step) * noise; 'langevin' has step = 2 a (snr ||noise|| / ||score||)^2
  (algorithms 4 and 5), 'annealed' has step = 2 a (snr * std)^2 (Song & Ermon 2019, algorithm 1), with std of the noise in x
  and a = 1 - beta of the transition (1 for VE).
  step_norms: 'image' takes the norms of 'langevin' of each image, which keeps it independent of its batch, and makes the variance
  too large by about 4 / (numbers in an image) of itself; 'batch' takes their means over the batch, as Song et al. do.
  """

  num_steps: int = 1000
  process: Process | str = SONG_VP
  predictor: str = "reverse_diffusion"
  corrector: str = "langevin"
  corrector_steps: int = 1
  snr: float = 0.16
  step_norms: str = "image"

  def __post_init__(self):
    object.__setattr__(self, "process", as_process(self.process))
    for name, known in (("predictor", PREDICTORS), ("corrector", CORRECTORS), ("step_norms", STEP_NORMS)):
      if getattr(self, name) not in known:
        raise InputError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
    for name, low in (("num_steps", 2), ("corrector_steps", 1)):
      if getattr(self, name) < low:
        raise InputError(f"{name} must be at least {low}, got {getattr(self, name)}")
    if self.snr <= 0:
      raise InputError(f"snr must be positive, got {self.snr}")
    if self.predictor == self.corrector == "none":
      raise InputError("a predictor and a corrector of none: nothing would be sampled")

  @property
  def corrections(self) -> int:
    """Corrector steps before a prediction: 0 without a corrector."""
    return 0 if self.corrector == "none" else self.corrector_steps

  @property
  def nfe(self) -> int:
    """Evaluations of the denoiser for an image: one for every update."""
    predictions = 1 if self.predictor == "none" else self.num_steps
    return predictions + self.num_steps * self.corrections

  @property
  def times(self) -> np.ndarray:
    """Time at the start of every step, float64, decreasing."""
    return np.linspace(*self.process.t_range[::-1], self.num_steps)

  @property
  def sigmas(self) -> np.ndarray:
    """Noise level at the start of every step."""
    return in_float64(self.process.sigma, self.times)

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
    """Images [b h w c] in [-1, 1] from `noise`; with `trajectory` those after every update [nfe b h w c], in the process's scale.

    keys: one for each image. draw: standard normal noise by the number of the update, in place of that of `keys`. checkpoints:
    states kept for a reverse-mode gradient. state: the first one for a `denoise` that is a StatefulDenoiser, possible without
    a corrector; the result is then (images, last state). known: pixels that the images must have.
    """
    if state is not None and self.corrections:
      raise InputError(f"a state goes with steps of predictors only, not with corrector {self.corrector!r}")
    draw = solvers.drawn_by(keys, noise, draw, "a sampler of a reverse SDE")
    table = self.table()
    levels = solvers.levels(table["sigma"], table["scale"])
    x = noise * jnp.asarray(levels.scales[0] * levels.sigmas[0], noise.dtype)
    fixed = denoise, self._update, table, x, draw, None, trajectory, checkpoints
    return solvers.solve(*fixed, levels=levels, state=state, known=known, keys=keys)

  def table(self) -> dict[str, np.ndarray]:
    """The numbers of every update [nfe]: x <- kept * x + gain * D + spread * noise if it is a prediction."""
    t = self.times
    sigma, scale = in_float64(self.process.sigma, t), in_float64(self.process.scale, t)
    after = np.append(sigma[1:], 0.0), np.append(scale[1:], 1.0)
    kept, gain, spread = self._prediction(t, sigma, scale, *after)
    last = np.arange(len(t)) == len(t) - 1
    steps = {
      "sigma": sigma,
      "scale": scale,
      "kept": np.where(last, 0.0, kept),
      "gain": np.where(last, 1.0, gain),
      "spread": np.where(last, 0.0, spread),
      "alpha": (scale / after[1]) ** 2,
    }
    step, update = (i.ravel() for i in np.indices((self.num_steps, self.corrections + 1)))
    corrects = update < self.corrections
    chosen = corrects | last[step] if self.predictor == "none" else np.ones(len(step), bool)
    return {name: column[step[chosen]] for name, column in steps.items()} | {"corrects": corrects[chosen]}

  def _prediction(self, t, sigma, scale, sigma_next, scale_next):
    variance = (scale * sigma) ** 2  # score = (scale * D - x) / variance
    if self.predictor == "euler_maruyama":
      dt = np.append(t[:-1] - t[1:], 0.0)
      drift, diffusion = in_float64(self.process.drift, t), in_float64(self.process.diffusion, t)
      pull = diffusion**2 * dt / variance
      return 1 - drift * dt - pull, pull * scale, diffusion * np.sqrt(dt)
    if self.predictor == "reverse_diffusion":
      factor, added = scale / scale_next, scale**2 * (sigma**2 - sigma_next**2)
      return 2 - factor - added / variance, added / variance * scale, np.sqrt(added)
    if self.predictor == "ancestral":
      ratio = (sigma_next / sigma) ** 2
      spread = scale_next * sigma_next * np.sqrt(1 - ratio)
      return scale_next / scale * ratio, scale_next * (1 - ratio), spread
    return np.ones_like(t), np.zeros_like(t), np.zeros_like(t)

  def _update(self, denoise, x, memory, row, draw, number):
    found = denoise(x / row["scale"], row["sigma"]).astype(x.dtype)
    noise = draw(number).astype(x.dtype)
    kept, gain, spread = row["kept"], row["gain"], row["spread"]
    if self.corrections:
      size, variance = self._step_size(x, found, noise, row), jnp.square(row["scale"] * row["sigma"])
      correction = 1 - size / variance, size * row["scale"] / variance, jnp.sqrt(2 * size)
      choices = zip(correction, (kept, gain, spread), strict=True)
      kept, gain, spread = (jnp.where(row["corrects"], *values) for values in choices)
    return kept * x + gain * found + spread * noise, memory

  def _step_size(self, x, found, noise, row):
    """Of a correction, a number or [b 1 1 1]."""
    std = row["scale"] * row["sigma"]
    if self.corrector == "annealed":
      ratio = std
    else:
      lengths = _lengths(noise), _lengths((row["scale"] * found - x) / jnp.square(std))
      if self.step_norms == "batch":
        lengths = tuple(length.mean() for length in lengths)
      ratio = lengths[0] / jnp.maximum(lengths[1], jnp.finfo(x.dtype).tiny)
    return 2 * row["alpha"] * jnp.square(self.snr * ratio)


def euler_maruyama(num_steps: int = 1000, process: Process | str = SONG_VP) -> PredictorCorrectorSampler:
  """The reverse SDE by the method of Euler and Maruyama: no corrector."""
  return PredictorCorrectorSampler(num_steps, process, "euler_maruyama", "none")


def reverse_diffusion(num_steps: int = 1000, process: Process | str = SONG_VP) -> PredictorCorrectorSampler:
  """The reverse diffusion sampler (Song et al. 2021, eq. 46): no corrector."""
  return PredictorCorrectorSampler(num_steps, process, "reverse_diffusion", "none")


def annealed_langevin(
  num_steps: int = 232, process: Process | str = SONG_VE, corrector_steps: int = 5, snr: float = 0.16
) -> PredictorCorrectorSampler:
  """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1), denoised at the end: no predictor.

  Their step size epsilon is 4 (snr * sigma_min)^2.
  """
  return PredictorCorrectorSampler(num_steps, process, "none", "annealed", corrector_steps, snr)


def in_float64(function: Callable[[jax.Array], jax.Array], t: np.ndarray) -> np.ndarray:
  """function(t) on the host in float64, also while something is traced and whatever the precision of jax."""
  enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before jax 0.8
  with jax.ensure_compile_time_eval(), enable(True):
    return np.asarray(function(jnp.asarray(t, jnp.float64)))


def _lengths(x: jax.Array) -> jax.Array:
  """||x_i|| of each image, [b 1 1 1]."""
  return jnp.sqrt(jnp.square(x).sum(axis=(1, 2, 3), keepdims=True))
