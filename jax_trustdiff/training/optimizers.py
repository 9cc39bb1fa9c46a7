"""Learning-rate schedules with momentum cycling, and the optimizers that follow them.

A schedule is a pair of functions of the step, written in jnp so that it lives inside the training step;
under float64 it agrees with the closed forms to 1e-12.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_trustdiff.types import InputError, PyTree

ScheduleFn = Callable[[jax.Array], jax.Array]


class Schedule(NamedTuple):
  """Learning rate and momentum as functions of the optimizer step (0, 1, ...)."""

  learning_rate: ScheduleFn
  momentum: ScheduleFn


def constant(
  learning_rate: float, num_epochs: float, steps_per_epoch: int, momentum: float = 0.9
) -> Schedule:
  """The same learning rate and momentum at every step."""
  del num_epochs, steps_per_epoch
  return Schedule(lambda step: _float(learning_rate), lambda step: _float(momentum))


def one_cycle_epochs(
  learning_rate: float,
  num_epochs: int,
  steps_per_epoch: int,
  warmup_fraction: float = 0.025,
  initial_divisor: float = 25.0,
  final_divisor: float = 1e4,
  momentum_high: float = 0.95,
  momentum_low: float = 0.85,
) -> Schedule:
  """One cycle of cosine warm-up and cosine decay, moved once an epoch; momentum cycles the other way.

  The schedule called `cosinew` in "Better Diffusion Models Further Improve Adversarial Training"
  (Wang et al., ICML 2023): torch's OneCycleLR stepped per epoch, which also moves the momentum
  high -> low -> high. `learning_rate` is the maximum, reached after `warmup_fraction` of the epochs.
  InputError if the warm-up would be shorter than one epoch (num_epochs * warmup_fraction <= 1):
  there the closed form divides by zero or has no warm-up at all.
  """
  if num_epochs * warmup_fraction <= 1:
    raise InputError(
      f"schedule 'one_cycle_epochs' needs num_epochs * warmup_fraction > 1, found {num_epochs} * {warmup_fraction}:"
      " take more epochs, a larger schedule.warmup_fraction, or schedule.name='one_cycle'"
    )
  cycle = _one_cycle(
    num_epochs, learning_rate, warmup_fraction, initial_divisor, final_divisor, momentum_high, momentum_low
  )
  return Schedule(*(lambda step, f=f: f(step // steps_per_epoch) for f in cycle))


def one_cycle(
  learning_rate: float,
  num_epochs: float,
  steps_per_epoch: int,
  warmup_fraction: float = 0.25,
  initial_divisor: float = 25.0,
  final_divisor: float = 1e4,
  momentum_high: float = 0.95,
  momentum_low: float = 0.85,
) -> Schedule:
  """The same cycle moved at every step (`cyclic` in Wang et al. 2023): see `one_cycle_epochs`."""
  num_steps = round(num_epochs * steps_per_epoch)
  if num_steps * warmup_fraction <= 1:
    raise InputError(
      f"schedule 'one_cycle' needs num_steps * warmup_fraction > 1, found {num_steps} * {warmup_fraction}"
    )
  return _one_cycle(
    num_steps, learning_rate, warmup_fraction, initial_divisor, final_divisor, momentum_high, momentum_low
  )


def cosine(learning_rate: float, num_epochs: float, steps_per_epoch: int, momentum: float = 0.9) -> Schedule:
  """Cosine decay from `learning_rate` towards 0, moved once an epoch: lr/2 * (1 + cos(pi * e / E))."""

  def rate(step):
    epoch = _float(step // steps_per_epoch)
    return learning_rate * 0.5 * (1 + jnp.cos(epoch / num_epochs * jnp.pi))

  return Schedule(rate, lambda step: _float(momentum))


def step_decay(
  learning_rate: float,
  num_epochs: float,
  steps_per_epoch: int,
  boundaries: tuple[int, ...] = (100, 105),
  factor: float = 0.1,
  momentum: float = 0.9,
) -> Schedule:
  """`learning_rate` times `factor` at every boundary, in epochs, that has been passed."""
  del num_epochs

  def rate(step):
    passed = sum((step // steps_per_epoch >= boundary) for boundary in boundaries)
    return learning_rate * _float(factor) ** passed

  return Schedule(rate, lambda step: _float(momentum))


def rampup(
  learning_rate: float, batch_size: int, rampup_images: int = 10_000_000, decay_images: int = 0
) -> Schedule:
  """`learning_rate` times min(n / rampup_images, 1), n the images seen before the step; 0 at the first one.

  The ramp of Karras et al. 2022 (arXiv:2206.00364, appendix F.3). With decay_images > 0 also divided by
  sqrt(max(n / decay_images, 1)), as Karras et al. 2024 have it (arXiv:2312.02696, eq. 67). rampup_images 0: no ramp.
  """
  if rampup_images < 0 or decay_images < 0:
    raise InputError(
      f"schedule 'rampup' takes numbers of images, found rampup_images={rampup_images} and decay_images={decay_images}"
    )

  def rate(step):
    seen = _float(step) * batch_size
    ramp = jnp.minimum(seen / rampup_images, 1) if rampup_images else 1.0
    decay = jax.lax.rsqrt(jnp.maximum(seen / decay_images, 1)) if decay_images else 1.0
    return _float(learning_rate * ramp * decay)

  return Schedule(rate, lambda step: _float(0.9))


SCHEDULES = {
  "constant": constant,
  "one_cycle_epochs": one_cycle_epochs,
  "one_cycle": one_cycle,
  "cosine": cosine,
  "step_decay": step_decay,
}
IMAGE_SCHEDULES = {"rampup": rampup}  # counted in images, not in epochs
ALL_SCHEDULES = SCHEDULES | IMAGE_SCHEDULES


def sgd(
  schedule: Schedule,
  weight_decay: float = 5e-4,
  nesterov: bool = True,
  no_decay: str = r"norm",
  clip_norm: float = 0.0,
) -> optax.GradientTransformation:
  """SGD with (Nesterov) momentum and coupled weight decay, as torch.optim.SGD computes it.

  g += weight_decay * w;  v = momentum * v + g;  w -= lr * (g + momentum * v)  [without Nesterov: lr * v].
  Parameters whose path ('stage_0/block_1/norm_0/scale') matches the regular expression `no_decay` are not
  decayed. clip_norm > 0 clips the global norm of the gradient first.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
    optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, no_decay)),
    _scheduled_trace(schedule.momentum, nesterov),
    optax.scale_by_learning_rate(schedule.learning_rate),
  )


def adamw(
  schedule: Schedule,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  no_decay: str = r"norm|bias",
  clip_norm: float = 0.0,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """AdamW with decoupled weight decay, without it Adam; the schedule's momentum is not used (Adam has b1)."""
  return optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
    optax.adamw(
      schedule.learning_rate,
      b1,
      b2,
      eps,
      weight_decay=weight_decay,
      mask=lambda params: decay_mask(params, no_decay),
    ),
  )


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def decay_mask(params: PyTree, no_decay: str) -> PyTree:
  """True for every leaf that is decayed: its path 'a/b/c' does not match the regular expression."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: re.search(no_decay, "/".join(str(getattr(k, "key", k)) for k in path)) is None, params
  )


def ema_decay(t: jax.Array, decay: float, warmup_steps: float = 0.0) -> jax.Array:
  """Decay of the parameter average at step t = 1, 2, ...; 0 is a plain copy.

  0 while t < warmup_steps, then min(decay, (1 + d) / (10 + d)) with d = t - warmup_steps
  (Gowal et al. 2020; warm start of Rebuffi et al. 2021 as in Wang et al. 2023).
  """
  d = _float(t) - warmup_steps
  return jnp.where(d < 0, 0.0, jnp.minimum(decay, (1 + d) / (10 + d)))


def _one_cycle(total, maximum, fraction, initial_divisor, final_divisor, high, low) -> Schedule:
  """torch.optim.lr_scheduler.OneCycleLR with cosine annealing, in closed form over positions 0..total-1."""
  up, last = fraction * total - 1, total - 1

  def anneal(position, start, peak, end):
    position = _float(position)
    rising = position / up
    falling = (position - up) / (last - up)
    return jnp.where(position <= up, _cosine(start, peak, rising), _cosine(peak, end, falling))

  start = maximum / initial_divisor
  return Schedule(
    lambda position: anneal(position, start, maximum, start / final_divisor),
    lambda position: anneal(position, high, low, high),
  )


def _cosine(start, end, t):
  return end + (start - end) * (1 + jnp.cos(jnp.pi * t)) / 2


def _float(x) -> jax.Array:
  return jnp.asarray(x, dtype=jnp.result_type(float))


class _TraceState(NamedTuple):
  count: jax.Array
  trace: PyTree


def _scheduled_trace(momentum: ScheduleFn, nesterov: bool) -> optax.GradientTransformation:
  """optax.trace with a decay that follows a schedule."""

  def init(params):
    return _TraceState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    m = momentum(state.count)
    trace = jax.tree.map(lambda g, v: g + m.astype(g.dtype) * v, updates, state.trace)
    if nesterov:
      updates = jax.tree.map(lambda g, v: g + m.astype(g.dtype) * v, updates, trace)
    else:
      updates = trace
    return updates, _TraceState(state.count + 1, trace)

  return optax.GradientTransformation(init, update)
