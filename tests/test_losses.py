"""Training losses where the best denoiser and its loss are known in closed form, and the densities of sigma."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from worlds import GaussianMixture

from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.losses import (
  LOSSES,
  DDPMLoss,
  EDMLoss,
  NoiseLoss,
  ScoreMatchingLoss,
  ve_loss,
  vp_loss,
)
from jax_trustdiff.diffusion.processes import EDM, VE, VP, Discrete, SubVP
from jax_trustdiff.types import InputError

VARIANCE = 0.3
SHAPE = (20_000, 2, 2, 3)
D = 12  # numbers in an image
WORLD = GaussianMixture(jnp.zeros((1, D)), jnp.array([VARIANCE]))
X0 = WORLD.sample(jax.random.key(0), SHAPE)

# With t_min the default 1e-5 the weights, up to 1e6, would leave a mean of so few images too uncertain.
ALL = {
  "edm": EDMLoss(),
  "edm2": EDMLoss(log_mean=-0.4, log_std=1.0, sigma_data=0.7),
  "vp": vp_loss(t_min=1e-3),
  "ve": ve_loss(),
  "ddpm": DDPMLoss(),
  "dsm_vp": ScoreMatchingLoss(VP(t_min=1e-3)),
  "dsm_subvp": ScoreMatchingLoss(SubVP()),
  "likelihood_vp": ScoreMatchingLoss(VP(t_min=0.01), likelihood_weighting=True),
  "likelihood_ve": ScoreMatchingLoss(VE(0.1, 20.0), likelihood_weighting=True),
}


def expectation(loss, f):
  """The mean of weight(sigma) * f(sigma) under the training density, by a quadrature in float64."""
  if isinstance(loss, EDMLoss):
    z = np.linspace(-9, 9, 20_001)
    sigma, density = np.exp(loss.log_mean + loss.log_std * z), np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    weight = (sigma**2 + loss.sigma_data**2) / (sigma * loss.sigma_data) ** 2
    return np.trapezoid(density * weight * f(sigma), z)
  if isinstance(loss, DDPMLoss):  # the mean over the times of Ho et al.: a sum, and alpha_bar by its product
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    return np.mean(f(sigma) / sigma**2)
  first, last = loss.process.t_range
  t = first + (last - first) * np.linspace(0, 1, 200_001) ** 3  # closer where the noise is small
  sigma = np.asarray(loss.process.sigma(jnp.asarray(t)), np.float64)
  weight = np.asarray(loss.weight(jnp.asarray(sigma)), np.float64)
  return np.trapezoid(weight * f(sigma), t) / (last - first)


def best(sigma):
  """E ||D - x0||^2 of the best denoiser: the variance of x0 given x."""
  return D * VARIANCE * sigma**2 / (VARIANCE + sigma**2)


def wrong_by(factor):
  """That of the best denoiser times a factor: its own error is orthogonal to every function of x."""
  return lambda sigma: best(sigma) + (factor - 1) ** 2 * D * VARIANCE**2 / (VARIANCE + sigma**2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_expected_loss_is_the_closed_form(float64, name, factor):
  loss = ALL[name]
  world = GaussianMixture(jnp.zeros((1, D)), jnp.array([VARIANCE]))
  x0 = world.sample(jax.random.key(0), SHAPE)
  found = np.asarray(loss(lambda x, sigma: factor * world(x, sigma), x0, jax.random.key(1)))
  assert found.shape == SHAPE[:1]
  expected, perfect = expectation(loss, wrong_by(factor)), expectation(loss, best)
  error = found.std() / np.sqrt(len(found))
  assert abs(found.mean() - expected) < 4 * error
  if factor != 1:
    assert found.mean() - perfect > 6 * error


@pytest.mark.parametrize("name", ALL)
def test_nothing_nearby_is_better_than_the_best_denoiser(name):
  """On the same draws, for which the difference has far less variance than the loss."""
  loss, key = ALL[name], jax.random.key(2)
  draws = loss.draw(key, X0)
  run = lambda world, factor: loss.at(lambda x, sigma: factor * world(x, sigma), X0, *draws)  # noqa: E731
  perfect = np.asarray(run(WORLD, 1.0), np.float64)
  for factor in (0.9, 0.97, 1.03, 1.1):
    worse = np.asarray(run(WORLD, factor), np.float64)
    difference = worse - perfect
    assert difference.mean() > 3 * difference.std() / np.sqrt(len(difference)), factor
  shifted = GaussianMixture(jnp.full((1, D), 0.05), jnp.array([VARIANCE]))
  assert np.asarray(run(shifted, 1.0), np.float64).mean() > perfect.mean()


def test_edm_weight_makes_every_noise_level_equal():
  """With the variance of the data, the best denoiser's expected loss is the number of pixels at every sigma."""
  sigma_data = np.sqrt(VARIANCE)
  sigma = np.geomspace(0.002, 80, 50)
  np.testing.assert_allclose(
    EDMLoss(sigma_data=sigma_data).weight(jnp.asarray(sigma)) * best(sigma), D, rtol=1e-5
  )
  assert np.ptp(EDMLoss(sigma_data=0.5).weight(jnp.asarray(sigma)) * best(sigma)) > 1


def test_edm_loss_of_the_network_has_unit_weight():
  """Karras et al. 2022, eq. 8: weight * c_out^2 = 1, so that the loss is ||F - its target||^2."""
  sigma = np.geomspace(0.002, 80, 50)
  out = EDMPreconditioning(0.6).coefficients(jnp.asarray(sigma)).out
  np.testing.assert_allclose(EDMLoss(sigma_data=0.6).weight(jnp.asarray(sigma)) * out**2, 1, rtol=1e-5)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE()])
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_score_matching_is_song_et_al_literally(float64, process, likelihood_weighting):
  rng = np.random.default_rng(0)
  t = jnp.asarray(rng.uniform(0.01, 1, 8))
  x0, noise, score_offset = (jnp.asarray(rng.normal(size=(8, 4, 4, 3))) for _ in range(3))
  scale, sigma = process.scale(t), process.sigma(t)
  column = lambda v: v[:, None, None, None]  # noqa: E731

  def score(x_t):  # any function of x_t
    return jnp.sin(x_t) + score_offset

  denoise = lambda x, s: x + column(scale * s**2) * score(column(scale) * x)  # noqa: E731
  std = scale * sigma
  residual = column(std) * score(process.diffuse(x0, t, noise)) + noise
  expected = 0.5 * (residual**2).sum((1, 2, 3))
  if likelihood_weighting:
    expected = expected * process.diffusion(t) ** 2 / std**2
  found = ScoreMatchingLoss(process, likelihood_weighting).at(denoise, x0, sigma, noise)
  np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_likelihood_weighted_loss_has_a_closed_form():
  """The integral over time is that of d(log sigma) v / (v + sigma^2) for every pixel."""
  process = VE(0.1, 20.0)
  anti = lambda sigma: np.log(sigma) - 0.5 * np.log(VARIANCE + sigma**2)  # noqa: E731
  first, last = process.t_range
  exact = D * (anti(process.sigma_max) - anti(process.sigma_min)) / (last - first)
  assert expectation(ALL["likelihood_ve"], best) == pytest.approx(exact, rel=1e-3)


# ---- densities of sigma ----

DENSITIES = [
  (EDMLoss(), scipy.stats.lognorm(1.2, scale=np.exp(-1.2)), scipy.stats.lognorm(1.3, scale=np.exp(-1.2))),
  (
    EDMLoss(-0.8, 1.6),
    scipy.stats.lognorm(1.6, scale=np.exp(-0.8)),
    scipy.stats.lognorm(1.6, scale=np.exp(-0.75)),
  ),
  (ve_loss(), scipy.stats.loguniform(0.02, 100), scipy.stats.loguniform(0.02, 80)),
  (NoiseLoss(EDM(0.002, 80)), scipy.stats.uniform(0.002, 80), scipy.stats.uniform(0.002, 84)),
]


@pytest.mark.parametrize("loss, density, near_miss", DENSITIES)
def test_density_of_sigma(loss, density, near_miss):
  sigma = np.asarray(loss.sample_sigma(jax.random.key(4), (20_000,)), np.float64)
  assert scipy.stats.kstest(sigma, density.cdf).pvalue > 1e-3
  assert scipy.stats.kstest(sigma, near_miss.cdf).pvalue < 1e-4


@pytest.mark.parametrize("likelihood_weighting", [False, True])
@pytest.mark.parametrize("process", [VP(), SubVP(), VE()])
def test_times_are_uniform(process, likelihood_weighting):
  """sigma of VP: exp(beta_d t^2 / 2 + beta_min t) - 1 with t uniform; of another beta_d it fails."""
  loss = ScoreMatchingLoss(process, likelihood_weighting)
  sigma = np.asarray(loss.sample_sigma(jax.random.key(5), (20_000,)))
  first, last = process.t_range
  t = np.asarray(process.t_of_sigma(sigma))
  assert scipy.stats.kstest(t, scipy.stats.uniform(first, last - first).cdf).pvalue > 1e-3
  assert sigma.min() >= process.sigma_min * 0.999 and sigma.max() <= process.sigma_max * 1.001
  if isinstance(process, VP):
    assert vp_loss().sample_sigma(jax.random.key(5), (20_000,)) == pytest.approx(sigma)
    other = np.asarray(dataclasses.replace(process, beta_d=21.0).t_of_sigma(sigma))
    assert scipy.stats.kstest(other, scipy.stats.uniform(first, last - first).cdf).pvalue < 1e-4


def test_whole_times_are_as_likely():
  """Every level of the table, exactly and with its multiplicity; the last time left out is noticed."""
  loss = DDPMLoss()
  sigma = np.asarray(loss.sample_sigma(jax.random.key(5), (200_000,)))
  levels = loss.process.sigmas.astype(np.float32)
  assert np.isin(sigma, levels).all()
  counts = np.bincount(np.searchsorted(levels, sigma), minlength=1000)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3
  counts[999] = 0
  assert scipy.stats.chisquare(counts).pvalue < 1e-3


def test_ddpm_loss_is_that_of_the_predicted_noise(float64):
  """Ho et al. 2020, eq. 14: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, and any function of it as the network."""
  rng = np.random.default_rng(0)
  x0, noise = (jnp.asarray(rng.normal(size=(8, 4, 4, 3))) for _ in range(2))
  loss = DDPMLoss()
  sigma, _ = loss.draw(jax.random.key(0), x0)
  column = sigma[:, None, None, None]
  alpha_bar = 1 / (1 + column**2)
  network = lambda x_t: jnp.sin(3 * x_t)  # noqa: E731
  expected = jnp.square(noise - network(jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * noise))
  denoise = lambda x, s: x - column * network(x * jax.lax.rsqrt(1 + column**2))  # noqa: E731
  found = loss.at(denoise, x0, sigma, noise)
  np.testing.assert_allclose(found, expected.sum((1, 2, 3)), rtol=1e-6)


# ---- keys, precision, networks ----


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "likelihood_vp"])
def test_an_image_does_not_depend_on_its_batch(name):
  run = lambda x0, keys: ALL[name](WORLD, x0, keys)  # noqa: E731
  keys, x0 = jax.random.split(jax.random.key(6), 8), X0[:8]
  whole = run(x0, keys)
  order = np.array([5, 1, 2])
  np.testing.assert_allclose(run(x0[order], keys[order]), whole[order], rtol=1e-5)
  assert not np.allclose(run(x0[order], keys[order + 1]), whole[order], rtol=1e-2)
  one = run(x0, jax.random.key(7))
  each = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(8))
  np.testing.assert_allclose(one, run(x0, each), rtol=1e-6)


def test_sigma_and_noise_are_independent():
  sigma, noise = EDMLoss().draw(jax.random.key(8), X0)
  total = np.asarray(noise).reshape(len(X0), -1)
  assert scipy.stats.kstest(total.ravel(), "norm").pvalue > 1e-3
  correlation = np.corrcoef(np.log(sigma), (total**2).sum(1))[0, 1]
  assert abs(correlation) < 4.5 / np.sqrt(len(X0))
  assert abs(np.corrcoef(np.log(sigma), total[:, 0])[0, 1]) < 4.5 / np.sqrt(len(X0))


EARLIEST = {"vp from 1e-5": vp_loss(), "dsm_vp from 1e-5": ScoreMatchingLoss()}


@pytest.mark.parametrize("name", ALL | EARLIEST)
def test_no_draw_is_infinite(name):
  """Over a million draws of sigma; images in bfloat16 are widened."""
  loss = (ALL | EARLIEST)[name]
  sigma = jax.jit(lambda key: loss.sample_sigma(key, (1_000_000,)))(jax.random.key(9))
  assert sigma.dtype == jnp.float32 and np.isfinite(sigma).all() and sigma.min() > 0
  assert np.isfinite(jax.jit(loss.weight)(sigma)).all()
  found = jax.eval_shape(loss, WORLD, X0[:4].astype(jnp.bfloat16), jax.random.key(0))
  assert found.dtype == jnp.float32


@dataclasses.dataclass(frozen=True)
class Affine:
  """A network of two numbers."""

  image_shape: tuple = (2, 2, 3)
  num_classes: int = 0
  num_augment_labels: int = 0

  def init(self, key):
    return {"params": {"a": jnp.zeros(()), "b": jnp.zeros(())}}

  def apply(self, variables, x, noise_labels, class_labels=None, augment_labels=None, dropout_key=None):
    a, b = variables["params"]["a"], variables["params"]["b"]
    return a * x + b


def test_gradient_descent_finds_the_best_network():
  """With sigma_data^2 the variance of the data, F's target is uncorrelated with its input: the best a and b are 0."""
  loss, network = EDMLoss(sigma_data=np.sqrt(VARIANCE)), Affine()

  def mean_loss(params, key):
    denoise = Denoiser(network, EDMPreconditioning(np.sqrt(VARIANCE)), {"params": params})
    return loss(denoise, X0[:4000], key).mean()

  params = {"a": jnp.array(0.3), "b": jnp.array(-0.4)}
  step = jax.jit(lambda p, k: jax.tree.map(lambda x, g: x - 0.02 * g, p, jax.grad(mean_loss)(p, k)))
  for i in range(60):
    params = step(params, jax.random.fold_in(jax.random.key(10), i))
  assert abs(params["a"]) < 0.02 and abs(params["b"]) < 0.02


def test_registry_and_one_line_errors():
  assert LOSSES["edm"]() == EDMLoss() and LOSSES["vp"]() == vp_loss() and LOSSES["ve"]() == ve_loss()
  assert LOSSES["score_matching"]("sub_vp:t_min=0.01", True) == ScoreMatchingLoss(SubVP(t_min=0.01), True)
  assert LOSSES["ddpm"]() == DDPMLoss(Discrete("linear", 1e-4, 0.02))
  with pytest.raises(InputError, match="needs a process with a table, got VP"):
    DDPMLoss("vp")
  assert hash(LOSSES["score_matching"](VP())) == hash(ScoreMatchingLoss())
  with pytest.raises(InputError, match="must be positive, got 0"):
    EDMLoss(log_std=0)
