"""Samplers that choose their steps by an error estimate, for every image on its own or for the batch as one.

An attempt takes image i from its own time over its own length, so that one evaluation of the denoiser serves the whole
batch; images at their end wait for the others. (diffrax's controllers know one time for a solve, and a `vmap` over solves
would need a denoiser that holds nothing of its own for each image, such as class labels.)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_trustdiff.diffusion.solvers import Grid, clock_dtype
from jax_trustdiff.types import DenoiseFn, InputError, Signed

SAFETY, SMALLEST_FACTOR, LARGEST_FACTOR = 0.9, 0.2, 10.0  # of the step length, as in diffrax.PIDController
FIRST_LENGTH = 0.01  # of the whole
PATH_KEY = 2**31 - 2  # folded into an image's key: no number of a step, and not that of the initial noise
FIRST_LEVEL, FINEST_LEVEL = 6, 16  # of the Brownian tree
ODE_SOLVERS = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5}


class Sampled(NamedTuple):
  """What an adaptive sampler found."""

  x: jax.Array  # [b h w c]
  nfe: jax.Array  # [b] evaluations for each image, of rejected steps too; the batch waits for the largest
  finished: jax.Array  # [b] False where max_steps ended the search; the image is then NaN


@dataclasses.dataclass(frozen=True)
class AdaptiveSampler:
  """What the samplers of this module share.

  A step stands where the root mean square of error / (atol + rtol |x|) is at most 1. coupled: one mean over the whole batch
  and one step for all, as in Song et al. 2021; an image then depends on its batch. Otherwise every image has steps of its
  own and is the same in every batch. max_steps: attempts, the rejected ones among them.
  """

  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rtol: float = 1e-5
  atol: float = 1e-5
  coupled: bool = False
  max_steps: int = 10000

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max < np.inf:
      found = f"{self.sigma_min} and {self.sigma_max}"
      raise InputError(f"needs 0 < sigma_min < sigma_max, both finite, got {found}")
    if min(self.rtol, self.atol) <= 0 or self.max_steps < 1:
      found = f"{self.rtol}, {self.atol} and {self.max_steps}"
      raise InputError(f"rtol, atol and max_steps must be positive, got {found}")

  @property
  def nfe(self) -> None:
    """Not known beforehand: `sample` tells it."""

  def __call__(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    checkpoints: int | None = None,
  ) -> Float[Array, "b h w c"]:
    """Images from `noise`; NaN where max_steps did not suffice. Arguments as those of `sample`."""
    return self.sample(denoise, noise, keys, checkpoints=checkpoints).x

  def _error_norm(self, error: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """Root mean square of the error in units of the tolerance, [b]."""
    allowed = self.atol + self.rtol * jnp.maximum(jnp.abs(before), jnp.abs(after))
    square = jnp.square(error / allowed).mean(axis=(1, 2, 3))
    square = jnp.broadcast_to(square.mean(), square.shape) if self.coupled else square
    return jax.lax.stop_gradient(jnp.sqrt(square))


@dataclasses.dataclass(frozen=True)
class AdaptiveODESampler(AdaptiveSampler):
  """The probability-flow ODE from sigma_max to sigma_min by an embedded Runge-Kutta method of order 5, then denoised.

  dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, eq. 1, with sigma(t) = t). solver: 'tsit5' or 'dopri5'.
  rtol, atol, coupled, max_steps: see `AdaptiveSampler`.
  """

  solver: str = "tsit5"

  def __post_init__(self):
    super().__post_init__()
    if self.solver not in ODE_SOLVERS:
      raise InputError(f"unknown solver {self.solver!r}; known: {', '.join(ODE_SOLVERS)}")

  def sample(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    checkpoints: int | None = None,
  ) -> Sampled:
    """Images with their cost. keys are not needed. checkpoints: states kept for a reverse-mode gradient, which takes the
    lengths of the steps as given.
    """
    del keys
    found = self._integrate(denoise, noise * self.sigma_max, -self.sigma_max, -self.sigma_min, checkpoints)
    return found._replace(x=_denoised(denoise, found.x, self.sigma_min), nfe=found.nfe + 1)

  def invert(self, denoise: DenoiseFn, x: Signed, *, checkpoints: int | None = None) -> Sampled:
    """The noise from which the ODE comes to `x`, taken for what it is at sigma_min, and the cost of finding it."""
    found = self._integrate(denoise, x, self.sigma_min, self.sigma_max, checkpoints)
    return found._replace(x=found.x / self.sigma_max)

  def _integrate(self, denoise, x, start, end, checkpoints):
    """From clock `start` up to `end`, where sigma = |clock|."""
    left = jnp.full(x.shape[:1], end - start, x.dtype)
    first = _slope(denoise, x, jnp.full(x.shape[:1], start, x.dtype))
    memory = FIRST_LENGTH * left, first
    found = _solve(self, (denoise, jnp.asarray(end, x.dtype)), x, left, memory, checkpoints)
    stages = len(ODE_SOLVERS[self.solver].tableau.c)
    return found._replace(nfe=stages * found.nfe + 1)

  def attempt(self, args, x, left, memory):
    """(x, left, memory) after one step of every image, which stands or is to be tried again at another length."""
    denoise, end = args
    length, first = memory
    h = jnp.minimum(length, left)
    x1, error, last = self._step(denoise, x, end - left, h, first)
    norm = self._error_norm(error, x, x1)
    stands = (norm <= 1) & (left > 0)
    # a NaN is an error too large: fmax passes over it
    factor = jnp.fmax(SAFETY * jnp.maximum(norm, 1e-10) ** -0.2, SMALLEST_FACTOR)
    factor = jnp.clip(factor, jnp.where(stands, 1.0, SMALLEST_FACTOR), LARGEST_FACTOR)
    length = jnp.where(left > 0, jax.lax.stop_gradient(h * factor), length)
    return (
      _where(stands, x1, x),
      jnp.where(stands, left - h, left),
      (length, _where(stands, last, first)),
    )

  def _step(self, denoise, x, t, h, first):
    """x after a step, its error, and the slope there: the last stage is the first one of the next step."""
    tableau = ODE_SOLVERS[self.solver].tableau
    slopes = [first]
    for node, row in zip(tableau.c, tableau.a_lower, strict=True):
      inner = x + _per_image(h, x) * _combine(row, slopes)
      slopes.append(_slope(denoise, inner, t + float(node) * h))
    change, error = (_per_image(h, x) * _combine(w, slopes) for w in (tableau.b_sol, tableau.b_error))
    return x + change, error, slopes[-1]


@dataclasses.dataclass(frozen=True)
class AdaptiveSDESampler(AdaptiveSampler):
  """The reverse SDE from sigma_max to sigma_min by ShARK (Foster et al. 2023, arXiv:2210.17543, eq. 6.1), then denoised.

  In u = -log sigma and z = x / sigma the reverse SDE dx = 2 (x - D) / sigma dsigma + sqrt(2 sigma) dw is dz = (2 D / sigma - z) du
  + sqrt(2) dw. Its noise is additive: strong order 1.5. Errors are those of x.
  Intervals of u are halved, and joined again (Gaines & Lyons 1997): the Brownian path of an image is a tree of its key, so
  rejected steps do not change its distribution. At the finest intervals, 1/65536 of the whole, every step stands.
  rtol, atol, coupled, max_steps: see `AdaptiveSampler`.
  """

  rtol: float = 1e-2
  atol: float = 1e-2

  def sample(
    self,
    denoise: DenoiseFn,
    noise: Float[Array, "b h w c"],
    keys: Key[Array, "b"] | None = None,
    *,
    checkpoints: int | None = None,
  ) -> Sampled:
    """Images with their cost. keys: one for each image. checkpoints: as in `AdaptiveODESampler.sample`."""
    if keys is None:
      raise InputError("a sampler of a reverse SDE draws noise: it needs a key for each image")
    batch = noise.shape[:1]
    path = jax.vmap(lambda key: jax.random.fold_in(key, PATH_KEY))(keys)
    memory = jnp.full(batch, FIRST_LEVEL, jnp.int32), jnp.zeros(batch, jnp.int32)
    found = _solve(self, (denoise, path), noise, jnp.ones(batch, noise.dtype), memory, checkpoints)
    x = _denoised(denoise, found.x * self.sigma_min, self.sigma_min)
    return found._replace(x=x, nfe=2 * found.nfe + 1)

  def attempt(self, args, z, left, memory):
    """(z, left, memory) after one step of every image; left: what remains of the whole, 0 to 1."""
    denoise, path = args
    level, index = memory
    whole = math.log(self.sigma_max / self.sigma_min)
    h = whole * 2.0 ** -level.astype(z.dtype)
    u = (1 - left) * whole - math.log(self.sigma_max)
    moved, area = brownian_increments(path, level, index, z.shape[1:], z.dtype)
    root = math.sqrt(2 * whole)
    z1, error = self._step(denoise, z, u, h, root * moved, root * area)
    sigma, sigma1 = (_per_image(jnp.exp(-clock), z) for clock in (u, u + h))
    norm = self._error_norm(sigma1 * error, sigma * z, sigma1 * z1)
    stands = ((norm <= 1) | (level == FINEST_LEVEL)) & (left > 0)
    next_index = jnp.where(stands, index + 1, index)
    halved = (left > 0) & ~stands
    joined = stands & (norm < 0.2) & (next_index % 2 == 0) & (level > 0)
    left = jnp.where(stands, 1 - next_index * 2.0 ** -level.astype(z.dtype), left)
    level1 = level + halved - joined
    index1 = jnp.where(halved, 2 * next_index, jnp.where(joined, next_index // 2, next_index))
    return _where(stands, z1, z), left, (level1.astype(jnp.int32), index1)

  def _step(self, denoise, z, u, h, moved, area):
    """z after a step and its error."""

    def slope(z, u):
      sigma = jnp.exp(-u)
      return 2 * denoise(z * _per_image(sigma, z), sigma).astype(z.dtype) / _per_image(sigma, z) - z

    length, begin = _per_image(h, z), z + area
    first = slope(begin, u)
    second = slope(begin + 5 / 6 * (length * first + moved), u + 5 / 6 * h)
    return z + length * (0.4 * first + 0.6 * second) + moved, 0.6 * length * (second - first)


def brownian_increments(
  keys: Key[Array, "b"],
  level: Int[Array, "b"],
  index: Int[Array, "b"],
  image_shape: tuple[int, ...],
  dtype: Any = jnp.float32,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
  """(w, a) of Brownian paths on [0, 1] over the intervals [index, index + 1] / 2^level, level at most FINEST_LEVEL.

  w is the increment, a the space-time Levy area, the mean over the interval of the path less its chord. Those of halves come
  from those of the whole (Foster, Oberhauser & Lyons 2020, arXiv:1904.06998), with the noise of fold_in(key, number of the
  interval in the tree), so one key is one path.
  """

  def draw(key, node):
    return jax.random.normal(jax.random.fold_in(key, node), (2, *image_shape), dtype)

  def one(key, level, index):
    def halve(depth, increments):
      w, a = increments
      node = (1 << depth) + (index >> jnp.maximum(level - depth, 0))
      right = (index >> jnp.maximum(level - depth - 1, 0)) & 1
      length = 2.0 ** -depth.astype(dtype)
      noise = draw(key, node)
      middle, other = jnp.sqrt(length / 16) * noise[0], jnp.sqrt(length / 12) * noise[1]
      sign = 1 - 2 * right.astype(dtype)
      half = w / 2 + sign * (1.5 * a + middle), a / 4 - middle / 2 + sign * other / 2
      return jax.tree.map(lambda new, old: jnp.where(depth < level, new, old), half, (w, a))

    whole = draw(key, 0) * jnp.array([1.0, np.sqrt(1 / 12)], dtype)[:, None, None, None]
    return jax.lax.fori_loop(0, FINEST_LEVEL, halve, (whole[0], whole[1]))

  return jax.vmap(one)(keys, level, index)


class _Attempts(diffrax.AbstractItoSolver):
  """A diffrax solver of y = (x, what is left for each image), whose clock counts attempts."""

  memory: Any  # at the start
  attempt: Callable = eqx.field(static=True)

  term_structure = diffrax.AbstractTerm
  interpolation_cls = diffrax.LocalLinearInterpolation

  def order(self, terms):
    del terms

  def strong_order(self, terms):
    del terms

  def init(self, terms, t0, t1, y0, args):
    del terms, t0, t1, args
    return jnp.zeros(y0[1].shape, jnp.int32), self.memory

  def func(self, terms, t0, y0, args):
    return terms.vf(t0, y0, args)

  def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
    del terms, t0, t1, made_jump
    attempts, memory = solver_state
    *y1, memory = self.attempt(args, *y0, memory)
    y1 = tuple(y1)
    attempts = attempts + (y0[1] > 0)
    return y1, None, dict(y0=y0, y1=y1), (attempts, memory), diffrax.RESULTS.successful


def _all_done(t, y, args, **kwargs):
  del t, args, kwargs
  return jnp.all(y[1] <= 0)


def _solve(sampler: AdaptiveSampler, args, x, left, memory, checkpoints) -> Sampled:
  """Attempts until nothing is left for any image; `nfe` counts the attempts of each."""
  clock = clock_dtype(x)
  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: y),  # not called: the attempts know their slopes
    _Attempts(memory, sampler.attempt),
    t0=clock.type(0),
    t1=clock.type(sampler.max_steps),
    dt0=None,
    y0=(x, left),
    args=args,
    stepsize_controller=Grid(ts=np.arange(sampler.max_steps + 1, dtype=clock)),
    saveat=diffrax.SaveAt(t1=True, solver_state=True),
    adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints),
    event=diffrax.Event(_all_done),
    max_steps=sampler.max_steps,
    throw=False,
  )
  x, left = (value[0] for value in solution.ys)
  finished = left <= 0
  return Sampled(_where(finished, x, jnp.full_like(x, jnp.nan)), solution.solver_state[0], finished)


def _slope(denoise: DenoiseFn, x: jax.Array, t: jax.Array) -> jax.Array:
  """dx/dt where sigma = |t|."""
  return (x - denoise(x, jnp.abs(t)).astype(x.dtype)) / _per_image(t, x)


def _denoised(denoise: DenoiseFn, x: jax.Array, sigma: float) -> jax.Array:
  return denoise(x, jnp.full(x.shape[:1], sigma, x.dtype)).astype(x.dtype)


def _combine(weights: np.ndarray, slopes: list[jax.Array]) -> jax.Array:
  return sum(float(weight) * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


def _per_image(value: jax.Array, x: jax.Array) -> jax.Array:
  """[b] as [b 1 1 1]."""
  return value.reshape(value.shape + (1,) * (x.ndim - 1))


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  return jnp.where(_per_image(chosen, new), new, old)
