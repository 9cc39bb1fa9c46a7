"""Fixed-grid diffusion solvers in diffrax: one solver class, into which each sampler puts its step.

The solver's clock is the number of the step, so it always increases; what a step needs at its noise level (sigma,
scale, step length) are rows of a table, computed in float64 on the host and cast once. A solve then costs what a
hand-written `lax.scan` costs: no error checks through the host, no stage buffers, a trip count that XLA knows.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.diffusion.inpainting import Known
from jax_trustdiff.types import InputError, PyTree

# Numbers of draws: those of steps count from 0, the others are above all of them.
KNOWN_NOISE = 2**30  # that of known pixels at the start; at the ends of steps the numbers that follow
INITIAL_NOISE = 2**31 - 1

Draw = Callable[[jax.Array], jax.Array]  # step number -> standard normal noise [b h w c]
# (denoise, x, memory, row of the table, draw, step number) -> (x, memory) after the step
StepFn = Callable[[Callable, jax.Array, PyTree, PyTree, Draw, jax.Array], tuple[jax.Array, PyTree]]


class PerImageNoise(eqx.Module):
  """A `Draw`: the noise of an image at a step is of the key fold_in(key of the image, step), whatever its batch."""

  keys: jax.Array  # [b] typed keys
  image_shape: tuple[int, ...] = eqx.field(static=True)
  dtype: Any = eqx.field(static=True)

  def __call__(self, step: jax.Array) -> jax.Array:
    one = lambda key: jax.random.normal(jax.random.fold_in(key, step), self.image_shape, self.dtype)  # noqa: E731
    return jax.vmap(one)(self.keys)


def initial_noise(
  keys: Key[Array, "b"], image_shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Float[Array, "b h w c"]:
  """Standard normal latents, that of each image of its own key: a number no step has."""
  return PerImageNoise(keys, tuple(image_shape), dtype)(jnp.array(INITIAL_NOISE))


def drawn_by(keys: Any, noise: jax.Array, draw: Draw | None, what: str) -> Draw:
  """`draw` if it is given, else the noise of `keys` in the shape of `noise`; InputError, which names `what`, without either."""
  if draw is not None:
    return draw
  if keys is None:
    raise InputError(f"{what} draws noise: it needs a key for each image")
  return PerImageNoise(keys, noise.shape[1:], noise.dtype)


class Point(NamedTuple):
  """Where images are: x [b h w c] in EDM convention, whatever the sampler's scale, at noise level sigma [b]."""

  x: jax.Array
  sigma: jax.Array


@runtime_checkable
class StatefulDenoiser(Protocol):
  """A denoiser with a state that goes along with the images, as a running log-density does; a pytree."""

  def __call__(self, x: jax.Array, sigma: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
    """(D(x; sigma), what `step_state` wants to know of this evaluation); the state is that of the start of the step."""

  def step_state(self, state: PyTree, seen: PyTree, at: Point, start: Point, end: Point) -> PyTree:
    """The state after a step from `start` to `end`, which hold all noise that it added.

    seen: of the step's first evaluation, which was at `at`: its start, or where churn had taken it from there. A state f(x, sigma)
    moves by g(end) - g(start) with g its Taylor expansion about `at`, of second order in x if the sampler draws noise.
    """


class Levels(NamedTuple):
  """Noise levels and scales of x at the start and at the end of every step, float64 [n + 1]."""

  sigmas: np.ndarray
  scales: np.ndarray


def levels(sigma: np.ndarray, scale: np.ndarray | None = None) -> Levels:
  """Those of steps that begin at `sigma` and `scale` (None: 1), of which the last one ends at 0 and 1."""
  scale = np.ones_like(sigma) if scale is None else scale
  return Levels(np.append(sigma, 0.0), np.append(scale, 1.0))


class DenoiserTerm(diffrax.AbstractTerm):
  """Its value at 'time' sigma is D(y; sigma), which only the solver of this module takes for what it is.

  args: (denoiser, its state or None).
  """

  def vf(self, t, y, args):
    return _evaluate(*args, y, t)[0]

  def contr(self, t0, t1, **kwargs):
    return t1 - t0

  def prod(self, vf, control):
    return jax.tree.map(lambda leaf: leaf * control, vf)


class FixedGrid(diffrax.AbstractItoSolver):
  """Takes step i by `step_fn` with row i of `table`, a pytree of arrays with one leading axis.

  memory: what a step hands on to the next beside the images, at the start. state: that of a denoiser that has one, at the
  start. Both go along in the solver's state.
  """

  table: PyTree
  memory: PyTree
  state: PyTree
  levels: Levels | None  # None where neither a state nor known pixels need them
  draw: Draw | None  # None: no step draws
  known: Known | None
  known_draw: Draw | None
  step_fn: StepFn = eqx.field(static=True)

  term_structure = DenoiserTerm
  interpolation_cls = diffrax.LocalLinearInterpolation

  def order(self, terms):
    del terms
    return 2

  def strong_order(self, terms):
    del terms
    return 0.5

  def init(self, terms, t0, t1, y0, args):
    del terms, t0, t1, y0, args
    return jnp.zeros((), jnp.int32), self.memory, self.state

  def func(self, terms, t0, y0, args):
    return terms.vf(t0, y0, args)

  def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
    del terms, t0, t1, made_jump
    denoiser, _ = args
    number, memory, state = solver_state
    row = jax.tree.map(lambda column: column[number], self.table)
    evaluations = []

    def denoise(x, sigma):
      found, seen = _evaluate(denoiser, state, x, sigma)
      evaluations.append((seen, x, jnp.broadcast_to(sigma, x.shape[:1])))
      return found

    y1, memory = self.step_fn(denoise, y0, memory, row, self.draw, number)
    if state is not None:
      state = self._step_state(denoiser, state, evaluations[0], y0, y1, number)
    if self.known is not None:
      sigma, scale = (column[number + 1] for column in self.levels)
      y1 = self.known.put_back(y1, sigma, scale, self.known_draw(KNOWN_NOISE + 1 + number))
    return y1, None, dict(y0=y0, y1=y1), (number + 1, memory, state), diffrax.RESULTS.successful

  def _step_state(self, denoiser, state, evaluation, y0, y1, number):
    seen, *at = evaluation
    start, end = (
      Point(y / self.levels.scales[i], jnp.broadcast_to(self.levels.sigmas[i], y.shape[:1]))
      for y, i in ((y0, number), (y1, number + 1))
    )
    return denoiser.step_state(state, seen, Point(*at), start, end)


def _evaluate(denoiser, state, x, sigma):
  """(D(x; sigma), what a denoiser with a state tells beside it)."""
  sigma = jnp.broadcast_to(sigma, x.shape[:1]).astype(x.dtype)
  return (denoiser(x, sigma), None) if state is None else denoiser(x, sigma, state)


class Grid(diffrax.StepTo):
  """`StepTo` without its run-time checks, which are calls of the host in the compiled program."""

  def wrap(self, direction):
    return type(self)(ts=self.ts * direction)

  def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
    del terms, t0, t1, y0, dt0, args, func, error_order
    return self.ts[1], 2


def clock_dtype(x: jax.Array) -> np.dtype:
  """That of a solver's clock: images get it too, so it is theirs, but counts steps exactly."""
  return np.dtype(jnp.promote_types(x.dtype, jnp.float32))


def solve(
  denoise: Callable,
  step_fn: StepFn,
  table: PyTree,
  x: Float[Array, "b h w c"],
  draw: Draw | None = None,
  memory: PyTree = None,
  trajectory: bool = False,
  checkpoints: int | None = None,
  *,
  levels: Levels | None = None,
  state: PyTree = None,
  known: Known | None = None,
  keys: Key[Array, "b"] | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], PyTree]:
  """Images after every row of `table` was a step from `x`; with `trajectory` those after every step.

  table: numpy arrays with one leading axis, the number of steps; cast to the precision of `x`. memory: arrays that a step
  hands on to the next. checkpoints: how many states a reverse-mode gradient keeps (None: the root of the number of steps).
  state: for `denoise`, then a StatefulDenoiser; the result is then (images, last state). known: pixels to put back, with
  noise of `keys`. Both need `levels`; InputError for both at once, since what is put back is no step of a path.
  """
  num_steps = len(jax.tree.leaves(table)[0])

  def cast(array):
    return jnp.asarray(array, x.dtype if np.issubdtype(array.dtype, np.floating) else array.dtype)

  levels = None if state is None and known is None else jax.tree.map(cast, levels)
  known_draw = None
  if known is not None:
    if state is not None:
      raise InputError("a denoiser with a state and known pixels do not go together")
    if keys is None:
      raise InputError("inpainting draws noise for the known pixels: it needs a key for each image")
    known.check(x.shape)
    known_draw = PerImageNoise(keys, x.shape[1:], x.dtype)
    sigma, scale = (column[0] for column in levels)
    x = known.put_back(x, sigma, scale, known_draw(jnp.array(KNOWN_NOISE)))
  table = jax.tree.map(cast, table)
  clock = clock_dtype(x)
  solution = diffrax.diffeqsolve(
    DenoiserTerm(),
    FixedGrid(table, memory, state, levels, draw, known, known_draw, step_fn),
    t0=clock.type(0),
    t1=clock.type(num_steps),
    dt0=None,
    y0=x,
    args=(denoise, state),
    stepsize_controller=Grid(ts=np.arange(num_steps + 1, dtype=clock)),
    saveat=diffrax.SaveAt(steps=trajectory, t1=not trajectory, solver_state=True),
    adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints or math.isqrt(num_steps)),
    max_steps=num_steps if trajectory else None,  # None: the grid ends the loop, and XLA knows where
    throw=False,
  )
  images = solution.ys if trajectory else solution.ys[0]
  return images if state is None else (images, solution.solver_state[2])
