"""A state that goes along with the images: the running log-density of one Gaussian, whose exact value is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import GaussianMixture, small

from jax_trustdiff.diffusion.samplers import AncestralSampler, DPMSolverPP2M, EDMSampler, euler_maruyama
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler
from jax_trustdiff.diffusion.solvers import StatefulDenoiser
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError

MEAN, VARIANCE, D = 0.3, 0.25, 4


@register_pytree
@dataclasses.dataclass(frozen=True)
class Running:
  """log p(x; sigma), which has the expansion score dx + d/dsigma log p dsigma + tr(Hessian dx dx^T) / 2 (Ito)."""

  world: GaussianMixture

  def __call__(self, x, sigma, state):
    del state
    return self.world(x, sigma), self.world.score(x, sigma)

  def step_state(self, state, seen, at, start, end):
    total = VARIANCE + jnp.square(at.sigma)
    by_sigma = at.sigma * (jnp.square(seen).sum((1, 2, 3)) - D / total)  # the heat equation

    def expansion(point):
      dx = point.x - at.x
      square = jnp.square(dx).sum((1, 2, 3))
      return (seen * dx).sum((1, 2, 3)) + by_sigma * (point.sigma - at.sigma) - square / (2 * total)

    return state + expansion(end) - expansion(start)


WORLD = GaussianMixture(jnp.full((1, D), MEAN), jnp.array([VARIANCE]))

SAMPLERS = {
  "heun": lambda n: EDMSampler(n, 0.01, 10.0),
  "vp schedule and scaling": lambda n: EDMSampler(n, schedule="vp", scaling="vp", discretization="vp"),
  "churn": lambda n: EDMSampler(n, 0.01, 10.0, churn=3.0),
  "ancestral": lambda n: AncestralSampler(n, 0.01, 10.0),
  "dpmpp_2m": lambda n: DPMSolverPP2M(n, 0.01, 10.0),
  "euler_maruyama": lambda n: euler_maruyama(n, "vp:t_min=0.001"),
  "reverse_diffusion": lambda n: PredictorCorrectorSampler(n, "ve:highest=10", corrector="none"),
}


QUICK = ("heun", "ancestral")


@pytest.mark.parametrize(
  "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_running_log_density_converges_to_the_exact_one(float64, name):
  keys, noise = small(64)
  noise = noise.astype(jnp.float64)
  world = GaussianMixture(jnp.full((1, D), MEAN), jnp.array([VARIANCE]))
  denoise = Running(world)
  assert isinstance(denoise, StatefulDenoiser)
  errors = []
  for num_steps in (100, 800):
    sampler = SAMPLERS[name](num_steps)
    high = sampler.sigmas[0]
    before = world.log_density(noise * high, jnp.full(64, high))
    run = jax.jit(lambda x, k, s, sampler=sampler: (sampler(denoise, x, k, state=s), sampler(world, x, k)))
    (images, found), plain = run(noise, keys, before)
    np.testing.assert_allclose(images, plain, atol=1e-12)
    exact = world.log_density(images, jnp.zeros(64))
    assert np.abs(exact - before).mean() > 3
    errors.append(float(jnp.abs(found - exact).mean()))
  # Ito's formula leaves out terms of order 1/2 where steps draw noise, of order 1 where they do not
  assert errors[1] < errors[0] / 2 and errors[1] < 0.35


def test_state_goes_with_predictors_only():
  keys, noise = small(2)
  with pytest.raises(InputError, match="not with corrector 'langevin'"):
    PredictorCorrectorSampler(4)(Running(WORLD), noise, keys, state=jnp.zeros(2))
