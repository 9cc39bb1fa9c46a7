"""Losses of one example as functions of its logits, to be maximised by an attack or minimised by a trainer.

All are computed in float32 (or wider) and come out as [b]; the caller reduces.
"""

import jax
import jax.numpy as jnp

from jax_trustdiff.types import AnyLabels, InputError, Labels, Logits, PerExample, SoftLabels


def is_soft(y: AnyLabels) -> bool:
  """Whether labels are probabilities [b k]; otherwise they are classes [b]."""
  return y.ndim == 2


def classes(y: AnyLabels) -> Labels:
  """The classes [b] of labels of either kind: of probabilities the most likely one."""
  return y.argmax(axis=1) if is_soft(y) else y


def entropy(y: SoftLabels) -> PerExample:
  """-sum_k y_k log y_k in nats, with 0 log 0 = 0: what cross-entropy to `y` exceeds KL(y || p) by."""
  return jax.scipy.special.entr(y).sum(axis=1)


def cross_entropy(logits: Logits, y: AnyLabels, label_smoothing: float = 0.0) -> PerExample:
  """(1 - s) * (-log p_y) + s * mean_c(-log p_c) with s = `label_smoothing` in [0, 1].

  Of soft labels -sum_k y_k log p_k: smoothing applies to integer labels only.
  """
  log_p = jax.nn.log_softmax(_full_precision(logits))
  if is_soft(y):
    return -(y * log_p).sum(axis=1)
  return (1 - label_smoothing) * -_pick(log_p, y) - label_smoothing * log_p.mean(axis=1)


def ce(logits: Logits, y: AnyLabels) -> PerExample:
  """Cross-entropy -log p_y, or -sum_k y_k log p_k of soft labels, at least 0."""
  return cross_entropy(logits, y)


def margin(logits: Logits, y: Labels, clip: bool = True) -> PerExample:
  """-max(z_y - max_{j != y} z_j, 0), at most 0.

  The objective f_6 of Carlini and Wagner (2017) for an attack without a target, negated because it is maximised. It is 0, and so is its gradient, once the example is misclassified: ascent stops there. At a margin of exactly 0
  the gradient is still that of the margin. With clip=False the loss goes on rising above 0.
  """
  gap = _gap(_full_precision(logits), y)
  return -jnp.where(gap >= 0, gap, 0) if clip else -gap


def margin_unclipped(logits: Logits, y: Labels) -> PerExample:
  """max_{j != y} z_j - z_y: positive exactly where the example is misclassified."""
  return margin(logits, y, clip=False)


def dlr(logits: Logits, y: Labels) -> PerExample:
  """Difference of logits ratio (Croce and Hein 2020, eq. 6): -(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12).

  Invariant to shift and scale of the logits. It has a pole where the three largest logits are equal. Three classes
  or more.
  """
  if logits.shape[1] < 3:
    raise InputError(f"the dlr loss needs at least 3 classes, found {logits.shape[1]}; use ce or margin")
  logits = _full_precision(logits)
  largest = jax.lax.top_k(logits, 3)[0]
  return -_gap(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerExample:
  """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12): the dlr loss towards a class t (Croce and Hein 2020, eq. 7).

  Four classes or more.
  """
  if logits.shape[1] < 4:
    raise InputError(
      f"the targeted dlr loss needs at least 4 classes, found {logits.shape[1]}; use ce or margin"
    )
  logits = _full_precision(logits)
  largest = jax.lax.top_k(logits, 4)[0]
  scale = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + 1e-12
  return (_pick(logits, target) - _pick(logits, y)) / scale


def targeted_ce(logits: Logits, y: Labels, target: Labels) -> PerExample:
  """log p_t, at most 0: minus the cross-entropy to a class t. `y` is not looked at."""
  del y
  return -ce(logits, target)


def targeted_margin(logits: Logits, y: Labels, target: Labels) -> PerExample:
  """z_t - z_y: positive where the class t is before the label."""
  logits = _full_precision(logits)
  return _pick(logits, target) - _pick(logits, y)


def kl(p_logits: Logits, q_logits: Logits) -> PerExample:
  """KL(p || q) = sum_k p_k log(p_k / q_k) in nats, at least 0, with p and q the softmax of the logits.

  Gradients flow through both. The regulariser of TRADES (Zhang et al. 2019, eq. 5).
  """
  log_p = jax.nn.log_softmax(_full_precision(p_logits))
  log_q = jax.nn.log_softmax(_full_precision(q_logits))
  return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=1)


def pairwise_squares(delta: Logits, weights: SoftLabels) -> PerExample:
  """1/4 sum_jk w_j w_k (d_j - d_k)^2, with rows of `weights` that sum to 1: half the variance of d under w.

  With d the difference of the logits of x and x_adv the weighted mean square error of Cui et al. (2024, theorem 1).
  """
  mean = (weights * delta).sum(axis=1, keepdims=True)
  return (weights * jnp.square(delta - mean)).sum(axis=1) / 2


LOSSES = {"ce": ce, "margin": margin, "margin_unclipped": margin_unclipped, "dlr": dlr}
TARGETED_LOSSES = {"ce": targeted_ce, "margin": targeted_margin, "dlr": targeted_dlr}


def _full_precision(logits: Logits) -> Logits:
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _pick(values: Logits, y: Labels) -> PerExample:
  return jnp.take_along_axis(values, y[:, None], axis=1)[:, 0]


def _gap(logits: Logits, y: Labels) -> PerExample:
  """z_y - max_{j != y} z_j."""
  others = jnp.where(jnp.arange(logits.shape[1]) == y[:, None], -jnp.inf, logits)
  return _pick(logits, y) - others.max(axis=1)
