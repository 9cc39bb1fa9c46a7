"""Adversarial weight perturbation: its length, its direction, and what the training step does with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_nets import CentredLinear

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.robustness.weight_perturbation import ascent
from jax_trustdiff.tasks import classifiers, train_classifier
from jax_trustdiff.training import state
from jax_trustdiff.types import InputError

NET = CentredLinear(num_classes=10, image_shape=(8, 8, 1))
BATCH = {
  "image": jax.random.randint(jax.random.key(2), (64, 8, 8, 1), 0, 256).astype(jnp.uint8),
  "label": jnp.arange(64, dtype=jnp.int32) % 10,
}


def layers():
  keys = jax.random.split(jax.random.key(0), 4)
  return {
    "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 1, 4)), "bias": jax.random.normal(keys[1], (4,))},
    "dense": {"kernel": jax.random.normal(keys[2], (4, 3))},
    "unused": {"kernel": jax.random.normal(keys[3], (2, 2))},
  }


def loss(params):
  conv, dense = params["conv"], params["dense"]
  return jnp.sin(conv["kernel"].sum((0, 1, 2)) + conv["bias"]) @ jnp.exp(dense["kernel"]) @ jnp.arange(3.0)


def test_length_is_gamma_of_each_weight_along_its_gradient():
  params = layers()
  v, g = ascent(loss, params, 0.02), jax.grad(loss)(params)
  for layer in ("conv", "dense"):
    w, found, gradient = (np.array(tree[layer]["kernel"], np.float64) for tree in (params, v, g))
    np.testing.assert_allclose(np.linalg.norm(found), 0.02 * np.linalg.norm(w), rtol=1e-6)
    cosine = (found * gradient).sum() / np.linalg.norm(found) / np.linalg.norm(gradient)
    assert cosine == pytest.approx(1, abs=1e-6)
  np.testing.assert_array_equal(v["conv"]["bias"], 0)
  np.testing.assert_array_equal(v["unused"]["kernel"], 0)  # no gradient, no direction
  assert np.abs(g["conv"]["bias"]).max() > 0.1
  jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), ascent(loss, params, 0.0))


def test_no_gradient_flows_through_the_perturbation():
  params = layers()

  def moved(p):
    return loss(jax.tree.map(jnp.add, p, ascent(loss, p, 0.1)))

  there = jax.tree.map(jnp.add, params, ascent(loss, params, 0.1))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.grad(moved)(params), jax.grad(loss)(there)
  )


@pytest.mark.parametrize("gamma", [1e-3, 0.1, 1.0])
def test_a_convex_loss_does_not_fall(gamma):
  """Cross-entropy of a linear classifier lies above its tangent, along which ascent goes up."""
  x = jax.random.normal(jax.random.key(4), (32, 6))
  y = jnp.arange(32) % 4

  def cross_entropy(params):
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ params["kernel"]), y[:, None], 1).mean()

  params = {"kernel": jax.random.normal(jax.random.key(5), (6, 4))}
  v = ascent(cross_entropy, params, gamma)
  slope = (jax.grad(cross_entropy)(params)["kernel"] * v["kernel"]).sum()
  rise = cross_entropy(jax.tree.map(jnp.add, params, v)) - cross_entropy(params)
  assert slope > 0 and rise >= 0.999 * slope


# ---- in the training step ----


def one_step(objective="standard", step=0, **train):
  """(state before, state after, metrics) of one step on BATCH."""
  overrides = {"objective.name": objective, "optimizer.weight_decay": 0.0}
  config = config_lib.load(
    "configs/at_cifar.py:smoke", overrides | {f"train.{k}": v for k, v in train.items()}
  )
  data = classifiers.load_data(config)
  trainer = train_classifier.build_trainer(config, NET, data, parallel.make_mesh())
  before = state.create(trainer.init, trainer.optimizer, jax.random.key(0))
  before = state.TrainState(**(vars(before) | {"step": jnp.int32(step)}))
  return before, *jax.jit(trainer.step)(before, BATCH)


def same(one, other):
  return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_gradient_is_taken_at_the_perturbed_weights_and_moves_the_plain_ones():
  before, after, metrics = one_step(awp_gamma=0.3)
  x = np.array(BATCH["image"], np.float64).reshape(64, -1) / 255
  x, one_hot = x - x.mean(0), np.eye(10)[BATCH["label"]]

  def gradient(w):
    e = np.exp(x @ w - (x @ w).max(1, keepdims=True))
    return x.T @ (e / e.sum(1, keepdims=True) - one_hot) / 64

  w = np.array(before.params["kernel"], np.float64)
  g = gradient(w)
  there = gradient(w + 0.3 * np.linalg.norm(w) * g / np.linalg.norm(g))
  _, plain, plain_metrics = one_step()
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(there), rtol=1e-4)
  moved, moved_plain = (np.array(s.params["kernel"], np.float64) - w for s in (after, plain))
  factor = np.linalg.norm(moved_plain) / np.linalg.norm(g)  # of the first step of SGD
  np.testing.assert_allclose(moved, -factor * there, atol=2e-3 * np.abs(moved).max())
  assert metrics["loss"] > plain_metrics["loss"]
  # The statistics of this network do not depend on its weights: they moved once, as without a perturbation.
  np.testing.assert_array_equal(
    after.collections["batch_stats"]["mean"], plain.collections["batch_stats"]["mean"]
  )


@pytest.mark.parametrize("objective", ["trades", "ikl"])
def test_off_and_warm_up_are_the_plain_step_bit_for_bit(objective):
  """Eight steps an epoch: step 7 is the last of a warm-up of one, step 8 the first that perturbs."""
  for step, perturbed in ((7, False), (8, True)):
    _, plain, _ = one_step(objective, step)
    _, warming, _ = one_step(objective, step, awp_gamma=0.05, awp_warmup_epochs=1)
    assert same(plain.params, warming.params) != perturbed
    assert same(plain.collections["batch_stats"], warming.collections["batch_stats"]) or perturbed
  if objective == "ikl":
    assert warming.collections["objective"]["counts"].sum() == 64  # the ascent is not counted


def test_accumulation_perturbs_each_micro_batch():
  before, after, metrics = one_step(awp_gamma=0.05, accumulate=4)
  assert np.isfinite(metrics["loss"]) and not same(before.params, after.params)
  assert not same(after.params, one_step(accumulate=4)[1].params)


@pytest.mark.parametrize("name", ["awp_gamma", "awp_warmup_epochs"])
def test_negative_numbers_are_one_clear_line(name):
  with pytest.raises(InputError, match=f"train.{name} must be at least 0, found -1"):
    one_step(**{name: -1})
