"""The mixture of shards against the closed form: eq. 5, its weights, classes, masks, stacks, and what is evaluated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from workers import answer, start
from worlds import GaussianMixture, LogDensities, log_density_of_all, samples_of_shards, shards, small

from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.mixture import GuidedMixture, Mixture, RandomShard, Recorded, TopShards
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning, convert
from jax_trustdiff.diffusion.guidance import ClassifierFreeGuidance, noisy_cross_entropy
from jax_trustdiff.diffusion.losses import vp_loss
from jax_trustdiff.diffusion.processes import VP
from jax_trustdiff.diffusion.samplers import AncestralSampler, EDMSampler, euler_maruyama
from jax_trustdiff.models.uvit import uvit
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError


def exact(stacked, **more):
  return Mixture(stacked, weights.Exact(LogDensities(stacked)), **more)


def noisy(stacked, count=4096, seed=0, dtype=jnp.float32):
  """Images of the mixture with noise at times uniform in VP's t: (x, sigma), in the EDM convention."""
  key = jax.random.key(seed)
  x0, _ = samples_of_shards(stacked, key, count)
  t = jax.random.uniform(jax.random.fold_in(key, 1), (count,), dtype, 1e-3, 1)
  sigma = VP().sigma(t).astype(dtype)
  noise = jax.random.normal(jax.random.fold_in(key, 2), x0.shape, dtype)
  return x0.astype(dtype) + sigma[:, None, None, None] * noise, sigma


def scores(stacked, x, sigma):
  """(score of every shard [s ...], score of the mixture), both by differentiating log-densities."""
  parts = [
    jax.grad(lambda x, i=i: LogDensities(stacked)(x, sigma)[i].sum())(x) for i in range(stacked.capacity)
  ]
  return jnp.stack(parts), jax.grad(lambda x: log_density_of_all(stacked, x, sigma).sum())(x)


def denoised(stacked, x, sigma, components=None):
  """D of the mixture as one mixture of all components, in float64 by numpy; components: of every image, those that there are."""
  mean, variance = (np.asarray(stacked.own[name], np.float64) for name in ("mean", "variance"))
  log_weight = np.repeat(np.asarray(stacked.log_prior, np.float64)[:, None], mean.shape[1], 1)
  if components is not None:
    log_weight = np.where(components, log_weight, -np.inf)
  x, noise = (
    np.asarray(x, np.float64).reshape(len(x), 1, 1, -1),
    np.asarray(sigma, np.float64)[:, None, None] ** 2,
  )
  total = variance + noise
  log = log_weight - ((x - mean) ** 2).sum(-1) / (2 * total) - mean.shape[-1] / 2 * np.log(total)
  posterior = scipy.special.softmax(log, axis=(1, 2))
  parts = (variance[..., None] * x + noise[..., None] * mean) / total[..., None]
  return (posterior[..., None] * parts).sum((1, 2)).reshape(-1, 2, 2, 1)


def relative_error(found, wanted):
  """The largest error of an image, relative to its own largest value where that is above 1."""
  scale = jnp.maximum(1, jnp.abs(wanted).max((1, 2, 3)))
  return float((jnp.abs(found - wanted).max((1, 2, 3)) / scale).max())


def in_vp(sigma, score):
  """A score in VP's coordinates x / sqrt(1 + sigma^2), which are of order 1."""
  return score * jnp.sqrt(1 + sigma**2)[:, None, None, None]


@pytest.mark.parametrize("apart", [3.0, 0.5])
def test_equation_5_in_float64(float64, apart):
  stacked = shards(apart, jnp.float64)
  x, sigma = noisy(stacked, dtype=jnp.float64)
  seen = exact(stacked).look(x, sigma)
  of_shards, wanted = scores(stacked, x, sigma)
  mixed = jnp.einsum("sb,sbhwc->bhwc", seen.weights, of_shards)
  assert jnp.abs(in_vp(sigma, mixed - wanted)).max() < 1e-13
  assert np.abs(seen.found - denoised(stacked, x, sigma)).max() < 1e-13
  np.testing.assert_allclose(seen.weights.sum(0), 1, atol=1e-15)


def test_equation_5_in_float32_and_with_no_other_weights():
  stacked = shards()
  x, sigma = noisy(stacked)
  seen = jax.jit(Mixture.look)(exact(stacked), x, sigma)
  of_shards, wanted = scores(stacked, x, sigma)
  mixed = jnp.einsum("sb,sbhwc->bhwc", seen.weights, of_shards)
  error = jnp.abs(in_vp(sigma, mixed - wanted))
  assert error.max() < 1e-5 and jnp.abs(in_vp(sigma, wanted)).max() < 50
  exact_d = denoised(stacked, x, sigma)
  assert np.abs(seen.found - exact_d).max() < 1e-5
  np.testing.assert_allclose(seen.weights.sum(0), 1, rtol=0, atol=1e-6)
  for other in (weights.Prior(), weights.Equal()):
    assert np.abs(Mixture(stacked, other)(x, sigma) - exact_d).max() > 0.5


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("prediction", ["noise", "score", "v", "flow"])
def test_the_same_weights_mix_other_predictions(request, prediction, dtype, tolerance):
  """In float32 what a prediction is worth in D: noise and score say little of the clean image where there is much noise."""
  if dtype == jnp.float64:
    request.getfixturevalue("float64")
  stacked = shards(dtype=dtype)
  x, sigma = noisy(stacked, 512, dtype=dtype)
  seen = exact(stacked).look(x, sigma)
  predicted = jax.vmap(lambda d: convert(d, x, sigma, "x0", prediction))(seen.estimates)
  mixed = jnp.einsum("sb,sbhwc->bhwc", seen.weights, predicted)
  back = convert(mixed, x, sigma, prediction, "x0")
  assert back.dtype == dtype
  error = jnp.abs(back - seen.found) / jnp.maximum(1, sigma)[:, None, None, None]
  assert error.max() < tolerance


def permuted(stacked, order):
  def rows(leaf):
    return leaf[order]

  return dataclasses.replace(
    stacked,
    own=jax.tree.map(rows, stacked.own),
    active=rows(stacked.active),
    proportions=rows(stacked.proportions),
  )


@pytest.mark.computes
@pytest.mark.parametrize("impl", ["vmap", "map"])
def test_the_order_of_shards_does_not_matter(impl):
  stacked = shards()
  x, sigma = noisy(stacked, 256)
  order = jnp.array([2, 0, 1])
  one, other = (exact(found, impl=impl).look(x, sigma) for found in (stacked, permuted(stacked, order)))
  np.testing.assert_allclose(one.weights[order], other.weights, rtol=0, atol=1e-6)
  assert relative_error(one.found, other.found) < 1e-6


@pytest.mark.computes
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("impl", ["vmap", "map"])
def test_one_shard_and_equal_shards_are_the_plain_model(request, impl, dtype):
  """D, and samples."""
  if dtype == jnp.float64:
    request.getfixturevalue("float64")
  stacked = shards(dtype=dtype)
  x, sigma = noisy(stacked, 256, dtype=dtype)
  own = jax.tree.map(lambda leaf: leaf[1], stacked.own)
  plain = GaussianMixture(**own)
  noise = small(32)[1].astype(dtype)
  sample_by = jax.jit(EDMSampler(12))
  for count in (1, 3):
    same = exact(cdm_shards.stack(plain, [own] * count, [1.0, 2.0, 3.0][:count]), impl=impl)
    found = jax.jit(Mixture.look)(same, x, sigma).found
    assert found.dtype == dtype and relative_error(found, plain(x, sigma)) < 1e-6
    np.testing.assert_allclose(sample_by(same, noise), sample_by(plain, noise), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
def test_some_shards_at_once_are_all(at_once):
  """Also where their number does not divide that of the shards, and with weights along a path."""
  stacked = shards()
  x, sigma = noisy(stacked, 64)
  wanted, found = (exact(stacked, **more).look(x, sigma) for more in ({}, {"at_once": at_once}))
  np.testing.assert_allclose(found.estimates, wanted.estimates, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(found.found, wanted.found, rtol=1e-6, atol=1e-6)
  with pytest.raises(InputError, match="a number of shards for impl 'vmap'"):
    exact(stacked, impl="map", at_once=at_once)


def unused(stacked, value=jnp.nan):
  """The stack with shard 1 full of NaN."""
  own = jax.tree.map(lambda leaf: leaf.at[1].set(value), stacked.own)
  return dataclasses.replace(stacked, own=own)


@pytest.mark.computes  # in programs as users run them
@pytest.mark.parametrize("impl", ["vmap", "map"])
@pytest.mark.parametrize("how", ["active", "allowed", "of each image", "dropped", "free slots"])
def test_a_shard_that_does_not_count_is_not_there(impl, how):
  stacked = shards()
  x, sigma = noisy(stacked, 256)
  without = cdm_shards.stack(
    stacked.common, [jax.tree.map(lambda leaf, i=i: leaf[i], stacked.own) for i in (0, 2)], [0.5, 0.2]
  )
  allowed = jnp.array([True, False, True])
  if how == "active":
    mixture = exact(unused(stacked).restricted(allowed), impl=impl)
  elif how == "allowed":
    mixture = exact(unused(stacked), allowed=allowed, impl=impl)
  elif how == "of each image":
    mixture = exact(unused(stacked), allowed=jnp.repeat(allowed[:, None], len(x), 1), impl=impl)
  elif how == "dropped":
    mixture = exact(unused(stacked).drop(1), impl=impl)
    assert not any(np.asarray(leaf[1]).any() for leaf in jax.tree.leaves(mixture.shards.own))
  else:
    mixture = exact(cdm_shards.with_capacity(without, 5), impl=impl)
  found, wanted = (jax.jit(lambda m: m(x, sigma))(m) for m in (mixture, exact(without, impl=impl)))
  assert jnp.isfinite(found).all()
  if impl == "map":
    np.testing.assert_array_equal(found, wanted)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
  with_all = exact(stacked, impl=impl)(x, sigma)
  assert jnp.abs(with_all - wanted).max() > 0.5


def test_access_differs_from_image_to_image():
  stacked = shards()
  x, sigma = noisy(stacked, 6)
  allowed = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1]], bool).T
  seen = exact(stacked, allowed=allowed).look(x, sigma)
  assert not seen.weights[~allowed].any()
  np.testing.assert_allclose(seen.weights.sum(0), 1, rtol=0, atol=1e-6)
  for image in range(6):
    alone = exact(stacked, allowed=allowed[:, image]).look(x[image : image + 1], sigma[image : image + 1])
    np.testing.assert_allclose(alone.weights[:, 0], seen.weights[:, image], rtol=0, atol=1e-6)


def test_weights_of_classes_hold_what_each_shard_has_of_a_class(float64):
  """Class c is component c of every shard; shard 0 has no class 4 and shard 2 twice as many of class 1 as of others."""
  stacked = shards(0.5, jnp.float64)
  frequencies = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 2, 1, 1, 1.0]])
  frequencies = frequencies / frequencies.sum(1, keepdims=True)
  x, sigma = noisy(stacked, 512, dtype=jnp.float64)
  labels = jnp.arange(512) % 5
  one = jax.nn.one_hot(labels, 5, dtype=bool)  # [b k]

  def log_of_class(x):
    """log p^i(x | c), [s b]"""
    total = stacked.own["variance"][:, None] + jnp.square(sigma)[:, None]
    flat = x.reshape(len(x), 1, -1)
    log = -jnp.square(flat - stacked.own["mean"][:, None]).sum(-1) / (2 * total) - 2 * jnp.log(total)
    return jnp.where(one, log, 0).sum(-1)

  of_class = OfClass(stacked.own["mean"][0], stacked.own["variance"][0])
  stacked = dataclasses.replace(stacked, common=of_class)
  mixture = Mixture(stacked, weights.Exact(ClassDensities(stacked, labels)), labels, jnp.log(frequencies))
  found = mixture.look(x, sigma)
  joint = stacked.log_prior[:, None] + jnp.log(frequencies)[:, labels] + log_of_class(x)
  score = jax.grad(
    lambda x: jax.nn.logsumexp(
      stacked.log_prior[:, None] + jnp.log(frequencies)[:, labels] + log_of_class(x), 0
    ).sum()
  )(x)
  column = sigma[:, None, None, None]
  np.testing.assert_allclose(found.weights, jax.nn.softmax(joint, 0), atol=1e-12)
  np.testing.assert_allclose((found.found - x) / column**2, score, rtol=1e-6, atol=1e-7)
  assert not found.weights[0][labels == 4].any()
  trained_with = jnp.log(jnp.asarray(np.random.RandomState(0).dirichlet(np.ones(15)).reshape(3, 5)))
  kind = weights.ByClassifier(ShardsWithClasses(stacked, trained_with), trained_with)
  by_classifier = dataclasses.replace(mixture, weights=kind)
  np.testing.assert_allclose(by_classifier.weigh(x, sigma, None), found.weights, atol=1e-12)
  of_any = dataclasses.replace(by_classifier, labels=None).weigh(x, sigma, None)
  within = jnp.exp(trained_with) / jnp.exp(trained_with).sum(1, keepdims=True)
  parts = jax.vmap(lambda own: GaussianMixture(**own).log_parts(x, sigma))(stacked.own)  # [s b k]
  of_shard = jax.nn.logsumexp(parts, 2, b=within[:, None])
  np.testing.assert_allclose(of_any, jax.nn.softmax(stacked.log_prior[:, None] + of_shard, 0), atol=1e-12)
  unconditional = Mixture(stacked, weights.Exact(LogDensities(stacked)), labels, None)(x, sigma)
  assert jnp.abs(unconditional - found.found).max() > 0.1


@register_pytree
@dataclasses.dataclass(frozen=True)
class OfClass(GaussianMixture):
  """The component of each image's class alone."""

  labels: jax.Array | None = None

  def with_variables(self, own):
    return OfClass(**own)

  def with_labels(self, labels):
    return dataclasses.replace(self, labels=labels)

  def log_parts(self, x, sigma):
    parts = super().log_parts(x, sigma)
    if self.labels is None:
      return parts
    return jnp.where(jax.nn.one_hot(self.labels, parts.shape[1], dtype=bool), parts, -jnp.inf)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ClassDensities:
  """log p^i(x | c; sigma), [s b]."""

  shards: cdm_shards.Shards
  labels: jax.Array

  def __call__(self, x, sigma):
    def one(own):
      return jax.nn.logsumexp(OfClass(**own, labels=self.labels).log_parts(x, sigma), 1)

    return jax.vmap(one)(self.shards.own)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class ShardsWithClasses:
  """The best classifier of noisy images by shard and component, in data of these frequencies: [b s*k]."""

  shards: cdm_shards.Shards
  log_training_prior: jax.Array  # [s k]

  def __call__(self, x, sigma):
    parts = jax.vmap(lambda own: GaussianMixture(**own).log_parts(x, sigma))(self.shards.own)  # [s b k]
    joint = self.log_training_prior[:, None] + parts
    return joint.swapaxes(0, 1).reshape(len(x), -1)


def test_guidance_comes_after_mixing():
  """The score of p(x) (p(x | c) / p(x))^g, by differentiating log-densities; it is not the mixture of guided shards."""
  stacked = dataclasses.replace(shards(0.5), common=OfClass(jnp.zeros((5, 4)), jnp.ones(5)))
  plain = shards(0.5)
  x, sigma = noisy(plain, 64)
  labels = jnp.arange(64) % 5
  conditional = Mixture(stacked, weights.Exact(ClassDensities(stacked, labels)), labels)
  unconditional = exact(plain)
  guided = ClassifierFreeGuidance(conditional, unconditional, 3.0)(x, sigma)

  def tilted(x):
    of_class = plain.log_prior[:, None] + ClassDensities(stacked, labels)(x, sigma)
    free = log_density_of_all(plain, x, sigma)
    return (free + 3 * (jax.nn.logsumexp(of_class, 0) - free)).sum()

  wanted = x + jnp.square(sigma)[:, None, None, None] * jax.grad(tilted)(x)
  scale = jnp.maximum(1, sigma)[:, None, None, None]
  assert (jnp.abs(guided - wanted) / scale).max() < 1e-5
  assert jnp.abs(guided - unconditional(x, sigma)).max() > 0.5
  of_classes = jnp.full((3, 5), jnp.log(0.2))
  trained_with = jnp.log(jnp.array([0.1, 0.3, 0.6]))[:, None] + of_classes
  kind = weights.ByClassifier(ShardsWithClasses(plain, trained_with), trained_with)
  by_labels = GuidedMixture(Mixture(stacked, kind, class_log_prior=of_classes), 3.0).with_labels(labels)
  assert (jnp.abs(by_labels(x, sigma) - wanted) / scale).max() < 1e-5
  seen = unconditional.look(x, sigma)
  of_each = seen.estimates + 3 * (conditional.look(x, sigma).estimates - seen.estimates)
  mixed_after = jnp.einsum("sb,sbhwc->bhwc", seen.weights, of_each)
  assert jnp.abs(mixed_after - guided).max() > 0.1


def network_stack(count, capacity=None, dtype="float32", size="tiny", shape=(8, 8, 1)):
  network = uvit(size, image_shape=shape, patch_size=2, dtype=dtype)
  init = jax.jit(network.init)
  own = [init(jax.random.key(i)) for i in range(count)]
  common = Denoiser(network, EDMPreconditioning(), {})
  return cdm_shards.stack(common, own, capacity=capacity), own


def test_adding_dropping_and_masking_compile_once():
  stacked, own = network_stack(3, 6)
  x, sigma = jnp.ones((2, 8, 8, 1)), jnp.ones(2)
  run = jax.jit(lambda mixture: mixture(x, sigma))
  seen = []
  for turn in range(20):
    if turn % 3 == 0:
      stacked = stacked.put(turn % 6, own[turn % 3], 1.0 + turn)
    elif turn % 3 == 1:
      stacked = stacked.drop((turn + 1) % 6)
    mixture = Mixture(stacked, weights.Prior(), allowed=jnp.arange(6) != turn % 2)
    seen.append(np.asarray(run(mixture)))
  assert run._cache_size() == 1
  assert len({image.tobytes() for image in seen}) > 5 and np.isfinite(seen).all()


def flops(denoise, x, sigma):
  return jax.jit(lambda d: d(x, sigma)).lower(denoise).compile().cost_analysis()["flops"]


def test_random_selection_costs_one_network_and_top_k_costs_k():
  stacked, own = network_stack(8)
  x, sigma = jnp.ones((4, 8, 8, 1)), jnp.ones(4)
  one = flops(stacked.common.with_variables(own[0]), x, sigma)
  assert flops(RandomShard(stacked, jax.random.key(0)), x, sigma) <= 1.05 * one
  mixture = Mixture(stacked, weights.Fixed(jnp.arange(1.0, 9.0)))
  assert flops(TopShards(mixture, 2), x, sigma) <= 2.1 * one
  assert flops(mixture, x, sigma) > 7 * one


def test_random_selection_draws_by_proportion_and_never_a_free_slot():
  stacked = cdm_shards.with_capacity(shards(), 5)
  x = jnp.zeros((2, 2, 2, 1))
  run = jax.jit(lambda d, sigma: d(x, jnp.full(2, sigma)))
  sigmas = np.linspace(1, 2, 400, dtype=np.float32)
  for uniform, wanted in ((False, [0.5, 0.3, 0.2]), (True, [1 / 3] * 3)):
    denoise = RandomShard(stacked, jax.random.key(1), uniform=uniform)
    counts = np.zeros(3)
    for sigma in sigmas:
      apart = np.abs(np.array(of_members(stacked, sigma)) - float(run(denoise, sigma)[0, 0, 0, 0]))
      assert apart.min() < 1e-5
      counts[apart.argmin()] += 1
    assert scipy.stats.chisquare(counts, 400 * np.array(wanted)).pvalue > 1e-3


@jax.jit
def of_members(stacked, sigma):
  x = jnp.zeros((1, 2, 2, 1))
  return [stacked.member(i)(x, jnp.full(1, sigma))[0, 0, 0, 0] for i in range(3)]


def test_top_shards_are_the_mixture_of_the_largest():
  stacked = shards()
  x, sigma = noisy(stacked, 64)
  fixed = weights.Fixed(jnp.array([1.0, 5.0, 3.0]))
  found = TopShards(Mixture(stacked, fixed), 2)(x, sigma)
  only = Mixture(stacked, fixed, allowed=jnp.array([False, True, True]))(x, sigma)
  np.testing.assert_allclose(found, only, rtol=1e-6, atol=1e-6)
  of_each = Mixture(stacked, weights.Largest(fixed, 2))(x, sigma)
  np.testing.assert_allclose(of_each, only, rtol=1e-6, atol=1e-6)
  everything = TopShards(Mixture(stacked, fixed), 3)(x, sigma)
  np.testing.assert_allclose(everything, Mixture(stacked, fixed)(x, sigma), rtol=1e-6, atol=1e-6)


def sample(mixture, sampler, count=4096):
  keys, noise = small(count)
  state = mixture.start(count)
  if state is None:
    return jax.jit(sampler)(mixture, noise, keys), None
  return jax.jit(lambda m, x, k: sampler(m, x, k, state=m.start(count)))(mixture, noise, keys)


def share_of_shards(stacked, images):
  """Of every shard, the share of images that are its own by the exact posterior."""
  posterior = jax.nn.softmax(
    stacked.log_prior[:, None] + LogDensities(stacked)(images, jnp.full(len(images), 1e-3)), 0
  )
  return np.asarray(jax.nn.one_hot(posterior.argmax(0), stacked.capacity).sum(0))


@pytest.mark.computes
def test_samples_have_the_proportions_and_the_density_of_the_data():
  """Mean log-likelihood under the truth: of the data's own samples, of eq. 5, and of naive averaging, which is far off."""
  stacked = shards()
  sampler = euler_maruyama(1000, "vp:t_min=0.001")
  truth, _ = samples_of_shards(stacked, jax.random.key(9), 4096)

  def mean_log_density(images):
    return float(log_density_of_all(stacked, images, jnp.full(len(images), 1e-3)).mean())

  wanted = mean_log_density(truth)
  for kind in (weights.Exact(LogDensities(stacked)), weights.AlongPath()):
    images, _ = sample(Mixture(stacked, kind), sampler)
    assert abs(mean_log_density(images) - wanted) < 0.2, kind
    counts = share_of_shards(stacked, images)
    assert scipy.stats.chisquare(counts, 4096 * np.array([0.5, 0.3, 0.2])).pvalue > 1e-3, kind
  for kind in (weights.Equal(), weights.Prior()):
    images, _ = sample(Mixture(stacked, kind), sampler)
    assert mean_log_density(images) < wanted - 3, kind
  images = jax.jit(sampler)(RandomShard(stacked, jax.random.key(3), uniform=True), *small(4096)[::-1])
  assert mean_log_density(images) < wanted - 3


def along_path(mixture, sampler, keys, noise):
  """(weights that were used, exact ones) [steps s b] of every step of a path but the first."""
  count, recorded = len(keys), Recorded(mixture)
  paths = jax.jit(lambda m, x, k: sampler(m, x, k, state=m.start(count), trajectory=True))
  states, _ = paths(mixture, noise, keys)
  _, record = jax.jit(lambda m, x, k: sampler(m, x, k, state=m.start(count, sampler.num_steps)))(
    recorded, noise, keys
  )
  np.testing.assert_allclose(record.sigma, sampler.sigmas, rtol=1e-6)
  scale = sampler.table()["scale"] if hasattr(sampler, "process") else np.ones(sampler.num_steps)
  starts = states[:-1] / jnp.asarray(scale[1:], states.dtype)[:, None, None, None, None]
  sigmas = jnp.asarray(sampler.sigmas[1:], states.dtype)
  look = jax.jit(lambda x, sigma: exact(mixture.shards).look(x, jnp.full(count, sigma)).weights)
  return record.weights[1:], jnp.stack([look(*at) for at in zip(starts, sigmas, strict=True)])


def total_variation(found, wanted):
  """Mean over images, [steps]."""
  return np.asarray(jnp.abs(found - wanted).sum(1).mean(-1) / 2)


@pytest.mark.computes
@pytest.mark.parametrize("apart, tolerance", [(3.0, 2e-7), (0.5, 0.02)])
def test_weights_along_a_path_are_those_of_the_densities(float64, apart, tolerance):
  """Total variation to the exact weights after 300 steps, and on the way; and wrong where no noise is added."""
  stacked = shards(apart, jnp.float64)
  keys, noise = small(256)
  noise = noise.astype(jnp.float64)
  mixture = Mixture(stacked, weights.AlongPath())

  def run(sampler):
    return total_variation(*along_path(mixture, sampler, keys, noise))

  found = run(euler_maruyama(300, "vp:t_min=0.001"))
  assert found[-1] < tolerance and found.mean() < 0.02
  if apart < 1:
    found = run(AncestralSampler(300, 0.03, 80.0))
    assert found[-1] < tolerance and found.mean() < 0.02
    assert run(EDMSampler(100, 0.03, 80.0))[-1] > 2 * tolerance


def test_weights_along_a_path_want_a_path():
  stacked = shards()
  with pytest.raises(InputError, match="state=mixture.start"):
    Mixture(stacked, weights.AlongPath())(jnp.ones((1, 2, 2, 1)), jnp.ones(1))


def perceptron(layers, x, sigma):
  """Logits of the scaled image and its noise level by three hidden layers."""
  features = x.reshape(len(x), -1) / jnp.sqrt(1 + sigma**2)[:, None]
  level = jnp.log(sigma)
  h = jnp.concatenate([features, jnp.stack([level / 4, 1 / jnp.sqrt(1 + sigma**2)], 1)], 1)
  for kernel, bias in layers[:-1]:
    h = jax.nn.silu(h @ kernel + bias)
  return h @ layers[-1][0] + layers[-1][1]


@pytest.mark.computes
@pytest.mark.parametrize("apart", [3.0, 0.5])
def test_a_trained_classifier_has_the_weights_of_the_densities(apart):
  """2000 steps of 512 images by the cross-entropy of the library; total variation to the exact weights, over times of VP."""
  stacked = shards(apart)
  sizes = [6, 128, 128, 128, 3]
  keys = jax.random.split(jax.random.key(0), 4)
  layers = [
    (jax.random.normal(k, (a, b)) * np.sqrt(2 / a), jnp.zeros(b))
    for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 2000))

  def loss(layers, key):
    x0, origin = samples_of_shards(stacked, key, 512)
    classifier = jax.tree_util.Partial(perceptron, layers)
    return noisy_cross_entropy(classifier, x0, origin, jax.random.fold_in(key, 9), vp_loss(t_min=1e-3)).mean()

  def step(carry, key):
    layers, state = carry
    updates, state = optimizer.update(jax.grad(loss)(layers, key), state)
    return (optax.apply_updates(layers, updates), state), None

  steps = jax.random.split(jax.random.key(1), 2000)
  (trained, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, steps))(layers, optimizer.init(layers))
  x, sigma = noisy(stacked, seed=5)
  wanted = exact(stacked).look(x, sigma).weights

  def distance(layers):
    kind = weights.ByClassifier(jax.tree_util.Partial(perceptron, layers), stacked.log_prior)
    return float(jnp.abs(Mixture(stacked, kind).look(x, sigma).weights - wanted).sum(0).mean() / 2)

  assert distance(layers) > 0.2
  assert distance(trained) < 0.03


@pytest.mark.parametrize("schedule", ["constant", "noise", "gaussian"])
def test_nearest_centroids_find_the_shard_at_small_noise(schedule):
  """Along a path: at small noise the weights are the exact ones, and on the whole nearer to them than the prior is.

  But for a constant temperature, which at large noise settles on one shard.
  """
  stacked = shards()
  keys, noise = small(512)
  nearest = weights.Nearest(
    Flat(), stacked.own["mean"], 0.2, 0.3, normalise=False, schedule=schedule, with_prior=True
  )
  sampler = euler_maruyama(200, "vp:t_min=0.001")
  found, wanted = along_path(Mixture(stacked, nearest), sampler, keys, noise)
  small_noise = sampler.sigmas[1:] < VP().sigma(0.2)
  of_nearest = total_variation(found, wanted)
  of_prior = total_variation(jnp.exp(stacked.log_prior)[:, None], wanted)
  assert of_nearest[small_noise].mean() < 0.02
  assert of_prior[small_noise].mean() > 0.4
  if schedule != "constant":
    assert of_nearest.mean() < of_prior.mean()


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_nearest_to_the_denoised_image_of_the_mixture_is_better_than_the_prior(temperature):
  """With one temperature for all noise levels, for images of all times, given the exact weights of the step before."""
  stacked = shards()
  x, sigma = noisy(stacked)
  wanted = exact(stacked).look(x, sigma).weights
  nearest = weights.Nearest(Flat(), stacked.own["mean"], temperature, normalise=False)
  before = weights.PreviousWeights(wanted, jnp.log(wanted), jnp.zeros((), jnp.int32))
  found = Mixture(stacked, nearest).look(x, sigma, state=before).weights
  prior = jnp.exp(stacked.log_prior)[:, None]
  of_nearest, of_prior = (jnp.abs(w - wanted).sum(0) / 2 for w in (found, prior))
  assert of_nearest.mean() < of_prior.mean()
  assert of_nearest[sigma < VP().sigma(0.2)].mean() < 1e-3


@pytest.mark.computes
def test_nearest_sees_nothing_of_a_shard_that_does_not_count():
  """To the bit, with shards of NaN between, whose centroids are those of others."""
  stacked = shards()
  x, sigma = noisy(stacked, 256)
  two = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked.own) for i in (0, 2)]
  without = cdm_shards.stack(stacked.common, two, [0.5, 0.2])
  rows = jnp.array([0, 1, 1, 2, 1])
  masked = permuted(unused(stacked), rows).restricted(rows != 1)

  def look(one, rows):
    nearest = weights.Nearest(Flat(), stacked.own["mean"][rows], 0.5, normalise=False)
    return jax.jit(Mixture.look)(Mixture(one, nearest, impl="map"), x, sigma)

  found, wanted = look(masked, rows), look(without, jnp.array([0, 2]))
  np.testing.assert_array_equal(found.found, wanted.found)
  np.testing.assert_array_equal(found.weights[rows != 1], wanted.weights)
  assert (wanted.weights[0] > 0.1).any() and (wanted.weights[0] < 0.9).any()


def test_nearest_is_the_prior_above_its_warm_up():
  stacked = shards()
  x, sigma = noisy(stacked, 64)
  nearest = weights.Nearest(Flat(), stacked.own["mean"], 0.5, warm_up=1.0, normalise=False)
  found = Mixture(stacked, nearest).look(x, sigma).weights
  prior = Mixture(stacked, weights.Prior()).look(x, sigma).weights
  late = np.asarray(sigma <= 1)
  np.testing.assert_allclose(found[:, ~late], prior[:, ~late], rtol=1e-6)
  assert (jnp.abs(found - prior).max(0)[late] > 1e-3).all()


@register_pytree
@dataclasses.dataclass(frozen=True)
class Flat:
  """Pixels as features."""

  def __call__(self, x):
    return x.reshape(len(x), -1)


def test_nearest_takes_the_weights_of_the_step_before():
  """With `every` 2 the weights stay for two steps; a record of them shows it."""
  stacked = shards()
  keys, noise = small(8)
  nearest = weights.Nearest(Flat(), stacked.own["mean"], 0.5, normalise=False, every=2)
  recorded = Recorded(Mixture(stacked, nearest))
  sampler = EDMSampler(9, solver="euler")
  _, record = jax.jit(lambda x: sampler(recorded, x, state=recorded.start(8, 9)))(noise)
  changes = jnp.abs(jnp.diff(record.weights, axis=0)).max((1, 2))
  np.testing.assert_allclose(changes[::2], 0, atol=1e-6)
  assert (changes[1::2] > 1e-3).any()


def test_an_image_that_may_have_parts_of_none_of_the_top_shards_is_nan():
  """Shards are chosen for the batch: an image of a class that they lack has none, and is not made of what it may not have."""
  stacked = shards()
  x, sigma = noisy(stacked, 6)
  of_classes = jnp.log(jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
  labels = jnp.array([0, 0, 0, 0, 0, 1])
  stacked = dataclasses.replace(stacked, common=OfAnyClass(**jax.tree.map(lambda leaf: leaf[0], stacked.own)))
  found = TopShards(Mixture(stacked, weights.Prior(), labels, of_classes), 2)(x, sigma)
  assert jnp.isfinite(found[:5]).all() and jnp.isnan(found[5]).all()
  np.testing.assert_allclose(
    found[:5], Mixture(stacked, weights.Prior(), labels, of_classes)(x, sigma)[:5], atol=1e-4
  )


@register_pytree
@dataclasses.dataclass(frozen=True)
class OfAnyClass(GaussianMixture):
  """The same for every class."""

  def with_variables(self, own):
    return OfAnyClass(**own)

  def with_labels(self, labels):
    return self


def test_bad_stacks_are_one_line():
  stacked = shards()
  own = jax.tree.map(lambda leaf: leaf[0], stacked.own)
  with pytest.raises(InputError, match="do not fit 1 slots"):
    cdm_shards.stack(stacked.common, [own, own], capacity=1)
  with pytest.raises(InputError, match="positive proportion"):
    cdm_shards.stack(stacked.common, [own], [0.0])
  with pytest.raises(InputError, match="shard 1 has another network than shard 0: mean"):
    cdm_shards.stack(stacked.common, [own, {**own, "mean": own["mean"][:2]}])
  with pytest.raises(InputError, match="cannot have 2"):
    cdm_shards.with_capacity(stacked, 2)
  with pytest.raises(InputError, match="unknown impl"):
    exact(stacked, impl="loop")
  with pytest.raises(InputError, match="need all shards"):
    TopShards(Mixture(stacked, weights.AlongPath()), 2)


@pytest.mark.slow
def test_eight_devices_with_a_shard_axis_give_the_same_samples():
  one, eight = (answer(start("cdm_worker.py", devices)) for devices in (1, 8))
  assert (one["devices"], eight["devices"]) == (1, 8)
  assert eight["split"] == 4
  for impl in ("map", "vmap", "shard_map"):
    np.testing.assert_allclose(eight[impl], one["map"], atol=1e-6)
