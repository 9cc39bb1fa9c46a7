"""Processes against the closed forms of their papers: scale, sigma, inverses, and the SDE they imply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff.diffusion.processes import EDM, IDDPM, PROCESSES, VE, VP, Discrete, SubVP
from jax_trustdiff.types import InputError

pytestmark = pytest.mark.usefixtures("float64")


def times(process, n=200):
  low, high = process.t_range
  return np.linspace(low, high, n)


@pytest.mark.parametrize("name", PROCESSES)
def test_inverse_and_growth(name):
  process = PROCESSES[name]()
  t = times(process)
  sigma = np.asarray(process.sigma(t))
  assert (np.diff(sigma) > 0).all()
  np.testing.assert_allclose(process.t_of_sigma(sigma), t, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(process.scale_of_sigma(sigma), process.scale(t), rtol=1e-9)
  np.testing.assert_allclose([process.sigma_min, process.sigma_max], sigma[[0, -1]], rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_floats_keep_their_width_in_64_bit_mode(name):
  process = PROCESSES[name]()
  t = jnp.asarray(times(process), jnp.float32)
  sigma = process.sigma(t)
  for found in (sigma, process.scale(t), process.t_of_sigma(sigma), process.scale_of_sigma(sigma)):
    assert found.dtype == jnp.float32
  assert process.sigma(t.astype(jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize("name", ["iddpm", "discrete"])
def test_the_range_of_a_table_is_that_of_its_levels(name):
  process = PROCESSES[name]()
  for x64 in (True, False):
    jax.config.update("jax_enable_x64", x64)
    assert (process.sigma_min, process.sigma_max) == tuple(process.sigmas[[0, -1]])


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_inverse(name):
  """Near both ends too: nothing cancels."""
  process = PROCESSES[name]()
  jax.config.update("jax_enable_x64", False)
  t = jnp.asarray(times(process), jnp.float32)
  back = process.t_of_sigma(process.sigma(t))
  assert back.dtype == jnp.float32
  np.testing.assert_allclose(back, t, rtol=2e-5, atol=1e-6 * process.t_range[1])


def test_vp_is_song_et_al_eq_11():
  process, t = VP(), times(VP())
  beta = 0.1 + 19.9 * t
  log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
  np.testing.assert_allclose(process.scale(t), np.exp(log_mean), rtol=1e-12)
  np.testing.assert_allclose(
    process.scale(t) * process.sigma(t), np.sqrt(-np.expm1(2 * log_mean)), rtol=1e-12
  )
  np.testing.assert_allclose(process.drift(t), -beta / 2, rtol=1e-9)
  np.testing.assert_allclose(process.diffusion(t), np.sqrt(beta), rtol=1e-9)
  assert process.sigma_max == pytest.approx(152.1670, abs=1e-4)  # Karras et al. 2022, released code: sigma(1)
  assert VP(t_min=1e-3).sigma_min == pytest.approx(0.010485993, abs=1e-8)


def test_sub_vp_is_song_et_al_eq_29():
  process, t = SubVP(), times(SubVP())
  beta = 0.1 + 19.9 * t
  log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
  np.testing.assert_allclose(process.scale(t) * process.sigma(t), -np.expm1(2 * log_mean), rtol=1e-12)
  np.testing.assert_allclose(process.drift(t), -beta / 2, rtol=1e-9)
  expected = np.sqrt(beta * -np.expm1(-2 * 0.1 * t - 19.9 * t**2))
  np.testing.assert_allclose(process.diffusion(t), expected, rtol=1e-9)


def test_ve_is_song_et_al_eq_9():
  process, t = VE(), times(VE())
  np.testing.assert_allclose(process.sigma(t), 0.01 * 5000**t, rtol=1e-12)
  np.testing.assert_allclose(process.drift(t), 0, atol=1e-15)
  np.testing.assert_allclose(process.diffusion(t), process.sigma(t) * np.sqrt(2 * np.log(5000)), rtol=1e-12)


def test_edm_sde():
  t = times(EDM())
  np.testing.assert_allclose(EDM().diffusion(t), np.sqrt(2 * t), rtol=1e-12)


@pytest.mark.parametrize("schedule, start, end", [("scaled_linear", 0.00085, 0.012), ("linear", 1e-4, 0.02)])
def test_discrete_is_the_product_of_its_betas(schedule, start, end):
  process = Discrete(schedule, start, end)
  betas = (
    np.linspace(start, end, 1000) if schedule == "linear" else np.linspace(start**0.5, end**0.5, 1000) ** 2
  )
  kept = np.cumprod(1 - betas)
  t = np.arange(1000.0)
  np.testing.assert_allclose(process.scale(t), np.sqrt(kept), rtol=1e-10)
  np.testing.assert_allclose(process.scale(t) * process.sigma(t), np.sqrt(1 - kept), rtol=1e-10)


def test_iddpm_table():
  process = IDDPM()
  assert len(process.sigmas) == 1000
  assert process.sigmas[0] == pytest.approx(
    0.00642234, rel=1e-3
  )  # u_999 (in float32) and u_0 of the released table
  assert process.sigmas[-1] == pytest.approx(20291.17, rel=1e-6)


def test_nearest_sigma_of_a_table():
  process = IDDPM()
  sigma = np.exp(np.random.default_rng(0).uniform(np.log(1e-3), np.log(3e4), 500))
  expected = np.abs(process.sigmas[None] - sigma[:, None]).argmin(1)
  np.testing.assert_array_equal(process.nearest(sigma), expected)
  np.testing.assert_allclose(process.round_sigma(sigma), process.sigmas[expected])
  assert (expected == 0).any() and (expected == 999).any() and len(set(expected)) > 100


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm"])
def test_the_sde_carries_scale_and_variance(name):
  """d scale/dt = f scale and d var/dt = 2 f var + g^2, integrated by a fine midpoint rule."""
  process = PROCESSES[name]()
  low, high = 0.3 * process.t_range[1], 0.6 * process.t_range[1]
  steps = 4000
  t = low + (np.arange(steps) + 0.5) * (high - low) / steps
  h = (high - low) / steps
  drift, diffusion = np.asarray(process.drift(t)), np.asarray(process.diffusion(t))
  scale, variance = float(process.scale(low)), float((process.scale(low) * process.sigma(low)) ** 2)
  for f, g in zip(drift, diffusion, strict=True):
    scale *= np.exp(f * h)
    variance = variance * np.exp(2 * f * h) + g**2 * h * np.exp(f * h)
  assert scale == pytest.approx(float(process.scale(high)), rel=1e-6)
  assert variance == pytest.approx(float((process.scale(high) * process.sigma(high)) ** 2), rel=1e-5)


def test_diffuse():
  process, rng = VP(), np.random.default_rng(1)
  x0, noise = jnp.asarray(rng.normal(size=(2, 3, 4, 4, 2)))
  t = jnp.array([0.1, 0.5, 0.9])
  expected = [
    process.scale(s) * a + process.scale(s) * process.sigma(s) * n
    for s, a, n in zip(t, x0, noise, strict=True)
  ]
  np.testing.assert_allclose(process.diffuse(x0, t, noise), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", PROCESSES.values())
def test_hashable_and_equal_by_fields(kind):
  assert kind() == kind() and hash(kind()) == hash(kind())
  assert VP(t_min=1e-3) != VP() and Discrete(num_steps=10) != Discrete()


@pytest.mark.parametrize(
  "make",
  [
    lambda: VP(beta_min=0.0),
    lambda: SubVP(t_min=1.0),
    lambda: VE(lowest=2.0, highest=1.0),
    lambda: EDM(lowest=0.0),
    lambda: Discrete("cosine"),
    lambda: Discrete(beta_end=1.0),
  ],
)
def test_refuses(make):
  with pytest.raises(InputError) as error:
    make()
  assert "\n" not in str(error.value)
