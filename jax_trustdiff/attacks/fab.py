"""FAB: the smallest perturbation that changes the class, found by steps to the linearised decision boundary.

Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", arXiv:1907.02044,
algorithm 1; FAB-T, which looks at one class at a time, is that of arXiv:2003.01690.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.runs import NEVER, AttackOfRuns, Found, fixed, per_image, rank_target
from jax_trustdiff.types import AnyLogitsFn, Image, KeyOrKeys, Labels, LogitsFn, PerExample, Unit

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
UNBROKEN = 1e10  # the distance of an image that no step has broken
LARGEST_WEIGHT = 0.1  # alpha_max: of the step from the original image, against that from the current point
OVERSHOOT = 1.05  # eta
BACKWARD = 0.9  # beta: of the perturbation, what is left after a step that broke the image
NEWTON_STEPS = 60  # at most; about five are needed


class Minimum(NamedTuple):
  """The nearest misclassified point that was found."""

  x_adv: jax.Array  # [b h w c]; the image itself where there is none
  distance: jax.Array  # [b] in the norm; UNBROKEN where there is none
  when: (
    jax.Array
  )  # int [b] evaluations of the classifier until there was one within the radius; NEVER without
  flat: jax.Array  # int [b] evaluations at which the gradient of no boundary was there


@dataclasses.dataclass(frozen=True)
class FAB(AttackOfRuns):
  """FAB against all classes at once, or FAB-T against one after another.

  An image is broken by a point within `radius`; `minimum` does not look at it. num_targets: 0, or against how many classes there
  are runs, the likeliest at the image first; at most the number of classes less one are used. Without targets a step
  needs as many backward passes as there are classes.
  restarts: of each; the first one begins at the image and draws nothing.
  final_steps: halvings of the way between the image and the nearest point that was found (the final search of section 3.2, by
  bisection): without, as in AutoAttack, the overshoot leaves distances half a percent too large. 16 find them to 1e-4.
  """

  num_steps: int = 100
  num_targets: int = 9
  restarts: int = 1
  final_steps: int = 0

  def __post_init__(self):
    super().__post_init__()
    for name, low in (("num_steps", 1), ("num_targets", 0), ("restarts", 1), ("final_steps", 0)):
      norms.check_range(f"attack {name}", getattr(self, name), low)

  def num_runs(self, num_classes: int) -> int:
    return max(1, min(self.num_targets, num_classes - 1)) * self.restarts

  @property
  def num_gradients(self) -> int:
    return self.num_steps

  def cost(self, num_classes: int) -> int:
    return self.num_steps * (4 if self.num_targets else 2 + 2 * num_classes) + self.final_steps

  def run(self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys, index) -> Found:
    found = self.minimum(logits_fn, x, y, key, index)
    return Found(found.x_adv, found.when, found.flat)

  def minimum(self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys, index=0) -> Minimum:
    """The nearest misclassified point of one run, at any distance."""
    x = norms.full_precision(x)
    drawn = fixed(logits_fn, key, 0)

    def logits_fn(images):  # float32 at least, whatever the classifier computes in
      logits = drawn(images)
      return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    target = None
    if self.num_targets:
      target = rank_target(logits_fn(x), y, index // self.restarts + 1)
    start = jnp.where(index % self.restarts == 0, x, self._random_start(x, key))

    def boundary(current):
      return _boundary(logits_fn, current, y, target, DUAL[self.norm])

    def step(i, state):  # the boundary is part of the state, so that XLA:CPU computes it once and apart
      current, (value, slope), best = state
      moved = self._step(x, current, value, slope)
      broken = logits_fn(moved).argmax(axis=1) != y
      distance = norms.lengths(moved - x, self.norm)
      nearer = broken & (distance < best.distance)
      within = broken & (distance <= self.radius) & (best.when == NEVER)
      best = Minimum(
        x_adv=jnp.where(per_image(nearer), moved, best.x_adv),
        distance=jnp.where(nearer, distance, best.distance),
        when=jnp.where(within, 2 * (i + 1), best.when),
        flat=best.flat + (slope == 0).all((1, 2, 3)),
      )
      current = jnp.where(per_image(broken), x + BACKWARD * (moved - x), moved)
      following = jax.lax.cond(i + 1 < self.num_steps, boundary, lambda _: (value, slope), current)
      return current, following, best

    none = jnp.full(x.shape[:1], NEVER, jnp.int32)
    begin = Minimum(x, jnp.full(x.shape[:1], UNBROKEN, x.dtype), none, jnp.zeros_like(none))
    best = jax.lax.fori_loop(0, self.num_steps, step, (start, boundary(start), begin))[2]
    return self._search(logits_fn, x, y, best) if self.final_steps else best

  def _search(self, logits_fn: LogitsFn, x: Unit, y: Labels, best: Minimum) -> Minimum:
    """The misclassified point nearest to the image on the way to that of `best`."""

    def halve(_, state):
      low, high = state
      middle = (low + high) / 2
      broken = logits_fn(x + per_image(middle) * (best.x_adv - x)).argmax(axis=1) != y
      return jnp.where(broken, low, middle), jnp.where(broken, middle, high)

    ends = jnp.zeros_like(best.distance), jnp.ones_like(best.distance)
    high = jax.lax.fori_loop(0, self.final_steps, halve, ends)[1]
    x_adv = jnp.where(per_image(high < 1), x + per_image(high) * (best.x_adv - x), best.x_adv)
    found = best.distance < UNBROKEN
    distance = jnp.where(found, norms.lengths(x_adv - x, self.norm), UNBROKEN)
    last = jnp.where(found & (distance <= self.radius), 2 * self.num_steps + self.final_steps, NEVER)
    return best._replace(x_adv=x_adv, distance=distance, when=jnp.where(best.when == NEVER, last, best.when))

  def _random_start(self, x: Unit, key: KeyOrKeys) -> Unit:
    """A point half the radius away."""
    draw = norms.uniform_like(key, x, -1.0, 1.0) if self.norm == "linf" else norms.normal_like(key, x)
    unit = draw / per_image(norms.lengths(draw, self.norm) + 1e-12)
    return jnp.clip(x + 0.5 * self.radius * unit, 0, 1)

  def _step(self, x: Unit, current: Unit, value: PerExample, slope: Image) -> Unit:
    """Algorithm 1, steps 7 to 11: between the projections of the current point and of the image on the boundary.

    The boundary is where value + <slope, z - current> = 0.
    """
    from_current = to_hyperplane(current, slope, value, self.norm)
    at_image = value + (slope * (x - current)).sum((1, 2, 3))
    from_image = to_hyperplane(x, slope, at_image, self.norm)
    near, far = (jnp.maximum(norms.lengths(d, self.norm), 1e-8) for d in (from_current, from_image))
    weight = per_image(jnp.minimum(near / (near + far), LARGEST_WEIGHT))
    moved = (current + OVERSHOOT * from_current) * (1 - weight) + (x + OVERSHOOT * from_image) * weight
    return jnp.clip(moved, 0, 1)


def _boundary(logits_fn: LogitsFn, x: Unit, y: Labels, target: Labels | None, dual: str):
  """(f [b], its gradient) of f = z_t - z_y, of the target or of the class whose linearised boundary is nearest."""
  if target is not None:

    def total(images):
      logits = logits_fn(images)
      value = _at(logits, target) - _at(logits, y)
      return value.sum(), value

    slope, value = jax.grad(total, has_aux=True)(x)
    return value, slope

  logits, pull_back = jax.vjp(logits_fn, x)
  label = jax.nn.one_hot(y, logits.shape[1], dtype=logits.dtype)

  def nearer(j, best):
    slope = pull_back(jax.nn.one_hot(j, logits.shape[1], dtype=logits.dtype) - label)[0]
    value = logits[:, j] - _at(logits, y)
    distance = jnp.abs(value) / (1e-12 + norms.lengths(slope, dual))
    better = (distance < best[0]) & (y != j)
    return (
      jnp.where(better, distance, best[0]),
      jnp.where(better, value, best[1]),
      jnp.where(per_image(better), slope, best[2]),
    )

  far = jnp.full(x.shape[:1], jnp.inf, logits.dtype)
  return jax.lax.fori_loop(0, logits.shape[1], nearer, (far, jnp.zeros_like(far), jnp.zeros_like(x)))[1:]


def to_hyperplane(
  x: Unit, slope: Float[Array, "b h w c"], value: PerExample, norm: str
) -> Float[Array, "b h w c"]:
  """The displacement d, smallest in `norm`, with x + d in [0, 1] and value + <slope, d> = 0.

  Where no point of the cube is on the hyperplane, the one that comes nearest to it. d moves every pixel against the sign of the
  slope if the value is positive, by m with 0 <= m <= its room to the wall and sum |slope| m = |value| (arXiv:1907.02044, section
  3.1). For 'linf' m = min(t, room), for 'l2' m = min(t |slope|, room), one t for an image: the sum is concave in t, so
  Newton's method from 0 rises to t and ends there exactly. For 'l1' the pixels with the largest slopes move, each as far as it can.
  """
  steep = jnp.abs(slope)
  direction = jnp.where(per_image(value > 0), -1.0, 1.0) * jnp.sign(slope)
  room = jnp.where(direction > 0, 1 - x, x)
  room = jnp.where(direction == 0, 0, room)
  steep, room = (array.reshape(x.shape[0], -1) for array in (steep, room))
  moved = _greedy(steep, room, jnp.abs(value)) if norm == "l1" else _level(steep, room, jnp.abs(value), norm)
  return direction * moved.reshape(x.shape)


def _level(steep: Float[Array, "b d"], room: Float[Array, "b d"], wanted: PerExample, norm: str):
  """min(t, room) or min(t steep, room), with t such that sum steep * that is `wanted`, or room if it cannot be."""
  speed = jnp.ones_like(steep) if norm == "linf" else steep
  reachable = (steep * room).sum(1) > wanted

  def more(state):
    return state[1].any() & (state[2] < NEWTON_STEPS)

  def newton(state):
    t, going, count = state
    free = t[:, None] * speed < room
    total = jnp.where(free, steep * t[:, None] * speed, steep * room).sum(1)
    rate = jnp.where(free, steep * speed, 0).sum(1)
    rise = (wanted - total) / jnp.where(rate > 0, rate, 1)
    rise = jnp.where(going & (rate > 0), jnp.maximum(rise, 0), 0)
    return t + rise, going & (t + rise > t), count + 1

  t = jax.lax.while_loop(more, newton, (jnp.zeros_like(wanted), reachable, 0))[0]
  return jnp.where(reachable[:, None], jnp.minimum(t[:, None] * speed, room), room)


def _greedy(steep: Float[Array, "b d"], room: Float[Array, "b d"], wanted: PerExample):
  """Room of the steepest pixels in turn until sum steep * that is `wanted`; the last ones, of one steepness, share the rest.

  The steepness at which the sum is reached is found bit by bit (a sort of all pixels takes many times as long): floats
  that are not negative are in the order of their bits.
  """
  unsigned = jnp.uint32 if steep.dtype == jnp.float32 else jnp.uint64
  bits, share = jax.lax.bitcast_convert_type(steep, unsigned), steep * room
  width = 8 * steep.dtype.itemsize

  def above(threshold):
    return jnp.where(bits > threshold[:, None], share, 0).sum(1)

  def set_bit(i, threshold):
    lower = threshold | (jnp.ones((), unsigned) << (width - 2 - i).astype(unsigned))
    return jnp.where(above(lower - 1) > wanted, lower, threshold)

  zeros = jnp.zeros(steep.shape[0], unsigned)
  last = jax.lax.fori_loop(0, width - 1, set_bit, zeros)  # the largest with more than wanted at or above it
  at = bits == last[:, None]
  left = (wanted - above(last)) / jnp.maximum(jnp.where(at, share, 0).sum(1), 1e-30)
  part = jnp.where(at, jnp.clip(left, 0, 1)[:, None], 0)
  return room * jnp.where(steep > 0, jnp.where(bits > last[:, None], 1, part), 0)


def _at(logits: jax.Array, label: jax.Array) -> PerExample:
  return jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
