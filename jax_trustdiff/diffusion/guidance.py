"""Guidance: DenoiseFns made of other DenoiseFns and of classifiers, and the loss that trains a noise-conditional classifier.

Every wrapper is a callable pytree whose leaves are parameters, labels and scales: as an argument of a jitted function it
recompiles for other shapes, not for other values. A guidance is written on D; since the score is (D(x; sigma) - x) / sigma^2,
adding g to the score adds sigma^2 g to D (Karras et al. 2022, arXiv:2206.00364, eq. 3).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning, Preconditioning
from jax_trustdiff.diffusion.losses import DenoisingLoss
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import (
  DenoiseFn,
  InputError,
  KeyOrKeys,
  Labels,
  Logits,
  LogitsFn,
  NoiseConditionalClassifier,
  PerExample,
  Sigma,
  Signed,
  Variables,
  to_unit,
)

NoisyLogitsFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x, sigma) in EDM convention -> Logits


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierFreeGuidance:
  """D = D_u + scale (D_c - D_u) where sigma_min < sigma <= sigma_max, and D_c elsewhere.

  Ho & Salimans 2022 (arXiv:2207.12598, eq. 6) write (1 + w) and -w for the factors of the two: scale = 1 + w. Scale 1 is the
  conditional model, 0 the unconditional one. The interval is that of Kynkaanniemi et al. 2024 (arXiv:2404.07724), whose w is
  this scale. Both models are evaluated at every noise level; where they are one network, `LabelGuidance` does it at once.
  """

  conditional: DenoiseFn
  unconditional: DenoiseFn
  scale: Any  # a number, or [b]
  sigma_min: Any = 0.0
  sigma_max: Any = float("inf")

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    scale = _within(self.scale, sigma, self.sigma_min, self.sigma_max)
    return _extrapolate(self.conditional(x, sigma), self.unconditional(x, sigma), scale)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class LabelGuidance:
  """`ClassifierFreeGuidance` by one network: D_c has the denoiser's class labels, D_u zeros in their place.

  Fields otherwise as there. The network is evaluated once, on twice the batch: every image lies beside its copy, so that a
  batch sharded over devices stays where it is. InputError for a denoiser without class labels.
  """

  denoiser: Denoiser  # with class_labels [b k]
  scale: Any
  sigma_min: Any = 0.0
  sigma_max: Any = float("inf")

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    labels, augment = self.denoiser.class_labels, self.denoiser.augment_labels
    if labels is None:
      raise InputError("LabelGuidance: the denoiser has no class_labels")
    both = dataclasses.replace(
      self.denoiser,
      class_labels=_interleave(labels, jnp.zeros_like(labels)),
      augment_labels=None if augment is None else _interleave(augment, augment),
    )
    found = both(_interleave(x, x), _interleave(sigma, sigma))
    found = found.reshape(x.shape[0], 2, *x.shape[1:])
    scale = _within(self.scale, sigma, self.sigma_min, self.sigma_max)
    return _extrapolate(found[:, 0], found[:, 1], scale)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class AutoGuidance:
  """D = D_guide + scale (D_main - D_guide): away from a worse version of the model (Karras et al. 2024, arXiv:2406.02507).

  guide: smaller or less trained, for the same labels. scale 1 is the main model.
  """

  main: DenoiseFn
  guide: DenoiseFn
  scale: Any  # a number, or [b]

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    return _extrapolate(self.main(x, sigma), self.guide(x, sigma), self.scale)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierGuidance:
  """D + scale sigma^2 grad_x log p(y | x; sigma): the score of p(x; sigma) p(y | x; sigma)^scale.

  Song et al. 2021 (arXiv:2011.13456, appendix I.1) with scale 1, Dhariwal & Nichol 2021 (arXiv:2105.05233, algorithm 2) with
  others. log_prob: (x, sigma) -> [b], such as `NoisyLogProb` of a classifier that knows noisy images.
  """

  denoise: DenoiseFn
  log_prob: Callable[[jax.Array, jax.Array], jax.Array]
  scale: Any  # a number, or [b]

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    gradient = jax.grad(lambda x: self.log_prob(x, sigma).sum())(x)
    return self.denoise(x, sigma) + _per_image(self.scale * jnp.square(sigma), x) * gradient


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class DenoisedGuidance:
  """Guidance by a classifier of clean images, that of the denoised estimate: p(y | x; sigma) is taken for p(y | x0 = D(x; sigma)).

  log_prob: (x0) -> [b], such as `CleanLogProb`; g is its gradient at D, and J the Jacobian of D by x.

      through_denoiser=True    D + scale sigma^2 J^T g   the gradient of log p(y | D(x; sigma)) by x; costs a backward pass
      through_denoiser=False   D + scale sigma^2 g       J taken for the identity, which it is near at small sigma alone

  The first is the guidance of Chung et al. 2023 (arXiv:2209.14687) with a classifier as the measurement. sigma^2 J is the
  covariance of x0 given x: where noise hides the image it is far below sigma^2, so the second needs far smaller scales there.
  Neither is exact, unless log_prob is linear over the spread of x0 given x.
  """

  denoise: DenoiseFn
  log_prob: Callable[[jax.Array], jax.Array]
  scale: Any  # a number, or [b]
  through_denoiser: bool = dataclasses.field(default=True, metadata={"static": True})

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Signed:
    if self.through_denoiser:
      x0, pull_back = jax.vjp(lambda x: self.denoise(x, sigma), x)
    else:
      x0, pull_back = self.denoise(x, sigma), lambda gradient: (gradient,)
    gradient = jax.grad(lambda x0: self.log_prob(x0).sum())(x0)
    return x0 + _per_image(self.scale * jnp.square(sigma), x0) * pull_back(gradient)[0].astype(x0.dtype)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyClassifier:
  """A classifier told the noise level, with its variables: (x = x0 + sigma * noise, sigma > 0) -> Logits; a pytree.

  The network sees input * x and is told what a denoiser with this preconditioning is told, by default log(sigma) / 4
  (Karras et al. 2022, table 1).
  """

  network: NoiseConditionalClassifier = dataclasses.field(metadata={"static": True})
  variables: Variables
  preconditioning: Preconditioning = dataclasses.field(
    default=EDMPreconditioning(), metadata={"static": True}
  )
  dropout_key: Any = None  # None: evaluation mode

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> Logits:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    c = self.preconditioning.coefficients(jnp.asarray(sigma, x.dtype))
    return self.network.apply(self.variables, _per_image(c.input, x) * x, c.noise, self.dropout_key)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class NoisyLogProb:
  """(x, sigma) -> log p(y | x; sigma) [b] of a noise-conditional classifier, in nats."""

  classifier: NoisyLogitsFn
  labels: Any  # [b] the class of each image

  def __call__(self, x: Float[Array, "b h w c"], sigma: Sigma) -> PerExample:
    return _log_prob(self.classifier(x, sigma), self.labels)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class CleanLogProb:
  """x0 in [-1, 1] -> log p(y | x0) [b] of a LogitsFn, in nats; what lies outside is not clipped, so that it has a gradient."""

  logits_fn: LogitsFn
  labels: Any  # [b] the class of each image

  def __call__(self, x0: Signed) -> PerExample:
    return _log_prob(self.logits_fn(to_unit(x0)), self.labels)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Guided:
  """A denoiser with its guidance, whose labels are not known yet: `with_labels` gives the DenoiseFn; a pytree.

  by_labels: whether there is `LabelGuidance`, with scale, sigma_min and sigma_max. With a classifier, `ClassifierGuidance` by it
  on top, for a denoiser with or without classes; the numbers of classes must agree.
  """

  denoiser: Denoiser
  by_labels: bool = dataclasses.field(default=False, metadata={"static": True})
  scale: Any = 1.0
  sigma_min: Any = 0.0
  sigma_max: Any = float("inf")
  classifier: NoisyLogitsFn | None = None
  classifier_scale: Any = 1.0

  @property
  def network_evaluations(self) -> int:
    """Evaluations of the denoiser's network for one of the DenoiseFn, those of the classifier not counted."""
    return 2 if self.by_labels else 1

  def with_variables(self, own: Variables) -> "Guided":
    """The same guidance of a denoiser with these variables."""
    return dataclasses.replace(self, denoiser=self.denoiser.with_variables(own))

  def with_labels(self, labels: Labels) -> DenoiseFn:
    """The denoiser guided to integer class labels [b]; InputError if `LabelGuidance` is asked for and it has no classes."""
    denoise = self.denoiser.with_labels(labels)
    if self.by_labels:
      denoise = LabelGuidance(denoise, self.scale, self.sigma_min, self.sigma_max)
    if self.classifier is not None:
      log_prob = NoisyLogProb(self.classifier, labels)
      denoise = ClassifierGuidance(denoise, log_prob, self.classifier_scale)
    return denoise


def noisy_cross_entropy(
  classifier: NoisyLogitsFn, x0: Signed, labels: Labels, key: KeyOrKeys, density: DenoisingLoss
) -> PerExample:
  """-log p(labels | x0 + sigma * noise; sigma) of each image, with sigma and noise drawn as `density` draws them.

  Its expectation is least for the exact p(y | x; sigma). key: one for each image, or one for the batch, as `DenoisingLoss` has it.
  """
  sigma, noise = density.draw(key, x0)
  return -NoisyLogProb(classifier, labels)(x0 + _per_image(sigma, x0) * noise, sigma)


def _log_prob(logits: Logits, labels: Labels) -> PerExample:
  return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def _within(scale: Any, sigma: jax.Array, sigma_min: Any, sigma_max: Any) -> jax.Array:
  """[b]: `scale` where sigma_min < sigma <= sigma_max, else 1."""
  return jnp.where((sigma_min < sigma) & (sigma <= sigma_max), scale, 1.0)


def _extrapolate(main: jax.Array, guide: jax.Array, scale: Any) -> jax.Array:
  return guide + _per_image(jnp.asarray(scale, main.dtype), main) * (main - guide)


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
  """[2b ...]: a row of the first, then the same row of the second."""
  return jnp.stack([first, second], 1).reshape(2 * first.shape[0], *first.shape[1:])


def _per_image(value: jax.Array, x: jax.Array) -> jax.Array:
  """[b] as [b 1 1 1] in the precision of x; a number stays one."""
  return value.astype(x.dtype).reshape(value.shape + (1,) * (x.ndim - value.ndim)) if value.ndim else value
