"""What a classifier is trained to minimise: standard, PGD-AT, TRADES and MART, each an attack and a loss.

An objective is two pure functions that the training step calls one after the other:

    x_adv = objective.attack(network, variables, x, y, key)
    loss, moments, metrics = objective.loss(network, variables, x, x_adv, y)

loss: [b]; the caller averages and differentiates it with respect to the parameters. No gradient flows into x_adv.
moments: one tree of batch statistics for each forward pass in training mode, in the order in which
`move_statistics` must apply them. metrics: a dict of [b] arrays.

Batch normalisation is used as in the code released with "Better Diffusion Models Further Improve Adversarial Training"
(github.com/wzekai99/DM-Improves-AT): TRADES attacks with the statistics of its batch and leaves the running ones alone;
PGD-AT and MART attack with the running statistics; the losses of TRADES and MART make two forward passes in training
mode, natural images first.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_trustdiff.attacks import losses, norms
from jax_trustdiff.attacks.pgd import PGD, maximize
from jax_trustdiff.types import (
  Classifier,
  Image,
  KeyOrKeys,
  Labels,
  PerExample,
  PyTree,
  Unit,
  Variables,
)

LossMomentsMetrics = tuple[PerExample, tuple[PyTree, ...], dict[str, PerExample]]


@dataclass(frozen=True)
class Standard:
  """Training on clean images: cross-entropy with label smoothing. `attack` returns the images themselves."""

  label_smoothing: float = 0.0

  def __post_init__(self):
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: Labels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    return x

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: Labels
  ) -> LossMomentsMetrics:
    z, moments = network.train_logits(variables, x)
    ce = losses.cross_entropy(z, y, self.label_smoothing)
    return ce, (moments,), {"clean_correct": _correct(z, y), "ce": ce}


@dataclass(frozen=True)
class PGDAT:
  """Adversarial training of Madry et al. (2018): CE(f(x_adv), y), where PGD with running statistics maximises CE.

  norm, radius, step_size, num_steps: as in `PGD`; 'linf' starts uniformly in the ball, 'l2' as `norms.random_start`.
  keep_clean: the mean of the losses of x and x_adv, from one forward pass over both (2b images share their batch
  statistics).
  """

  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar = 2 / 255
  num_steps: int = 10
  keep_clean: bool = False
  label_smoothing: float = 0.0

  def __post_init__(self):
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)
    self._pgd()

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: Labels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    variables = jax.lax.stop_gradient(variables)
    return self._pgd()(lambda images: network.logits(variables, images), x, y, key, start)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: Labels
  ) -> LossMomentsMetrics:
    x_adv = jax.lax.stop_gradient(x_adv)
    images = jnp.concatenate([x, x_adv]) if self.keep_clean else x_adv
    logits, moments = network.train_logits(variables, images)
    z_adv = logits[-x.shape[0] :]
    ce = losses.cross_entropy(z_adv, y, self.label_smoothing)
    metrics = {"adversarial_correct": _correct(z_adv, y), "ce": ce}
    if not self.keep_clean:
      return ce, (moments,), metrics
    z = logits[: x.shape[0]]
    metrics["clean_correct"] = _correct(z, y)
    return (losses.cross_entropy(z, y, self.label_smoothing) + ce) / 2, (moments,), metrics

  def _pgd(self) -> PGD:
    return PGD(self.norm, self.radius, self.step_size, self.num_steps)


@dataclass(frozen=True)
class TRADES:
  """CE(f(x), y) + beta * KL(softmax f(x) || softmax f(x_adv)) (Zhang et al. 2019, eq. 5), where x_adv maximises the KL.

  The attack holds softmax f(x) fixed; the loss is differentiated through both arguments of the KL. Label smoothing
  applies to the CE alone.
  norm 'linf': starts uniformly in the ball and steps by the sign of the gradient. 'l2': starts at x + 0.001 N(0, I)
  and steps by the normalised gradient (N(0, I) itself where the gradient is exactly 0).
  step_size: None is radius / 4 for 'linf' (2/255 of 8/255) and 2 radius / num_steps for 'l2'.
  """

  beta: float = 6.0
  label_smoothing: float = 0.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10

  def __post_init__(self):
    norms.check_range("objective beta", self.beta)
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)
    _check_attack(self)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: Labels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    variables, x = jax.lax.stop_gradient((variables, norms.full_precision(x)))
    start_key, noise_key = norms.fold_in(key, 0), norms.fold_in(key, 1)
    if start is None:
      linf = self.norm == "linf"
      start = norms.random_start(start_key, x, self.radius, "linf") if linf else _near(start_key, x)
    z, _ = network.train_logits(variables, x)
    return _attack(
      self, lambda images: losses.kl(z, network.train_logits(variables, images)[0]), x, start, noise_key
    )

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: Labels
  ) -> LossMomentsMetrics:
    z, moments = network.train_logits(variables, x)
    z_adv, moments_adv = network.train_logits(variables, jax.lax.stop_gradient(x_adv))
    ce, kl = losses.cross_entropy(z, y, self.label_smoothing), losses.kl(z, z_adv)
    metrics = {"clean_correct": _correct(z, y), "adversarial_correct": _correct(z_adv, y), "ce": ce, "kl": kl}
    return ce + self.beta * kl, (moments, moments_adv), metrics


@dataclass(frozen=True)
class MART:
  """Misclassification-aware adversarial training (Wang et al. 2020, eq. 11), with p = softmax f:

    CE(f(x_adv), y) - log(1.0001 - max_{k != y} p_k(x_adv)) + beta * KL(p(x) || p(x_adv)) * (1 - p_y(x)).

  x_adv maximises CE with running statistics, from x + 0.001 N(0, I), in 'linf' or 'l2'. The paper is about Linf; the
  'l2' steps are those of TRADES. Gradients flow through p(x) and its weight too; there is no label smoothing.
  step_size: None is radius / 4 for 'linf' and 2 radius / num_steps for 'l2'.
  The small constants are those of the released code (github.com/YisenWang/MART).
  """

  beta: float = 5.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10

  def __post_init__(self):
    norms.check_range("objective beta", self.beta)
    _check_attack(self)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: Labels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    variables, x = jax.lax.stop_gradient((variables, norms.full_precision(x)))
    start_key, noise_key = norms.fold_in(key, 0), norms.fold_in(key, 1)
    start = _near(start_key, x) if start is None else start
    return _attack(self, lambda images: losses.ce(network.logits(variables, images), y), x, start, noise_key)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: Labels
  ) -> LossMomentsMetrics:
    z, moments = network.train_logits(variables, x)
    z_adv, moments_adv = network.train_logits(variables, jax.lax.stop_gradient(x_adv))
    p, p_adv = jax.nn.softmax(z), jax.nn.softmax(z_adv)
    true = jnp.arange(z.shape[1]) == y[:, None]
    rival = jnp.where(true, 0, p_adv).max(axis=1)
    ce = losses.ce(z_adv, y)
    kl = (p * (jax.nn.log_softmax(z) - jnp.log(p_adv + 1e-12))).sum(axis=1)
    weight = 1.0000001 - jnp.where(true, p, 0).sum(axis=1)
    metrics = {"clean_correct": _correct(z, y), "adversarial_correct": _correct(z_adv, y), "ce": ce, "kl": kl}
    loss = ce - jnp.log(1.0001 - rival + 1e-12) + self.beta * kl * weight
    return loss, (moments, moments_adv), metrics


OBJECTIVES = {"standard": Standard, "pgd_at": PGDAT, "trades": TRADES, "mart": MART}


def move_statistics(running: PyTree, moments: tuple[PyTree, ...], momentum: norms.Scalar) -> PyTree:
  """The running statistics after each of `moments` in turn: (1 - momentum) * running + momentum * moments.

  momentum: 0.01 is slow, 1 keeps the last of `moments` alone. May be traced.
  """
  for batch in moments:
    running = jax.tree.map(lambda old, new: (1 - momentum) * old + momentum * new, running, batch)
  return running


def _correct(logits, y):
  return (logits.argmax(axis=1) == y).astype(jnp.float32)


def _near(key, x):
  """x + 0.001 N(0, I), which may leave [0, 1] by that little."""
  return x + 0.001 * norms.normal_like(key, x)


def _attack(objective, loss, x, start, key):
  """The inner loop of TRADES and MART; `key` draws the steps from flat points in 'l2'."""
  norm, radius, step_size = objective.norm, objective.radius, objective.step_size
  if step_size is None:
    step_size = radius / 4 if norm == "linf" else 2 * radius / max(objective.num_steps, 1)
  if norm == "linf":
    return maximize(
      loss, x, start, norm, radius, objective.num_steps, lambda v, g: v + step_size * jnp.sign(g)
    )
  noise = norms.normal_like(key, x)

  def move(x_adv, gradient):
    flat = (norms.lengths(gradient, "l2") == 0)[:, None, None, None]
    return x_adv + step_size * jnp.where(flat, noise, norms.ascend(gradient, "l2", floor=1e-30))

  return maximize(loss, x, start, norm, radius, objective.num_steps, move)


def _check_attack(objective):
  norms.check_norm(objective.norm, ("linf", "l2"))
  for name in ("radius", "step_size", "num_steps"):
    norms.check_range(f"objective {name}", getattr(objective, name))
