"""What holds for every sampler of the registry: fit, cost, independence of the batch, and building from a config."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import GaussianMixture, far_apart, fit, high_dimensional, small

from jax_trustdiff import config as config_lib
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler, AdaptiveSDESampler
from jax_trustdiff.diffusion.losses import LOSSES, ScoreMatchingLoss
from jax_trustdiff.diffusion.processes import VE, VP, Discrete, SubVP, as_process
from jax_trustdiff.diffusion.samplers import (
  SAMPLERS,
  AncestralSampler,
  DPMSolverPP2M,
  EDMSampler,
  annealed_langevin,
  euler_maruyama,
  reverse_diffusion,
)
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler
from jax_trustdiff.types import InputError

pytestmark = pytest.mark.computes

WORLD = GaussianMixture(
  jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 0.7), jnp.array([0.05, 0.1, 0.02])
)


@pytest.mark.slow
@pytest.mark.parametrize(
  "sampler",
  [
    EDMSampler(num_steps=40),
    EDMSampler(num_steps=150, churn=30, churn_noise=1.0),
    EDMSampler(num_steps=60, discretization="vp", schedule="vp", scaling="vp"),
    AncestralSampler(num_steps=500),
    DPMSolverPP2M(num_steps=60),
    euler_maruyama(500),
    reverse_diffusion(500),
    PredictorCorrectorSampler(300, VE(), "reverse_diffusion", snr=0.1, step_norms="batch"),
    PredictorCorrectorSampler(300, SubVP(), "ancestral", snr=0.1, step_norms="batch"),
    annealed_langevin(100, corrector_steps=30, snr=0.25),
    AdaptiveODESampler(),
    AdaptiveODESampler(solver="dopri5", rtol=1e-4, atol=1e-4, coupled=True),
    AdaptiveSDESampler(),
    AdaptiveSDESampler(coupled=True),
  ],
  ids=lambda sampler: type(sampler).__name__,
)
def test_samples_fit_the_world(sampler):
  """Chi-square of radii about the nearest mean: accepted, and refused where the denoiser believes in 10 % more noise."""
  check_fit(far_apart(), sampler, *small(2000, seed=5))


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
def test_correctors_with_steps_of_each_image_fit_in_many_dimensions(predictor):
  """In d of them corrections alone would make the variance too large by about 4 / d."""
  sampler = PredictorCorrectorSampler(200, "ve:lowest=0.02,highest=10", predictor, snr=0.1)
  check_fit(high_dimensional(), sampler, *small(100, 6, (16, 16, 3)))


def check_fit(world, sampler, keys, noise):
  run = jax.jit(lambda scaled, x, k: sampler(lambda x, sigma: world(x, scaled * sigma), x, k))
  weights, shells = fit(world, run(1.0, noise, keys))
  assert weights > 1e-3 and shells > 1e-3
  assert fit(world, run(1.1, noise, keys))[1] < 1e-6


SMALL = {
  "edm": EDMSampler(7),
  "edm churn": EDMSampler(7, churn=5.0),
  "ancestral": AncestralSampler(7),
  "dpmpp_2m": DPMSolverPP2M(7),
  "predictor_corrector": PredictorCorrectorSampler(7),
  "predictor_corrector twice": PredictorCorrectorSampler(4, "ve", "ancestral", corrector_steps=2),
  "euler_maruyama": euler_maruyama(7),
  "reverse_diffusion": reverse_diffusion(7),
  "annealed_langevin": annealed_langevin(4, corrector_steps=3),
  "adaptive_ode": AdaptiveODESampler(rtol=1e-3, atol=1e-3),
  "adaptive_sde": AdaptiveSDESampler(rtol=0.1, atol=0.1),
}


QUICK = ("edm churn", "dpmpp_2m", "predictor_corrector", "adaptive_ode")


@pytest.mark.parametrize(
  "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_cost_and_independence_of_the_batch(name):
  """Eight images at once, in another order, and four at a time. Evaluations are counted while it runs.

  Not bit for bit: how XLA rounds depends on the place in a batch, and a world of narrow components amplifies it.
  """
  sampler, calls, order = SMALL[name], [], np.array([5, 2, 7, 0, 1, 3, 6, 4])
  keys, noise = small(8)
  adaptive = isinstance(sampler, (AdaptiveODESampler, AdaptiveSDESampler))

  def denoise(x, sigma):
    jax.debug.callback(lambda: calls.append(1))
    return WORLD(x, sigma)

  @jax.jit
  def run(x, k):
    found = sampler.sample(denoise, x, k) if adaptive else (sampler(denoise, x, k), sampler.nfe)
    return found[:2]

  together, nfe = jax.block_until_ready(run(noise, keys))
  jax.effects_barrier()
  assert len(calls) == np.max(nfe)
  assert len(np.unique(np.asarray(together).round(4), axis=0)) == 8
  rounding = 1e-4
  np.testing.assert_allclose(run(noise[order], keys[order])[0], together[order], rtol=0, atol=rounding)
  halves = [run(noise[part], keys[part])[0] for part in (slice(4), slice(4, 8))]
  np.testing.assert_allclose(np.concatenate(halves), together, rtol=0, atol=rounding)


@pytest.mark.parametrize(
  "name",
  [
    name if name in (*QUICK, "adaptive_sde") else pytest.param(name, marks=pytest.mark.slow) for name in SMALL
  ],
)
def test_the_precision_is_that_of_the_noise(float64, name):
  """In 64-bit mode too: float32 stays float32 and gives the images of 32-bit mode."""
  keys, noise = small(4)
  run = lambda x: jax.jit(lambda x, k: SMALL[name](WORLD, x, k))(x, keys)  # noqa: E731
  found = run(noise)
  assert noise.dtype == found.dtype == jnp.float32
  assert run(noise.astype(jnp.float64)).dtype == jnp.float64
  jax.config.update("jax_enable_x64", False)
  assert np.isfinite(found).all()
  np.testing.assert_allclose(found, run(noise), rtol=0, atol=1e-3)


def test_another_key_is_another_image():
  keys, noise = small(4)
  others = small(4, seed=1)[0]
  for name in ("edm churn", "euler_maruyama"):
    run = jax.jit(lambda x, k, sampler=SMALL[name]: sampler(WORLD, x, k))
    assert np.abs(run(noise, keys) - run(noise, others)).max() > 1e-2, name


# ---- from configs ----


@pytest.mark.parametrize("registry", [SAMPLERS, LOSSES], ids=["samplers", "losses"])
def test_every_entry_builds_from_its_default_section(registry):
  """Sections as a recipe writes them, with every key."""
  for name, constructor in registry.items():
    parameters = inspect.signature(constructor).parameters
    section = {"name": name} | {key: parameter.default for key, parameter in parameters.items()}
    assert len(section) > 1
    kinds = {type(value) for value in section.values()}
    assert kinds <= {int, float, str, bool, tuple}, name
    assert config_lib.build(registry, config_lib.from_plain(section)) == constructor(), name


def test_sections_with_processes_by_name():
  section = {"name": "predictor_corrector", "num_steps": 5, "process": "ve:lowest=0.02,highest=100"}
  assert config_lib.build(SAMPLERS, section) == PredictorCorrectorSampler(5, VE(0.02, 100.0))
  section = {"name": "score_matching", "process": "sub_vp", "likelihood_weighting": True}
  assert config_lib.build(LOSSES, section) == ScoreMatchingLoss(SubVP(), True)
  section = {"name": "ancestral", "round_to": "discrete:schedule=linear,num_steps=500"}
  assert config_lib.build(SAMPLERS, section).round_to == Discrete("linear", num_steps=500)
  assert euler_maruyama().process == VP(t_min=1e-3) and as_process(VE()) == VE()
  assert dataclasses.replace(euler_maruyama(), process="ve") == euler_maruyama(process=VE())


def test_another_name_from_the_command_line():
  """`sampler.name` gives the section the keys of the other sampler."""
  config = config_lib.from_plain({"sampler": {"name": "edm", "num_steps": 18, "churn": 3.0}})
  config_lib.override(config, {"sampler.name": "predictor_corrector", "sampler.process": "ve"})
  found = config_lib.build(SAMPLERS, config.sampler)
  assert found == PredictorCorrectorSampler(18, "ve")


@pytest.mark.parametrize(
  "text, words",
  [
    ("pv", "unknown process 'pv'; known: vp, sub_vp"),
    ("ve:sigma=1", "does not take 'sigma'; it takes: lowest, highest"),
    ("vp:t_min=early", "t_min of process 'vp' must be float, got 'early'"),
    ("ve:lowest=60", "needs 0 < lowest < highest"),
  ],
)
def test_refuses_processes(text, words):
  with pytest.raises(InputError, match=words):
    euler_maruyama(process=text)
