"""Projections against brute force and closed forms, starts and steps against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jax_trustdiff.attacks import norms
from jax_trustdiff.types import InputError

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


def images(seed, b=8, shape=(4, 4, 3)):
  return jax.random.uniform(jax.random.key(seed), (b, *shape))


project = jax.jit(norms.project, static_argnames="norm")


def nearest_point_l1(x, center, radius):
  """The L2-nearest point to `x` with |v - center|_1 <= radius in the unit cube, by a general solver.

  The absolute values are split: v = center + p - q with p, q >= 0.
  """
  d = len(x)
  split = lambda pq: center + pq[:d] - pq[d:]  # noqa: E731
  result = optimize.minimize(
    lambda pq: ((split(pq) - x) ** 2).sum(),
    np.zeros(2 * d),
    jac=lambda pq: np.concatenate([2 * (split(pq) - x), -2 * (split(pq) - x)]),
    method="SLSQP",
    bounds=[(0, 1 - c) for c in center] + [(0, c) for c in center],
    constraints={"type": "ineq", "fun": lambda pq: radius - pq.sum(), "jac": lambda pq: -np.ones(2 * d)},
    options={"ftol": 1e-14, "maxiter": 500},
  )
  assert result.success or result.status == 8, result.message
  return split(result.x)


def cases():
  rng = np.random.default_rng(0)
  for _ in range(24):
    yield rng.normal(0.5, 1.5, 5), rng.random(5), rng.uniform(0.05, 2.5)
  corner = np.array([0.0, 1, 0, 1, 1])
  yield corner + [2, -2, -3, 3, -0.1], corner, 0.7  # some pixels cannot move at all
  yield corner + [-2, 2, -3, 3, 1], corner, 0.7  # none can
  yield np.full(5, 0.9), np.full(5, 0.5), 1.0  # ties
  yield np.array([0.5, 0.5, 3, 0.5, 0.5]), np.full(5, 0.5), 2.0  # one pixel against its wall
  yield np.full(5, 0.5), np.full(5, 0.5), 0.3  # nothing to do
  yield rng.normal(0.5, 1, 5), rng.random(5), 0.0
  yield rng.normal(0.5, 9, 5), rng.random(5), 99.0  # the cube alone


def test_l1_projection_is_the_nearest_point_of_ball_and_cube():
  xs, centers, radii = map(np.array, zip(*cases(), strict=True))
  project_all = jax.vmap(
    lambda x, c, r: norms.project(x[None, None, None], c[None, None, None], r, "l1")[0, 0, 0]
  )
  found = np.array(project_all(xs.astype(np.float32), centers.astype(np.float32), radii.astype(np.float32)))
  for x, center, radius, got in zip(xs, centers, radii, found, strict=True):
    np.testing.assert_allclose(got, nearest_point_l1(x, center, radius), atol=2e-5)


@pytest.mark.parametrize("radius", [0.5, 12.0, 300.0])
def test_l1_projection_of_a_whole_image_spends_exactly_the_radius(radius):
  center = images(0, b=4, shape=(32, 32, 3))
  x = center + jax.random.normal(jax.random.key(1), center.shape)
  got = project(x, center, radius, "l1")
  # An independent route: bisection on the shrinkage in float64.
  delta, mid = np.float64(x) - np.float64(center), np.float64(center)
  room = np.where(delta > 0, 1 - mid, mid)
  low, high = np.zeros((4, 1, 1, 1)), np.full((4, 1, 1, 1), 9.0)
  for _ in range(80):
    theta = (low + high) / 2
    total = np.clip(np.abs(delta) - theta, 0, np.minimum(np.abs(delta), room)).sum((1, 2, 3), keepdims=True)
    low, high = np.where(total > radius, theta, low), np.where(total > radius, high, theta)
  expected = mid + np.sign(delta) * np.clip(np.abs(delta) - high, 0, np.minimum(np.abs(delta), room))
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(norms.lengths(got - center, "l1"), radius, rtol=1e-5)


@pytest.mark.floor
def test_linf_and_l2_projections_against_their_formulas():
  center = images(2)
  x = center + jax.random.normal(jax.random.key(3), center.shape)
  low, high = np.maximum(center - 0.1, 0), np.minimum(center + 0.1, 1)
  np.testing.assert_allclose(project(x, center, 0.1, "linf"), np.clip(x, low, high), atol=1e-7)
  delta = np.float64(x - center)
  length = np.sqrt((delta**2).sum((1, 2, 3), keepdims=True))
  np.testing.assert_allclose(
    project(x, center, 0.7, "l2"),
    np.clip(center + delta * np.minimum(1, 0.7 / length), 0, 1),
    atol=1e-6,
  )


@pytest.mark.floor
@pytest.mark.parametrize("norm", norms.NORMS)
def test_projection_stays_in_ball_and_cube_and_leaves_inner_points_alone(norm):
  center = images(4).at[0].set(0.0).at[1].set(1.0)
  x = center + 3 * jax.random.normal(jax.random.key(5), center.shape)
  for radius in (0.0, 0.03, 1.0, 1000.0):
    got = project(x, center, radius, norm)
    assert got.dtype == jnp.float32
    assert (got >= 0).all() and (got <= 1).all()
    assert (norms.lengths(got - center, norm) <= radius * (1 + 1e-5) + 1e-6).all()
    np.testing.assert_allclose(project(got, center, radius, norm), got, atol=2e-6)
  np.testing.assert_array_equal(project(x, center, 0.0, norm), center)
  traced = jax.jit(norms.project, static_argnames="norm")(x, center, 0.03, norm=norm)
  np.testing.assert_allclose(traced, project(x, center, 0.03, norm), atol=1e-6)


@pytest.mark.floor
@pytest.mark.parametrize("norm", norms.NORMS)
def test_a_step_reaches_the_dual_norm(norm):
  """max <g, d> over the unit ball is the dual norm of g."""
  gradient = jax.random.normal(jax.random.key(6), (8, 4, 4, 3))
  if norm == "l1":  # from the middle of the cube, where no wall is near
    step = 4 * (norms.l1_step(jnp.full_like(gradient, 0.5), gradient, 0.25, fraction=0.0) - 0.5)
    np.testing.assert_array_equal(norms.l1_step(gradient, jnp.zeros_like(gradient), 0.25), gradient)
  else:
    step = norms.ascend(gradient, norm)
    np.testing.assert_array_equal(norms.ascend(jnp.zeros_like(gradient), norm), 0)
  np.testing.assert_allclose(norms.lengths(step, norm), 1, rtol=1e-6)
  np.testing.assert_allclose((step * gradient).sum((1, 2, 3)), norms.lengths(gradient, DUAL[norm]), rtol=1e-6)


def test_ascend_has_no_l1():
  with pytest.raises(InputError, match="'l1'; the choices are linf, l2"):
    norms.ascend(images(0), "l1")


def test_l1_step_takes_equal_steps_on_the_largest_gradients():
  gradient = jax.random.normal(jax.random.key(7), (3, 10, 10, 1))
  step = np.array(norms.l1_step(jnp.full_like(gradient, 0.5), gradient, 1.0, fraction=0.1) - 0.5).reshape(
    3, -1
  )
  order = np.argsort(-np.abs(np.array(gradient).reshape(3, -1)), axis=1)
  for row, pixels, g in zip(step, order, np.array(gradient).reshape(3, -1), strict=True):
    np.testing.assert_allclose(row[pixels[:10]], np.sign(g[pixels[:10]]) / 10, rtol=1e-5)
    np.testing.assert_allclose(row[pixels[10:]], 0, atol=1e-7)


def test_what_a_wall_stops_in_an_l1_step_goes_to_the_next_pixels():
  x = jnp.array([0.95, 0.3, 1.0, 0.5]).reshape(1, 2, 2, 1)
  gradient = jnp.array([4.0, -2.0, 5.0, 1.0]).reshape(1, 2, 2, 1)
  got = norms.l1_step(x, gradient, 0.2, fraction=0.0)
  np.testing.assert_allclose(got.ravel(), [1.0, 0.15, 1.0, 0.5], atol=1e-6)


def test_ascend_l2_is_short_below_its_floor():
  gradient = jnp.full((1, 2, 2, 1), 1e-8)
  np.testing.assert_allclose(norms.lengths(norms.ascend(gradient, "l2"), "l2"), 1, rtol=1e-6)
  np.testing.assert_allclose(norms.lengths(norms.ascend(gradient, "l2", floor=1e-6), "l2"), 0.02, rtol=1e-5)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_random_starts_fill_the_ball_and_follow_their_keys(norm):
  x = images(8, b=64)
  radius = {"linf": 0.1, "l2": 0.5, "l1": 2.0}[norm]
  start = norms.random_start(jax.random.key(9), x, radius, norm)
  sizes = norms.lengths(start - x, norm)
  assert (sizes <= radius * (1 + 1e-5)).all() and (sizes > 0.9 * radius).all()
  assert (start >= 0).all() and (start <= 1).all()
  twins = norms.random_start(jax.random.key(9), jnp.full((16, 4, 4, 3), 0.5), radius, norm)
  assert len(np.unique(np.array(twins).reshape(16, -1), axis=0)) == 16
  np.testing.assert_array_equal(norms.random_start(jax.random.key(9), x, 0.0, norm), x)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(10), jnp.arange(64))
  rows = jnp.array([5, 63, 2])
  np.testing.assert_allclose(
    norms.random_start(keys, x, radius, norm)[rows],
    norms.random_start(keys[rows], x[rows], radius, norm),
    atol=1e-7,
  )


def test_linf_start_is_uniform():
  x = jnp.full((16, 16, 16, 3), 0.5)
  offset = np.array(norms.random_start(jax.random.key(11), x, 0.1, "linf") - x).ravel() / 0.1
  # 12288 draws of U(-1, 1): standard errors 0.0052 of the mean, 0.0027 of the mean square.
  assert abs(offset.mean()) < 0.026 and abs((offset**2).mean() - 1 / 3) < 0.0135
  assert offset.min() < -0.99 and offset.max() > 0.99


@pytest.mark.floor
def test_bfloat16_is_widened():
  x = images(12).astype(jnp.bfloat16)
  assert project(x, x, 0.1, "linf").dtype == jnp.float32
  assert norms.random_start(jax.random.key(0), x, 0.1, "l2").dtype == jnp.float32


@pytest.mark.floor
def test_unknown_norm_lists_the_choices():
  with pytest.raises(InputError, match="'l3'; the choices are linf, l2, l1"):
    norms.project(images(0), images(0), 0.1, "l3")
