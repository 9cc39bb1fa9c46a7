"""Guidance in a labelled mixture of Gaussians, where conditional denoisers, densities and the Bayes classifier are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workers
from worlds import GaussianMixture

from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.guidance import (
  AutoGuidance,
  ClassifierFreeGuidance,
  ClassifierGuidance,
  CleanLogProb,
  DenoisedGuidance,
  Guided,
  LabelGuidance,
  NoisyLogProb,
)
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, to_signed

SHAPE = (2, 2, 1)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Bayes:
  """The exact classifier of noisy images, in a mixture with two components for each class: (x, sigma) -> log p(x, y; sigma)."""

  world: GaussianMixture

  def __call__(self, x, sigma):
    parts = self.world.log_parts(x, sigma)
    return jax.scipy.special.logsumexp(parts.reshape(len(parts), -1, 2), axis=2)


@register_pytree
@dataclasses.dataclass(frozen=True)
class OfClass:
  """The exact denoiser and log-density of the class of each image."""

  world: GaussianMixture
  labels: jax.Array

  def parts(self):
    mean, variance = self.world.mean.reshape(-1, 2, 4), self.world.variance.reshape(-1, 2)
    return [GaussianMixture(mean[k], variance[k]) for k in range(len(mean))]

  def __call__(self, x, sigma):
    found = jnp.stack([part(x, sigma) for part in self.parts()])
    return found[self.labels, jnp.arange(len(x))]

  def log_density(self, x, sigma):
    found = jnp.stack([part.log_density(x, sigma) for part in self.parts()])
    return found[self.labels, jnp.arange(len(x))]


def setting(n=12, seed=0, dtype=jnp.float64):
  """(world of three classes, x, sigma, labels) at noise levels from 0.01 to 50."""
  r = np.random.default_rng(seed)
  world = GaussianMixture(
    jnp.asarray(r.normal(size=(6, 4)), dtype), jnp.asarray(0.02 + 0.2 * r.random(6), dtype)
  )
  sigma = jnp.asarray(np.geomspace(0.01, 50, n), dtype)
  x = world.sample(jax.random.key(seed), (n, *SHAPE)).astype(dtype)
  x = x + sigma[:, None, None, None] * jnp.asarray(r.normal(size=x.shape), dtype)
  return world, x, sigma, jnp.asarray(r.integers(0, 3, n))


@jax.jit
def evaluate(denoise, x, sigma):
  return denoise(x, sigma)


def test_bayes_classifier_gives_the_conditional_denoiser(float64):
  world, x, sigma, labels = setting()
  guided = ClassifierGuidance(world, NoisyLogProb(Bayes(world), labels), 1.0)
  conditional = OfClass(world, labels)
  np.testing.assert_allclose(evaluate(guided, x, sigma), evaluate(conditional, x, sigma), rtol=0, atol=1e-9)
  # a near miss in the scale, or the labels of others, gives something else
  for wrong in (
    dataclasses.replace(guided, scale=1.05),
    ClassifierGuidance(world, NoisyLogProb(Bayes(world), (labels + 1) % 3), 1.0),
  ):
    assert jnp.abs(evaluate(wrong, x, sigma) - evaluate(conditional, x, sigma)).max() > 1e-3


@pytest.mark.slow
def test_bayes_classifier_in_float32():
  world, x, sigma, labels = setting(dtype=jnp.float32)
  guided = ClassifierGuidance(world, NoisyLogProb(Bayes(world), labels), 1.0)
  found = evaluate(guided, x, sigma)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, evaluate(OfClass(world, labels), x, sigma), rtol=0, atol=2e-4)


def test_scales_one_and_zero(float64):
  world, x, sigma, labels = setting()
  conditional = OfClass(world, labels)
  one = ClassifierFreeGuidance(conditional, world, 1.0)
  np.testing.assert_allclose(evaluate(one, x, sigma), evaluate(conditional, x, sigma), rtol=0, atol=1e-13)
  zero = ClassifierFreeGuidance(conditional, world, 0)
  np.testing.assert_array_equal(evaluate(zero, x, sigma), evaluate(world, x, sigma))
  assert jnp.abs(evaluate(conditional, x, sigma) - evaluate(world, x, sigma)).max() > 0.1
  # a scale for each image
  mixed = evaluate(ClassifierFreeGuidance(conditional, world, jnp.arange(12) % 2), x, sigma)
  np.testing.assert_allclose(mixed[1::2], evaluate(conditional, x, sigma)[1::2], rtol=0, atol=1e-13)
  np.testing.assert_array_equal(mixed[::2], evaluate(world, x, sigma)[::2])


@pytest.mark.parametrize("kind", [ClassifierFreeGuidance, pytest.param(AutoGuidance, marks=pytest.mark.slow)])
def test_guided_score_is_that_of_the_tempered_density(float64, kind):
  """(D - x) / sigma^2 = grad of w log p(x | y) + (1 - w) log p(x), by central differences of the densities."""
  world, x, sigma, labels = setting()
  w, step, conditional = 2.5, 1e-5, OfClass(world, labels)
  guided = evaluate(kind(conditional, world, w), x, sigma)

  @jax.jit
  def log_density(x):
    return w * conditional.log_density(x, sigma) + (1 - w) * world.log_density(x, sigma)

  for i in range(4):
    h = step * sigma[:, None, None, None] * jnp.eye(4)[i].reshape(SHAPE)
    slope = (log_density(x + h) - log_density(x - h)) / (2 * step)  # times sigma
    found = ((guided - x).reshape(-1, 4)[:, i]) / sigma
    np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-6)


def test_guidance_within_an_interval(float64):
  world, x, _, labels = setting(5)
  sigma = jnp.array([0.1, 0.2, 1.0, 3.0, 3.1])
  conditional = OfClass(world, labels)
  everywhere = evaluate(ClassifierFreeGuidance(conditional, world, 2.0), x, sigma)
  inside = evaluate(ClassifierFreeGuidance(conditional, world, 2.0, sigma_min=0.1, sigma_max=3.0), x, sigma)
  np.testing.assert_array_equal(inside[1:4], everywhere[1:4])  # 0.1 is not within, 3 is
  outside = jnp.array([0, 4])
  np.testing.assert_allclose(inside[outside], evaluate(conditional, x, sigma)[outside], rtol=0, atol=1e-13)
  assert jnp.abs(inside - everywhere)[outside].max((1, 2, 3)).min() > 1e-3


@dataclasses.dataclass(frozen=True)
class LabelledNetwork:
  """A `types.DiffusionNetwork` of one layer, which counts how often it is traced and at which batch."""

  image_shape: tuple = SHAPE
  num_classes: int = 3
  num_augment_labels: int = 2
  batches: list = dataclasses.field(default_factory=list, compare=False)

  def init(self, key):
    shapes = {"x": (4, 4), "class": (3, 4), "augment": (2, 4)}
    return {"params": {name: jax.random.normal(key, shape) for name, shape in shapes.items()}}

  def apply(self, variables, x, noise_labels, class_labels, augment_labels, dropout_key):
    self.batches.append(len(x))
    p = variables["params"]
    told = class_labels @ p["class"] + augment_labels @ p["augment"] + noise_labels[:, None]
    return jnp.tanh(x.reshape(-1, 4) @ p["x"] + told).reshape(x.shape)


def test_one_network_is_evaluated_once(float64):
  _, x, sigma, labels = setting()
  network = LabelledNetwork()
  augment = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)))
  denoiser = Denoiser(
    network, EDMPreconditioning(), network.init(jax.random.key(0)), jax.nn.one_hot(labels, 3), augment
  )
  unconditional = dataclasses.replace(denoiser, class_labels=jnp.zeros((12, 3)))
  interval = {"sigma_min": 0.05, "sigma_max": 10.0}
  expected = evaluate(ClassifierFreeGuidance(denoiser, unconditional, 3.0, **interval), x, sigma)
  network.batches.clear()
  found = LabelGuidance(denoiser, 3.0, **interval)(x, sigma)
  assert network.batches == [24]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  assert jnp.abs(found - denoiser(x, sigma)).max() > 0.1
  plain = dataclasses.replace(denoiser, class_labels=None)
  with pytest.raises(InputError, match="no class_labels"):
    LabelGuidance(plain, 3.0)(x, sigma)


def test_guidances_wait_for_their_labels(float64):
  """`Guided` is what its parts are by hand: none, either, or both; an unconditional model has the classifier alone."""
  world, x, sigma, labels = setting()
  network = LabelledNetwork()
  augment = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)))
  denoiser = Denoiser(network, EDMPreconditioning(), network.init(jax.random.key(0)), None, augment)
  labelled = dataclasses.replace(denoiser, class_labels=jax.nn.one_hot(labels, 3))
  classifier, log_prob = Bayes(world), NoisyLogProb(Bayes(world), labels)
  both = LabelGuidance(labelled, 3.0, 0.05, 10.0)
  for guided, wanted, evaluations in (
    (Guided(denoiser), labelled, 1),
    (Guided(denoiser, True, 3.0, 0.05, 10.0), both, 2),
    (Guided(denoiser, classifier=classifier), ClassifierGuidance(labelled, log_prob, 1.0), 1),
    (Guided(denoiser, True, 3.0, 0.05, 10.0, classifier, 2.0), ClassifierGuidance(both, log_prob, 2.0), 2),
  ):
    found = jax.jit(lambda guided: guided.with_labels(labels)(x, sigma))(guided)
    np.testing.assert_allclose(found, evaluate(wanted, x, sigma), rtol=0, atol=1e-12)
    network.batches.clear()
    guided.with_labels(labels)(x, sigma)
    assert network.batches == [12 * evaluations] and guided.network_evaluations == evaluations
  plain = Denoiser(Unconditional(), EDMPreconditioning(), {})
  found = Guided(plain, classifier=classifier, classifier_scale=2.0).with_labels(labels)(x, sigma)
  assert plain.with_labels(labels) is plain
  expected = evaluate(ClassifierGuidance(plain, log_prob, 2.0), x, sigma)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  assert jnp.abs(found - plain(x, sigma)).max() > 0.1


@dataclasses.dataclass(frozen=True)
class Unconditional:
  """A `types.DiffusionNetwork` that says 0 and has no classes."""

  image_shape: tuple = SHAPE
  num_classes: int = 0
  num_augment_labels: int = 0

  def init(self, key):
    return {}

  def apply(self, variables, x, noise_labels, class_labels, augment_labels, dropout_key):
    assert class_labels is None
    return jnp.zeros_like(x)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Linear:
  """A LogitsFn of Unit images whose log-odds are linear: kernel . x, x in [-1, 1]."""

  kernel: jax.Array

  def __call__(self, u):
    odds = (to_signed(u) * self.kernel).sum((1, 2, 3))
    return jnp.stack([jnp.zeros_like(odds), odds], 1)


def test_clean_classifier_on_the_denoised_estimate(float64):
  """In a world of one Gaussian, J = variance / (variance + sigma^2), so both variants are known."""
  r = np.random.default_rng(2)
  world = GaussianMixture(jnp.asarray(r.normal(size=(1, 4))), jnp.array([0.3]))
  sigma = jnp.array([0.05, 0.5, 5.0])
  x = jnp.asarray(r.normal(size=(3, *SHAPE)))
  kernel, labels = jnp.asarray(r.normal(size=SHAPE)), jnp.array([1, 0, 1])
  log_prob = CleanLogProb(Linear(kernel), labels)
  x0 = evaluate(world, x, sigma)
  odds = (x0 * kernel).sum((1, 2, 3))
  np.testing.assert_allclose(
    log_prob(x0), jnp.where(labels == 1, -jnp.log1p(jnp.exp(-odds)), -jnp.log1p(jnp.exp(odds))), rtol=1e-12
  )
  gradient = (labels - jax.nn.sigmoid(odds))[:, None, None, None] * kernel
  for through, jacobian in ((True, 0.3 / (0.3 + sigma**2)), (False, jnp.ones(3))):
    found = evaluate(DenoisedGuidance(world, log_prob, 2.0, through), x, sigma)
    expected = x0 + (2 * sigma**2 * jacobian)[:, None, None, None] * gradient
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def wrappers(world, labels, scale):
  """One of each, all of whose arrays and numbers are leaves."""
  noisy = NoisyLogProb(Bayes(world), labels)
  clean = CleanLogProb(Linear(jnp.ones(SHAPE) * world.mean[0, 0]), labels % 2)
  return [
    ClassifierFreeGuidance(OfClass(world, labels), world, scale, 0.1 * scale, 10.0 * scale),
    AutoGuidance(OfClass(world, labels), world, scale),
    ClassifierGuidance(world, noisy, scale),
    DenoisedGuidance(world, clean, scale),
    DenoisedGuidance(world, clean, scale, through_denoiser=False),
  ]


def test_other_values_do_not_recompile():
  traced = []

  @jax.jit
  def run(guided, x, sigma):
    traced.append(type(guided))
    return guided(x, sigma)

  results = []
  for seed, scale in ((0, 1.5), (1, 2.5)):
    world, x, sigma, labels = setting(seed=seed, dtype=jnp.float32)
    results.append([run(guided, x, sigma) for guided in wrappers(world, labels, scale)])
  assert len(traced) == 5
  np.testing.assert_allclose(
    results[1][2], evaluate(wrappers(world, labels, scale)[2], x, sigma), rtol=1e-4, atol=1e-4
  )
  assert all(jnp.abs(first - second).max() > 0.1 for first, second in zip(*results, strict=True))


@pytest.mark.slow
def test_finite_as_sigma_vanishes():
  world, x, _, labels = setting(4, dtype=jnp.float32)

  @jax.jit
  def value_and_gradient(guided, x, sigma):
    value, pull_back = jax.vjp(lambda x: guided(x, sigma), x)
    return value, pull_back(jnp.ones_like(value))[0]

  for sigma, far in ((1e-3, 1e-3), (1e-8, 1e-5), (1e-20, 1e-5)):
    for guided in wrappers(world, labels, 3.0):
      value, gradient = value_and_gradient(guided, x, jnp.full(4, sigma))
      assert np.isfinite(gradient).all()
      np.testing.assert_allclose(value, x, rtol=0, atol=far)


@pytest.mark.slow
def test_doubled_batch_stays_on_its_devices():
  """Sharded over four devices, the compiled program of a sampler with `LabelGuidance` has no collective."""
  found = workers.answer(workers.start("guidance_worker.py", 4))
  assert found["devices"] == 4 and found["collectives"] == [] and found["largest_difference"] < 5e-4
  # what the interleaving avoids: the batch behind itself has to be moved between devices
  assert found["collectives_of_concatenation"]
