"""Samplers that choose their steps: errors against tolerances, orders, Brownian paths, gradients, inversion, coupling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from worlds import GaussianMixture, small

from jax_trustdiff.diffusion import adaptive
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler, AdaptiveSDESampler, brownian_increments
from jax_trustdiff.types import InputError

WORLD = GaussianMixture(
  jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 0.7), jnp.array([0.05, 0.1, 0.02])
)
LOW, HIGH = 0.02, 3.0


def one_gaussian():
  """A world, and what the probability flow from noise to LOW, denoised there, makes of it."""
  world = GaussianMixture(jnp.full((1, 4), 0.3), jnp.array([0.25]))
  flow = lambda x: 0.3 + (x * HIGH - 0.3) * np.sqrt((0.25 + LOW**2) / (0.25 + HIGH**2))  # noqa: E731
  return world, flow, lambda x: 0.3 + (flow(x) - 0.3) * 0.25 / (0.25 + LOW**2)


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_error_and_cost_follow_the_tolerance(float64, solver):
  """The error is of the tolerance's size; of order 5, a tolerance 10^4 smaller costs up to 10^(4/5) times the evaluations."""
  world, _, exact = one_gaussian()
  noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)))
  errors, nfe = [], []
  for tolerance in (1e-7, 1e-11):
    sampler = AdaptiveODESampler(LOW, HIGH, tolerance, tolerance, solver=solver)
    found = jax.jit(lambda x, sampler=sampler: sampler.sample(world, x))(noise)
    assert found.finished.all()
    errors.append(np.abs(found.x - exact(noise)).max() / tolerance)
    nfe.append(float(found.nfe.mean()))
  assert 0.005 < min(errors) and max(errors) < 10
  assert 10**0.5 < nfe[1] / nfe[0] < 10**0.9
  assert (found.nfe % 6 == 2).all()  # 6 for a step, the first slope, and the denoised image


def test_images_have_steps_of_their_own():
  """A number of evaluations for each; those that max_steps cuts off are NaN, and the others are not touched."""
  keys, noise = small(8)
  sampler = AdaptiveODESampler(rtol=1e-4, atol=1e-4)
  found = jax.jit(lambda x: sampler.sample(WORLD, x))(noise)
  assert len(np.unique(found.nfe)) > 2 and found.finished.all()
  attempts = (np.asarray(found.nfe) - 2) // 6
  limit = int(np.median(attempts))
  cut = AdaptiveODESampler(rtol=1e-4, atol=1e-4, max_steps=limit)
  short = jax.jit(lambda x: cut.sample(WORLD, x))(noise)
  np.testing.assert_array_equal(short.finished, attempts <= limit)
  assert 0 < short.finished.sum() < 8
  assert np.isnan(short.x[~short.finished]).all()
  np.testing.assert_allclose(short.x[short.finished], found.x[short.finished], atol=1e-6)


@pytest.mark.parametrize(
  "kind", [AdaptiveODESampler, pytest.param(AdaptiveSDESampler, marks=pytest.mark.slow)]
)
def test_coupled_steps_are_those_of_the_batch(kind):
  """One number of evaluations for all, and an image that depends on its batch."""
  keys, noise = small(4)
  for coupled in (True, False):
    sampler = kind(rtol=1e-2, atol=1e-2, coupled=coupled)
    run = jax.jit(lambda x, k, sampler=sampler: sampler.sample(WORLD, x, k))
    found, other = run(noise, keys), run(noise.at[3].multiply(3.0), keys)
    moved = np.abs(found.x[:3] - other.x[:3]).max()
    assert (len(np.unique(found.nfe)) == 1) == coupled
    assert (moved > 0) == coupled


def test_inversion(float64):
  world, flow, exact = one_gaussian()
  noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)))
  sampler = AdaptiveODESampler(LOW, HIGH, 1e-8, 1e-8)
  found = jax.jit(lambda x: sampler.invert(world, x))(jnp.asarray(flow(noise)))
  np.testing.assert_allclose(found.x, noise, atol=1e-6)
  assert found.finished.all() and (found.nfe > 30).all()
  back = jax.jit(lambda x: sampler(WORLD, x))
  image = WORLD.sample(jax.random.key(1), (4, 2, 2, 1)).astype(jnp.float64)
  there = jax.jit(lambda x: sampler.invert(WORLD, x).x)(image)
  # D(x) is not x at LOW: the round trip is that of the flow, up to what denoising takes away
  step = jnp.full(4, LOW)
  np.testing.assert_allclose(back(there), WORLD(image, step), atol=1e-5)
  assert np.abs(back(there) - image).max() > 1e-3


@pytest.mark.slow
def test_gradient_of_a_solve_is_that_of_finite_differences(float64):
  sampler = AdaptiveODESampler(LOW, HIGH, 1e-9, 1e-9, max_steps=500)
  rng = np.random.default_rng(2)
  noise, weights, direction = (jnp.asarray(rng.normal(size=(3, 2, 2, 1))) for _ in range(3))
  loss = lambda x, n: (weights * sampler(WORLD, x, checkpoints=n)).sum()  # noqa: E731
  value, h = jax.jit(lambda x: loss(x, None)), 1e-4
  numeric = float((value(noise + h * direction) - value(noise - h * direction)) / (2 * h))
  gradient = jax.jit(jax.grad(lambda x: loss(x, 8)))(noise)
  assert abs(numeric) > 0.1
  assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5)


# ---- Brownian paths ----


def leaves(n, level, shape=(1, 1, 1)):
  """(increments, areas) of n paths over all intervals of a level: [2^level n ...]."""
  keys = jax.random.split(jax.random.key(3), n)
  one = lambda i: brownian_increments(keys, jnp.full(n, level), jnp.full(n, i), shape)  # noqa: E731
  return jax.jit(lambda: jax.lax.map(one, jnp.arange(2**level)))()


def test_increments_and_areas_are_independent_normal():
  """Variance h and h / 12, nothing between neighbours: Foster, Oberhauser & Lyons 2020; a wrong 12th is refused."""
  n, level = 20_000, 2
  w, a = (np.asarray(value).reshape(4, n) for value in leaves(n, level))
  for values, std in ((w, 0.5), (a, np.sqrt(1 / 48))):
    for part in values:
      assert scipy.stats.kstest(part / std, "norm").pvalue > 1e-4
      assert scipy.stats.kstest(part / std * 1.1, "norm").pvalue < 1e-6
  correlation = np.corrcoef(np.concatenate([w, a]))
  assert np.abs(correlation - np.eye(8)).max() < 4.5 / np.sqrt(n)


def test_a_parent_is_the_sum_of_its_children():
  n = 5
  for level in (0, 5):
    w, a = leaves(n, level, (2, 1, 3))
    w1, a1 = leaves(n, level + 1, (2, 1, 3))
    left, right = (w1[0::2], a1[0::2]), (w1[1::2], a1[1::2])
    np.testing.assert_allclose(left[0] + right[0], w, atol=1e-6)
    # the mean over both halves, less the chord over both
    np.testing.assert_allclose((left[1] + right[1]) / 2 + (left[0] - right[0]) / 4, a, atol=1e-6)
    assert np.abs(np.asarray(a)).min() > 0


def test_paths_are_those_of_keys_and_pixels():
  w = np.asarray(leaves(2000, 1, (1, 2, 1))[0])[0].reshape(2000, 2)
  assert abs(np.corrcoef(w.T)[0, 1]) < 4.5 / np.sqrt(2000)
  assert abs(np.corrcoef(w[:-1, 0], w[1:, 0])[0, 1]) < 4.5 / np.sqrt(2000)


# ---- the reverse SDE ----


def ends(monkeypatch, world, level, x, keys):
  """Samples where every step is of 1 / 2^level of the whole, on the paths of the keys."""
  monkeypatch.setattr(adaptive, "FIRST_LEVEL", level)
  monkeypatch.setattr(adaptive, "FINEST_LEVEL", level)
  sampler = AdaptiveSDESampler(0.3, 3.0, 1e-12, 1e-12)
  found = jax.jit(lambda x, k: sampler.sample(world, x, k))(x, keys)
  assert (found.nfe == 2 * 2**level + 1).all()
  return found.x


@pytest.mark.slow
def test_strong_order_of_shark(float64, monkeypatch):
  """3/2: errors on the same paths at steps of 1/32 and 1/128 against 1/1024."""
  keys, noise = small(64)
  noise = noise.astype(jnp.float64)
  coarse, middle, fine = (ends(monkeypatch, WORLD, level, noise, keys) for level in (5, 7, 10))
  errors = [float(jnp.sqrt(jnp.square(x - fine).mean())) for x in (coarse, middle)]
  found = math.log2(errors[0] / errors[1]) / 2
  assert 1.35 < found < 1.9 and errors[1] > 1e-6


@pytest.mark.slow
def test_error_of_the_sde_follows_the_tolerance(float64, monkeypatch):
  """On the same paths, against steps of 1/4096 of the whole; a tolerance changes the steps and not the path."""
  keys, noise = small(16)
  noise = noise.astype(jnp.float64)
  errors, nfe = [], []
  for tolerance in (0.3, 0.01):
    sampler = AdaptiveSDESampler(0.3, 3.0, tolerance, tolerance)
    found = jax.jit(lambda x, k, sampler=sampler: sampler.sample(WORLD, x, k))(noise, keys)
    errors.append(found.x)
    nfe.append(float(found.nfe.mean()))
  exact = ends(monkeypatch, WORLD, 12, noise, keys)
  errors = [float(jnp.sqrt(jnp.square(x - exact).mean())) for x in errors]
  assert errors[1] < errors[0] / 3 and errors[1] < 0.01 and nfe[1] > 1.5 * nfe[0]


@pytest.mark.slow
def test_sde_gradient(float64):
  """The steps of these tolerances are the same for both sides of the difference."""
  sampler = AdaptiveSDESampler(LOW, HIGH, 0.1, 0.1, max_steps=400)
  keys, noise = small(2)
  noise = noise.astype(jnp.float64)
  rng = np.random.default_rng(2)
  weights, direction = (jnp.asarray(rng.normal(size=noise.shape)) for _ in range(2))
  loss = lambda x: (weights * sampler(WORLD, x, keys)).sum()  # noqa: E731
  value, h = jax.jit(loss), 1e-6
  numeric = float((value(noise + h * direction) - value(noise - h * direction)) / (2 * h))
  assert float((jax.jit(jax.grad(loss))(noise) * direction).sum()) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize(
  "kind, fields, words",
  [
    (AdaptiveODESampler, dict(solver="rk4"), "known: tsit5, dopri5"),
    (AdaptiveODESampler, dict(sigma_min=0.0), "0 < sigma_min"),
    (AdaptiveSDESampler, dict(rtol=0.0), "must be positive"),
    (AdaptiveSDESampler, dict(max_steps=0), "must be positive"),
  ],
)
def test_refuses(kind, fields, words):
  with pytest.raises(InputError, match=words):
    kind(**fields)


def test_sde_needs_keys():
  with pytest.raises(InputError, match="key for each image"):
    AdaptiveSDESampler()(WORLD, small(2)[1])
