"""Projected gradient ascent on a loss of the input, with restarts; FGSM is one step of it.

PGD (Madry et al. 2018, section 2.1) is x_{t+1} = P(x_t + step_size * sign(gradient of the loss at x_t)), with P the
projection on the ball around x; in other norms the sign gives way to the steepest direction of that norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.losses import LOSSES, classes, is_soft
from jax_trustdiff.types import AnyLabels, Image, InputError, KeyOrKeys, LogitsFn, Unit


def maximize(
  loss: Callable[[jax.Array], jax.Array],
  x: Unit,
  start: Image,
  norm: str,
  radius: norms.Scalar,
  num_steps: int,
  move: Callable[[jax.Array, jax.Array], jax.Array],
) -> Unit:
  """The last point of `num_steps` steps x_adv -> P(move(x_adv, gradient of the loss at x_adv)) from `start`.

  loss: images -> [b]; its sum is differentiated, with respect to the images only. A loss may couple the
  images of a batch, as batch statistics do.
  P for 'linf' and 'l2': clip to [0, 1], then to the ball around `x` (then to [0, 1] again, for rounding). P for 'l1':
  the nearest point of ball and cube.
  `start` may lie outside of both; the result does not, even after no step, and carries no gradient.
  """
  x, start = norms.full_precision(x), norms.full_precision(start)

  def confine(images):
    return norms.project(images if norm == "l1" else jnp.clip(images, 0, 1), x, radius, norm)

  def step(_, x_adv):
    return confine(move(x_adv, jax.grad(lambda images: loss(images).sum())(x_adv)))

  x_adv = jax.lax.fori_loop(0, num_steps, step, start) if num_steps else confine(start)
  return jax.lax.stop_gradient(x_adv)


@dataclass(frozen=True)
class PGD:
  """An attack: x_adv in [0, 1] and in the ball around x, after `num_steps` steps of ascent on `loss`.

  norm: 'linf', 'l2' or 'l1'; radius and step_size in [0, 1] pixel units, lengths in that norm. A step is
  step_size * sign(gradient) in 'linf' and step_size * gradient / ||gradient||_2 in 'l2'. In 'l1' one per cent of the
  pixels, those with the largest gradients, share the step equally, and what a wall stops goes on to the next pixels
  (`norms.l1_step`).
  loss: a name in LOSSES. With 'margin' an example stops as soon as it is misclassified.
  random_start: from `norms.random_start`, otherwise from x.
  restarts: runs from different random starts. Of their last points, one that is misclassified is kept before
  one that is not, then the one with the larger loss, then the earlier one. Run r has the key fold_in(key, r), so more
  restarts never do worse. With one restart the last point is returned as it is, with no extra forward pass.
  Examples that are misclassified from the beginning are attacked like the others.
  """

  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar = 2 / 255
  num_steps: int = 40
  loss: str = "ce"
  restarts: int = 1
  random_start: bool = True

  def __post_init__(self):
    norms.check_norm(self.norm)
    if self.loss not in LOSSES:
      raise InputError(f"attack loss is {self.loss!r}; the choices are {', '.join(LOSSES)}")
    for name, low in (("radius", 0), ("step_size", 0), ("num_steps", 0), ("restarts", 1)):
      norms.check_range(f"attack {name}", getattr(self, name), low)
    if self.restarts > 1 and not self.random_start:
      raise InputError(
        f"attack restarts is {self.restarts} with random_start off: every run would be the same"
      )

  def __call__(
    self, logits_fn: LogitsFn, x: Unit, y: AnyLabels, key: KeyOrKeys, start: Image | None = None
  ) -> Unit:
    """Adversarial images for `x` in float32.

    key: one for the batch, or one for each image, which makes the result for an image independent of the batch it
    is in. start: where the first run begins, in place of a random start; it may lie outside of ball and cube, and for
    'l1' is projected first. Soft labels go with the loss 'ce' alone (InputError).
    """
    if is_soft(y) and self.loss != "ce":
      raise InputError(
        f"attack loss is {self.loss!r}, which takes classes as labels; with soft labels use 'ce'"
      )
    x = norms.full_precision(x)
    if start is not None:
      start = norms.full_precision(start)
      start = norms.project(start, x, self.radius, "l1") if self.norm == "l1" else start
    loss = LOSSES[self.loss]

    def run(restart):
      begin = x
      if self.random_start:
        begin = norms.random_start(norms.fold_in(key, restart), x, self.radius, self.norm)
      if start is not None:
        begin = jnp.where(restart == 0, start, begin)
      return maximize(
        lambda images: loss(logits_fn(images), y),
        x,
        begin,
        self.norm,
        self.radius,
        self.num_steps,
        self._move,
      )

    if self.restarts == 1:
      return run(0)

    def keep_better(restart, best):
      best_x, best_fooled, best_loss = best
      x_adv = run(restart)
      logits = logits_fn(x_adv)
      fooled, reached = logits.argmax(axis=1) != classes(y), loss(logits, y)
      better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (reached > best_loss))
      return (
        jnp.where(better[:, None, None, None], x_adv, best_x),
        best_fooled | fooled,
        jnp.where(better, reached, best_loss),
      )

    shape = jax.eval_shape(lambda: loss(logits_fn(x), y))
    none_yet = (x, jnp.zeros(x.shape[0], bool), jnp.full(shape.shape, -jnp.inf, shape.dtype))
    return jax.lax.fori_loop(0, self.restarts, keep_better, none_yet)[0]

  def _move(self, x_adv, gradient):
    if self.norm == "l1":
      return norms.l1_step(x_adv, gradient, self.step_size)
    return x_adv + self.step_size * norms.ascend(gradient, self.norm, floor=1e-6)


def fgsm(norm: str = "linf", radius: norms.Scalar = 8 / 255, loss: str = "ce") -> PGD:
  """The fast gradient sign method, x + radius * sign(gradient) clipped to [0, 1] (Goodfellow et al. 2015, section 4).

  In another `norm` the one step from x has the length of the radius in it.
  """
  return PGD(norm, radius, step_size=radius, num_steps=1, loss=loss, random_start=False)
