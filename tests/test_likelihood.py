"""Log-likelihood by the probability-flow ODE in worlds whose densities, and whose bits, are known."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import GaussianMixture

from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.likelihood import LIKELIHOODS, ODELikelihood, bits_per_dim, dequantise
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.models import layers
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError

SHAPE, SIGMA_MIN = (2, 2, 3), 0.002
DATA_STD = 0.5


@functools.cache
def mixture(dtype, n=32):
  """(12-dimensional mixture with mean zero and mean square DATA_STD^2, n of its images with noise of SIGMA_MIN)."""
  r = np.random.default_rng(0)
  mean, variance = r.normal(size=(3, 12)), np.array([0.05, 0.1, 0.02])
  mean -= mean.mean(0)
  mean *= np.sqrt((DATA_STD**2 - variance.mean()) / np.square(mean).mean())
  world = GaussianMixture(jnp.asarray(mean, dtype), jnp.asarray(variance, dtype))
  k = r.integers(0, 3, n)
  x = mean[k] + np.sqrt(variance[k] + SIGMA_MIN**2)[:, None] * r.normal(size=(n, 12))
  return world, jnp.asarray(x.reshape(n, *SHAPE), dtype)


def exact(world, x):
  return world.log_density(x, jnp.full(len(x), SIGMA_MIN, x.dtype))


def image_keys(n, seed=0):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def run(likelihood, denoise, x, keys=None):
  return jax.jit(lambda denoise, x, keys: likelihood(denoise, x, keys))(denoise, x, keys)


SOLVERS = {
  "adaptive": AdaptiveODESampler(rtol=1e-6, atol=1e-6),
  "coupled": AdaptiveODESampler(solver="dopri5", coupled=True),
  "grid": EDMSampler(num_steps=256),
  "grid_vp": EDMSampler(num_steps=256, schedule="vp", scaling="vp"),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow("adaptive"), slow("coupled"), "grid", slow("grid_vp")])
def test_exact_trace(float64, name):
  world, x = mixture(jnp.float64)
  found = run(ODELikelihood(SOLVERS[name], "exact"), world, x)
  assert jnp.abs(found.log_prob - exact(world, x)).max() < 0.02
  # components that are 5 % wider are told apart
  wider = dataclasses.replace(world, variance=world.variance * 1.05**2)
  assert jnp.abs(found.log_prob - exact(wider, x)).mean() > 0.1
  np.testing.assert_allclose(found.bits_per_dim, -found.log_prob / (12 * np.log(2)) + 7, rtol=1e-12)
  if name != "grid":  # another way to the noise of x
    z = jax.jit(lambda x: SOLVERS["grid"].invert(world, x))(x)
    np.testing.assert_allclose(found.z, z, rtol=0, atol=6e-3)


def test_exact_trace_in_float32():
  world, x = mixture(jnp.float32)
  found = run(ODELikelihood(trace="exact"), world, x)
  assert found.log_prob.dtype == jnp.float32
  assert jnp.abs(found.log_prob - exact(world, x)).max() < 0.02
  wider = dataclasses.replace(world, variance=world.variance * 1.05**2)
  assert jnp.abs(found.log_prob - exact(wider, x)).mean() > 0.1


@pytest.mark.parametrize("solver", [AdaptiveODESampler(rtol=1e-5, atol=1e-5), slow(EDMSampler(64))])
def test_the_precision_is_that_of_the_images(float64, solver):
  """In 64-bit mode too: float32 stays float32 and gives the numbers of 32-bit mode."""
  world, x = mixture(jnp.float32, 4)
  likelihood = ODELikelihood(solver, trace="exact")
  found = run(likelihood, world, x)
  assert found.log_prob.dtype == found.bits_per_dim.dtype == found.z.dtype == jnp.float32
  assert run(ODELikelihood(solver), world, x, image_keys(4)).log_prob.dtype == jnp.float32
  assert run(likelihood, world, x.astype(jnp.float64)).log_prob.dtype == jnp.float64
  jax.config.update("jax_enable_x64", False)
  assert np.isfinite(found.log_prob).all()
  np.testing.assert_allclose(found.log_prob, run(likelihood, world, x).log_prob, rtol=0, atol=0.01)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Independent:
  """A DenoiseFn: Gaussian pixels with mean zero and these variances."""

  variance: jax.Array  # [h w c]

  def __call__(self, x, sigma):
    return x * self.variance / (self.variance + jnp.square(sigma)[:, None, None, None])

  def log_density(self, x):
    total, x = (np.asarray(value, np.float64) for value in (self.variance, x))
    total = total + SIGMA_MIN**2
    return -(x**2 / total + np.log(2 * np.pi * total)).sum((1, 2, 3)) / 2


def test_error_in_192_dimensions():
  """Variances from 0.001 to 0.7: at the defaults a sum over 192 pixels is right to 0.02 nats."""
  shape = (8, 8, 3)
  world = Independent(jnp.asarray(np.geomspace(0.001, 0.7, 192).reshape(shape), jnp.float32))
  r = np.random.default_rng(0)
  x = jnp.asarray(r.normal(size=(4, *shape)) * np.sqrt(world.variance + SIGMA_MIN**2), jnp.float32)
  likelihood = ODELikelihood(trace="exact", data_std=float(np.sqrt(world.variance.mean())), basis_chunk=64)
  found = run(likelihood, world, x).log_prob
  error = np.asarray(found, np.float64) - world.log_density(x)
  assert np.abs(error).max() < 0.02


@pytest.mark.slow
def test_grid_error_is_of_second_order(float64):
  world, x = mixture(jnp.float64, 8)
  error = [
    jnp.abs(run(ODELikelihood(EDMSampler(n), "exact"), world, x).log_prob - exact(world, x)).mean()
    for n in (64, 128)
  ]
  assert 1.8 < np.log2(error[0] / error[1]) < 2.2


@pytest.mark.parametrize("probe, num_probes", [("rademacher", 1), slow("gaussian", 1), slow("rademacher", 8)])
def test_hutchinson(probe, num_probes):
  """Unbiased within its standard error over draws, and of a standard deviation that falls with the number of probes."""
  world, x = mixture(jnp.float32)
  x = jnp.repeat(x[:4], 128, 0)
  likelihood = ODELikelihood(EDMSampler(256), probe=probe, num_probes=num_probes)
  found = run(likelihood, world, x, image_keys(512)).log_prob
  error = np.asarray(found - exact(world, x), np.float64).reshape(4, 128)
  std = error.std(1, ddof=1)
  print(f"{probe} x {num_probes}: mean error {error.mean():.3f} nats, std {std.round(2)}")
  assert (np.abs(error.mean(1)) < 4 * std / np.sqrt(128) + 0.02).all()
  pooled = np.sqrt(np.square(std).mean())
  low, high = STD[probe, num_probes]
  assert low < pooled < high


# of one draw of log_prob in this world of 12 dimensions, in nats, measured and given 15 % either way
STD = {("rademacher", 1): (1.24, 1.68), ("gaussian", 1): (3.5, 4.8), ("rademacher", 8): (0.42, 0.56)}


@pytest.mark.parametrize("solver", [slow("adaptive"), "grid"])
def test_an_image_does_not_depend_on_its_batch(solver):
  world, x = mixture(jnp.float32, 8)
  likelihood = ODELikelihood(EDMSampler(16) if solver == "grid" else SOLVERS[solver], num_probes=2)
  keys = image_keys(8)
  together = run(likelihood, world, x, keys)
  # among other images bit for bit; XLA may round otherwise for another size of the batch
  order = np.array([5, 2, 7, 0, 0, 0, 5, 5])
  mixed = run(likelihood, world, x[order], keys[order])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), mixed, together)
  apart = run(likelihood, world, x[order[:4]], keys[order[:4]])
  np.testing.assert_allclose(apart.log_prob, together.log_prob[order[:4]], atol=2e-3)
  other = run(likelihood, world, x, image_keys(8, seed=1))
  assert jnp.abs(other.log_prob - together.log_prob).min() > 1e-3


@register_pytree
@dataclasses.dataclass(frozen=True)
class Counted:
  """A DenoiseFn that counts its evaluations while it runs."""

  denoise: GaussianMixture
  counted: list = dataclasses.field(metadata={"static": True}, hash=False, compare=False)

  def __call__(self, x, sigma):
    jax.debug.callback(lambda s: self.counted.append(float(s)), sigma[0])
    return self.denoise(x, sigma)


@pytest.mark.parametrize(
  "solver, trace",
  [
    (EDMSampler(12), "hutchinson"),
    slow(EDMSampler(12, solver="euler"), "exact"),
    slow(AdaptiveODESampler(), "hutchinson"),
  ],
)
def test_evaluations_are_counted(solver, trace):
  world, x = mixture(jnp.float32, 4)
  visited = []
  found = run(ODELikelihood(solver, trace, num_probes=3), Counted(world, visited), x, image_keys(4))
  jax.block_until_ready(found)
  jax.effects_barrier()
  assert found.nfe.shape == (4,)
  assert len(visited) == found.nfe.max()
  if isinstance(solver, EDMSampler):
    assert len(visited) == (22 if solver.solver == "heun" else 11)
  else:
    assert len(set(found.nfe.tolist())) > 1


@register_pytree
@dataclasses.dataclass(frozen=True)
class Convolution:
  """A DenoiseFn with the library's convolution, which has no forward-mode derivative, and a number for each image."""

  kernel: jax.Array
  shift: jax.Array

  def __call__(self, x, sigma):
    told = (self.shift + sigma)[:, None, None, None]
    return jnp.tanh(layers.conv_general_dilated(x, self.kernel, (1, 1), "SAME") + told)


def test_trace_of_a_network():
  """One step of Euler's against the full Jacobian; a chunk that does not divide the 12 values is no matter."""
  r = np.random.default_rng(0)
  denoiser = Convolution(jnp.asarray(r.normal(size=(3, 3, 3, 3)), jnp.float32), jnp.array([0.1, -0.4]))
  x = jnp.asarray(r.normal(size=(2, 2, 2, 3)), jnp.float32)
  solver = EDMSampler(2, sigma_min=0.5, sigma_max=1.0, solver="euler")
  found = run(ODELikelihood(solver, "exact", data_std=0.0, basis_chunk=5), denoiser, x)

  @jax.jit
  def one_step(denoiser, x):
    sigma = jnp.full(2, 0.5)
    jacobian = jax.jacrev(lambda x: denoiser(x, sigma))(x)
    return jnp.einsum("bhwcbhwc->b", jacobian), x + 0.5 * (x - denoiser(x, sigma)) / 0.5

  trace, end = one_step(denoiser, x)
  # the step changes the log-density by -trace; 12 / sigma of the divergence is integrated in closed form
  log_prior = -6 * np.log(2 * np.pi) - jnp.square(end).sum((1, 2, 3)) / 2
  np.testing.assert_allclose(found.log_prob, log_prior + 12 * np.log(2) - trace, rtol=2e-5)
  np.testing.assert_allclose(found.z, end, rtol=1e-5, atol=1e-5)


@register_pytree
@dataclasses.dataclass(frozen=True)
class UniformWorld:
  """Pixels independent and uniform in [low, high]; a `DenoiseFn`."""

  low: float
  high: float

  def ends(self, x, sigma):
    sigma = sigma[:, None, None, None]
    return sigma, (self.low - x) / sigma, (self.high - x) / sigma

  def log_density(self, x, sigma):
    sigma, a, b = self.ends(x, sigma)
    mass = jax.scipy.stats.norm.cdf(b) - jax.scipy.stats.norm.cdf(a)
    return jnp.log(mass / (self.high - self.low)).sum((1, 2, 3))

  def __call__(self, x, sigma):
    sigma, a, b = self.ends(x, sigma)
    # both ends on the negative side, where the tails of the distribution function keep their precision
    flip = a + b > 0
    a, b = jnp.where(flip, -b, a), jnp.where(flip, -a, b)
    density, mass = jax.scipy.stats.norm.pdf, jax.scipy.stats.norm.cdf(b) - jax.scipy.stats.norm.cdf(a)
    moved = (density(a) - density(b)) / mass
    return x + sigma * jnp.where(flip, -moved, moved)


@pytest.mark.parametrize("levels, bits", [((0, 256), 8.0), slow((64, 192), 7.0)])
def test_bits_of_uniform_images(float64, levels, bits):
  """Images whose pixels take each of 256, or of the 128 middle levels equally often have 8, or 7, bits for each."""
  r = np.random.default_rng(0)
  images, keys = jnp.asarray(r.integers(*levels, size=(64, *SHAPE)), jnp.uint8), image_keys(64)
  x = jax.jit(dequantise)(images, keys).astype(jnp.float64)
  world = UniformWorld(2 * levels[0] / 256 - 1, 2 * levels[1] / 256 - 1)
  data_std = (world.high - world.low) / np.sqrt(12)
  solver = EDMSampler(400, sigma_max=20.0)
  found = run(ODELikelihood(solver, "exact", data_std=data_std), world, x)
  assert jnp.abs(found.log_prob - exact(world, x)).max() < 0.02
  # noise of sigma_min smooths the edge of the distribution: within two levels of it the density is lower
  inside = (images >= levels[0] + 4).all((1, 2, 3)) & (images < levels[1] - 4).all((1, 2, 3))
  assert inside.sum() > 10
  np.testing.assert_allclose(found.bits_per_dim[inside], bits, atol=0.003)


def test_dequantise_is_of_float32_in_64_bit_mode(float64):
  images, keys = jnp.full((2, 4, 4, 3), 255, jnp.uint8), image_keys(2)
  found = dequantise(images, keys)
  jax.config.update("jax_enable_x64", False)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, dequantise(images, keys))


def test_dequantise():
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)), jnp.uint8)
  keys = image_keys(64)
  x = jax.jit(dequantise)(images, keys)
  assert x.dtype == jnp.float32 and x.min() >= -1 and x.max() <= 1
  position = (np.asarray(x, np.float64) + 1) * 128 - np.asarray(images)  # u
  assert position.min() >= -1e-4 and position.max() <= 1 + 1e-4
  assert abs(position.mean() - 0.5) < 4 / np.sqrt(12 * position.size)
  assert abs(position.std() - 12**-0.5) < 0.01
  np.testing.assert_array_equal(jax.jit(dequantise)(images[5:7], keys[5:7]), x[5:7])
  ends = jnp.array([0, 255], jnp.uint8)[:, None, None, None]
  low, high = jax.jit(dequantise)(jnp.broadcast_to(ends, (2, 100, 100, 1)), keys[:2])
  assert -1 <= low.min() and low.max() < -1 + 2 / 256 + 1e-6 and low.max() > -1 + 1.99 / 256
  assert high.min() < 1 - 1.99 / 256 and 1 - 1 / 25600 < high.max() <= 1


def test_bits_per_dim():
  # the uniform density on [-1, 1]^d: 8 bits for each value
  np.testing.assert_allclose(bits_per_dim(jnp.array([-192 * np.log(2)]), 192), 8.0, rtol=1e-6)


@pytest.mark.slow
def test_prior_accounts_for_the_data(float64):
  """In a world of one Gaussian nothing is left to integrate with its data_std; with 0 the prior is that of noise alone."""
  world = GaussianMixture(jnp.zeros((1, 12)), jnp.array([1.0]))
  x = world.sample(jax.random.key(0), (16, *SHAPE))
  right, wrong = (
    run(ODELikelihood(EDMSampler(512, sigma_max=5.0), "exact", data_std=data_std), world, x)
    for data_std in (1.0, 0.0)
  )
  np.testing.assert_allclose(right.log_prob, exact(world, x), atol=1e-3)
  squares = jnp.square(wrong.z * 5).sum((1, 2, 3))
  expected = 6 * np.log(26 / 25) - squares / 2 * (1 / 25 - 1 / 26)
  np.testing.assert_allclose(wrong.log_prob - exact(world, x), expected, atol=5e-3)
  assert jnp.abs(expected).max() > 0.05


def test_bad_input():
  assert LIKELIHOODS["ode"] is ODELikelihood
  world, x = mixture(jnp.float32, 4)
  for message, make in {
    "hutchinson, exact": lambda: ODELikelihood(trace="skilling"),
    "rademacher, gaussian": lambda: ODELikelihood(probe="uniform"),
    "num_probes": lambda: ODELikelihood(num_probes=0),
    "churn": lambda: ODELikelihood(EDMSampler(churn=1.0)),
    "needs a key for each image": lambda: ODELikelihood()(world, x),
  }.items():
    with pytest.raises(InputError, match=message):
      make()


@pytest.mark.slow
def test_unfinished_solves_are_nan():
  world, x = mixture(jnp.float32, 4)
  found = run(ODELikelihood(AdaptiveODESampler(max_steps=5), "exact"), world, x)
  assert np.isnan(found.log_prob).all() and np.isnan(found.bits_per_dim).all() and np.isnan(found.z).all()
  assert (found.nfe == 31).all()
