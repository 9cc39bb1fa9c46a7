"""Credit of shards against closed forms: the parts of the likelihood, their divergences, and posteriors by denoising errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import LogDensities, log_density_of_all, samples_of_shards, shards

from jax_trustdiff.cdm import credit as credit_lib
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.credit import PathCredit, denoising_energies, denoising_posterior, over_data_set
from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.processes import VP
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.types import InputError

FINE = AdaptiveODESampler(0.03, 80.0, rtol=1e-9, atol=1e-9)


def world(apart, count, dtype=jnp.float64):
  stacked = shards(apart, dtype)
  x, origin = samples_of_shards(stacked, jax.random.key(2), count)
  return Mixture(stacked, weights.Exact(LogDensities(stacked))), x.astype(dtype), np.asarray(origin)


def run(credit, mixture, x, keys=None):
  return jax.jit(credit)(mixture, x, keys)


@pytest.mark.parametrize("gradient", ["posterior", "autodiff"])
@pytest.mark.parametrize("apart", [3.0, 0.5])
def test_parts_add_up_to_the_log_likelihood(float64, apart, gradient):
  mixture, x, _ = world(apart, 64)
  found = run(PathCredit(FINE, gradient, "exact"), mixture, x)
  low, high = (jnp.full(64, s) for s in (0.03, 80.0))
  start, end = (log_density_of_all(mixture.shards, y, s) for y, s in ((x, low), (found.z * 80.0, high)))
  np.testing.assert_allclose(found.parts.sum(0), start - end, atol=1e-6)
  np.testing.assert_allclose(
    found.log_prob, start, atol=0.05 * 4
  )  # N(0, sigma_max^2 + data_std^2) is not the end's density
  np.testing.assert_allclose(found.paper.sum(0), 1, atol=1e-9)
  np.testing.assert_allclose(found.integrated.sum(0), 1, atol=1e-9)
  np.testing.assert_allclose(found.posterior, mixture.look(x, low).weights, atol=1e-12)
  times = jnp.linspace(VP().t_of_sigma(0.03), VP().t_of_sigma(80.0), 4001)
  one = path_weights(mixture, x[:1], times)
  np.testing.assert_allclose(found.integrated[:, 0], one.mean(0)[:, 0], atol=0.01)


def path_weights(mixture, x, times):
  """w_t along the ODE by Euler's method on a fine grid of VP's times, [n s b]."""
  sigma = VP().sigma(times)

  def step(x, pair):
    here, there = pair
    level = jnp.full(len(x), here)
    seen = mixture.look(x, level)
    return x + (there - here) * (x - seen.found) / here, seen.weights

  return jax.lax.scan(step, x, (sigma[:-1], sigma[1:]))[1]


def test_divergence_is_that_of_the_closed_form(float64):
  """div w_i (D_i - x): by the formula with either gradient, by all columns of the Jacobian, and by probes on average."""
  mixture, x, _ = world(0.5, 16)
  sigma = jnp.geomspace(0.05, 20.0, 16)
  x = x + sigma[:, None, None, None] * jax.random.normal(jax.random.key(3), x.shape)

  def flat(image, level):
    seen = mixture.look(image.reshape(1, 2, 2, 1), level[None])
    return (seen.weights[:, :, None, None, None] * (seen.estimates - image.reshape(2, 2, 1))).reshape(3, 4)

  jacobian = jax.vmap(jax.jacfwd(flat))(x.reshape(16, 4), sigma)  # [b s d d]
  wanted = jnp.trace(jacobian, axis1=-2, axis2=-1).T

  def divergence(gradient, probes):
    flow = credit_lib._CreditFlow(mixture, probes, (2, 2, 1), gradient, VP())
    return flow._look(x, sigma)[2]

  exact = PathCredit(trace="exact")._probes(x, None)
  for gradient in ("posterior", "autodiff"):
    np.testing.assert_allclose(divergence(gradient, exact), wanted, atol=1e-10)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(16))
  many = PathCredit(num_probes=4096, probe="gaussian")._probes(x, keys)
  of_each = jax.lax.map(lambda probe: divergence("autodiff", probe[None]), many)
  error = of_each.std(0) / 64
  assert (jnp.abs(of_each.mean(0) - wanted) <= 4.5 * error + 1e-9).all()
  assert (error > 1e-4).any()


def test_credit_of_separated_shards_goes_to_the_source(float64):
  mixture, x, origin = world(3.0, 256)
  found = run(PathCredit(AdaptiveODESampler(0.03, 80.0), "posterior", "exact"), mixture, x)
  for name in ("paper", "posterior", "integrated"):
    assert (np.asarray(getattr(found, name)).argmax(0) == origin).mean() >= 0.95, name
  of_source = np.asarray(found.posterior)[origin, np.arange(256)]
  assert of_source.min() > 0.999
  # what the paper's credit does not say: the source of an image without doubt has a half to two thirds of it
  assert 0.3 < np.median(np.asarray(found.paper)[origin, np.arange(256)]) < 0.9


def test_the_largest_credit_may_be_another_shards_than_the_largest_posterior(float64):
  mixture, x, _ = world(0.5, 256)
  found = run(PathCredit(AdaptiveODESampler(0.03, 80.0), "posterior", "exact"), mixture, x)
  np.testing.assert_allclose(found.posterior.sum(0), 1, atol=1e-9)
  assert (found.paper.argmax(0) != found.posterior.argmax(0)).mean() > 0.05


def test_fixed_grids_and_probes_agree_with_exact_credit(float64):
  mixture, x, _ = world(0.5, 8)
  keys = jax.random.split(jax.random.key(0), 8)
  wanted = run(PathCredit(FINE, "posterior", "exact"), mixture, x)
  grid = run(PathCredit(EDMSampler(64, 0.03, 80.0), "posterior", "exact"), mixture, x)
  np.testing.assert_allclose(grid.parts, wanted.parts, atol=0.05)
  assert int(grid.nfe[0]) == 126
  many = run(PathCredit(FINE, num_probes=64), mixture, x, keys)
  assert 1e-6 < jnp.abs(many.parts - wanted.parts).mean() < 0.3


def test_denoising_errors_give_differences_of_log_densities(float64):
  """Mean over draws of noise of the energies of one image: shards differ by their log-densities (Kong et al. 2023)."""
  mixture, x, _ = world(0.5, 2)
  sigmas = jnp.geomspace(2e-3, 200.0, 200)
  many = jnp.repeat(x, 2048, 0)
  keys = jax.random.split(jax.random.key(1), len(many))
  energies = jax.jit(denoising_energies)(mixture, many, keys, sigmas).reshape(3, 2, 2048)
  differences = energies - energies[:1]
  wanted = -LogDensities(mixture.shards)(x, jnp.full(2, 2e-3))
  wanted = wanted - wanted[:1]
  error = differences.std(-1) / np.sqrt(2048)
  assert (jnp.abs(differences.mean(-1) - wanted)[1:] < 4 * error[1:] + 0.02).all()
  assert (jnp.abs(wanted)[1:] > 20 * error[1:] + 0.1).any()


def test_denoising_posterior_names_the_source():
  mixture, x, origin = world(3.0, 256, jnp.float32)
  keys = jax.random.split(jax.random.key(1), 256)
  found = jax.jit(denoising_posterior)(mixture, x, keys, jnp.geomspace(0.01, 100.0, 32))
  np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
  assert (np.asarray(found).argmax(0) == origin).mean() >= 0.98


def test_shards_that_do_not_count_have_no_credit():
  mixture, x, _ = world(0.5, 8, jnp.float32)
  keys = jax.random.split(jax.random.key(0), 8)
  own = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), mixture.shards.own)
  masked = dataclasses.replace(
    mixture, shards=dataclasses.replace(mixture.shards, own=own, active=jnp.array([True, False, True]))
  )
  found = run(PathCredit(EDMSampler(8, 0.03, 80.0)), masked, x, keys)
  assert all(np.isfinite(value).all() for value in found)
  for name in ("paper", "posterior", "integrated"):
    assert not np.asarray(getattr(found, name))[1].any(), name


def test_a_data_set_has_the_mean_of_its_images():
  values = jnp.array([[0.2, 0.4, 0.6], [0.8, 0.6, 0.4]])
  mean, error = over_data_set(values)
  np.testing.assert_allclose(mean, [0.4, 0.6], atol=1e-6)
  np.testing.assert_allclose(error, 0.2 / np.sqrt(3), rtol=1e-5)


def test_credit_needs_weights_of_the_image_alone():
  mixture, x, _ = world(3.0, 2, jnp.float32)
  along = dataclasses.replace(mixture, weights=weights.AlongPath())
  with pytest.raises(InputError, match="no function of the noisy image alone"):
    PathCredit()(along, x, None)
  with pytest.raises(InputError, match="a key for each image"):
    PathCredit()(mixture, x, None)
  with pytest.raises(InputError, match="unknown gradient"):
    PathCredit(gradient="exact")
  with pytest.raises(InputError, match="has no inverse"):
    PathCredit(EDMSampler(8, churn=1.0))
