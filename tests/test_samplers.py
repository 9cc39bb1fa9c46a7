"""Samplers against reference values and closed-form worlds."""

import hashlib
import json
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import shared_dir
from worlds import GaussianMixture

from jax_trustdiff.diffusion import schedules, solvers
from jax_trustdiff.diffusion.samplers import SAMPLERS, AncestralSampler, DPMSolverPP2M, EDMSampler
from jax_trustdiff.types import InputError

ENTRIES = {
  "edm_det18": EDMSampler(),
  "edm_churn18": EDMSampler(churn=40, churn_min=0.05, churn_max=50, churn_noise=1.003),
  "abl_vp_vp_vp_heun": EDMSampler(
    discretization="vp", schedule="vp", scaling="vp", sigma_min=schedules.SIGMA_RANGES["vp"][0]
  ),
  "abl_edm_linear_none_euler": EDMSampler(solver="euler"),
}


@pytest.fixture(scope="module")
def reference():
  """The reference's values, and its inputs in float64: flattened NCHW order is one order of pixels like any other."""
  golden = dict(np.load(shared_dir("golden", "edm_sampler", "gmm_seed0.npz")))
  r = np.random.RandomState(0)
  inputs = {"mu": r.randn(10, 3072) * 0.5}
  inputs["s2"] = (0.05 + 0.2 * r.rand(10)) ** 2
  inputs["latents"] = r.randn(16, 3, 32, 32)
  inputs["noise"] = r.randn(64, 16, 3, 32, 32)
  for name, digest in json.loads(str(golden["input_sha256"])).items():
    assert hashlib.sha256(inputs[name].astype("<f8").tobytes()).hexdigest() == digest
  return golden, inputs


def nhwc(array):
  return np.moveaxis(array, -3, -1)


def sample(inputs, sampler, dtype, denoise=None):
  """The reference's images [16, 3, 32, 32] by our sampler."""
  order = nhwc(np.arange(3072).reshape(3, 32, 32)).ravel()
  world = GaussianMixture(jnp.asarray(inputs["mu"][:, order], dtype), jnp.asarray(inputs["s2"], dtype))
  noise = jnp.asarray(nhwc(inputs["noise"][: sampler.num_steps]), dtype)
  fn = denoise(world) if denoise else world
  run = jax.jit(lambda x: sampler(fn, x, draw=(lambda i: noise[i]) if sampler.churn else None))
  found = run(jnp.asarray(nhwc(inputs["latents"]), dtype))
  assert found.dtype == dtype
  return np.moveaxis(np.asarray(found), -1, -3)


@pytest.mark.parametrize("name", ENTRIES)
def test_reference_in_float64(reference, float64, name):
  golden, inputs = reference
  visited = []

  def recording(world):
    def denoise(x, sigma):
      jax.debug.callback(lambda s: visited.append(float(s)), sigma[0], ordered=True)
      return world(x, sigma)

    return denoise

  found = sample(inputs, ENTRIES[name], jnp.float64, recording)
  jax.effects_barrier()
  np.testing.assert_allclose(found[0], golden[f"{name}/x0_f64"], rtol=0, atol=1e-10)
  np.testing.assert_allclose(found[:4], golden[f"{name}/x"], rtol=0, atol=1e-6)  # kept in float32
  np.testing.assert_allclose(
    np.linalg.norm(found.reshape(16, -1), axis=1), golden[f"{name}/per_image_norm"], rtol=1e-10
  )
  np.testing.assert_allclose(np.abs(found).mean(), golden[f"{name}/mean_abs"], rtol=1e-10)
  # evaluations counted while it ran, one for each noise level of the reference, and none more
  assert len(visited) == ENTRIES[name].nfe
  np.testing.assert_allclose(visited, golden[f"{name}/sigmas_evaluated"], rtol=1e-10)


@pytest.mark.parametrize("name", ENTRIES)
def test_reference_in_float32(reference, name):
  golden, inputs = reference
  found = sample(inputs, ENTRIES[name], jnp.float32)
  difference = np.abs(found[:4] - golden[f"{name}/x"])
  assert difference.max() < 1e-4 and difference.mean() < 2e-5
  assert np.abs(found).mean() == pytest.approx(float(golden[f"{name}/mean_abs"]), abs=1e-5)


# mean |x0| of the reference for further choices, same inputs (float64)
@pytest.mark.parametrize(
  "discretization, schedule, scaling, solver, mean",
  [
    ("ve", "linear", "none", "heun", 0.420031174),
    ("edm", "vp", "vp", "heun", 0.415228721),
    ("iddpm", "linear", "none", "heun", 0.427889174),
    ("vp", "linear", "none", "euler", 0.404966459),
  ],
)
def test_reference_of_the_grid_of_choices(
  reference, float64, discretization, schedule, scaling, solver, mean
):
  low, high = schedules.SIGMA_RANGES[discretization]
  sampler = EDMSampler(
    sigma_min=max(low, 0.002),
    sigma_max=min(high, 80.0),
    discretization=discretization,
    schedule=schedule,
    scaling=scaling,
    solver=solver,
  )
  found = np.abs(sample(reference[1], sampler, jnp.float64)).mean()
  # the reference's table of 'iddpm' is in float32
  assert found == pytest.approx(mean, abs=2e-6 if discretization == "iddpm" else 2e-9)


WORLD = GaussianMixture(
  jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 0.7), jnp.array([0.05, 0.1, 0.02])
)


def small(n=8, seed=0):
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))
  return keys, solvers.initial_noise(keys, (2, 2, 1))


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_an_image_does_not_depend_on_its_batch(churn):
  sampler = EDMSampler(churn=churn)
  keys, noise = small(8)
  run = jax.jit(lambda keys, noise: sampler(WORLD, noise, keys))
  together = run(keys, noise)
  order = np.array([5, 2, 7, 0])
  np.testing.assert_array_equal(run(keys[order], noise[order]), together[order])
  assert len(np.unique(np.asarray(together).round(4), axis=0)) == 8
  if churn:
    other = run(jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys), noise)
    assert np.abs(other - together).max() > 1e-2


@pytest.mark.parametrize(
  "solver, alpha, order", [("euler", 1.0, 1), ("heun", 1.0, 2), ("heun", 0.5, 2), ("heun", 2 / 3, 2)]
)
@pytest.mark.parametrize("schedule, scaling", [("linear", "none"), ("vp", "vp")])
def test_order_of_convergence(float64, solver, alpha, order, schedule, scaling):
  """One Gaussian, whose probability flow is known: x(sigma) = mean + (x - mean) sqrt(v + sigma^2) / sqrt(v + sigma_max^2)."""
  world = GaussianMixture(jnp.full((1, 4), 0.3), jnp.array([0.25]))
  noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)))
  low, high = (0.3, 3.0) if schedule == "linear" else (0.02, 3.0)

  def error(num_steps):
    sampler = EDMSampler(num_steps, low, high, schedule=schedule, scaling=scaling, solver=solver, alpha=alpha)
    states = jax.jit(lambda x: sampler(world, x, trajectory=True))(noise)
    scale = 1 / np.sqrt(1 + low**2) if scaling == "vp" else 1.0
    exact = 0.3 + (noise * high - 0.3) * np.sqrt((0.25 + low**2) / (0.25 + high**2))
    return np.abs(states[-2] / scale - exact).max()  # before the last step, which is Euler's to sigma 0

  found = math.log2(error(33) / error(65))
  # on this flow the midpoint rule happens to be of order 3 in sigma
  assert order - 0.25 < found < order + (1.25 if alpha == 0.5 else 0.25)


def test_gradients_through_50_steps(float64):
  sampler = EDMSampler(num_steps=50, churn=10.0)
  keys, noise = small(2)
  noise = noise.astype(jnp.float64)
  weights = jnp.asarray(np.random.default_rng(3).normal(size=noise.shape))
  loss = lambda x, n: (weights * sampler(WORLD, x, keys, checkpoints=n)).sum()  # noqa: E731
  direction = jnp.asarray(np.random.default_rng(4).normal(size=noise.shape))
  h = 1e-5
  value = jax.jit(lambda x: loss(x, None))
  numeric = (value(noise + h * direction) - value(noise - h * direction)) / (2 * h)
  for checkpoints in (None, 7, 50):
    gradient = jax.jit(jax.grad(lambda x, n=checkpoints: loss(x, n)))(noise)
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_compiled_program_is_one_plain_loop(churn):
  """No call of the host, and a trip count that XLA knows."""
  keys, noise = small(8)
  run = jax.jit(lambda d, k, x: EDMSampler(churn=churn)(d, x, k))
  text = run.lower(WORLD, keys, noise).compile().as_text()
  assert "callback" not in text
  assert text.count('"known_trip_count":{"n":"18"}') == 1


def test_built_in_heun_agrees(float64):
  """diffrax's own Heun on the same grid, and the last step by hand."""
  sampler = EDMSampler()
  _, noise = small(4)
  noise = noise.astype(jnp.float64)
  sigmas = sampler.sigmas

  def slope(tau, x, args):  # in the increasing clock tau = -sigma
    sigma = jnp.full(x.shape[:1], -tau)
    return -(x - WORLD(x, sigma)) / -tau

  solution = diffrax.diffeqsolve(
    diffrax.ODETerm(slope), diffrax.Heun(), -sigmas[0], -sigmas[-1], None, noise * sigmas[0],
    stepsize_controller=diffrax.StepTo(-sigmas),
  )  # fmt: skip
  last = WORLD(solution.ys[0], jnp.full(4, sigmas[-1]))
  np.testing.assert_allclose(jax.jit(lambda x: sampler(WORLD, x))(noise), last, atol=1e-12)


def test_trajectory_ends_in_the_sample():
  _, noise = small(3)
  states = EDMSampler()(WORLD, noise, trajectory=True)
  assert states.shape == (18, *noise.shape)
  np.testing.assert_allclose(states[-1], EDMSampler()(WORLD, noise), atol=1e-6)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(solver="rk4"), "heun"),
    (dict(schedule="cosine"), "linear"),
    (dict(discretization="ddim"), "iddpm"),
    (dict(alpha=0.0), "alpha"),
    (dict(num_steps=1), "at least 2"),
    (dict(sigma_min=100.0), "sigma_min"),
    (dict(churn=-1.0), "churn"),
    (dict(discretization="vp", sigma_min=0.1, sigma_max=4.0), "no VP process"),
  ],
)
def test_refuses(fields, words):
  with pytest.raises(InputError, match=words):
    EDMSampler(**fields)


def test_churn_needs_keys():
  with pytest.raises(InputError, match="key for each image"):
    EDMSampler(churn=1.0)(WORLD, small(2)[1])


@pytest.mark.parametrize("discretization", ["edm", "vp"])
def test_ddim_three_ways(float64, discretization):
  """Ancestral with eta 0, and Euler in the VP schedule and scaling and in the linear one: one method (exactly, for DDIM)."""
  _, noise = small(4)
  noise = noise.astype(jnp.float64)
  fields = dict(num_steps=12, discretization=discretization)
  found = AncestralSampler(eta=0.0, **fields)(WORLD, noise)
  np.testing.assert_allclose(EDMSampler(solver="euler", **fields)(WORLD, noise), found, atol=1e-12)


def test_ancestral_is_the_posterior_of_ddpm(float64):
  """One step in x / scale against Ho et al. 2020, eq. 7, in the terms of that paper: alpha_bar, beta, x_t, x_{t-1}."""
  sampler = AncestralSampler(num_steps=5, sigma_min=0.01, sigma_max=80.0, discretization="vp")
  keys, noise = small(3)
  noise = noise.astype(jnp.float64)
  eps = jnp.asarray(np.random.default_rng(1).normal(size=(5, *noise.shape)))
  states = sampler(WORLD, noise, draw=lambda i: eps[i], trajectory=True)
  sigma, i = sampler.sigmas, 2
  bar, bar_next = 1 / (1 + sigma[i] ** 2), 1 / (1 + sigma[i + 1] ** 2)
  alpha = bar / bar_next
  beta = 1 - alpha
  x_t = np.sqrt(bar) * states[i - 1]
  x0 = WORLD(states[i - 1], jnp.full(3, sigma[i]))
  mean = (np.sqrt(bar_next) * beta * x0 + np.sqrt(alpha) * (1 - bar_next) * x_t) / (1 - bar)
  variance = (1 - bar_next) / (1 - bar) * beta
  np.testing.assert_allclose(np.sqrt(bar_next) * states[i], mean + np.sqrt(variance) * eps[i], atol=1e-12)


def test_dpm_solver_order(float64):
  """Second order in lambda on one Gaussian; without its memory, first."""
  world = GaussianMixture(jnp.full((1, 4), 0.3), jnp.array([0.25]))
  noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)))
  low, high = 0.3, 3.0
  exact = 0.3 + (noise * high - 0.3) * np.sqrt((0.25 + low**2) / (0.25 + high**2))

  def order(kind):
    errors = []
    for num_steps in (33, 65):
      sampler = kind(num_steps=num_steps, sigma_min=low, sigma_max=high, discretization="ve")
      states = jax.jit(lambda x, sampler=sampler: sampler(world, x, trajectory=True))(noise)
      errors.append(np.abs(states[-2] - exact).max())
    return math.log2(errors[0] / errors[1])

  assert order(DPMSolverPP2M) == pytest.approx(2, abs=0.25)
  assert order(lambda **fields: AncestralSampler(eta=0.0, **fields)) == pytest.approx(1, abs=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
  "sampler",
  [
    EDMSampler(num_steps=40),
    EDMSampler(num_steps=150, churn=30, churn_noise=1.0),
    EDMSampler(num_steps=60, discretization="vp", schedule="vp", scaling="vp"),
    AncestralSampler(num_steps=500),
    DPMSolverPP2M(num_steps=60),
  ],
  ids=["heun", "churn", "vp", "ancestral", "dpmpp_2m"],
)
def test_samples_fit_the_world(sampler):
  """Chi-square of radii about the nearest mean: accepted, and refused where the denoiser believes in 10 % more noise."""
  mean = jnp.array([[-3.0, 0.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, -3.0, 0.0, 2.0]])
  world = GaussianMixture(mean, jnp.array([0.09, 0.04, 0.16]))
  keys, noise = small(3000, seed=5)

  def statistic(denoise):
    x = np.asarray(jax.jit(lambda x, k: sampler(denoise, x, k))(noise, keys)).reshape(-1, 4)
    distance = ((x[:, None] - np.asarray(mean)) ** 2).sum(-1)
    nearest = distance.argmin(1)
    counts = np.bincount(nearest, minlength=3)
    radius = (
      distance[np.arange(len(x)), nearest] / np.asarray(world.variance)[nearest]
    )  # chi-square with 4 degrees
    edges = scipy.stats.chi2(4).ppf(np.linspace(0, 1, 11))
    shells = np.histogram(radius, edges)[0]
    return scipy.stats.chisquare(counts).pvalue, scipy.stats.chisquare(shells).pvalue

  weights, shells = statistic(world)
  assert weights > 1e-3 and shells > 1e-3
  assert statistic(lambda x, sigma: world(x, 1.1 * sigma))[1] < 1e-6


def test_every_sampler_tells_its_nfe():
  keys, noise = small(2)
  for name, kind in SAMPLERS.items():
    calls = []
    sampler = kind(num_steps=7)

    def denoise(x, sigma, calls=calls):
      jax.debug.callback(lambda: calls.append(1))
      return WORLD(x, sigma)

    jax.block_until_ready(jax.jit(lambda x, k, s=sampler, d=denoise: s(d, x, k))(noise, keys))
    jax.effects_barrier()
    assert len(calls) == sampler.nfe, name
