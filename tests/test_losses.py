"""Denoising losses in a Gaussian world, where the best denoiser and its loss are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from worlds import GaussianMixture

from jax_trustdiff.diffusion.losses import DIFFUSION_LOSSES, EDMLoss, VELoss, VPLoss
from jax_trustdiff.diffusion.processes import VP
from jax_trustdiff.types import InputError

N = 20_000
KEYS = jax.random.split(jax.random.key(0), N)
VARIANCE = 0.25
WORLD = GaussianMixture(jnp.full((1, 12), 0.3), jnp.array([VARIANCE]))
X0 = WORLD.sample(jax.random.key(1), (N, 2, 2, 3))


def cdf(name):
  """The distribution of sigma in the words of the paper."""
  if name == "edm":
    return lambda s: scipy.stats.norm(-1.2, 1.2).cdf(np.log(s))
  if name == "vp":
    return lambda s: (np.asarray(VP().t_of_sigma(np.asarray(s, np.float32))) - 1e-5) / (1 - 1e-5)
  return lambda s: np.log(s / 0.02) / np.log(5000)


@pytest.mark.parametrize("name", DIFFUSION_LOSSES)
def test_density_of_sigma(name):
  sigma = np.asarray(jax.vmap(DIFFUSION_LOSSES[name]().sigma_of)(KEYS))
  assert scipy.stats.kstest(sigma, cdf(name)).pvalue > 1e-3
  assert scipy.stats.kstest(sigma**1.1, cdf(name)).pvalue < 1e-6


@pytest.mark.parametrize("loss", [EDMLoss(), EDMLoss(-0.8, 1.6, 0.3), VPLoss(t_min=1e-3), VELoss()])
def test_the_best_denoiser_has_the_known_loss(loss):
  """One Gaussian: E ||D - x0||^2 = d v s^2 / (v + s^2) at the best D; another D is worse."""
  run = jax.jit(lambda denoise: loss(denoise, X0, KEYS), static_argnums=0)
  sigma = np.asarray(jax.vmap(lambda key: loss.sigma_of(jax.random.split(key)[0]))(KEYS))
  expected = np.asarray(loss.weight(jnp.asarray(sigma))) * 12 * VARIANCE * sigma**2 / (VARIANCE + sigma**2)
  found = np.asarray(run(WORLD.__call__))
  assert found.shape == (N,)
  # a sum of 12 squares: relative deviation sqrt(2 / 12)
  deviation = np.sqrt(2 / 12 * (expected**2).sum())
  assert abs(found.sum() - expected.sum()) < 4 * deviation
  for wrong in (lambda x, s: WORLD(x, 1.2 * s), lambda x, s: 1.1 * WORLD(x, s)):
    worse = np.asarray(run(wrong)) - found  # of the same noise
    assert worse.mean() > 4 * worse.std() / np.sqrt(N)


def test_edm_weight_times_c_out_squared_is_one():
  """Karras et al. 2022, eq. 144: the network's own error counts the same at every noise level."""
  sigma = jnp.logspace(-3, 3, 20)
  c_out = sigma * 0.5 / jnp.sqrt(sigma**2 + 0.25)
  np.testing.assert_allclose(EDMLoss().weight(sigma) * c_out**2, 1, rtol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
  loss = EDMLoss()
  some = np.array([5, 3, 77])
  np.testing.assert_allclose(loss(WORLD, X0[some], KEYS[some]), loss(WORLD, X0, KEYS)[some], rtol=1e-5)


def test_refuses():
  with pytest.raises(InputError, match="p_std"):
    EDMLoss(p_std=0.0)
  with pytest.raises(InputError, match="sigma_min"):
    VELoss(sigma_min=0.0)
  with pytest.raises(InputError, match="t_min"):
    VPLoss(t_min=2.0)
