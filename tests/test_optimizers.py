"""Schedules, optimizers and the parameter average against closed forms, torch's numbers and the original's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff import config
from jax_trustdiff.training import optimizers
from jax_trustdiff.types import InputError


@pytest.fixture
def float64():
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)


def _table(fn, count):
  return np.asarray(jax.vmap(fn)(jnp.arange(count)))


@pytest.mark.parametrize("epochs", [400, 100])
@pytest.mark.parametrize(
  "name, ours", [("cosinew", "one_cycle_epochs"), ("cosine", "cosine"), ("step", "step_decay")]
)
def test_epoch_schedules_equal_the_originals(float64, epochs, name, ours):
  golden = np.load(shared_dir("golden/at_step/schedules.npz"))
  schedule = optimizers.SCHEDULES[ours](0.2, epochs, steps_per_epoch=1)
  np.testing.assert_allclose(
    _table(schedule.learning_rate, epochs), golden[f"{name}_E{epochs}_lr"], rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(
    _table(schedule.momentum, epochs), golden[f"{name}_E{epochs}_momentum"], rtol=0, atol=1e-12
  )


def test_step_schedule_equals_the_original(float64):
  golden = np.load(shared_dir("golden/at_step/schedules.npz"))
  schedule = optimizers.one_cycle(0.2, 2, steps_per_epoch=98)
  np.testing.assert_allclose(
    _table(schedule.learning_rate, 196), golden["cyclic_E2_B512_lr"], rtol=0, atol=1e-12
  )
  np.testing.assert_allclose(
    _table(schedule.momentum, 196), golden["cyclic_E2_B512_momentum"], rtol=0, atol=1e-12
  )


@pytest.mark.parametrize("warmup, count", [(0, 2000), (25, 100)])
def test_ema_decay_equals_the_original(float64, warmup, count):
  golden = np.load(shared_dir("golden/at_step/schedules.npz"))[f"ema_decay_tau0995_warmup{warmup}_t1_{count}"]
  ours = _table(lambda t: optimizers.ema_decay(t + 1, 0.995, warmup), count)
  np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-7)  # the golden factors went through float32


@pytest.mark.floor
def test_one_cycle_rises_to_the_maximum_and_falls(float64):
  schedule = optimizers.one_cycle_epochs(0.2, 400, steps_per_epoch=98)
  rate = _table(schedule.learning_rate, 400 * 98)
  assert rate[0] == pytest.approx(0.008) and rate[97] == rate[0] and rate[98] > rate[0]
  assert rate.max() == pytest.approx(0.2) and rate.argmax() == 9 * 98
  assert rate[-1] == pytest.approx(8e-7)
  assert _table(schedule.momentum, 400 * 98).min() == pytest.approx(0.85)


def test_a_warmup_shorter_than_an_epoch_is_refused():
  with pytest.raises(InputError, match="warmup_fraction"):
    optimizers.one_cycle_epochs(0.2, 40, steps_per_epoch=98)


@pytest.mark.floor
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_equals_torch_by_hand(nesterov):
  """Two steps on one decayed weight and one scale that is not, momentum cycling between them."""
  schedule = optimizers.Schedule(lambda s: jnp.where(s == 0, 0.1, 0.2), lambda s: jnp.where(s == 0, 0.9, 0.8))
  optimizer = optimizers.sgd(schedule, weight_decay=0.5, nesterov=nesterov)
  params = {"dense": {"kernel": jnp.array(2.0)}, "norm0": {"scale": jnp.array(3.0)}}
  grads = {"dense": {"kernel": jnp.array(0.3)}, "norm0": {"scale": jnp.array(0.7)}}
  state = optimizer.init(params)
  velocity = {"kernel": 0.0, "scale": 0.0}
  expected = {"kernel": 2.0, "scale": 3.0}
  for rate, momentum in ((0.1, 0.9), (0.2, 0.8)):
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    for name, gradient, decay in (("kernel", 0.3, 0.5), ("scale", 0.7, 0.0)):
      g = gradient + decay * expected[name]
      velocity[name] = momentum * velocity[name] + g
      expected[name] -= rate * (g + momentum * velocity[name] if nesterov else velocity[name])
  assert float(params["dense"]["kernel"]) == pytest.approx(expected["kernel"], rel=1e-6)
  assert float(params["norm0"]["scale"]) == pytest.approx(expected["scale"], rel=1e-6)


def test_sgd_equals_torch():
  torch = pytest.importorskip("torch")
  w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
  peer = torch.optim.SGD([w], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
  schedule = optimizers.constant(0.1, 1, 1, momentum=0.9)
  optimizer = optimizers.sgd(schedule, weight_decay=0.01)
  params = {"kernel": jnp.array([1.0, -2.0, 0.5])}
  state = optimizer.init(params)
  for _ in range(5):
    peer.zero_grad()
    (w**4).sum().backward()
    peer.step()
    grads = jax.grad(lambda p: (p["kernel"] ** 4).sum())(params)
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  np.testing.assert_allclose(params["kernel"], w.detach().numpy(), rtol=1e-6)


@pytest.mark.floor
def test_adamw_by_hand():
  """Three steps with a rate that changes: the bias, which no_decay names, is not decayed."""
  schedule = optimizers.Schedule(lambda s: 0.1 / (1 + s), lambda s: jnp.float32(0.9))
  optimizer = optimizers.adamw(schedule, weight_decay=0.5, b1=0.8, b2=0.95)
  params = {"dense": {"kernel": jnp.array(2.0), "bias": jnp.array(3.0)}, "norm_0": {"scale": jnp.array(-1.0)}}
  decays = {"kernel": 0.5, "bias": 0.0, "scale": 0.0}
  expected = {"kernel": 2.0, "bias": 3.0, "scale": -1.0}
  mean, square = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
  state = optimizer.init(params)
  for t, gradient in enumerate((0.3, -0.7, 0.2), start=1):
    updates, state = optimizer.update(jax.tree.map(lambda _, g=gradient: jnp.array(g), params), state, params)
    params = jax.tree.map(jnp.add, params, updates)
    for name, decay in decays.items():
      mean[name] = 0.8 * mean[name] + 0.2 * gradient
      square[name] = 0.95 * square[name] + 0.05 * gradient**2
      move = (mean[name] / (1 - 0.8**t)) / (np.sqrt(square[name] / (1 - 0.95**t)) + 1e-8)
      expected[name] -= 0.1 / t * (move + decay * expected[name])
  found = params["dense"] | params["norm_0"]
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("clip_norm, factor", [(1.0, 0.2), (5.0, 1.0), (10.0, 1.0), (0.0, 1.0)])
def test_clip_norm_bounds_the_global_norm_before_the_weight_decay(clip_norm, factor):
  """The gradient (3, 4) has norm 5; 0 clips nothing."""
  schedule = optimizers.constant(1.0, 1, 1, momentum=0.0)
  optimizer = optimizers.sgd(schedule, weight_decay=0.5, clip_norm=clip_norm)
  params = {"a": jnp.array(10.0), "b": jnp.array(20.0)}
  updates, _ = optimizer.update({"a": jnp.array(3.0), "b": jnp.array(4.0)}, optimizer.init(params), params)
  assert float(updates["a"]) == pytest.approx(-(3 * factor + 5), rel=1e-6)
  assert float(updates["b"]) == pytest.approx(-(4 * factor + 10), rel=1e-6)


def test_adamw_sees_the_clipped_gradient():
  """Clipped at norm 1, a gradient of 100 moves Adam's averages as one of 1 does; 0.5 is below the bound."""
  schedule = optimizers.constant(0.1, 1, 1)
  params = {"kernel": jnp.array(1.0)}
  clipped, plain = (optimizers.adamw(schedule, clip_norm=norm) for norm in (1.0, 0.0))
  states = [clipped.init(params), plain.init(params)]
  for first, second in ((100.0, 1.0), (0.5, 0.5)):
    found = []
    for i, (optimizer, gradient) in enumerate(((clipped, first), (plain, second))):
      update, states[i] = optimizer.update({"kernel": jnp.array(gradient)}, states[i], params)
      found.append(float(update["kernel"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_build_names_what_is_wrong():
  with pytest.raises(InputError, match="unknown name 'sdg' .did you mean 'sgd'"):
    config.build(optimizers.OPTIMIZERS, {"name": "sdg"})
  with pytest.raises(InputError, match="does not take 'nesterof' .did you mean 'nesterov'"):
    config.build(optimizers.OPTIMIZERS, {"name": "sgd", "nesterof": True}, schedule=None)
  with pytest.raises(InputError, match="needs schedule"):
    config.build(optimizers.OPTIMIZERS, {"name": "sgd"})
