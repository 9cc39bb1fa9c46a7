"""Losses and attacks of the objectives against independent numpy and torch calculations on a linear network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_nets import CentredLinear

from jax_trustdiff.attacks import norms
from jax_trustdiff.robustness.objectives import (
  MART,
  OBJECTIVES,
  PGDAT,
  TRADES,
  Standard,
  initial_collections,
  move_statistics,
)
from jax_trustdiff.types import InputError

NET = CentredLinear()
VARIABLES = NET.init(jax.random.key(0))
X = jax.random.uniform(jax.random.key(1), (6, 2, 3, 1))
X_ADV = jnp.clip(X + 0.3 * jax.random.normal(jax.random.key(2), X.shape), 0, 1)
Y = jnp.array([0, 1, 2, 3, 0, 2])

KERNEL, MEAN, X64, X_ADV64 = (
  np.array(a, np.float64) for a in (VARIABLES["params"]["kernel"], VARIABLES["batch_stats"]["mean"], X, X_ADV)
)
ROWS = np.arange(6)


def attack(objective, variables, key, start=None):
  return objective.attack(NET, variables, X, Y, key, start)


def logits(x, mean=None):
  """In float64 numpy; the mean is the batch's unless given."""
  flat = x.reshape(len(x), -1)
  return (flat - (flat.mean(0) if mean is None else mean)) @ KERNEL


def softmax(z):
  e = np.exp(z - z.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def kl(p, q):
  return (p * np.log(p / q)).sum(1)


@pytest.mark.floor
def test_trades_loss_moments_and_metrics():
  loss, moments, metrics = TRADES(beta=5.0, label_smoothing=0.1).loss(NET, VARIABLES, X, X_ADV, Y)
  p, q = softmax(logits(X64)), softmax(logits(X_ADV64))
  ce = -0.9 * np.log(p[ROWS, Y]) - 0.1 * np.log(p).mean(1)
  np.testing.assert_allclose(loss, ce + 5 * kl(p, q), rtol=1e-5)
  np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], kl(p, q), rtol=1e-4)
  np.testing.assert_array_equal(metrics["clean_correct"], p.argmax(1) == Y)
  np.testing.assert_array_equal(metrics["adversarial_correct"], q.argmax(1) == Y)
  natural, adversarial = moments
  np.testing.assert_allclose(natural["mean"], X64.reshape(6, -1).mean(0), rtol=1e-5)
  np.testing.assert_allclose(adversarial["mean"], X_ADV64.reshape(6, -1).mean(0), rtol=1e-5)


@pytest.mark.floor
def test_mart_loss():
  loss, moments, metrics = MART(beta=4.0).loss(NET, VARIABLES, X, X_ADV, Y)
  p, q = softmax(logits(X64)), softmax(logits(X_ADV64))
  expected = []
  for i, y in enumerate(np.array(Y)):
    rival = max(q[i, k] for k in range(4) if k != y)
    divergence = sum(p[i, k] * (np.log(p[i, k]) - np.log(q[i, k] + 1e-12)) for k in range(4))
    expected.append(
      -np.log(q[i, y]) - np.log(1.0001 - rival + 1e-12) + 4 * divergence * (1.0000001 - p[i, y])
    )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(moments[0]["mean"], X64.reshape(6, -1).mean(0), rtol=1e-5)
  np.testing.assert_allclose(moments[1]["mean"], X_ADV64.reshape(6, -1).mean(0), rtol=1e-5)
  np.testing.assert_allclose(metrics["ce"], -np.log(q[ROWS, Y]), rtol=1e-5)


def test_standard_and_pgd_at_losses():
  p, q = softmax(logits(X64)), softmax(logits(X_ADV64))
  loss, moments, _ = Standard(0.2).loss(NET, VARIABLES, X, X, Y)
  np.testing.assert_allclose(loss, -0.8 * np.log(p[ROWS, Y]) - 0.2 * np.log(p).mean(1), rtol=1e-5)
  assert len(moments) == 1
  np.testing.assert_array_equal(Standard().attack(NET, VARIABLES, X, Y, jax.random.key(0)), X)
  loss, moments, metrics = PGDAT().loss(NET, VARIABLES, X, X_ADV, Y)
  np.testing.assert_allclose(loss, -np.log(q[ROWS, Y]), rtol=1e-5)
  np.testing.assert_array_equal(metrics["adversarial_correct"], q.argmax(1) == Y)
  assert "clean_correct" not in metrics
  # Both in one pass: the batch statistics are those of all twelve images.
  loss, moments, metrics = PGDAT(keep_clean=True).loss(NET, VARIABLES, X, X_ADV, Y)
  both = softmax(logits(np.concatenate([X64, X_ADV64])))
  clean, adversarial = -np.log(both[ROWS, Y]), -np.log(both[ROWS + 6, Y])
  np.testing.assert_allclose(loss, (clean + adversarial) / 2, rtol=1e-5)
  np.testing.assert_allclose(metrics["ce"], adversarial, rtol=1e-5)
  np.testing.assert_array_equal(metrics["clean_correct"], both[:6].argmax(1) == Y)
  np.testing.assert_allclose(
    moments[0]["mean"], np.concatenate([X64, X_ADV64]).reshape(12, -1).mean(0), rtol=1e-5
  )


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_parameter_gradients_agree_with_torch(name):
  torch = pytest.importorskip("torch")
  objective = OBJECTIVES[name](beta=5.0)
  got = jax.grad(lambda params: objective.loss(NET, {**VARIABLES, "params": params}, X, X_ADV, Y)[0].mean())(
    VARIABLES["params"]
  )["kernel"]

  kernel = torch.tensor(KERNEL, requires_grad=True)
  z, z_adv = (
    (flat - flat.mean(0)) @ kernel for flat in (torch.tensor(a.reshape(6, -1)) for a in (X64, X_ADV64))
  )
  y = torch.tensor(np.array(Y), dtype=torch.long)
  functional = torch.nn.functional
  if name == "trades":
    divergence = functional.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")
    loss = functional.cross_entropy(z, y) + 5 * divergence
  else:
    p, q = z.softmax(1), z_adv.softmax(1)
    first_two = q.argsort(1)[:, -2:]
    rival = torch.where(first_two[:, -1] == y, first_two[:, -2], first_two[:, -1])
    boosted = functional.cross_entropy(z_adv, y) + functional.nll_loss(torch.log(1.0001 - q + 1e-12), rival)
    divergence = functional.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    loss = boosted + 5 * (divergence * (1.0000001 - p.gather(1, y[:, None])[:, 0])).mean()
  loss.backward()
  np.testing.assert_allclose(got, kernel.grad.numpy(), rtol=2e-4, atol=1e-6)


def ascend_by_hand(start, radius, step_size, num_steps, norm, logit_gradient, mean):
  """The inner loop in float64: gradients through the linear network, with its batch mean where `mean` is None."""
  v = start.copy()
  for _ in range(num_steps):
    g = logit_gradient(softmax(logits(v, mean))) @ KERNEL.T
    g = (g - g.mean(0) if mean is None else g).reshape(v.shape)
    if norm == "linf":
      v = np.clip(np.clip(v + step_size * np.sign(g), X64 - radius, X64 + radius), 0, 1)
    else:
      v = v + step_size * g / np.sqrt((g**2).sum((1, 2, 3), keepdims=True))
      delta = np.clip(v, 0, 1) - X64
      length = np.sqrt((delta**2).sum((1, 2, 3), keepdims=True))
      v = np.clip(X64 + delta * np.minimum(1, radius / length), 0, 1)
  return v


@pytest.mark.parametrize("norm, radius, default_step", [("linf", 0.2, 0.05), ("l2", 0.5, 0.25)])
def test_trades_attack_by_hand_with_batch_statistics(norm, radius, default_step):
  start = X + 0.05 * jax.random.normal(jax.random.key(3), X.shape)
  p = softmax(logits(X64))
  for step_size in (None, 0.11):
    objective = TRADES(norm=norm, radius=radius, step_size=step_size, num_steps=4)
    x_adv = attack(objective, VARIABLES, jax.random.key(0), start)
    expected = ascend_by_hand(
      np.array(start, np.float64), radius, step_size or default_step, 4, norm, lambda q: q - p, None
    )
    np.testing.assert_allclose(x_adv, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["mart", "pgd_at"])
@pytest.mark.parametrize("norm, radius", [("linf", 0.2), ("l2", 0.5)])
def test_mart_and_pgd_at_attack_by_hand_with_running_statistics(name, norm, radius):
  start = jnp.clip(X + 0.05 * jax.random.normal(jax.random.key(3), X.shape), 0, 1)
  objective = OBJECTIVES[name](norm=norm, radius=radius, step_size=0.11, num_steps=4)
  x_adv = attack(objective, VARIABLES, jax.random.key(0), start)
  one_hot = np.eye(4)[Y]
  expected = ascend_by_hand(np.array(start, np.float64), radius, 0.11, 4, norm, lambda q: q - one_hot, MEAN)
  np.testing.assert_allclose(x_adv, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["trades", "mart", "pgd_at", "score", "consistency", "ikl"])
@pytest.mark.parametrize("norm, radius", [("linf", 0.1), ("l2", 0.4)])
def test_attacks_stay_in_ball_and_cube_and_do_not_depend_on_the_batch_keys_of_others(name, norm, radius):
  objective = OBJECTIVES[name](norm=norm, radius=radius, num_steps=3)
  keys = jax.random.split(jax.random.key(4), 6)
  x_adv = attack(objective, VARIABLES, keys)
  assert (x_adv >= 0).all() and (x_adv <= 1).all()
  sizes = norms.lengths(x_adv - X, norm)
  assert (sizes <= radius * (1 + 1e-5)).all() and (sizes > 0.1 * radius).all()
  other = attack(objective, VARIABLES, keys.at[5].set(jax.random.key(99)))
  if name in ("mart", "pgd_at"):  # the batch statistics of the others couple the images
    np.testing.assert_allclose(other[:5], x_adv[:5], atol=1e-6)
  assert not np.allclose(other[5], x_adv[5], atol=1e-5)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_l2_attack_leaves_a_flat_point(name):
  """A network without any gradient: the step is noise, and the result is on the sphere."""
  flat = {**VARIABLES, "params": {"kernel": jnp.zeros_like(VARIABLES["params"]["kernel"])}}
  x_adv = attack(OBJECTIVES[name](norm="l2", radius=0.3, num_steps=2), flat, jax.random.key(5))
  sizes = norms.lengths(x_adv - X, "l2")
  assert (sizes > 0.05).all() and (sizes <= 0.3 * (1 + 1e-5)).all()


@pytest.mark.floor
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_no_gradient_flows_through_the_attack(name):
  objective = OBJECTIVES[name]()
  key = jax.random.key(6)
  whole_variables = VARIABLES | initial_collections(objective, 4)
  x_adv = attack(objective, whole_variables, key)

  def whole(params, attacked):
    variables = {**whole_variables, "params": params}
    adversarial = objective.attack(NET, variables, X, Y, key) if attacked else x_adv
    return objective.loss(NET, variables, X, adversarial, Y)[0].mean()

  inside, outside = (
    jax.jit(jax.grad(whole), static_argnums=1)(VARIABLES["params"], a) for a in (True, False)
  )
  np.testing.assert_allclose(inside["kernel"], outside["kernel"], rtol=1e-4, atol=1e-6)
  to_images = jax.grad(lambda v: objective.loss(NET, whole_variables, X, v, Y)[0].sum())(x_adv)
  np.testing.assert_array_equal(to_images, 0)


@pytest.mark.floor
def test_running_statistics_move_in_the_order_of_the_passes():
  running = {"a": {"mean": jnp.array([1.0])}}
  moments = ({"a": {"mean": jnp.array([2.0])}}, {"a": {"mean": jnp.array([10.0])}})
  moved = move_statistics(running, moments, 0.25)
  np.testing.assert_allclose(moved["a"]["mean"], 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 10)
  np.testing.assert_allclose(move_statistics(running, moments, 1.0)["a"]["mean"], 10)
  assert move_statistics({}, ({},), 0.1) == {}


@pytest.mark.parametrize(
  "name, fields, message",
  [
    ("trades", {"norm": "l1"}, "'l1'; the choices are linf, l2"),
    ("mart", {"norm": "inf"}, "'inf'; the choices are linf, l2"),
    ("pgd_at", {"norm": "inf"}, "choices are linf, l2, l1"),
    ("trades", {"beta": -1.0}, "beta is -1.0; it must be at least 0"),
    ("standard", {"label_smoothing": 1.5}, "label_smoothing is 1.5; it must be from 0 to 1"),
    ("mart", {"num_steps": -2}, "num_steps is -2"),
    ("mart", {"radius": float("inf")}, "radius is inf; it must be at least 0 and finite"),
    ("trades", {"beta": float("inf")}, "beta is inf"),
    ("trades", {"step_size": float("nan")}, "step_size is nan"),
    ("score", {"clip": -0.1}, "clip is -0.1; it must be at least 0"),
    ("score", {"norm": "l1"}, "choices are linf, l2"),
    ("consistency", {"temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ("consistency", {"beta": -1.0}, "beta is -1.0"),
    ("ikl", {"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
    ("ikl", {"mse_weight": -1.0}, "mse_weight is -1.0"),
    ("ikl", {"norm": "l1"}, "choices are linf, l2"),
  ],
)
def test_bad_fields_are_one_clear_line(name, fields, message):
  with pytest.raises(InputError, match=message):
    OBJECTIVES[name](**fields)
