"""Balls, starts and steepest-ascent steps in the Linf, L2 and L1 norms of an image, and checks of settings.

Everything works on one image at a time: a norm is taken over height, width and channels. `radius` is in
[0, 1] pixel units (8/255 for CIFAR-10 in Linf) and may be a traced scalar. Float32 at least.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_trustdiff.types import Image, InputError, KeyOrKeys, PerExample, Unit

NORMS = ("linf", "l2", "l1")
Scalar = float | int | Float[Array, ""]


def check_norm(norm: str, choices: tuple[str, ...] = NORMS) -> str:
  """`norm` itself; InputError if it is not one of `choices`."""
  if norm not in choices:
    raise InputError(f"norm is {norm!r}; the choices are {', '.join(choices)}")
  return norm


def check_range(what: str, value: Scalar | None, low: float = 0, high: float = math.inf):
  """InputError, which names it by `what`, if a number is not finite or not from `low` to `high`.

  None, and a traced or array value, which has no number yet, are not looked at.
  """
  if isinstance(value, float | int) and not (low <= value <= high and math.isfinite(value)):
    wanted = f"at least {low} and finite" if high == math.inf else f"from {low} to {high}"
    raise InputError(f"{what} is {value}; it must be {wanted}")


def lengths(delta: Image, norm: str) -> PerExample:
  """||delta_i|| of each image i in `norm`."""
  check_norm(norm)
  magnitude = jnp.abs(_flat(delta))
  if norm == "linf":
    return magnitude.max(axis=1)
  if norm == "l2":
    return jnp.sqrt((magnitude**2).sum(axis=1))
  return magnitude.sum(axis=1)


def project(x: Image, center: Unit, radius: Scalar, norm: str) -> Unit:
  """A point of [0, 1] in the `norm`-ball around `center`, near `x`.

  'linf', 'l2': the nearest point of the ball first, then clipped to [0, 1]. The result is still in the
  ball, because the unit cube contains `center` and clipping moves no coordinate away from it. For 'linf' this
  is the nearest point of ball and cube together; for 'l2' it is not in general.
  'l1': the nearest point (in L2) of ball and cube together, found by sorting (Croce and Hein 2021, "Mind the
  box", proposition 2.1): clipping an L1 projection would leave most of the budget unused.
  """
  check_norm(norm)
  x, center = full_precision(x), full_precision(center)
  if norm == "linf":
    return jnp.clip(jnp.clip(x, center - radius, center + radius), 0, 1)
  if norm == "l2":
    delta = x - center
    shrink = jnp.minimum(1, radius / jnp.maximum(lengths(delta, "l2"), 1e-12))
    return jnp.clip(center + delta * _per_image(shrink), 0, 1)
  return _project_l1(x, center, radius)


def random_start(key: KeyOrKeys, x: Unit, radius: Scalar, norm: str) -> Unit:
  """A random point of [0, 1] in the `norm`-ball around `x`.

  'linf': x + U(-radius, radius), clipped. 'l2': uniform in the unit cube, shrunk towards `x` into the ball
  (for small radii: on its sphere). 'l1': x + N(0, I), projected (the start of APGD in L1).
  key: one for the batch, or one for each image, which makes a start independent of the other images.
  """
  check_norm(norm)
  x = full_precision(x)
  if norm == "linf":
    return project(x + radius * uniform_like(key, x, -1.0, 1.0), x, radius, norm)
  if norm == "l2":
    return project(uniform_like(key, x, 0.0, 1.0), x, radius, norm)
  return project(x + normal_like(key, x), x, radius, norm)


def ascend(gradient: Image, norm: str, *, floor: Scalar = 1e-12) -> Image:
  """The direction of unit length in 'linf' or 'l2' in which a loss with this gradient rises fastest.

  'linf': the sign. 'l2': gradient / max(||gradient||_2, floor), shorter than 1 below the floor. 0 where the gradient
  is 0. For 'l1' see `l1_step`.
  """
  check_norm(norm, ("linf", "l2"))
  if norm == "linf":
    return jnp.sign(gradient)
  return gradient / _per_image(jnp.maximum(lengths(gradient, "l2"), floor))


def l1_step(x: Unit, gradient: Image, step_size: Scalar, fraction: float = 0.01) -> Unit:
  """`x`, a point of [0, 1], after a step of 'l1' length `step_size` (less if all is used up) that stays in [0, 1].

  Equal steps on the `fraction` of pixels with the largest gradients, at least one pixel, as in SLIDE (Tramer and Boneh
  2019), which takes one per cent; one pixel alone is the steepest step, more of them need fewer steps. What a wall
  stops goes to the pixels with the next largest gradients.
  """
  shape, x = x.shape, _flat(x)
  gradient = _flat(gradient)
  share = step_size / max(1, round(fraction * x.shape[1]))
  room = jnp.where(gradient > 0, 1 - x, x)
  order = jnp.argsort(-jnp.abs(gradient), axis=1)
  limit = jnp.where(gradient != 0, jnp.minimum(room, share), 0)
  limit = jnp.take_along_axis(limit, order, axis=1)
  before = jnp.cumsum(limit, axis=1) - limit
  spent = jnp.clip(step_size - before, 0, limit)
  spent = jnp.take_along_axis(spent, jnp.argsort(order, axis=1), axis=1)
  return (x + jnp.sign(gradient) * spent).reshape(shape)


def uniform_like(key: KeyOrKeys, x: Image, low: Scalar, high: Scalar) -> Image:
  """U(low, high) in the shape of `x`; with one key for each image every image has its own stream."""
  return _draw(key, x, lambda k, shape: jax.random.uniform(k, shape, x.dtype, low, high))


def normal_like(key: KeyOrKeys, x: Image) -> Image:
  """N(0, 1) in the shape of `x`; with one key for each image every image has its own stream."""
  return _draw(key, x, lambda k, shape: jax.random.normal(k, shape, x.dtype))


def fold_in(key: KeyOrKeys, data: int | Int[Array, ""]) -> KeyOrKeys:
  """`jax.random.fold_in` of one key, or of each of the images' keys."""
  return jax.vmap(jax.random.fold_in, (0, None))(key, data) if key.ndim else jax.random.fold_in(key, data)


def full_precision(x: Image) -> Image:
  """`x` in float32, or unchanged if it is wider: bfloat16 cannot hold one step of an attack."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _draw(key: KeyOrKeys, x: Image, sample: Callable) -> Image:
  if key.ndim:
    return jax.vmap(lambda k: sample(k, x.shape[1:]))(key)
  return sample(key, x.shape)


def _flat(x: Image) -> Float[Array, "b d"]:
  return x.reshape(x.shape[0], -1)


def _per_image(value: PerExample) -> Float[Array, "b 1 1 1"]:
  return value[:, None, None, None]


def _project_l1(x: Image, center: Unit, radius: Scalar) -> Unit:
  """Shrink every |x - center| by one theta, within 0 and its room to the wall, so that the sum is `radius`.

  sum_i clip(a_i - theta, 0, u_i) falls piecewise linearly in theta; it bends where pixel i starts to move
  (theta = a_i) and where it meets its wall (theta = a_i - u_i). Walk the sorted bends from the largest theta.
  """
  delta = _flat(x - center)
  a = jnp.abs(delta)
  room = jnp.where(delta > 0, 1 - _flat(center), _flat(center))
  u = jnp.minimum(a, room)
  bends = jnp.concatenate([a, a - u], axis=1)
  moves = jnp.concatenate([jnp.ones_like(a), -jnp.ones_like(a)], axis=1)
  negated, moves = jax.lax.sort((-bends, moves), dimension=1, num_keys=1)
  bends, moving = -negated, jnp.cumsum(moves, axis=1)  # pixels moving just below each bend
  rise = jnp.cumsum(moving[:, :-1] * (bends[:, :-1] - bends[:, 1:]), axis=1)
  total = jnp.concatenate([jnp.zeros_like(rise[:, :1]), rise], axis=1)  # the sum at each bend
  last = (total <= radius).sum(axis=1, keepdims=True) - 1
  bend, moving, total = (jnp.take_along_axis(values, last, axis=1) for values in (bends, moving, total))
  theta = bend - (radius - total) / jnp.maximum(moving, 1)
  inside = u.sum(axis=1, keepdims=True) <= radius
  theta = jnp.where(inside, 0, jnp.maximum(theta, 0))
  moved = jnp.sign(delta) * jnp.clip(a - theta, 0, u)
  return jnp.clip(center + moved.reshape(x.shape), 0, 1)
