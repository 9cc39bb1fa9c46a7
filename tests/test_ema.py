"""Averages of parameters: their weights in closed form, and averages reconstructed afterwards beside tracked ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_trustdiff.training import checkpoints
from jax_trustdiff.training import state as training_state
from jax_trustdiff.training.ema import (
  MAX_STD,
  POST_HOC_STDS,
  exponent_of_std,
  half_life_decay,
  posthoc_weights,
  power_decay,
  power_update,
  reconstruct,
  std_of_exponent,
)
from jax_trustdiff.types import InputError


def weights_of(decays):
  """What each step contributes to the average after the last, from the decays of steps 1, 2, ..."""
  decays = np.asarray(decays, np.float64)
  later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
  return (1 - decays) * later


def table(decay, steps):
  return np.asarray(jax.vmap(decay)(jnp.arange(1, steps + 1)))


# ---- half-life ----


def test_half_life_is_karras_et_al_2022():
  """Their loop in plain Python: the count of images is that before the step."""
  ours, seen = table(functools.partial(half_life_decay, batch_size=512), 30_000), 0
  for step in range(30_000):
    half = min(500_000, 0.05 * seen)
    expected = 0.5 ** (512 / max(half, 1e-8))
    assert ours[step] == pytest.approx(expected, abs=2e-6), step
    seen += 512
  assert ours[0] == 0 and ours[1] == pytest.approx(0.5**20)
  after = table(functools.partial(half_life_decay, batch_size=512, half_life=400_000), 30_000)
  assert np.abs(after - ours).max() > 1e-4


def test_half_the_weight_is_older_than_the_half_life(float64):
  batch, half_life, steps = 100, 5_000, 2_000
  decay = functools.partial(half_life_decay, batch_size=batch, half_life=half_life, rampup_ratio=None)
  weights = weights_of(table(decay, steps))
  assert weights[-half_life // batch :].sum() == pytest.approx(0.5, abs=1e-9)
  ramped = weights_of(table(functools.partial(decay, rampup_ratio=0.05), steps))
  assert ramped.sum() == pytest.approx(1, abs=1e-12) and weights.sum() < 1 - 1e-13
  assert ramped[-half_life // batch :].sum() == pytest.approx(0.5, abs=1e-3)


def test_ramp_up_forgets_the_start():
  decay = functools.partial(half_life_decay, batch_size=512)
  early = weights_of(table(decay, 200))
  flat = weights_of(table(functools.partial(decay, rampup_ratio=None), 200))
  # past the start the decay is 2^(-20 / (t - 1)): of the first 100 steps their product over the next 100 is left
  left = 2 ** (-20 * (1 / np.arange(100, 200)).sum())
  assert left < 1e-4 and early[:100].sum() == pytest.approx(left, rel=1e-3)
  assert early.sum() == pytest.approx(1, abs=1e-6)
  assert flat.sum() < 0.2  # most of the weight is still with the initial parameters


# ---- power functions ----


@pytest.mark.parametrize("std, exponent", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_karras_et_al_2024(std, exponent):
  assert exponent_of_std(std) == pytest.approx(exponent, abs=0.005)


def test_exponent_and_std_are_inverse():
  for std in np.linspace(0.004, 0.2886, 60):
    assert std_of_exponent(exponent_of_std(std)) == pytest.approx(std, rel=1e-9)
  assert exponent_of_std(MAX_STD) == pytest.approx(0, abs=1e-6)
  assert std_of_exponent(0.0) == pytest.approx(MAX_STD)


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1, 0.25])
def test_power_weights_are_the_integral_of_the_profile(float64, std):
  steps, g = 3000, exponent_of_std(std)
  weights = weights_of(table(functools.partial(power_decay, std=std), steps))
  edges = (np.arange(steps + 1) / steps) ** (g + 1)
  np.testing.assert_allclose(weights, np.diff(edges), atol=1e-13)
  assert weights.sum() == pytest.approx(1, abs=1e-12)
  time = (np.arange(steps) + 0.5) / steps
  mean = weights @ time
  assert np.sqrt(weights @ (time - mean) ** 2) == pytest.approx(std, rel=1e-4)
  assert mean == pytest.approx((g + 1) / (g + 2), rel=1e-6)


def test_power_update_is_the_average_by_its_weights(float64):
  path = np.cumsum(np.random.default_rng(0).normal(size=(400, 3)), axis=0)
  averages = tracked(path, POST_HOC_STDS)[-1]
  for average, std in zip(averages, POST_HOC_STDS, strict=True):
    edges = (np.arange(401) / 400) ** (exponent_of_std(std) + 1)
    np.testing.assert_allclose(average, np.diff(edges) @ path, rtol=1e-10)


def test_power_update_copies_at_the_first_step_and_checks_its_stds():
  params = {"a": jnp.array([1.0, 2.0]), "b": jnp.ones((2, 2), jnp.bfloat16)}
  start = jax.tree.map(lambda x: 7 * x, params)
  for average in power_update((start, start), params, jnp.array(1)):
    assert [x.dtype for x in jax.tree.leaves(average)] == [jnp.float32, jnp.bfloat16]
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), average, params))
  with pytest.raises(InputError, match="1 averages and 2 stds"):
    power_update((start,), params, jnp.array(1))


def test_float32_weights_hold_over_a_long_run():
  """Late in training 1 - decay is small: it is computed as itself, so a million steps lose no weight."""
  path = jnp.ones(1)
  average = (jnp.zeros(1),)
  run = jax.jit(
    lambda a: jax.lax.fori_loop(1, 200_001, lambda t, a: power_update(a, path, t, (0.05,)), a),
    donate_argnums=0,
  )
  assert run(average)[0][0] == pytest.approx(1, abs=1e-6)


def test_decays_fit_the_training_step():
  """The average that make_train_step keeps, of a quadratic whose path is known."""

  def loss_fn(params, stats, batch, key, step):
    return ((params["w"] - 1) ** 2).sum() / 2, (stats, {})

  for decay in (
    functools.partial(half_life_decay, batch_size=8, half_life=40),
    functools.partial(power_decay, std=0.1),
  ):
    optimizer = optax.sgd(0.1)
    state = training_state.create(lambda key: {"params": {"w": jnp.zeros(2)}}, optimizer, jax.random.key(0))
    step = jax.jit(training_state.make_train_step(loss_fn, optimizer, decay))
    for _ in range(50):
      state, _ = step(state, jnp.zeros(()))
    path = 1 - 0.9 ** np.arange(1, 51)
    expected = weights_of(table(decay, 50)) @ path
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)


def test_training_step_tracks_power_averages_through_a_checkpoint(tmp_path):
  """Beside `power_update` by hand along the path of the parameters; the run goes on from a checkpoint half-way."""

  def init(key):
    return {"params": {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}}

  def loss_fn(params, stats, batch, key, step):
    target = jax.random.normal(key, (2,))
    return ((batch @ params["w"] + params["b"] - target) ** 2).mean(), (stats, {})

  optimizer = optax.adam(0.1)
  decay = functools.partial(half_life_decay, batch_size=4, half_life=20)
  step = jax.jit(training_state.make_train_step(loss_fn, optimizer, decay, power_stds=POST_HOC_STDS))
  batch = jax.random.normal(jax.random.key(1), (4, 3))
  state = training_state.create(init, optimizer, jax.random.key(0), len(POST_HOC_STDS))
  by_hand = tuple(jax.tree.map(jnp.zeros_like, state.params) for _ in POST_HOC_STDS)
  for t in range(1, 21):
    state, _ = step(state, batch)
    by_hand = power_update(by_hand, state.params, t)
    if t == 10:
      with checkpoints.Checkpoints(tmp_path / "checkpoints") as store:
        store.save(t, state, {})
        store.wait()
        before, (state, _) = state, store.restore_latest(checkpoints.template(state))
      jax.tree.map(np.testing.assert_array_equal, state.power_averages, before.power_averages)
  short, long = state.power_averages
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), (short, long), by_hand)
  # one average is not the other, nor the parameters themselves
  apart = [np.abs(a["w"] - b["w"]).max() for a, b in ((short, long), (short, state.params))]
  assert min(apart) > 0.01


# ---- reconstruction ----


def tracked(path, stds):
  """The averages after every step of a path [steps n], as a list of tuples."""

  def body(averages, item):
    t, params = item
    averages = power_update(averages, params, t, stds)
    return averages, averages

  start = tuple(jnp.zeros_like(path[0]) for _ in stds)
  _, history = jax.lax.scan(body, start, (jnp.arange(1, len(path) + 1), jnp.asarray(path)))
  return list(zip(*(np.asarray(h) for h in history), strict=True))


STEPS, EVERY = 4000, 125
TIMES = np.repeat(np.arange(EVERY, STEPS + 1, EVERY), 2)
STDS = np.tile(POST_HOC_STDS, STEPS // EVERY)


def profile(std, time):
  """Weights of steps 1 .. STEPS in the average after step `time`."""
  return np.diff(np.minimum(np.arange(STEPS + 1) / time, 1) ** (exponent_of_std(std) + 1))


@pytest.mark.parametrize("target_time", [4000, 3000, 2000])
@pytest.mark.parametrize("std", [0.04, 0.06, 0.08, 0.15, 0.20])
def test_reconstructed_profile_is_that_of_the_target(std, target_time):
  """The snapshots' own profiles, combined, against the target's; those of a std 10 % off are farther away."""
  weights = posthoc_weights(TIMES, STDS, std, target_time)
  assert weights.sum() == pytest.approx(1, abs=1e-12)
  combined = sum(w * profile(s, t) for w, s, t in zip(weights, STDS, TIMES, strict=True))
  target, near = profile(std, target_time), profile(1.1 * std, target_time)
  error = np.linalg.norm(combined - target) / np.linalg.norm(target)
  other = np.linalg.norm(combined - near) / np.linalg.norm(near)
  assert error < 0.025 < other


def test_a_target_between_snapshots_is_met_only_roughly():
  """A profile ends with a step, and no snapshot has one there."""
  errors = []
  for target_time in (2000, 2060):
    weights = posthoc_weights(TIMES, STDS, 0.08, target_time)
    combined = sum(w * profile(s, t) for w, s, t in zip(weights, STDS, TIMES, strict=True))
    target = profile(0.08, target_time)
    errors.append(np.linalg.norm(combined - target) / np.linalg.norm(target))
  assert errors[0] < 0.02 and 0.1 < errors[1] < 0.5


@pytest.mark.parametrize("std", [0.06, 0.08, 0.15])
def test_reconstructed_average_of_a_random_walk_is_the_tracked_one(float64, std):
  """To 1 % of how far averages 10 % shorter and longer lie apart, or better."""
  path = np.cumsum(np.random.default_rng(1).normal(size=(STEPS, 50)), axis=0) / np.sqrt(STEPS)
  history = tracked(path, (*POST_HOC_STDS, std, 0.9 * std, 1.1 * std))
  snapshots = [{"w": history[t - 1][POST_HOC_STDS.index(s)]} for t, s in zip(TIMES, STDS, strict=True)]
  for time in (None, 3000):
    found = reconstruct(iter(snapshots), TIMES, STDS, std, time)["w"]
    _, _, direct, shorter, longer = history[(time or STEPS) - 1]
    scale = np.linalg.norm(longer - shorter)
    assert np.linalg.norm(found - direct) < 0.05 * scale
    assert np.linalg.norm(found - longer) > 0.3 * scale


def test_a_stored_average_is_itself():
  for i in (3, 20, 63):
    weights = posthoc_weights(TIMES, STDS, STDS[i], float(TIMES[i]))
    np.testing.assert_allclose(weights, np.eye(len(TIMES))[i], atol=1e-5)
  snapshots = [np.full(3, i, np.float32) for i in range(len(TIMES))]
  np.testing.assert_allclose(reconstruct(snapshots, TIMES, STDS, 0.10), np.full(3, 63.0), atol=1e-3)


def test_weights_do_not_depend_on_the_unit_of_time():
  one = posthoc_weights(TIMES, STDS, 0.07)
  np.testing.assert_allclose(posthoc_weights(TIMES * 512.0, STDS, 0.07), one, atol=1e-6)


def test_constant_parameters_stay_and_types_are_kept():
  snapshots = [{"a": jnp.ones((2, 2)), "b": np.float32(3)} for _ in TIMES]
  found = reconstruct(snapshots, TIMES, STDS, 0.13)
  np.testing.assert_allclose(found["a"], 1, atol=1e-6)
  assert found["b"] == pytest.approx(3, abs=1e-5) and found["a"].dtype == np.float32


def test_one_line_errors():
  for std in (0.0, -1.0, 0.3):
    with pytest.raises(InputError, match="between 0 and 0.2887"):
      exponent_of_std(std)
  with pytest.raises(InputError, match="must be positive, got 0"):
    half_life_decay(1, 512, half_life=0)
  with pytest.raises(InputError, match="got 0 and 0"):
    posthoc_weights([], [], 0.1)
  with pytest.raises(InputError, match="target within them, got 10.0 .. 20.0 and 30.0"):
    posthoc_weights([10, 20], [0.1, 0.1], 0.1, 30)
  with pytest.raises(InputError, match="same time and std"):
    posthoc_weights([10, 10], [0.1, 0.1], 0.1)
  with pytest.raises(ValueError):
    reconstruct([np.ones(2)], [1, 2], [0.1, 0.1], 0.1)
