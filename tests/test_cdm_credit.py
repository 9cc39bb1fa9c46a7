"""Credit of shards against closed forms: the parts of the likelihood, their divergences, and posteriors by denoising errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from worlds import LogDensities, log_density_of_all, samples_of_shards, shards

from jax_trustdiff.cdm import credit as credit_lib
from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.credit import (
  PathCredit,
  denoising_errors,
  denoising_posterior,
  log_densities_of_errors,
  over_data_set,
  path_credit_of_set,
)
from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.processes import VP
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError

HIGH = float(VP().sigma(1.0))  # 152
FINE = AdaptiveODESampler(0.03, HIGH, rtol=1e-9, atol=1e-9)


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
  low, high = (jnp.full(64, s) for s in (0.03, HIGH))
  start, end = (log_density_of_all(mixture.shards, y, s) for y, s in ((x, low), (found.z * HIGH, high)))
  np.testing.assert_allclose(found.parts.sum(0), start - end, atol=1e-6)
  np.testing.assert_allclose(found.log_prob, start, atol=0.05)  # N(0, sigma_max^2 + data_std^2) is not the end's density
  np.testing.assert_allclose(found.paper.sum(0), 1, atol=1e-9)
  np.testing.assert_allclose(found.integrated.sum(0), 1, atol=1e-9)
  np.testing.assert_allclose(found.posterior, mixture.look(x, low).weights, atol=1e-12)
  times = jnp.linspace(VP().t_of_sigma(0.03), VP().t_of_sigma(HIGH), 4001)
  one = path_weights(mixture, x[:1], times)
  np.testing.assert_allclose(found.integrated[:, 0], one.mean(0)[:, 0], atol=0.01)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
  """The denoiser of a mixture as that of a shard, whose own variables are none."""

  mixture: Mixture

  def with_variables(self, own):
    return self.mixture


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-10), (jnp.float32, 1e-4)])
def test_parts_add_up_to_the_integral_of_the_whole_divergence(request, dtype, tolerance):
  """Along the same grid: the parts of the shards, and the one part of the mixture taken for a single model."""
  if dtype == jnp.float64:
    request.getfixturevalue("float64")
  mixture, x, _ = world(0.5, 64, dtype)
  one = Mixture(cdm_shards.stack(Whole(mixture), [{"nothing": jnp.zeros(1, dtype)}]), weights.Prior())
  credit = PathCredit(EDMSampler(64, 0.03, 80.0), "posterior", "exact")
  parts, whole = (run(credit, model, x).parts for model in (mixture, one))
  assert parts.dtype == dtype and len(parts) == 3 and len(whole) == 1
  assert jnp.abs(parts.sum(0) - whole[0]).max() < tolerance < jnp.abs(parts).max()


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
  for probe in ("rademacher", "gaussian"):
    many = PathCredit(num_probes=4096, probe=probe)._probes(x, keys)
    of_each = jax.lax.map(lambda probe: divergence("autodiff", probe[None]), many)
    error = of_each.std(0) / 64
    # 48 numbers: one key in 300 has one beyond 4 sigma
    # where all probes agree, a Jacobian that is nearly diagonal, there is rounding alone
    assert (jnp.abs(of_each.mean(0) - wanted) <= 4 * error + 1e-9).all(), probe
    assert (error > 1e-4).any(), probe


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
  grid = run(PathCredit(EDMSampler(64, 0.03, HIGH), "posterior", "exact"), mixture, x)
  np.testing.assert_allclose(grid.parts, wanted.parts, atol=0.05)
  assert int(grid.nfe[0]) == 126
  many = run(PathCredit(FINE, num_probes=64), mixture, x, keys)
  assert 1e-6 < jnp.abs(many.parts - wanted.parts).mean() < 0.3


def test_denoising_errors_give_differences_of_log_densities(float64):
  """Mean over draws of noise: the log-densities of every shard (Kong et al. 2023)."""
  mixture, x, _ = world(0.5, 2)
  sigmas = jnp.geomspace(2e-3, 200.0, 200)
  many = jnp.repeat(x, 2048, 0)
  keys = jax.random.split(jax.random.key(1), len(many))
  errors = jax.jit(denoising_errors)(mixture, many, keys, sigmas)
  found = log_densities_of_errors(errors, sigmas, 4).reshape(3, 2, 2048)
  wanted = LogDensities(mixture.shards)(x, jnp.full(2, 2e-3))
  for one, truth in ((found, wanted), (found[1:] - found[:1], wanted[1:] - wanted[:1])):
    error = one.std(-1) / np.sqrt(2048)
    assert (jnp.abs(one.mean(-1) - truth) < 4 * error + 0.02).all()
    assert (jnp.abs(truth) > 20 * error + 0.1).any()


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_errors_of_a_gaussian_give_its_log_density(float64, std):
  """Kong et al. 2023, eq. 3, with errors in closed form: |D - x|^2 is (d s^4 sigma^2 + sigma^4 |x|^2) / (s^2 + sigma^2)^2 on average."""
  x = 2 * std * jax.random.normal(jax.random.key(0), (16, 4))
  sigmas = jnp.geomspace(1e-4, 1e4, 2000)
  level, squares = sigmas[:, None] ** 2, jnp.square(x).sum(1)
  errors = (4 * std**4 * level + level**2 * squares) / (std**2 + level) ** 2
  found = log_densities_of_errors(errors, sigmas, 4)
  np.testing.assert_allclose(found, scipy.stats.norm(0, std).logpdf(x).sum(1), atol=1e-4)


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


def test_the_paper_s_credit_of_a_set_is_that_of_its_likelihood():
  """An image whose parts nearly cancel has any credit, and hardly counts for the set; the error is that of other sets."""
  rng = np.random.RandomState(0)
  parts = rng.normal([[3.0], [1.0]], 0.5, (2, 4000))
  share, error = path_credit_of_set(jnp.asarray(parts[:, :400]))
  np.testing.assert_allclose(share, [0.75, 0.25], atol=0.02)
  of_sets = [path_credit_of_set(jnp.asarray(one))[0][0] for one in np.split(parts, 40, 1)]
  assert np.std(of_sets) == pytest.approx(float(error[0]) * 2, rel=0.3)  # of a hundred images
  odd = np.concatenate([parts[:, :400], [[5.0], [-4.999]]], 1)
  assert (odd[0] / odd.sum(0))[-1] > 1000
  np.testing.assert_allclose(path_credit_of_set(jnp.asarray(odd))[0], share, atol=0.02)


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
