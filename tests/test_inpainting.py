"""Inpainting where the conditional distribution, and that to which replacement tends, are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import far_apart, small

from jax_trustdiff.diffusion.inpainting import Known
from jax_trustdiff.diffusion.samplers import (
  AncestralSampler,
  DPMSolverPP2M,
  EDMSampler,
  annealed_langevin,
  euler_maruyama,
)
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError

V, R = 0.25, 0.8  # variance and correlation of two pixels


@register_pytree
@dataclasses.dataclass(frozen=True)
class TwoPixels:
  """Normal with mean 0 and covariance V [[1, R], [R, 1]]; images [b 1 2 1]."""

  correlation: jax.Array

  def __call__(self, x, sigma):
    both, apart = (
      x.sum(2, keepdims=True) / 2,
      (x[:, :, :1] - x[:, :, 1:]) / 2,
    )  # along the axes of the ellipse
    s = jnp.square(sigma)[:, None, None, None]
    both, apart = (
      part * variance / (variance + s)
      for part, variance in ((both, V * (1 + self.correlation)), (apart, V * (1 - self.correlation)))
    )
    return jnp.concatenate([both + apart, both - apart], 2)


WORLD = TwoPixels(jnp.float32(R))
MASK = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)  # the left pixel is known


def inpaint(sampler, value, n=4000, seed=1):
  """The right pixels where the left one is `value`."""
  keys, noise = small(n, seed, (1, 2, 1))
  image = jnp.full(noise.shape, value).at[:, :, 1].set(77.0)  # not known, and not to be seen
  run = jax.jit(lambda x, k, known: sampler(WORLD, x, k, known=known))
  found = np.asarray(run(noise, keys, Known(image, MASK))).reshape(n, 2)
  np.testing.assert_array_equal(found[:, 0], np.float32(value))
  return found[:, 1]


@pytest.mark.parametrize(
  "sampler",
  [AncestralSampler(400, 0.005, 20.0), PredictorCorrectorSampler(400, "ve:highest=20", "ancestral", "none")],
)
@pytest.mark.parametrize("value", [0.5, -0.2])
def test_steps_alone_tend_to_the_known_limit(sampler, value):
  """See `Known`: (1 - sqrt(1 - R^2)) / R = 0.5 of the known pixel, where the conditional mean is R = 0.8 of it."""
  found = inpaint(sampler, value)
  error = found.std() / np.sqrt(len(found))
  assert abs(found.mean() - (1 - np.sqrt(1 - R**2)) / R * value) < 4 * error + 0.01 * abs(value)
  assert abs(found.mean() - R * value) > 4 * error + 0.1 * abs(value)


@pytest.mark.slow
@pytest.mark.parametrize(
  "sampler",
  [
    annealed_langevin(120, "ve:lowest=0.02,highest=5", corrector_steps=40, snr=0.3),
    PredictorCorrectorSampler(
      120, "ve:lowest=0.02,highest=5", corrector="annealed", corrector_steps=40, snr=0.3
    ),
    PredictorCorrectorSampler(120, "vp:t_min=0.001", "ancestral", "annealed", corrector_steps=40, snr=0.3),
  ],
)
@pytest.mark.computes
def test_corrections_lead_to_the_conditional_distribution(sampler):
  """Mean R y within 4 % of y, standard deviation sqrt(V (1 - R^2)) within 10 %: the steps at small sigma are short."""
  value = 0.6
  found = inpaint(sampler, value, n=1500)
  error = found.std() / np.sqrt(len(found))
  assert abs(found.mean() - R * value) < 4 * error + 0.04 * value
  assert found.std() == pytest.approx(np.sqrt(V * (1 - R**2)), rel=0.1)


FIXED = {
  "heun": EDMSampler(30),
  "vp": EDMSampler(30, schedule="vp", scaling="vp", discretization="vp", churn=10.0),
  "ancestral": AncestralSampler(50),
  "dpmpp_2m": DPMSolverPP2M(30),
  "euler_maruyama": euler_maruyama(60),
  "predictor_corrector": PredictorCorrectorSampler(60, step_norms="batch", snr=0.1),
}


QUICK = ("vp", "predictor_corrector")


@pytest.mark.parametrize(
  "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FIXED]
)
def test_known_pixels_choose_the_component(name):
  """The first two pixels tell the components apart: the free ones are of the right one, with its mean and width."""
  world, sampler = far_apart(), FIXED[name]
  keys, noise = small(400, 3)
  component = jnp.arange(400) % 3
  image = world.mean[component].reshape(noise.shape)
  mask = jnp.zeros((1, 2, 2, 1)).at[:, 0].set(1.0)
  run = jax.jit(lambda x, k, known: sampler(world, x, k, known=known))
  found = run(noise, keys, Known(image, mask))
  np.testing.assert_array_equal(found[:, 0], image[:, 0])
  free = np.asarray(found[:, 1] - image[:, 1]).reshape(400, 2) / np.sqrt(world.variance)[component, None]
  assert np.abs(free.mean(0)).max() < 4.5 / np.sqrt(400) + 0.05
  assert 0.7 < free.std() < 1.3
  unconditional = run(noise, keys, Known(image, 0 * mask))
  assert np.abs(unconditional[:, 1] - image[:, 1]).mean() > 0.5


def test_noise_of_known_pixels_is_of_their_level_and_of_no_other_draw():
  """States of a long trajectory: standard normal once the image and scale are taken away, and new in every step."""
  sampler = PredictorCorrectorSampler(50, "vp:t_min=0.001", corrector_steps=1)
  keys, noise = small(300, 4)
  known = Known(jnp.full(noise.shape, 0.4), jnp.ones((1, 1, 1, 1), bool))
  states = jax.jit(lambda x, k: sampler(far_apart(), x, k, known=known, trajectory=True))(noise, keys)
  table = sampler.table()
  sigma, scale = table["sigma"][1:], table["scale"][1:]
  # the state after update i is at the level at which update i + 1 begins
  drawn = (np.asarray(states[:-1]) / scale[:, None, None, None, None] - 0.4) / sigma[
    :, None, None, None, None
  ]
  drawn = drawn.reshape(len(sigma), -1)
  assert np.abs(drawn.std(1) - 1).max() < 4.5 / np.sqrt(2 * drawn.shape[1])
  correlation = np.corrcoef(np.concatenate([drawn, np.asarray(noise).reshape(1, -1)]))
  assert np.abs(correlation - np.eye(len(correlation))).max() < 5.5 / np.sqrt(drawn.shape[1])
  np.testing.assert_array_equal(states[-1], known.image)


def test_deterministic_by_key_and_independent_of_the_batch():
  keys, noise = small(8)
  image = far_apart().mean[jnp.arange(8) % 3].reshape(noise.shape)
  mask = (jnp.arange(32).reshape(noise.shape) % 3 == 0).astype(jnp.float32)  # another one for each image
  run = jax.jit(lambda x, k, known: EDMSampler(8)(far_apart(), x, k, known=known))
  together = run(noise, keys, Known(image, mask))
  order = np.array([6, 1, 3, 0])
  found = run(noise[order], keys[order], Known(image[order], mask[order]))
  np.testing.assert_array_equal(found, together[order])
  np.testing.assert_array_equal(run(noise, keys, Known(image, mask)), together)
  assert np.abs(run(noise, small(8, 9)[0], Known(image, mask)) - together).max() > 1e-2
  unconditional = jax.jit(lambda x: EDMSampler(8)(far_apart(), x))(noise)
  np.testing.assert_array_equal(run(noise, keys, Known(image, 0 * mask)), unconditional)


def test_refuses():
  keys, noise = small(2)
  known = Known(noise, MASK)
  with pytest.raises(InputError, match="inpainting draws noise"):
    DPMSolverPP2M(4)(WORLD, noise, known=known)
  with pytest.raises(InputError, match=r"must fit the noise, \(2, 2, 2, 1\); got \(3, 2, 2, 1\)"):
    DPMSolverPP2M(4)(WORLD, noise, keys, known=Known(small(3)[1], MASK))
  with pytest.raises(InputError, match=r"\(2, 2, 2, 1\) and \(2, 1\)"):
    DPMSolverPP2M(4)(WORLD, noise, keys, known=Known(noise, MASK[0, 0]))
  with pytest.raises(InputError, match="do not go together"):
    DPMSolverPP2M(4)(WORLD, noise, keys, known=known, state=jnp.zeros(2))
