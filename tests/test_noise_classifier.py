"""The noise-conditional classifier: what its network keeps, and that it learns to guide samples to a class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from worlds import GaussianMixture

from jax_trustdiff.diffusion.denoisers import EDMPreconditioning
from jax_trustdiff.diffusion.guidance import (
  ClassifierGuidance,
  NoisyClassifier,
  NoisyLogProb,
  noisy_cross_entropy,
)
from jax_trustdiff.diffusion.losses import EDMLoss
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.models.registry import NOISE_CLASSIFIERS, num_params
from jax_trustdiff.types import InputError, NoiseConditionalClassifier

TINY = dict(
  num_classes=3,
  image_shape=(4, 4, 2),
  model_channels=8,
  channel_mult=(1, 2),
  num_blocks=1,
  attention_resolutions=(2,),
)


def tiny(**changes):
  return NOISE_CLASSIFIERS["noise_classifier"](**TINY | changes)


def drawn(network):
  """Variables for tests: ADM's blocks begin as the identity, and other values show what is connected."""
  r = np.random.default_rng(0)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: jnp.asarray(0.3 * r.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def tiny_variables():
  return drawn(tiny())


def batch(n=6):
  r = np.random.default_rng(1)
  x, noise_labels = r.normal(size=(n, 4, 4, 2)), np.log(r.uniform(0.01, 50, n)) / 4
  return jnp.asarray(x, jnp.float32), jnp.asarray(noise_labels, jnp.float32)


def test_network(tiny_variables):
  network, (x, noise_labels) = tiny(), batch()
  assert isinstance(network, NoiseConditionalClassifier) and hash(network) == hash(tiny())
  apply = jax.jit(network.apply)
  logits = apply(tiny_variables, x, noise_labels)
  assert logits.shape == (6, 3) and logits.dtype == jnp.float32
  # an image does not depend on its batch, and its logits on the noise level and the pixels do
  order = jnp.array([4, 1, 1, 5, 0, 3])
  np.testing.assert_allclose(apply(tiny_variables, x[order], noise_labels[order]), logits[order], atol=2e-6)
  assert jnp.abs(apply(tiny_variables, x, noise_labels + 1) - logits).max(1).min() > 1e-3
  assert jnp.abs(apply(tiny_variables, x[..., ::-1], noise_labels) - logits).max(1).min() > 1e-3


def test_variants():
  small = dict(channel_mult=(1,), attention_resolutions=())
  network, (x, noise_labels) = tiny(**small), batch(2)
  variables = drawn(network)

  @jax.jit
  def gradients(variables):
    def of(network):
      return jax.grad(lambda variables: network.apply(variables, x, noise_labels)[:, 0].sum())(variables)

    return of(network), of(tiny(**small, remat=True))

  plain, again = gradients(variables)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["params"]["level0_block0"]))

  @jax.jit
  def logits(variables, key):
    dropped = tiny(**small, dropout=0.5)
    return (
      network.apply(variables, x, noise_labels),
      dropped.apply(variables, x, noise_labels),
      dropped.apply(variables, x, noise_labels, key),
      tiny(**small, dtype="bfloat16").apply(variables, x, noise_labels),
    )

  full, evaluated, noisy, low = logits(variables, jax.random.key(1))
  np.testing.assert_allclose(evaluated, full, rtol=1e-6)
  assert jnp.abs(noisy - full).max() > 1e-2
  assert low.dtype == jnp.float32 and 0 < jnp.abs(low - full).max() < 0.1 * jnp.abs(full).max()


def test_default_size():
  variables = jax.eval_shape(NOISE_CLASSIFIERS["noise_classifier"]().init, jax.random.key(0))
  # blocks of c -> k: two 3x3 convolutions, the affine map of 256 values to 2k, norms, a 1x1 shortcut if c != k
  blocks = [(64, 64)] * 2 + [(64, 64)] + [(64, 128), (128, 128)] + [(128, 128)] * 3
  total = 64 * 256 + 256 + 256 * 256 + 256 + 27 * 64 + 64 + 2 * 128 + 128 * 10 + 10
  for c, k in blocks:
    total += 9 * c * k + 9 * k * k + 2 * k + 256 * 2 * k + 2 * k + 2 * (c + k) + (c * k + k if c != k else 0)
  total += 2 * (128 * 3 * 128 + 3 * 128 + 128 * 128 + 128 + 2 * 128)  # attention in the two blocks at 8x8
  assert num_params(variables) == total


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"image_shape": (5, 4, 2)}, "divisible by 2"),
    ({"image_shape": (4, 4, 0)}, "height, width, channels"),
    ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ({"model_channels": 10}, "multiple of 4"),
    ({"num_blocks": 0}, "num_blocks"),
    ({"dropout": 1.0}, "dropout"),
    ({"dtype": "float16"}, "float32, bfloat16"),
  ],
)
def test_bad_fields(changes, message):
  with pytest.raises(InputError, match=message):
    tiny(**changes)


@pytest.mark.slow
def test_the_network_is_told_what_a_denoiser_is_told(tiny_variables):
  x, _ = batch()
  sigma = jnp.geomspace(0.01, 50, 6)
  classifier = NoisyClassifier(tiny(), tiny_variables, EDMPreconditioning(0.7))
  found = jax.jit(lambda classifier: classifier(x, sigma))(classifier)
  scaled = x / jnp.sqrt(sigma**2 + 0.49)[:, None, None, None]
  expected = jax.jit(tiny().apply)(tiny_variables, scaled, jnp.log(sigma) / 4)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_loss(tiny_variables):
  """The cross-entropy at the noise that the density draws; uniform logits cost log k."""
  x, _ = batch()
  keys = jax.vmap(jax.random.key)(jnp.arange(6))
  labels, density = jnp.array([0, 1, 2, 0, 1, 2]), EDMLoss()
  classifier = NoisyClassifier(tiny(), tiny_variables)
  found = jax.jit(lambda classifier: noisy_cross_entropy(classifier, x, labels, keys, density))(classifier)
  sigma, noise = density.draw(keys, x)
  logits = jax.jit(lambda f, x: f(x, sigma))(classifier, x + sigma[:, None, None, None] * noise)
  p = np.exp(np.asarray(logits, np.float64))
  expected = -np.log(p[np.arange(6), labels] / p.sum(1))
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  uniform = noisy_cross_entropy(lambda x, sigma: jnp.zeros((len(x), 3)), x, labels, keys, density)
  np.testing.assert_allclose(uniform, np.log(3), rtol=1e-6)


def test_trained_classifier_guides_to_the_class():
  """100 steps on 4x4 images of two classes; of guided samples of the world over 90 % are of the class asked for."""
  r = np.random.default_rng(0)
  sign = r.choice([-1, 1], 16)
  world = GaussianMixture(jnp.asarray(np.stack([0.6 * sign, -0.6 * sign]), jnp.float32), jnp.full(2, 0.1))
  network = tiny(num_classes=2, image_shape=(4, 4, 1), channel_mult=(1,), attention_resolutions=())
  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(variables):
    def step(carry, key):
      variables, state = carry
      data_key, choice_key, noise_key = jax.random.split(key, 3)
      labels = jax.random.randint(choice_key, (64,), 0, 2)
      pixels = jax.random.normal(data_key, (64, 16)) * jnp.sqrt(0.1) + world.mean[labels]
      x0 = pixels.reshape(64, 4, 4, 1)

      def loss(variables):
        density = EDMLoss(log_mean=0.5, log_std=1.2)
        return noisy_cross_entropy(NoisyClassifier(network, variables), x0, labels, noise_key, density).mean()

      value, gradient = jax.value_and_grad(loss)(variables)
      update, state = optimizer.update(gradient, state)
      return (optax.apply_updates(variables, update), state), value

    keys = jax.random.split(jax.random.key(1), 100)
    (variables, _), values = jax.lax.scan(step, (variables, optimizer.init(variables)), keys)
    return variables, values

  variables, values = train(jax.jit(network.init)(jax.random.key(0)))
  assert values[-10:].mean() < 0.7 * values[0]
  labels = jnp.arange(256) % 2
  noise = initial_noise(jax.random.split(jax.random.key(2), 256), (4, 4, 1))
  log_prob = NoisyLogProb(NoisyClassifier(network, variables), labels)

  @jax.jit
  def hits(scale):
    x = EDMSampler(num_steps=12)(ClassifierGuidance(world, log_prob, scale), noise)
    nearest = jnp.square(x.reshape(256, 1, 16) - world.mean).sum(-1).argmin(1)
    return (nearest == labels).mean()

  unguided, guided, opposite = hits(0.0), hits(1.5), hits(-1.5)
  print(
    f"unguided {unguided:.3f}, guided {guided:.3f}, opposite {opposite:.3f}, loss {values[-10:].mean():.3f}"
  )
  assert 0.4 < unguided < 0.6 and guided > 0.9 and opposite < 0.1
