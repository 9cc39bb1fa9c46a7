"""What a classifier is trained to minimise: standard, PGD-AT, TRADES and its descendants, each an attack and a loss.

An objective is two pure functions that the training step calls one after the other:

    x_adv = objective.attack(network, variables, x, y, key)
    loss, moments, metrics = objective.loss(network, variables, x, x_adv, y)

loss: [b]; the caller averages and differentiates it with respect to the parameters. No gradient flows into x_adv.
moments: one tree of batch statistics for each forward pass in training mode, in the order in which
`move_statistics` must apply them. metrics: a dict of [b] arrays.
y: classes, int [b], or soft labels, float [b k], e.g. of mixed images. With soft labels cross-entropy is
-sum_k y_k log p_k; label smoothing applies to integer labels only; accuracies compare with the most likely class.
num_views: how many augmentations of every image x holds, one whole batch after the other.

Batch normalisation is used as in the code released with "Better Diffusion Models Further Improve Adversarial Training"
(github.com/wzekai99/DM-Improves-AT): TRADES attacks with the statistics of its batch and leaves the running ones alone;
PGD-AT and MART attack with the running statistics; the losses of TRADES and MART make two forward passes in training
mode, natural images first. SCORE, Consistency and IKL do as TRADES.

An objective that remembers something from step to step is a `StatefulObjective`; `initial_collections` and
`loss_and_collections` serve objectives of either kind.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jax_trustdiff.attacks import losses, norms
from jax_trustdiff.attacks.pgd import PGD, maximize
from jax_trustdiff.types import (
  OBJECTIVE,
  AnyLabels,
  Classifier,
  Image,
  InputError,
  KeyOrKeys,
  Logits,
  PerExample,
  PyTree,
  Unit,
  Variables,
)

LossMomentsMetrics = tuple[PerExample, tuple[PyTree, ...], dict[str, PerExample]]


@runtime_checkable
class StatefulObjective(Protocol):
  """An objective with a state: a tree of arrays, which is the collection 'objective' of the variables it is given."""

  def init_state(self, num_classes: int) -> PyTree:
    """The state before the first step."""

  def loss_and_state(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels, epoch: jax.Array
  ) -> tuple[PerExample, tuple[PyTree, ...], dict[str, PerExample], PyTree]:
    """What `loss` returns, and the state after this batch of `epoch` (0, 1, ...)."""


@dataclass(frozen=True)
class Standard:
  """Training on clean images: cross-entropy with label smoothing. `attack` returns the images themselves."""

  label_smoothing: float = 0.0

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    return x

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
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

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)
    self._pgd()

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    variables = jax.lax.stop_gradient(variables)
    return self._pgd()(lambda images: network.logits(variables, images), x, y, key, start)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
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
  With soft labels KL(y || softmax f(x)) takes the place of the CE, which differs by a constant, and with mixed_target
  x_adv maximises KL(y || softmax f(x_adv)), as in the code of Wang et al. (2023) for CutMix; without it, the same as
  with integer labels.
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
  mixed_target: bool = True

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective beta", self.beta)
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)
    _check_attack(self)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    if losses.is_soft(y) and self.mixed_target:
      return _attack_by_batch_statistics(
        self, network, variables, x, key, start, lambda z: lambda z_adv: losses.ce(z_adv, y)
      )
    return _attack_by_batch_statistics(
      self, network, variables, x, key, start, lambda z: lambda z_adv: losses.kl(z, z_adv)
    )

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> LossMomentsMetrics:
    return self.logits_and_loss(network, variables, x, x_adv, y)[1:]

  def logits_and_loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> tuple[Logits, PerExample, tuple[PyTree, ...], dict[str, PerExample]]:
    """The logits of x_adv, which a loss built on this one may need, and what `loss` returns."""
    z, moments = network.train_logits(variables, x)
    z_adv, moments_adv = network.train_logits(variables, jax.lax.stop_gradient(x_adv))
    ce, kl = losses.cross_entropy(z, y, self.label_smoothing), losses.kl(z, z_adv)
    metrics = {"clean_correct": _correct(z, y), "adversarial_correct": _correct(z_adv, y), "ce": ce, "kl": kl}
    natural = ce - losses.entropy(y) if losses.is_soft(y) else ce
    return z_adv, natural + self.beta * kl, (moments, moments_adv), metrics


@dataclass(frozen=True)
class MART:
  """Misclassification-aware adversarial training (Wang et al. 2020, eq. 11), with p = softmax f:

    CE(f(x_adv), y) - log(1.0001 - max_{k != y} p_k(x_adv)) + beta * KL(p(x) || p(x_adv)) * (1 - p_y(x)).

  x_adv maximises CE with running statistics, from x + 0.001 N(0, I), in 'linf' or 'l2'. The paper is about Linf; the
  'l2' steps are those of TRADES. Gradients flow through p(x) and its weight too; there is no label smoothing.
  step_size: None is radius / 4 for 'linf' and 2 radius / num_steps for 'l2'.
  The small constants are those of the released code (github.com/YisenWang/MART). InputError for soft labels: p_y is the
  probability of one class.
  """

  beta: float = 5.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective beta", self.beta)
    _check_attack(self)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    _check_classes("mart", y)
    variables, x = jax.lax.stop_gradient((variables, norms.full_precision(x)))
    start_key, noise_key = norms.fold_in(key, 0), norms.fold_in(key, 1)
    start = _near(start_key, x) if start is None else start
    return _attack(self, lambda images: losses.ce(network.logits(variables, images), y), x, start, noise_key)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> LossMomentsMetrics:
    _check_classes("mart", y)
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


@dataclass(frozen=True)
class SCORE:
  """TRADES with squared distances of probabilities p = softmax f (Pang et al. 2022, arXiv:2202.10103):

    ||p(x) - y||^2 + beta * max(||p(x_adv) - p(x)||^2 - clip, 0),

  the objective LSE of its released code (github.com/P2333/SCORE), where x_adv maximises ||p(x_adv) - p(x)||^2. y is
  1 - label_smoothing at the true class and label_smoothing / (k - 1) at each of the others, or the soft label.
  clip: a squared distance that is not minimised further. It does not bound the attack.
  Attack, gradients, norm, radius, step_size and num_steps as in `TRADES`.
  """

  beta: float = 4.0
  clip: float = 0.0
  label_smoothing: float = 0.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective beta", self.beta)
    norms.check_range("objective clip", self.clip)
    norms.check_range("objective label_smoothing", self.label_smoothing, 0, 1)
    _check_attack(self)

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    def distance_from(z):
      p = jax.nn.softmax(z)
      return lambda z_adv: jnp.square(jax.nn.softmax(z_adv) - p).sum(axis=1)

    return _attack_by_batch_statistics(self, network, variables, x, key, start, distance_from)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> LossMomentsMetrics:
    z, moments = network.train_logits(variables, x)
    z_adv, moments_adv = network.train_logits(variables, jax.lax.stop_gradient(x_adv))
    p, p_adv = jax.nn.softmax(z), jax.nn.softmax(z_adv)
    target = _probabilities(y, z.shape[1], self.label_smoothing)
    natural, robust = jnp.square(p - target).sum(axis=1), jnp.square(p_adv - p).sum(axis=1)
    metrics = {
      "clean_correct": _correct(z, y),
      "adversarial_correct": _correct(z_adv, y),
      "natural_distance": natural,
      "robust_distance": robust,
    }
    loss = natural + self.beta * jax.nn.relu(robust - self.clip)
    return loss, (moments, moments_adv), metrics


@dataclass(frozen=True)
class Consistency:
  """TRADES of two augmentations of each image, whose attacked predictions must agree (Tack et al. 2022, arXiv:2103.04623):

    TRADES(x, y) + consistency * JSD(softmax(f(x_adv_1) / T) || softmax(f(x_adv_2) / T)), T = temperature.

  x and y hold 2b images: the first b one augmentation, the last b the other of the same images. Both are attacked and
  share their batch statistics. The two examples of an image carry the same divergence, so the mean of the loss is that
  of TRADES over 2b images and of the divergence over b. JSD is the mean of KL(p_1 || m) and KL(p_2 || m) with
  m = (p_1 + p_2) / 2, at least 1e-8 under its logarithm. The other fields: see `TRADES`.
  InputError for an odd number of images.
  """

  consistency: float = 1.0
  temperature: float = 0.5
  beta: float = 6.0
  label_smoothing: float = 0.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10
  mixed_target: bool = True

  num_views = 2

  def __post_init__(self):
    norms.check_range("objective consistency", self.consistency)
    _check_positive("objective temperature", self.temperature)
    self._trades()

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    return self._trades().attack(network, variables, x, y, key, start)

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> LossMomentsMetrics:
    if len(x) % 2:
      raise InputError(
        f"consistency takes two augmentations of each image, found {len(x)} images, an odd number"
      )
    z_adv, loss, moments, metrics = self._trades().logits_and_loss(network, variables, x, x_adv, y)
    log_p, log_q = jnp.split(jax.nn.log_softmax(z_adv / self.temperature), 2)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_mean = jnp.log(jnp.maximum((p + q) / 2, 1e-8))
    jsd = (p * (log_p - log_mean) + q * (log_q - log_mean)).sum(axis=1) / 2
    jsd = jnp.concatenate([jsd, jsd])
    return loss + self.consistency * jsd, moments, metrics | {"jsd": jsd}

  def _trades(self) -> TRADES:
    return TRADES(
      self.beta,
      self.label_smoothing,
      self.norm,
      self.radius,
      self.step_size,
      self.num_steps,
      self.mixed_target,
    )


@dataclass(frozen=True)
class IKL:
  """TRADES with the improved KL divergence (Cui et al. 2024, "Decoupled Kullback-Leibler Divergence Loss", arXiv:2305.13948):

    CE(z, y) + mse_weight / 4 * sum_jk s_j s_k ((z_j - z_k) - (z'_j - z'_k))^2 + ce_weight * sum_k -p_k log p'_k,

  with z, z' the logits of x and x_adv and p, p' their softmax. The gradient flows through both z and z' in the second
  term and through z' alone in the third. With p in place of s and the gradient of the second term through z alone, both
  weights 1, the two terms have the gradient of KL(p || p') (theorem 1).
  s: the mean of softmax(z / temperature) over all images of the class y in the epoch before; uniform in the first epoch.
  With soft labels, which the paper does not use, the mean of the rows s of all classes with weights y, and images count
  for every class by that weight. A class without images keeps its row.
  Attack, norm, radius, step_size, num_steps and mixed_target as in `TRADES`.
  The state: {'table': float [k k], the rows s by class, 'sums': float [k k] and 'counts': float [k], the epoch until
  now, 'epoch': int []}. `loss` reads the table of variables['objective'].
  The weights and the temperature are those of the released runs with generated images of CIFAR-10
  (github.com/jiequancui/DKL).
  """

  mse_weight: float = 10.0
  ce_weight: float = 3.0
  temperature: float = 4.0
  label_smoothing: float = 0.0
  norm: str = "linf"
  radius: norms.Scalar = 8 / 255
  step_size: norms.Scalar | None = None
  num_steps: int = 10
  mixed_target: bool = True

  num_views = 1

  def __post_init__(self):
    norms.check_range("objective mse_weight", self.mse_weight)
    norms.check_range("objective ce_weight", self.ce_weight)
    _check_positive("objective temperature", self.temperature)
    self._trades()

  def attack(
    self,
    network: Classifier,
    variables: Variables,
    x: Unit,
    y: AnyLabels,
    key: KeyOrKeys,
    start: Image | None = None,
  ) -> Unit:
    return self._trades().attack(network, variables, x, y, key, start)

  def init_state(self, num_classes: int) -> PyTree:
    square = (num_classes, num_classes)
    return {
      "table": jnp.full(square, 1 / num_classes),
      "sums": jnp.zeros(square),
      "counts": jnp.zeros(num_classes),
      "epoch": jnp.zeros([], jnp.int32),
    }

  def loss(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels
  ) -> LossMomentsMetrics:
    return self._logits_and_loss(network, variables, x, x_adv, y)[1:]

  def loss_and_state(
    self, network: Classifier, variables: Variables, x: Unit, x_adv: Unit, y: AnyLabels, epoch: jax.Array
  ) -> tuple[PerExample, tuple[PyTree, ...], dict[str, PerExample], PyTree]:
    state = _turn_over(variables[OBJECTIVE], epoch)
    z, *found = self._logits_and_loss(network, {**variables, OBJECTIVE: state}, x, x_adv, y)
    p = jax.lax.stop_gradient(jax.nn.softmax(z / self.temperature))
    weights = _probabilities(y, z.shape[1])
    sums = state["sums"] + jnp.matmul(weights.T, p, precision="highest")
    return *found, state | {"sums": sums, "counts": state["counts"] + weights.sum(axis=0)}

  def _logits_and_loss(self, network, variables, x, x_adv, y):
    z, moments = network.train_logits(variables, x)
    z_adv, moments_adv = network.train_logits(variables, jax.lax.stop_gradient(x_adv))
    s = jnp.matmul(_probabilities(y, z.shape[1]), variables[OBJECTIVE]["table"], precision="highest")
    ce = losses.cross_entropy(z, y, self.label_smoothing)
    mse = losses.pairwise_squares(z - z_adv, s)
    soft_ce = losses.cross_entropy(z_adv, jax.lax.stop_gradient(jax.nn.softmax(z)))
    metrics = {
      "clean_correct": _correct(z, y),
      "adversarial_correct": _correct(z_adv, y),
      "ce": ce,
      "weighted_mse": mse,
      "soft_ce": soft_ce,
    }
    loss = ce + self.mse_weight * mse + self.ce_weight * soft_ce
    return z, loss, (moments, moments_adv), metrics

  def _trades(self) -> TRADES:
    return TRADES(
      label_smoothing=self.label_smoothing,
      norm=self.norm,
      radius=self.radius,
      step_size=self.step_size,
      num_steps=self.num_steps,
      mixed_target=self.mixed_target,
    )


OBJECTIVES = {
  "standard": Standard,
  "pgd_at": PGDAT,
  "trades": TRADES,
  "mart": MART,
  "score": SCORE,
  "consistency": Consistency,
  "ikl": IKL,
}


def initial_collections(objective, num_classes: int) -> dict[str, PyTree]:
  """What `objective` adds to the variables of a network: {'objective': its state}, or nothing if it has none."""
  if not isinstance(objective, StatefulObjective):
    return {}
  return {OBJECTIVE: objective.init_state(num_classes)}


def loss_and_collections(
  objective,
  network: Classifier,
  variables: Variables,
  x: Unit,
  x_adv: Unit,
  y: AnyLabels,
  epoch: jax.Array,
) -> tuple[PerExample, tuple[PyTree, ...], dict[str, PerExample], dict[str, PyTree]]:
  """What `objective.loss` returns, and what `initial_collections` made, after this batch of `epoch` (0, 1, ...).

  The batches of one epoch may come in any number of pieces. No gradient flows into the collections.
  """
  if not isinstance(objective, StatefulObjective):
    return *objective.loss(network, variables, x, x_adv, y), {}
  *found, state = objective.loss_and_state(network, variables, x, x_adv, y, epoch)
  return *found, {OBJECTIVE: state}


def move_statistics(running: PyTree, moments: tuple[PyTree, ...], momentum: norms.Scalar) -> PyTree:
  """The running statistics after each of `moments` in turn: (1 - momentum) * running + momentum * moments.

  momentum: 0.01 is slow, 1 keeps the last of `moments` alone. May be traced.
  """
  for batch in moments:
    running = jax.tree.map(lambda old, new: (1 - momentum) * old + momentum * new, running, batch)
  return running


def _correct(logits, y):
  return (logits.argmax(axis=1) == losses.classes(y)).astype(jnp.float32)


def _probabilities(y, num_classes, label_smoothing=0.0):
  """Soft labels [b k]: `y` itself if it is soft, else 1 - s at the class and s / (k - 1) at each of the others."""
  if losses.is_soft(y):
    return y
  true = jnp.arange(num_classes) == y[:, None]
  return jnp.where(true, 1.0 - label_smoothing, label_smoothing / (num_classes - 1))


def _turn_over(state, epoch):
  """The state of IKL at a batch of `epoch`: the first one makes the table of what was summed up before it."""
  new, seen = epoch > state["epoch"], state["counts"] > 0
  means = state["sums"] / jnp.where(seen, state["counts"], 1)[:, None]
  return {
    "table": jnp.where(new & seen[:, None], means, state["table"]),
    "sums": jnp.where(new, 0, state["sums"]),
    "counts": jnp.where(new, 0, state["counts"]),
    "epoch": jnp.maximum(epoch, state["epoch"]).astype(jnp.int32),
  }


def _near(key, x):
  """x + 0.001 N(0, I), which may leave [0, 1] by that little."""
  return x + 0.001 * norms.normal_like(key, x)


def _attack_by_batch_statistics(objective, network, variables, x, key, start, divergence_from):
  """The attack of TRADES: maximises divergence_from(logits of x)(logits of x_adv), all by statistics of the batch."""
  variables, x = jax.lax.stop_gradient((variables, norms.full_precision(x)))
  start_key, noise_key = norms.fold_in(key, 0), norms.fold_in(key, 1)
  if start is None:
    linf = objective.norm == "linf"
    start = norms.random_start(start_key, x, objective.radius, "linf") if linf else _near(start_key, x)
  divergence = divergence_from(network.train_logits(variables, x)[0])
  return _attack(
    objective, lambda images: divergence(network.train_logits(variables, images)[0]), x, start, noise_key
  )


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


def _check_positive(what, value):
  norms.check_range(what, value)
  if value == 0:
    raise InputError(f"{what} is {value}; it must be positive")


def _check_classes(name, y):
  if losses.is_soft(y):
    raise InputError(f"{name} takes classes as labels, int [b], found soft labels {y.shape}")
