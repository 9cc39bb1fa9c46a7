"""Auto-PGD: projected gradient ascent that chooses its own step length (Croce and Hein 2020, arXiv:2003.01690, algorithm 1).

In L1 the steps are sparse and the radius shrinks to its size in three phases (Croce and Hein 2021, "Mind the box",
arXiv:2103.01208, algorithm 1 and section 3.4).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.losses import LOSSES, TARGETED_LOSSES
from jax_trustdiff.attacks.runs import DRAWS, NEVER, AttackOfRuns, Found, fixed, per_image, rank_target
from jax_trustdiff.types import (
  AnyLogitsFn,
  Image,
  InputError,
  KeyOrKeys,
  Labels,
  Unit,
)

TINY = 1e-12
MOMENTUM = 0.75  # alpha of algorithm 1, in all steps but the first
RISING = 0.75  # rho: the part of the steps of a window that must have raised the loss
# (times the radius, part of the steps) of the phases of a run with `large_radii`
PHASES = ((3, 0.3), (2, 0.3), (1, 0.4))

Objective = Callable[[jax.Array], jax.Array]  # logits -> [b]


class Evaluation(NamedTuple):
  """The loss at an image, its gradient and whether the image is misclassified, [b ...]."""

  loss: jax.Array
  gradient: jax.Array
  broken: jax.Array


class Trace(NamedTuple):
  """Where the ascent stands; every field is [b ...]."""

  x: jax.Array
  before: jax.Array  # x of the step before
  gradient: jax.Array  # at x
  best_x: jax.Array
  best_gradient: jax.Array
  best_loss: jax.Array
  x_adv: jax.Array  # the last misclassified x, and until there is one the start
  when: jax.Array
  flat: jax.Array
  size: jax.Array  # length of a step
  loss: jax.Array
  rises: jax.Array  # steps that raised the loss, since the last checkpoint
  halved: jax.Array  # at the last checkpoint
  best_at_checkpoint: jax.Array
  sparsity: jax.Array  # L1: the part of the values that a step moves
  support: jax.Array  # L1: values at which best_x differed from the image at the last checkpoint


@dataclasses.dataclass(frozen=True)
class APGD(AttackOfRuns):
  """APGD with the 'ce' or 'dlr' loss, or against one class after another.

  num_targets: 0, or against how many classes there are runs, the likeliest at the image first (APGD-T, with the targeted
  losses); at most the number of classes less one are used. restarts: of each. num_steps: N_iter.
  num_draws: gradients averaged in a step, for a classifier that draws (Athalye et al. 2018, arXiv:1707.07397).
  large_radii: in L1, three phases with 3, 2 and 1 times the radius.
  """

  loss: str = "ce"
  num_steps: int = 100
  num_targets: int = 0
  restarts: int = 1
  num_draws: int = 1
  large_radii: bool = False

  def __post_init__(self):
    super().__post_init__()
    known = TARGETED_LOSSES if self.num_targets else LOSSES
    if self.loss not in known:
      raise InputError(f"attack loss is {self.loss!r}; the choices are {', '.join(known)}")
    for name, low in (("num_steps", 1), ("num_targets", 0), ("restarts", 1), ("num_draws", 1)):
      norms.check_range(f"attack {name}", getattr(self, name), low)
    if self.large_radii and (self.norm != "l1" or self.num_steps < 4):
      raise InputError("attack large_radii needs the norm 'l1' and at least 4 steps")

  def num_runs(self, num_classes: int) -> int:
    return max(1, min(self.num_targets, num_classes - 1)) * self.restarts

  @property
  def num_gradients(self) -> int:
    return self.num_steps + (len(PHASES) if self.large_radii else 1)

  def cost(self, num_classes: int) -> int:
    del num_classes
    return 3 * self.num_draws * self.num_gradients

  def run(self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys, index) -> Found:
    x = norms.full_precision(x)
    draw = norms.uniform_like(key, x, -1.0, 1.0) if self.norm == "linf" else norms.normal_like(key, x)
    target = None
    if self.num_targets:
      target = rank_target(fixed(logits_fn, key, DRAWS)(x), y, index // self.restarts + 1)
    trace = self.ascend(logits_fn, x, y, draw, target, key)
    when = jnp.where(trace.when == NEVER, NEVER, trace.when * self.num_draws)
    return Found(trace.x_adv, when, trace.flat)

  def ascend(
    self,
    logits_fn: AnyLogitsFn,
    x: Unit,
    y: Labels,
    noise: Image,
    target: Labels | None = None,
    key: KeyOrKeys | None = None,
  ) -> Trace:
    """One run from a start made of `noise`, in [-1, 1] for 'linf' and standard normal otherwise.

    target: classes to go towards. key: for a classifier that draws.
    """
    objective = self._objective(y, target)
    evaluate = lambda images, step: self._evaluate(logits_fn, objective, images, y, key, step)  # noqa: E731
    if not self.large_radii:
      return self._phase(evaluate, x, self._start(x, noise), self.radius, self.num_steps, 0)
    first, second = (math.ceil(part * self.num_steps) for _, part in PHASES[:2])
    lengths, done, flat = (first, second, self.num_steps - first - second), 0, 0
    begin = norms.project(x + noise, x, PHASES[0][0] * self.radius, "l1")
    for (times, _), length in zip(PHASES, lengths, strict=True):
      begin = norms.project(begin, x, times * self.radius, "l1")
      trace = self._phase(evaluate, x, begin, times * self.radius, length, done, given=True)
      begin, done, flat = trace.best_x, done + length + 1, flat + trace.flat
    return trace._replace(flat=flat)

  def _objective(self, y: Labels, target: Labels | None) -> Objective:
    if target is None:
      return lambda logits: LOSSES[self.loss](logits, y)
    return lambda logits: TARGETED_LOSSES[self.loss](logits, y, target)

  def _start(self, x: Unit, noise: Image) -> Unit:
    if self.norm == "l1":
      return norms.project(x + noise, x, self.radius, "l1")
    unit = noise / per_image(norms.lengths(noise, self.norm) + TINY)
    return jnp.clip(x + self.radius * unit, 0, 1)

  def _evaluate(self, logits_fn, objective: Objective, images, y, key, step) -> Evaluation:
    def once(draw):
      fn = fixed(logits_fn, key, step * self.num_draws + draw)

      def total(images):
        logits = fn(images)
        loss = objective(logits)
        return loss.sum(), (loss, logits.argmax(axis=1) != y)

      gradient, (loss, broken) = jax.grad(total, has_aux=True)(images)
      return Evaluation(loss, gradient, broken)

    if self.num_draws == 1:
      return once(0)

    def another(draw, seen):
      new = once(draw)
      return new._replace(gradient=seen.gradient + new.gradient)

    last = jax.lax.fori_loop(1, self.num_draws, another, once(0))
    return last._replace(gradient=last.gradient / self.num_draws)

  def _phase(self, evaluate, x, start, radius, num_steps: int, offset: int, given: bool = False) -> Trace:
    """`num_steps` steps from `start` in the ball of `radius`; `offset` numbers the draws of a classifier that draws."""
    windows = jnp.asarray(_windows(num_steps))
    first = evaluate(start, offset)
    batch = x.shape[0]
    size = x[0].size
    support = jnp.full(batch, float(size), x.dtype)
    sparsity = jnp.full(batch, 0.2, x.dtype)
    if given:
      support = _support(start, x)
      sparsity = support / size / 1.5
    trace = Trace(
      x=start,
      before=start,
      gradient=first.gradient,
      best_x=start,
      best_gradient=first.gradient,
      best_loss=first.loss,
      x_adv=start,
      when=jnp.where(first.broken, offset + 1, NEVER),
      flat=_is_flat(first.gradient).astype(jnp.int32),
      size=jnp.full(batch, radius if self.norm == "l1" else 2 * radius, x.dtype),
      loss=jnp.zeros(batch, first.loss.dtype),
      rises=jnp.zeros(batch, jnp.int32),
      halved=jnp.ones(batch, bool),
      best_at_checkpoint=first.loss,
      sparsity=sparsity,
      support=support,
    )
    every = max(int(0.04 * num_steps), 1)

    def step(i, state):  # the next point is part of the state, so that XLA:CPU computes it once and apart
      trace, moved = state
      found = evaluate(moved, offset + 1 + i)
      trace = _after(trace, moved, found, offset + 2 + i)
      if self.norm == "l1":
        trace = _choose(_check_l1(trace, x, radius), trace, (i + 1) % every == 0)
      else:
        trace = _choose(_check(trace, windows[i]), trace, windows[i] > 0)
      return trace, self._move(trace, x, radius, MOMENTUM)

    return jax.lax.fori_loop(0, num_steps, step, (trace, self._move(trace, x, radius, 1.0)))[0]

  def _move(self, trace: Trace, x: Unit, radius, weight) -> Unit:
    """The next point: a step along the gradient, and (not in L1) part of the last one again."""
    if self.norm == "l1":
      direction = _sparse_sign(trace.gradient, trace.sparsity)
      total = norms.lengths(direction, "l1") + 1e-10
      return norms.project(trace.x + per_image(trace.size / total) * direction, x, radius, "l1")
    if self.norm == "linf":
      direction = jnp.sign(trace.gradient)
    else:
      direction = trace.gradient / per_image(norms.lengths(trace.gradient, "l2") + TINY)
    straight = _confine(trace.x + per_image(trace.size) * direction, x, radius, self.norm)
    mixed = trace.x + weight * (straight - trace.x) + (1 - weight) * (trace.x - trace.before)
    return _confine(mixed, x, radius, self.norm)


def _after(trace: Trace, moved: Unit, found: Evaluation, number) -> Trace:
  """The trace after a step to `moved`, the evaluation of this number."""
  better = found.loss > trace.best_loss
  return trace._replace(
    x=moved,
    before=trace.x,
    gradient=found.gradient,
    best_x=_where(better, moved, trace.best_x),
    best_gradient=_where(better, found.gradient, trace.best_gradient),
    best_loss=jnp.where(better, found.loss, trace.best_loss),
    x_adv=_where(found.broken, moved, trace.x_adv),
    when=jnp.where(found.broken & (trace.when == NEVER), number, trace.when),
    flat=trace.flat + _is_flat(found.gradient),
    loss=found.loss,
    rises=trace.rises + (found.loss > trace.loss),
  )


def _check(trace: Trace, window) -> Trace:
  """Algorithm 1, conditions 1 and 2: where the loss has not risen enough, half the step and back to the best point."""
  stuck = ~trace.halved & (trace.best_at_checkpoint >= trace.best_loss)
  halve = (trace.rises <= RISING * window) | stuck
  return trace._replace(
    size=jnp.where(halve, trace.size / 2, trace.size),
    x=_where(halve, trace.best_x, trace.x),
    gradient=_where(halve, trace.best_gradient, trace.gradient),
    rises=jnp.zeros_like(trace.rises),
    halved=halve,
    best_at_checkpoint=trace.best_loss,
  )


def _check_l1(trace: Trace, x: Unit, radius) -> Trace:
  """Where the perturbation has become sparser the step begins anew, from the best point; elsewhere it shrinks."""
  support = _support(trace.best_x, x)
  sparser = support < 0.95 * trace.support
  size = jnp.where(sparser, radius, trace.size / 1.5)
  return trace._replace(
    size=jnp.clip(size, radius / 10, radius),
    x=_where(sparser, trace.best_x, trace.x),
    gradient=_where(sparser, trace.best_gradient, trace.gradient),
    sparsity=support / x[0].size / 1.5,
    support=support,
  )


def _windows(num_steps: int) -> np.ndarray:
  """int32 [num_steps]: after a step with a checkpoint the number of steps since the last one, else 0 (section 3.1)."""
  window, least = max(int(0.22 * num_steps), 1), max(int(0.06 * num_steps), 1)
  found, at = np.zeros(num_steps, np.int32), 0
  while at + window <= num_steps:
    at += window
    found[at - 1] = window
    window = max(window - max(int(0.03 * num_steps), 1), least)
  return found


def _confine(images: Image, x: Unit, radius, norm: str) -> Unit:
  """Nearest point of the ball, clipped to [0, 1]."""
  if norm == "linf":
    return norms.project(images, x, radius, norm)
  delta = images - x
  length = norms.lengths(delta, "l2")
  return jnp.clip(x + delta * per_image(jnp.minimum(radius, length) / (length + TINY)), 0, 1)


def _sparse_sign(gradient: Image, sparsity) -> Image:
  """The sign of the largest part `sparsity` [b] of the values of each image, 0 elsewhere."""
  size = gradient[0].size
  ordered = jnp.sort(jnp.abs(gradient).reshape(-1, size), axis=1)
  smallest = jnp.clip((1 - sparsity) * size, 0, size - 1).astype(jnp.int32)
  threshold = jnp.take_along_axis(ordered, smallest[:, None], axis=1)[:, 0]
  return jnp.sign(gradient) * (jnp.abs(gradient) >= per_image(threshold))


def _support(images: Image, x: Image) -> jax.Array:
  return (images != x).sum((1, 2, 3)).astype(x.dtype)


def _is_flat(gradient: Image) -> jax.Array:
  return (gradient == 0).all((1, 2, 3))


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  return jnp.where(per_image(chosen), new, old)


def _choose(new: Trace, old: Trace, now) -> Trace:
  return jax.tree.map(lambda a, b: jnp.where(now, a, b), new, old)
