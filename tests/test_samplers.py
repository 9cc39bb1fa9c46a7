"""Fixed-grid samplers of the probability flow against reference values and closed-form worlds."""

import hashlib
import json
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir
from worlds import GaussianMixture, small

from jax_trustdiff.diffusion import schedules
from jax_trustdiff.diffusion.denoisers import iddpm_preconditioning
from jax_trustdiff.diffusion.processes import IDDPM, Discrete
from jax_trustdiff.diffusion.samplers import AncestralSampler, DPMSolverPP2M, EDMSampler
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
@pytest.mark.slow
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


@pytest.mark.parametrize(
  "solver, alpha, order",
  [
    ("euler", 1.0, 1),
    ("heun", 1.0, 2),
    pytest.param("heun", 0.5, 2, marks=pytest.mark.slow),
    ("heun", 2 / 3, 2),
  ],
)
@pytest.mark.parametrize(
  "schedule, scaling", [("linear", "none"), pytest.param("vp", "vp", marks=pytest.mark.slow)]
)
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


@pytest.mark.parametrize("checkpoints", [None, pytest.param(50, marks=pytest.mark.slow)])
def test_gradients_through_50_steps(float64, checkpoints):
  sampler = EDMSampler(num_steps=50, churn=10.0)
  keys, noise = small(2)
  noise = noise.astype(jnp.float64)
  weights = jnp.asarray(np.random.default_rng(3).normal(size=noise.shape))
  loss = lambda x: (weights * sampler(WORLD, x, keys, checkpoints=checkpoints)).sum()  # noqa: E731
  direction = jnp.asarray(np.random.default_rng(4).normal(size=noise.shape))
  h = 1e-5
  value = jax.jit(loss)
  numeric = (value(noise + h * direction) - value(noise - h * direction)) / (2 * h)
  gradient = jax.jit(jax.grad(loss))(noise)
  assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_compiled_program_is_one_plain_loop(churn):
  """No call of the host, and a trip count that XLA knows."""
  keys, noise = small(8)
  run = jax.jit(lambda d, k, x: EDMSampler(churn=churn)(d, x, k))
  text = run.lower(WORLD, keys, noise).compile().as_text()
  assert "callback" not in text
  assert text.count('"known_trip_count":{"n":"18"}') == 1


@pytest.mark.slow
def test_built_in_heun_agrees(float64):
  """diffrax's own Heun on the same grid, and the last step by hand."""
  sampler = EDMSampler()
  _, noise = small(4)
  noise = noise.astype(jnp.float64)
  sigmas = sampler.sigmas

  def slope(tau, x, args):  # in the increasing clock tau = -sigma
    sigma = jnp.full(x.shape[:1], -tau)
    return -(x - WORLD(x, sigma)) / -tau

  @jax.jit
  def both(noise):
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(slope), diffrax.Heun(), -sigmas[0], -sigmas[-1], None, noise * sigmas[0],
      stepsize_controller=diffrax.StepTo(-sigmas),
    )  # fmt: skip
    return WORLD(solution.ys[0], jnp.full(4, sigmas[-1])), sampler(WORLD, noise)

  expected, found = both(noise)
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_trajectory_ends_in_the_sample():
  _, noise = small(3)
  run = jax.jit(lambda x: (EDMSampler()(WORLD, x, trajectory=True), EDMSampler()(WORLD, x)))
  states, found = run(noise)
  assert states.shape == (18, *noise.shape)
  np.testing.assert_allclose(states[-1], found, atol=1e-6)


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
    (dict(round_to="vp"), "process with a table, got VP"),
    (dict(discretization="table"), "give round_to"),
    (
      dict(discretization="table", round_to="discrete:num_steps=17"),
      "17 noise levels .* fewer than num_steps 18",
    ),
    (dict(discretization="table", round_to="iddpm", sigma_min=3e4, sigma_max=4e4), "no two noise levels"),
  ],
)
def test_refuses(fields, words):
  with pytest.raises(InputError, match=words):
    EDMSampler(**fields)


def test_churn_needs_keys():
  with pytest.raises(InputError, match="key for each image"):
    EDMSampler(churn=1.0)(WORLD, small(2)[1])


@pytest.mark.parametrize("churn", [pytest.param(0.0, marks=pytest.mark.slow), 20.0])
def test_rounded_to_the_levels_that_a_network_knows(churn):
  """Every evaluation but those in the middle of a step is at a level of the table, while traced in float32 too."""
  sampler = EDMSampler(12, 0.02, churn=churn, round_to="iddpm")
  known, visited = IDDPM().sigmas, []
  assert sampler == EDMSampler(12, 0.02, churn=churn, round_to=iddpm_preconditioning().process)
  assert np.isin(sampler.sigmas, known).all()
  plain = EDMSampler(12, 0.02).sigmas
  gap = np.abs(known[:, None] - plain).min(0)
  np.testing.assert_allclose(np.abs(sampler.sigmas - plain), gap, atol=1e-12)
  assert gap.max() > 1e-3

  def denoise(x, sigma):
    jax.debug.callback(lambda s: visited.append(float(s)), sigma[0], ordered=True)
    return WORLD(x, sigma)

  keys, noise = small(2)
  jax.block_until_ready(jax.jit(lambda x, k: sampler(denoise, x, k))(noise, keys))
  jax.effects_barrier()
  visited = np.array(visited)
  distance = np.abs(visited[:, None] / known - 1).min(1)
  assert len(visited) == sampler.nfe and distance.max() < 1e-6
  if churn:
    assert visited[0] > 80.5  # raised, then rounded


DDPM = "discrete:schedule=linear,beta_start=0.0001,beta_end=0.02"


def test_the_levels_of_a_table():
  """All of them exactly, or those at whole times as evenly spaced as can be; within the range, its ends included."""
  levels = Discrete("linear", 1e-4, 0.02).sigmas
  whole = dict(sigma_max=1000.0, discretization="table", round_to=DDPM)
  np.testing.assert_array_equal(AncestralSampler(1000, **whole).sigmas, levels[::-1])
  np.testing.assert_array_equal(AncestralSampler(334, **whole).sigmas, levels[::-3])
  times = np.searchsorted(levels, AncestralSampler(50, **whole).sigmas)
  assert times[0] == 999 and times[-1] == 0 and set(-np.diff(times)) == {20, 21}
  np.testing.assert_array_equal(levels[times], AncestralSampler(50, **whole).sigmas)
  ends = dict(whole, sigma_min=levels[100], sigma_max=levels[119])
  np.testing.assert_array_equal(AncestralSampler(20, **ends).sigmas, levels[100:120][::-1])


@pytest.mark.computes
def test_ancestral_sampling_of_ho_et_al(float64):
  """Algorithm 2 in that paper's terms, alpha, beta and x_t, through all 1000 times: mean and variance of one Gaussian.

  They follow from a recursion; they are those of the data up to 1000 steps in place of infinitely many.
  """
  mean, variance, shape = 0.3, 0.25, (8000, 2, 2, 1)
  world = GaussianMixture(jnp.full((1, 4), mean), jnp.array([variance]))
  sampler = AncestralSampler(1000, sigma_max=1000.0, discretization="table", round_to=DDPM)

  @jax.jit
  def run(factor):
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), shape, jnp.float32)  # noqa: E731
    denoise = lambda x, sigma: world(x, factor * sigma)  # noqa: E731
    return sampler(denoise, draw(2**30), draw=draw)

  beta = np.linspace(1e-4, 0.02, 1000)
  alpha_bar = np.cumprod(1 - beta)
  m, v = 0.0, 1.0  # of x_t
  for b, bar, before in zip(beta[::-1], alpha_bar[::-1], np.append(1.0, alpha_bar[:-1])[::-1], strict=True):
    noise_of_x0 = (1 - bar) / bar
    gain = variance / (variance + noise_of_x0)  # x0 = mean + gain (x_t / sqrt(bar) - mean)
    of_x0, of_x = np.sqrt(before) * b / (1 - bar), np.sqrt(1 - b) * (1 - before) / (1 - bar)
    slope = of_x0 * gain / np.sqrt(bar) + of_x
    m, v = slope * m + of_x0 * (1 - gain) * mean, slope**2 * v + b * (1 - before) / (1 - bar)
  assert m == pytest.approx(mean, abs=0.01) and v == pytest.approx(variance, rel=0.02)

  def misfit(images):
    """In standard errors: of the mean and of the variance."""
    n, images = images.size, np.asarray(images)
    return abs(images.mean() - m) / np.sqrt(v / n), abs(images.var() / v - 1) / np.sqrt(2 / n)

  assert max(misfit(run(1.0))) < 4
  assert misfit(run(1.1))[1] > 6


@pytest.mark.parametrize("discretization", [pytest.param("edm", marks=pytest.mark.slow), "vp"])
def test_ddim_three_ways(float64, discretization):
  """Ancestral with eta 0, and Euler in the VP schedule and scaling and in the linear one: one method (exactly, for DDIM)."""
  _, noise = small(4)
  noise = noise.astype(jnp.float64)
  fields = dict(num_steps=12, discretization=discretization)
  samplers = AncestralSampler(eta=0.0, **fields), EDMSampler(solver="euler", **fields)
  found, euler = jax.jit(lambda x: [sampler(WORLD, x) for sampler in samplers])(noise)
  np.testing.assert_allclose(euler, found, atol=1e-12)


def test_ancestral_is_the_posterior_of_ddpm(float64):
  """One step in x / scale against Ho et al. 2020, eq. 7, in the terms of that paper: alpha_bar, beta, x_t, x_{t-1}."""
  sampler = AncestralSampler(num_steps=5, sigma_min=0.01, sigma_max=80.0, discretization="vp")
  keys, noise = small(3)
  noise = noise.astype(jnp.float64)
  eps = jnp.asarray(np.random.default_rng(1).normal(size=(5, *noise.shape)))
  states = jax.jit(lambda x: sampler(WORLD, x, draw=lambda i: eps[i], trajectory=True))(noise)
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


def test_dpm_solver_takes_levels_that_are_the_same():
  """Two levels that rounding made one are a step of length 0; another would be a division by it."""
  sampler = DPMSolverPP2M(40, 0.01, 0.05, round_to="iddpm")
  assert len(np.unique(sampler.sigmas)) < 40
  _, noise = small(4)
  assert np.isfinite(jax.jit(lambda x: sampler(WORLD, x))(noise)).all()


@pytest.mark.parametrize("solver, order", [pytest.param("euler", 1, marks=pytest.mark.slow), ("heun", 2)])
def test_inversion(float64, solver, order):
  """Noise to the image at sigma_min and back; the error falls as that of the solver, and the noise is the exact one."""
  world = GaussianMixture(jnp.full((1, 4), 0.3), jnp.array([0.25]))
  noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)))
  low, high = 0.02, 3.0
  image = 0.3 + (noise * high - 0.3) * np.sqrt((0.25 + low**2) / (0.25 + high**2))
  errors = []
  for num_steps in (33, 65):
    sampler = EDMSampler(num_steps, low, high, solver=solver)
    found = jax.jit(lambda x, sampler=sampler: sampler.invert(world, x))(image)
    errors.append(np.abs(found - noise).max())
    states = jax.jit(lambda x, sampler=sampler: sampler(world, x, trajectory=True))(found)
    assert np.abs(states[-2] - image).max() < 3 * errors[-1]
  assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3) and errors[1] < 0.1**order
  with pytest.raises(InputError, match="no inverse"):
    EDMSampler(churn=1.0).invert(world, image)


@pytest.mark.parametrize("solver", ["euler", pytest.param("heun", marks=pytest.mark.slow)])
def test_inversion_keeps_the_precision_of_images(float64, solver):
  sampler = EDMSampler(12, solver=solver)
  run = lambda x: jax.jit(lambda x: sampler.invert(WORLD, x))(x)  # noqa: E731
  image = jnp.asarray(WORLD.sample(jax.random.key(0), (4, 2, 2, 1)), jnp.float32)
  found = run(image)
  assert found.dtype == jnp.float32 and run(image.astype(jnp.float64)).dtype == jnp.float64
  jax.config.update("jax_enable_x64", False)
  np.testing.assert_allclose(found, run(image), atol=1e-4)


@pytest.mark.slow
def test_inversion_in_vp_schedule_and_scaling(float64):
  sampler = EDMSampler(200, discretization="vp", schedule="vp", scaling="vp")
  x = jnp.asarray(WORLD.sample(jax.random.key(0), (16, 2, 2, 1)), jnp.float64)
  there = jax.jit(lambda x: sampler.invert(WORLD, x))(x)
  back = jax.jit(lambda x: sampler(WORLD, x))(there)
  assert 0.3 < np.asarray(there).std() < 3
  assert np.abs(back - x).max() < 2e-2 and np.abs(back - x).mean() < 2e-3
