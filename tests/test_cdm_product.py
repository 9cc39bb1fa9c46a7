"""Products of models: the bound, the bias of averaged scores, and the moves that mend it, on two Gaussians of different width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from worlds import GaussianMixture, small

from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.cdm.product import (
  ProductSampler,
  divergences,
  effective_samples,
  kl_bound,
  kl_limits,
  max_bound,
)
from jax_trustdiff.types import InputError

MEANS, STDS = (-1.0, 1.0), (0.3, 1.0)
SHAPE = (1, 1, 1)


def product():
  """(mean, std) of the normalised square root of q_1 q_2, which is Gaussian."""
  precision = [0.5 / std**2 for std in STDS]
  mean = sum(p * m for p, m in zip(precision, MEANS, strict=True)) / sum(precision)
  return mean, sum(precision) ** -0.5


def coefficient():
  """Bhattacharyya coefficient by quadrature."""
  one, two = (scipy.stats.norm(m, s) for m, s in zip(MEANS, STDS, strict=True))
  return scipy.integrate.quad(lambda x: np.sqrt(one.pdf(x) * two.pdf(x)), -10, 10, limit=200)[0]


def models(means=MEANS, stds=STDS):
  own = [{"mean": jnp.array([[m]]), "variance": jnp.array([s**2])} for m, s in zip(means, stds, strict=True)]
  return Mixture(cdm_shards.stack(GaussianMixture(**own[0]), own), weights.Equal())


def log_densities(x):
  return np.stack([scipy.stats.norm(m, s).logpdf(x) for m, s in zip(MEANS, STDS, strict=True)])


def test_bound_of_the_kl_product():
  """-2 log BC, which is the sum of both divergences: a bound for each. By quadrature, and by the estimates from samples."""
  mean, std = product()
  k = -2 * np.log(coefficient())
  p, densities = scipy.stats.norm(mean, std), [scipy.stats.norm(m, s) for m, s in zip(MEANS, STDS, strict=True)]
  exact = [
    scipy.integrate.quad(lambda x, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -6, 4, limit=200)[0] for q in densities
  ]
  assert (coefficient(), k) == pytest.approx((0.29643, 2.43187), abs=5e-6)
  assert exact == pytest.approx([0.26545, 2.16642], abs=5e-6)
  assert sum(exact) == pytest.approx(k, abs=1e-9) and max(exact) <= k
  x = np.random.RandomState(0).normal(mean, std, 200_000)
  of_each = np.asarray(
    divergences(jnp.asarray(scipy.stats.norm(mean, std).logpdf(x)), jnp.asarray(log_densities(x)))
  )
  np.testing.assert_allclose(of_each, exact, atol=0.02)
  assert of_each.sum() == pytest.approx(k, abs=0.02) and of_each.max() <= k
  of_first = np.random.RandomState(1).normal(
    MEANS[1], STDS[1], 200_000
  )  # of the wider one, which covers the other
  found, error = kl_bound(jnp.asarray(log_densities(of_first)[::-1].copy()))
  assert abs(float(found) - k) < 4 * float(error) and float(error) < 0.02


def test_limits_of_the_bound_and_what_estimates_it():
  mean, std = product()
  k, rng = -2 * np.log(coefficient()), np.random.RandomState(0)
  of_product = jnp.asarray(log_densities(rng.normal(mean, std, 200_000)))
  of_wide = jnp.asarray(log_densities(rng.normal(MEANS[1], STDS[1], 200_000))[::-1].copy())
  low, high = map(float, kl_limits(of_wide, of_product[::-1]))
  assert low == pytest.approx(2.16642 - 0.26545, abs=0.03)  # the difference of the divergences, of two models
  ratio, gap = STDS[1] / STDS[0], (MEANS[0] - MEANS[1]) / STDS[0]
  assert high == pytest.approx((ratio**2 + gap**2 - 1) / 2 - np.log(ratio), rel=0.02)  # KL(q_0 || q_1)
  assert low < k < high
  equal = jnp.zeros((3, 50))
  assert float(effective_samples(equal)) == pytest.approx(50)
  one = equal.at[1:, 7].set(60.0)
  assert float(effective_samples(one)) == pytest.approx(1, abs=1e-6)


def test_bound_of_the_max_product():
  one, two = (scipy.stats.norm(m, s) for m, s in zip(MEANS, STDS, strict=True))
  common = scipy.integrate.quad(lambda x: min(one.pdf(x), two.pdf(x)), -10, 10, limit=400)[0]
  draw = np.random.RandomState(0).normal
  samples = [log_densities(draw(m, s, 100_000)) for m, s in zip(MEANS, STDS, strict=True)]
  found, error = max_bound(*map(jnp.asarray, samples))
  assert abs(float(found) + np.log(common)) < 4 * float(error) and float(error) < 0.01


def samples(sampler, mixture, count=8192):
  keys, noise = small(count, shape=SHAPE)
  return np.asarray(jax.jit(sampler)(mixture, noise, keys)).ravel()


GRID = dict(num_steps=300, sigma_min=0.01, sigma_max=20.0)


@pytest.mark.computes
@pytest.mark.parametrize("mcmc", ["none", "ula", "hmc"])
def test_averaged_scores_are_biased_and_moves_mend_it(mcmc):
  mean, std = product()
  x = samples(ProductSampler(**GRID, mcmc=mcmc), models())
  if mcmc == "none":
    assert abs(x.mean() - mean) > 0.2 and abs(x.std() - std) > 0.05
  else:
    assert abs(x.mean() - mean) < 0.02 and abs(x.std() - std) < 0.02


@pytest.mark.computes
def test_averaged_scores_are_right_for_equal_covariances():
  x = samples(ProductSampler(**GRID, mcmc="none"), models(stds=(0.5, 0.5)))
  assert abs(x.mean()) < 0.02 and abs(x.std() - 0.5) < 0.02


def test_evaluations_are_counted():
  def count(sampler):
    evaluations = []

    def denoise(x, sigma):
      jax.debug.callback(lambda: evaluations.append(1))
      return x / (1 + sigma[:, None, None, None] ** 2)

    keys, noise = small(2, shape=SHAPE)
    jax.block_until_ready(sampler(denoise, noise, keys))
    jax.effects_barrier()
    return len(evaluations)

  for mcmc in ("none", "ula", "hmc"):
    sampler = ProductSampler(6, 0.1, 10.0, mcmc=mcmc, mcmc_steps=3, mcmc_min=0.5)
    assert count(sampler) == sampler.nfe
  assert ProductSampler(6, mcmc="none").nfe == 6


def test_bad_products_are_one_line():
  with pytest.raises(InputError, match="unknown mcmc"):
    ProductSampler(mcmc="mala")
  with pytest.raises(InputError, match="step_size positive"):
    ProductSampler(step_size=0.0)
