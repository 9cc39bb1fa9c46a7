"""Preconditionings and predictions: the algebra against closed forms, and D against reference values."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.diffusion import denoisers
from jax_trustdiff.diffusion.denoisers import PRECONDITIONINGS, PREDICTIONS, Denoiser, convert
from jax_trustdiff.diffusion.processes import EDM, IDDPM, VP
from jax_trustdiff.types import DiffusionNetwork, InputError

RNG = np.random.default_rng(0)
X0, NOISE = (jnp.asarray(RNG.normal(size=(5, 4, 4, 3)), jnp.float32) for _ in range(2))
SIGMA = jnp.array([0.01, 0.3, 1.0, 4.0, 70.0])
COLUMN = SIGMA[:, None, None, None]
NOISY = X0 + COLUMN * NOISE

# What a perfect network says about one clean image, by the definition of each prediction.
ALPHA, STD = 1 / jnp.sqrt(1 + COLUMN**2), COLUMN / jnp.sqrt(1 + COLUMN**2)
TRUTH = {
  "x0": X0,
  "noise": NOISE,
  "score": -NOISE / COLUMN,
  "v": ALPHA * NOISE - STD * X0,
  "flow": NOISE - X0,
}


@pytest.mark.parametrize("source, target", list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_becomes_every_other(source, target):
  found = convert(TRUTH[source], NOISY, SIGMA, source, target)
  # Rounding of x is magnified where the target is a difference of larger numbers: at most sigma or 1 / sigma^2 times.
  for i, sigma in enumerate(np.asarray(SIGMA)):
    unit = {"x0": 1, "noise": 1 / sigma, "score": 1 / sigma**2, "v": 1 / sigma, "flow": 1 / sigma}
    tolerance = 2e-6 * (1 + sigma) * max(1, unit[target]) * (1 + sigma)
    np.testing.assert_allclose(found[i], TRUTH[target][i], atol=tolerance, rtol=1e-4)
  again = convert(found, NOISY, SIGMA, target, source)
  scale = np.abs(TRUTH[source]).max((1, 2, 3)) + np.abs(NOISY).max((1, 2, 3)) * np.asarray(1 / SIGMA + 1)
  assert (np.abs(again - TRUTH[source]).max((1, 2, 3)) <= 1e-4 * scale * np.asarray(1 + SIGMA)).all()


def test_conversions_in_float64_are_exact(float64):
  x0, noise, sigma = (jnp.asarray(np.asarray(a), jnp.float64) for a in (X0, NOISE, SIGMA))
  x = x0 + sigma[:, None, None, None] * noise
  for source, target in itertools.product(PREDICTIONS, PREDICTIONS):
    value = convert(noise, x, sigma, "noise", source)
    back = convert(convert(value, x, sigma, source, target), x, sigma, target, "noise")
    np.testing.assert_allclose(back, noise, rtol=1e-9, atol=1e-9)


def test_unknown_prediction():
  with pytest.raises(InputError, match="'epsilon'.*noise"):
    convert(X0, X0, SIGMA, "epsilon", "x0")
  with pytest.raises(InputError, match="'epsilon'"):
    denoisers.ProcessPreconditioning(VP(), "epsilon")
  with pytest.raises(InputError, match="table"):
    denoisers.ProcessPreconditioning(VP(), whole_times=True)


def test_edm_preconditioning_has_its_defining_properties():
  """Karras et al. 2022, appendix B.6: unit variance of input and target, and the smallest c_out."""
  c = PRECONDITIONINGS["edm"](sigma_data=0.7).coefficients(SIGMA)
  variance = 0.7**2
  np.testing.assert_allclose(c.input**2 * (variance + SIGMA**2), 1, rtol=1e-6)  # eq. 117
  target = (1 - c.skip) ** 2 * variance + c.skip**2 * SIGMA**2  # of x0 - c_skip x, eq. 124
  np.testing.assert_allclose(c.out**2, target, rtol=1e-5)
  for nearby in (c.skip * 1.01, c.skip * 0.99):
    assert ((1 - nearby) ** 2 * variance + nearby**2 * SIGMA**2 > target * (1 - 1e-6)).all()
  np.testing.assert_allclose(c.noise, np.log(SIGMA) / 4, rtol=1e-6)


def test_vp_and_iddpm_tell_the_network_its_time():
  t = jnp.array([0.001, 0.2, 0.7, 1.0])
  c = PRECONDITIONINGS["vp"]().coefficients(VP().sigma(t))
  np.testing.assert_allclose(c.noise, 999 * t, rtol=1e-5)
  np.testing.assert_allclose(c.input, VP().scale(t), rtol=1e-5)
  table = IDDPM().sigmas
  preconditioning = PRECONDITIONINGS["iddpm"]()
  c = preconditioning.coefficients(jnp.asarray(table[[0, 10, 999]] * 1.0005, jnp.float32))
  np.testing.assert_array_equal(c.noise, [0, 10, 999])  # M - 1 - j of u_j
  np.testing.assert_allclose(
    preconditioning.round_sigma(jnp.asarray(table[[3, 500]] * 1.0005, jnp.float32)),
    table[[3, 500]],
    rtol=1e-6,
  )
  assert PRECONDITIONINGS["ve"]().round_sigma(SIGMA) is SIGMA


def test_discrete_with_whole_times():
  """A network is told the nearest time of the table, or one in between; iDDPM likewise where that is asked for."""
  betas = dict(schedule="linear", beta_start=1e-4, beta_end=0.02)
  for name, fields, default in (("discrete", betas, False), ("iddpm", {}, True)):
    whole, between = (PRECONDITIONINGS[name](**fields, whole_times=value) for value in (True, False))
    assert PRECONDITIONINGS[name](**fields) == (whole if default else between)
    levels = whole.process.sigmas
    sigma = jnp.asarray(np.sqrt(levels[[500, 700]] * levels[[501, 701]]) * 0.9999, jnp.float32)
    np.testing.assert_array_equal(whole.coefficients(sigma).noise, [500, 700])
    np.testing.assert_allclose(between.coefficients(sigma).noise, [500.5, 700.5], atol=0.05)
    np.testing.assert_allclose(whole.round_sigma(sigma), levels[[500, 700]], rtol=1e-6)
    assert between.round_sigma(sigma) is sigma
    every = jnp.asarray(levels, jnp.float32)
    np.testing.assert_array_equal(whole.coefficients(every).noise, np.arange(1000))
    np.testing.assert_array_equal(whole.round_sigma(every), every)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_coefficients_keep_the_precision_of_sigma(float64, name):
  for dtype in (jnp.float32, jnp.float64):
    found = PRECONDITIONINGS[name]().coefficients(jnp.asarray(SIGMA, dtype))
    assert {value.dtype for value in found} == {jnp.dtype(dtype)}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Perfect:
  """The network that knows the clean image and answers as `prediction` of a process asks."""

  prediction: str = "noise"
  image_shape: tuple = (4, 4, 3)
  num_classes: int = 0
  num_augment_labels: int = 0

  def init(self, key):
    return {"params": {}}

  def apply(self, variables, x, noise_labels, class_labels=None, augment_labels=None, dropout_key=None):
    return jnp.concatenate([TRUTH[self.prediction], jnp.ones_like(x)], -1)  # and learned variances


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_denoises(prediction):
  assert isinstance(Perfect(), DiffusionNetwork)
  preconditioning = denoisers.ProcessPreconditioning(EDM(), prediction)
  found = jax.jit(Denoiser(Perfect(prediction), preconditioning, {"params": {}}))(NOISY, SIGMA)
  np.testing.assert_allclose(found, X0, atol=2e-4)  # sigma 70 leaves 1e-5 of relative precision


def test_the_network_s_values_are_leaves():
  def make(value):
    return Denoiser(Perfect(), denoisers.EDMPreconditioning(), {"params": {"a": jnp.full(3, value)}})

  traces = []

  @jax.jit
  def call(denoise, x, sigma):
    traces.append(1)
    return denoise(x, sigma) + denoise.variables["params"]["a"].sum()

  first, second = (call(make(value), NOISY, SIGMA) for value in (0.0, 1.0))
  assert len(traces) == 1 and np.allclose(second - first, 3, atol=1e-4)


class Recorded:
  """Gives the reference's F, and checks what it is given against what the reference's network was given."""

  image_shape, num_classes, num_augment_labels = (16, 16, 3), 10, 9

  def __init__(self, golden):
    self.golden = golden

  def init(self, key):
    return {}

  def apply(self, variables, x, noise_labels, class_labels=None, augment_labels=None, dropout_key=None):
    np.testing.assert_allclose(x.transpose(0, 3, 1, 2), self.golden["net_input"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(noise_labels, self.golden["noise_labels"], rtol=1e-6, atol=1e-7)
    return jnp.asarray(self.golden["F"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["ddpmpp_edm_cond", "ncsnpp_ve_uncond", "adm_edm_cond"])
def test_reference_denoisers(name):
  golden = dict(np.load(shared_dir("golden", "edm_networks", f"{name}.npz")))
  config = json.loads(str(golden["config"]))
  preconditioning = PRECONDITIONINGS[config["precond"].removesuffix("Precond").lower()]()
  denoise = Denoiser(Recorded(golden), preconditioning, {})
  x = jnp.asarray(golden["x"].transpose(0, 2, 3, 1))
  found = denoise(x, jnp.asarray(golden["sigma"])).transpose(0, 3, 1, 2)
  tolerance = 2e-6 * np.maximum(1, golden["sigma"])[:, None, None, None]
  assert (np.abs(found - golden["D"]) <= tolerance).all()
