"""Fixed-grid diffusion solvers in diffrax: one solver class, into which each sampler puts its step.

The solver's clock is the number of the step, so it always increases; what a step needs at its noise level (sigma,
scale, step length) are rows of a table, computed in float64 on the host and cast once. A solve then costs what a
hand-written `lax.scan` costs: no error checks through the host, no stage buffers, a trip count that XLA knows.
"""

import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jax_trustdiff.types import PyTree

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
  return PerImageNoise(keys, tuple(image_shape), dtype)(jnp.array(2**31 - 1))


class DenoiserTerm(diffrax.AbstractTerm):
  """Its value at 'time' sigma and state x is D(x; sigma), which only the solver of this module takes for what it is."""

  denoise: Callable

  def vf(self, t, y, args):
    del args
    return self.denoise(y, jnp.broadcast_to(t, y.shape[:1]).astype(y.dtype))

  def contr(self, t0, t1, **kwargs):
    return t1 - t0

  def prod(self, vf, control):
    return jax.tree.map(lambda leaf: leaf * control, vf)


class FixedGrid(diffrax.AbstractItoSolver):
  """Takes step i by `step_fn` with row i of `table`, a pytree of arrays with one leading axis.

  memory: what a step hands on to the next beside the images, at the start; its final value is in the solver's state.
  """

  table: PyTree
  memory: PyTree
  draw: Draw | None  # None: no step draws
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
    return jnp.zeros((), jnp.int32), self.memory

  def func(self, terms, t0, y0, args):
    return terms.vf(t0, y0, args)

  def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
    del t0, t1, made_jump
    denoise = lambda x, sigma: terms.vf(sigma, x, args)  # noqa: E731
    number, memory = solver_state
    row = jax.tree.map(lambda column: column[number], self.table)
    y1, memory = self.step_fn(denoise, y0, memory, row, self.draw, number)
    return y1, None, dict(y0=y0, y1=y1), (number + 1, memory), diffrax.RESULTS.successful


class Grid(diffrax.StepTo):
  """`StepTo` without its run-time checks, which are calls of the host in the compiled program."""

  def wrap(self, direction):
    return type(self)(ts=self.ts * direction)

  def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
    del terms, t0, t1, y0, dt0, args, func, error_order
    return self.ts[1], 2


def solve(
  denoise: Callable,
  step_fn: StepFn,
  table: PyTree,
  x: Float[Array, "b h w c"],
  draw: Draw | None = None,
  memory: PyTree = None,
  trajectory: bool = False,
  checkpoints: int | None = None,
) -> tuple[Float[Array, "..."], PyTree]:
  """(images, memory) after every row of `table` was a step from `x`; with `trajectory` the images after every step.

  table: numpy arrays with one leading axis, the number of steps; cast to the precision of `x`. memory: arrays that a step
  hands on to the next. checkpoints: how many states a reverse-mode gradient keeps (None: the root of the number of steps).
  """
  num_steps = len(jax.tree.leaves(table)[0])
  table = jax.tree.map(
    lambda a: jnp.asarray(a, x.dtype if np.issubdtype(a.dtype, np.floating) else a.dtype), table
  )
  solution = diffrax.diffeqsolve(
    DenoiserTerm(denoise),
    FixedGrid(table, memory, draw, step_fn),
    t0=0,
    t1=num_steps,
    dt0=None,
    y0=x,
    stepsize_controller=Grid(ts=np.arange(num_steps + 1, dtype=np.dtype(x.dtype))),
    saveat=diffrax.SaveAt(steps=trajectory, t1=not trajectory, solver_state=True),
    adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints or math.isqrt(num_steps)),
    max_steps=num_steps if trajectory else None,  # None: the grid ends the loop, and XLA knows where
    throw=False,
  )
  return solution.ys if trajectory else solution.ys[0], solution.solver_state[1]
