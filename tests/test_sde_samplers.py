"""Samplers of reverse SDEs against the formulas of their papers, written out in numpy, and their orders of convergence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import GaussianMixture, high_dimensional, small

from jax_trustdiff.diffusion.processes import VE, VP, SubVP
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler, annealed_langevin, euler_maruyama
from jax_trustdiff.types import InputError

WORLD = GaussianMixture(
  jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)) * 0.7), jnp.array([0.05, 0.1, 0.02])
)
BETA_MIN, BETA_MAX = 0.1, 20.0  # Song et al. 2021, appendix C


def score_by_x(x, scale, std):
  """Gradient of log p_t by x_t of the world, in numpy; x_t = scale * x0 + std * noise."""
  mean, total = scale * np.asarray(WORLD.mean), scale**2 * np.asarray(WORLD.variance) + std**2
  flat = x.reshape(len(x), 1, -1)
  logits = -((flat - mean) ** 2).sum(-1) / (2 * total) - mean.shape[1] / 2 * np.log(total)
  weight = np.exp(logits - logits.max(1, keepdims=True))
  weight /= weight.sum(1, keepdims=True)
  return (weight[..., None] * (mean - flat) / total[:, None]).sum(1).reshape(x.shape)


def vp(t):
  """(scale, std) of x_t: Song et al. 2021, eq. 33."""
  scale = np.exp(-0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN)
  return scale, np.sqrt(1 - scale**2)


def ve(t):
  return 1.0, 0.01 * 5000**t


def norms(v, over):
  """||v||: of each image, or their mean over the batch."""
  length = np.sqrt((v**2).sum((1, 2, 3), keepdims=True))
  return length if over == "image" else length.mean()


def predicted(x, t, following, process, predictor, z):
  """x at time `following`: for VP algorithm 3 and eq. 4, for VE algorithm 2 and eq. 47, and eq. 6."""
  scale, std = process(t)
  score = score_by_x(x, scale, std)
  if process is vp:
    beta = 1 - (scale / vp(following)[0]) ** 2
    if predictor == "reverse_diffusion":
      return (2 - np.sqrt(1 - beta)) * x + beta * score + np.sqrt(beta) * z
    if predictor == "ancestral":  # with the variance of DDPM's posterior
      variance = (1 - vp(following)[0] ** 2) / (1 - scale**2) * beta
      return (x + beta * score) / np.sqrt(1 - beta) + np.sqrt(variance) * z
    rate, dt = BETA_MIN + t * (BETA_MAX - BETA_MIN), t - following
    return x + (0.5 * rate * x + rate * score) * dt + np.sqrt(rate * dt) * z
  added = std**2 - ve(following)[1] ** 2
  if predictor == "reverse_diffusion":
    return x + added * score + np.sqrt(added) * z
  if predictor == "ancestral":
    return x + added * score + ve(following)[1] * np.sqrt(added) / std * z
  dt, square = t - following, std**2 * 2 * np.log(5000)
  return x + square * score * dt + np.sqrt(square * dt) * z


def by_hand(x, noise, times, process, predictor, corrector, corrector_steps, snr, over):
  """Algorithms 2 to 5, corrections first; x: the noise at the first time. Ends with D at the last time."""
  numbers = iter(noise)
  for i, t in enumerate(times):
    scale, std = process(t)
    last = i + 1 == len(times)
    before = (1.0 if last else process(times[i + 1])[0]) if process is vp else 1.0
    for _ in range(corrector_steps if corrector != "none" else 0):
      z, score = next(numbers), score_by_x(x, scale, std)
      alpha = (scale / before) ** 2
      ratio = norms(z, over) / norms(score, over) if corrector == "langevin" else std
      step = 2 * alpha * (snr * ratio) ** 2
      x = x + step * score + np.sqrt(2 * step) * z
    if last:
      return (x + std**2 * score_by_x(x, scale, std)) / scale
    if predictor != "none":
      x = predicted(x, t, times[i + 1], process, predictor, next(numbers))


@pytest.mark.parametrize(
  "process, predictor, corrector, corrector_steps, over",
  [
    (vp, "reverse_diffusion", "langevin", 1, "image"),
    (vp, "ancestral", "langevin", 2, "batch"),
    (vp, "euler_maruyama", "none", 1, "image"),
    (ve, "reverse_diffusion", "langevin", 2, "image"),
    (ve, "ancestral", "langevin", 1, "batch"),
    (ve, "euler_maruyama", "annealed", 1, "image"),
    (ve, "none", "annealed", 3, "image"),
  ],
)
def test_steps_are_those_of_the_paper(float64, process, predictor, corrector, corrector_steps, over):
  rng = np.random.default_rng(1)
  first, noise = rng.normal(size=(5, 2, 2, 1)), rng.normal(size=(60, 5, 2, 2, 1))
  kind = VP(t_min=1e-3) if process is vp else VE()
  sampler = PredictorCorrectorSampler(12, kind, predictor, corrector, corrector_steps, 0.2, over)
  world = GaussianMixture(*(jnp.asarray(np.asarray(v), jnp.float64) for v in (WORLD.mean, WORLD.variance)))
  table = jnp.asarray(noise)
  found = jax.jit(lambda x: sampler(world, x, draw=lambda i: table[i]))(jnp.asarray(first))
  times = np.linspace(1, kind.t_min, 12)
  expected = by_hand(
    first * process(1.0)[1], noise, times, process, predictor, corrector, corrector_steps, 0.2, over
  )
  # the sampler's prior has the process's scale at t = 1 exactly
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_norms_of_the_batch_couple_its_images():
  """As Song et al. have it; norms of each image do not."""
  keys, noise = small(4)
  for over in ("image", "batch"):
    sampler = PredictorCorrectorSampler(6, "ve", step_norms=over)
    run = jax.jit(lambda x, k, sampler=sampler: sampler(WORLD, x, k))
    moved = run(noise, keys)[:3] - run(noise.at[3].multiply(3.0), keys)[:3]
    assert (np.abs(moved).min() > 1e-6) if over == "batch" else (np.abs(moved).max() == 0)


@pytest.mark.slow
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("process", [VP(3.0, 0.1, 0.1), SubVP(3.0, 0.1, 0.2), VE(0.3, 3.0, 0.0)])
def test_strong_order(float64, process, predictor):
  """Order 1, since the noise is additive: on one Brownian path, errors of K and 2 K steps against 16 K."""
  world = GaussianMixture(jnp.full((1, 4), 0.3), jnp.array([0.25]))
  rng = np.random.default_rng(0)
  x, fine = jnp.asarray(rng.normal(size=(64, 2, 2, 1))), rng.normal(size=(512, 64, 2, 2, 1))

  def end(num_intervals):
    """x_t at the earliest time, before it is denoised."""
    parts = fine.reshape(num_intervals, -1, *x.shape).sum(1) / np.sqrt(512 / num_intervals)
    table = jnp.asarray(np.append(parts, parts[-1:], 0))
    sampler = PredictorCorrectorSampler(num_intervals + 1, process, predictor, "none")
    run = jax.jit(lambda x: sampler(world, x, draw=lambda i: table[i], trajectory=True))
    return run(x)[-2]

  finest = end(512)
  errors = [float(jnp.sqrt(jnp.square(end(k) - finest).mean())) for k in (32, 64)]
  assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.25) and errors[1] > 1e-4


def test_corrections_keep_a_distribution_which_they_reach_from_another():
  """Langevin steps alone at one noise level: the variance of one Gaussian, with the bias that their length has."""
  d, n = 16, 1500
  world = GaussianMixture(jnp.zeros((1, d)), jnp.array([0.25]))
  process, snr = VE(0.5, 0.5001, 0.0), 0.3
  sampler = annealed_langevin(2, process, corrector_steps=60, snr=snr)
  keys, noise = small(n, 2, (4, 4, 1))
  states = jax.jit(lambda x, k: sampler(world, x, k, trajectory=True))(1.7 * noise, keys)
  total, step = 0.25 + 0.25, 2 * (snr * 0.5) ** 2
  # x <- (1 - step / total) x + sqrt(2 step) noise has this variance in the end
  expected = total / (1 - step / (2 * total))
  assert states[-2].var() == pytest.approx(expected, rel=4 * np.sqrt(2 / (n * d)))
  assert states[0].var() > 1.2 * expected


@pytest.mark.slow
def test_bias_of_steps_of_each_image():
  """The length depends on the image, for which variances are too large by 4 / d of themselves, nearly: see the docstring."""
  keys, noise = small(200, 3, (16, 16, 3))
  world = GaussianMixture(high_dimensional().mean[:1] * 0, jnp.array([0.09]))
  sampler = PredictorCorrectorSampler(100, VE(0.05, 3.0), snr=0.1)
  ratio = {}
  for d in (12, 768):
    side, channels = {12: (2, 3), 768: (16, 3)}[d]
    part = GaussianMixture(world.mean[:, :d], world.variance)
    image = noise[:, :side, :side, :channels]
    found = jax.jit(lambda x, k, part=part: sampler(part, x, k))(image, keys)
    ratio[d] = float(jnp.square(found).mean() / 0.09)
  assert abs(ratio[768] - 1) < 0.02 < ratio[12] - 1


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(predictor="heun"), "known: euler_maruyama"),
    (dict(corrector="mala"), "known: langevin"),
    (dict(step_norms="device"), "known: image, batch"),
    (dict(num_steps=1), "at least 2"),
    (dict(corrector_steps=0), "at least 1"),
    (dict(snr=0.0), "snr must be positive"),
    (dict(predictor="none", corrector="none"), "nothing would be sampled"),
  ],
)
def test_refuses(fields, words):
  with pytest.raises(InputError, match=words):
    PredictorCorrectorSampler(**fields)


def test_needs_keys():
  with pytest.raises(InputError, match="key for each image"):
    euler_maruyama(5)(WORLD, small(2)[1])
