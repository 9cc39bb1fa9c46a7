"""PGD where the optimum is known, its invariants, and the evaluation attack against reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir
from reference_nets import load_graph

from jax_trustdiff.attacks import losses, norms
from jax_trustdiff.attacks.pgd import PGD, fgsm
from jax_trustdiff.attacks.registry import ATTACKS
from jax_trustdiff.types import InputError

SHAPE = (4, 4, 1)
W = np.random.default_rng(0).normal(size=16).astype(np.float32)


def linear(x):
  """Two classes, with logits 0 and w . (x - 1/2)."""
  score = (x.reshape(x.shape[0], -1) - 0.5) @ W
  return jnp.stack([jnp.zeros_like(score), score], axis=1)


def bumpy(x):
  """Three classes over many hills: ascent ends in local optima."""
  rng = np.random.default_rng(1)
  kernel = rng.normal(size=(16, 24)).astype(np.float32) * 4
  return jnp.sin(x.reshape(x.shape[0], -1) @ kernel) @ rng.normal(size=(24, 3)).astype(np.float32)


def run(attack, logits_fn, x, y, key, start=None):
  return attack(logits_fn, jnp.asarray(x), jnp.asarray(y), key, start)


def greatest_move(x, sign, radius, norm):
  """max sign * w . delta over the ball and the cube, exact for linf and l1, and for l2 far from the walls."""
  push = sign[:, None] * W
  room = np.where(push > 0, 1 - x.reshape(-1, 16), x.reshape(-1, 16))
  if norm == "linf":
    return (np.abs(push) * np.minimum(room, radius)).sum(1)
  if norm == "l2":
    return radius * np.linalg.norm(push, axis=1)
  total = np.zeros(len(x))
  for i in range(len(x)):
    left = radius
    for j in np.argsort(-np.abs(push[i])):
      step = min(left, room[i, j])
      total[i], left = total[i] + step * abs(push[i, j]), left - step
  return total


@pytest.mark.floor
@pytest.mark.parametrize(
  "norm, radius, step_size", [("linf", 0.1, 0.03), ("l2", 0.2, 0.1), ("l1", 0.8, 0.02)]
)
@pytest.mark.parametrize("loss", ["ce", "margin_unclipped"])
def test_linear_classifier_reaches_the_optimum_in_closed_form(norm, radius, step_size, loss):
  rng = np.random.default_rng(2)
  low, high = (0.3, 0.7) if norm == "l2" else (0.0, 1.0)
  x = rng.uniform(low, high, (64, *SHAPE)).astype(np.float32)
  y = rng.integers(0, 2, 64)
  num_steps = 300 if norm == "l1" else 60
  x_adv = run(PGD(norm, radius, step_size, num_steps, loss), linear, x, y, jax.random.key(0))
  sign = np.where(y == 1, -1.0, 1.0)
  score = np.array(linear(x)[:, 1], np.float64)
  worst = score + sign * greatest_move(x, sign, radius, norm)
  # In l1 the last steps swing between pixels at the end of the budget: half a step times a difference of weights.
  atol = 0.6 * step_size if norm == "l1" else 1e-4
  np.testing.assert_allclose(linear(x_adv)[:, 1], worst, atol=atol)
  robust = np.where(y == 1, worst > 0, worst <= 0)
  clear = np.abs(worst) > atol
  np.testing.assert_array_equal((linear(x_adv).argmax(1) == y)[clear], robust[clear])
  assert 0 < robust.mean() < 1


@pytest.mark.parametrize("norm, radius", [("linf", 0.1), ("l2", 0.4), ("l1", 1.0)])
def test_result_is_in_ball_and_cube_for_any_steps(norm, radius):
  x = jax.random.uniform(jax.random.key(1), (16, *SHAPE)).at[0].set(0).at[1].set(1)
  y = jnp.arange(16) % 3
  for num_steps in (0, 3):
    x_adv = run(PGD(norm, radius, 3 * radius, num_steps), bumpy, x, y, jax.random.key(2))
    assert x_adv.dtype == jnp.float32
    assert (x_adv >= 0).all() and (x_adv <= 1).all()
    assert (norms.lengths(x_adv - x, norm) <= radius * (1 + 1e-5) + 1e-6).all()
  unmoved = run(PGD(norm, 0.0, 0.1, 3), bumpy, x, y, jax.random.key(2))
  np.testing.assert_allclose(unmoved, x, atol=1e-6)


def test_more_restarts_never_do_worse():
  x = jax.random.uniform(jax.random.key(3), (64, *SHAPE))
  y = bumpy(x).argmax(1)
  key = jax.random.key(4)
  fooled, reached = [], []
  for restarts in (1, 6):
    x_adv = run(PGD("linf", 0.02, 0.005, 1, "ce", restarts), bumpy, x, y, key)
    fooled.append(np.array(bumpy(x_adv).argmax(1) != y))
    reached.append(np.array(losses.ce(bumpy(x_adv), y)))
  assert (fooled[1] | ~fooled[0]).all()
  same = fooled[1] == fooled[0]
  assert (reached[1] >= reached[0] - 1e-4)[same].all()
  assert fooled[1].sum() > fooled[0].sum()


@pytest.mark.parametrize("fooling_run", [0, 1])
def test_a_restart_that_fools_is_kept_before_a_larger_loss(fooling_run):
  """Two runs without steps: one ends misclassified with CE 0.92, the other correct with CE 1.08."""
  x, y, key = jnp.full((1, 1, 1, 1), 0.5), jnp.array([0]), jax.random.key(0)
  ends = [float(norms.random_start(norms.fold_in(key, r), x, 0.5, "linf")[0, 0, 0, 0]) for r in (0, 1)]
  below = ends[fooling_run] < ends[1 - fooling_run]

  def logits_fn(images):
    fooled = (images.reshape(-1, 1) < sum(ends) / 2) == below
    return jnp.log(jnp.where(fooled, jnp.array([0.4, 0.6, 1e-9]), jnp.array([0.34, 0.33, 0.33])))

  x_adv = run(PGD("linf", 0.5, 0.0, 0, "ce", 2), logits_fn, x, y, key)
  assert float(x_adv[0, 0, 0, 0]) == pytest.approx(ends[fooling_run])


@pytest.mark.parametrize("norm, radius", [("linf", 0.1), ("l2", 0.4), ("l1", 1.0)])
def test_with_a_key_per_image_the_result_does_not_depend_on_the_batch(norm, radius):
  x = jax.random.uniform(jax.random.key(5), (12, *SHAPE))
  y = jnp.arange(12) % 3
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(6), jnp.arange(100, 112))
  attack = PGD(norm, radius, radius / 4, 3, restarts=2)
  rows = jnp.array([7, 0, 11])
  whole = run(attack, bumpy, x, y, keys)
  few = run(attack, bumpy, x[rows], y[rows], keys[rows])
  np.testing.assert_allclose(few, whole[rows], atol=1e-5)
  other_keys = run(attack, bumpy, x[rows], y[rows], keys[rows - 1])
  assert not np.allclose(other_keys, whole[rows], atol=1e-3)


def test_fgsm_is_one_signed_step_and_starts_at_the_image():
  x = jax.random.uniform(jax.random.key(7), (5, *SHAPE))
  y = jnp.array([0, 1, 0, 1, 1])
  expected = jnp.clip(x + 0.1 * jnp.sign(jnp.where(y == 1, -1.0, 1.0)[:, None] * W).reshape(x.shape), 0, 1)
  np.testing.assert_allclose(run(fgsm(radius=0.1), linear, x, y, jax.random.key(0)), expected, atol=1e-6)


def test_the_l2_step_order_box_then_ball():
  """One step by hand: normalise, add, clip to the cube, shrink into the ball."""
  rng = np.random.default_rng(3)
  x = rng.uniform(0, 1, (6, *SHAPE)).astype(np.float32)
  y = rng.integers(0, 2, 6)
  start = jnp.clip(x + rng.normal(0, 0.1, x.shape).astype(np.float32), 0, 1)
  direction = np.where(y == 1, -1, 1)[:, None] * W / np.linalg.norm(W)
  delta = np.clip(start + 1.5 * direction.reshape(x.shape), 0, 1) - x
  length = np.linalg.norm(delta.reshape(6, -1), axis=1)
  expected = x + delta * np.minimum(1, 0.8 / length)[:, None, None, None]
  got = run(PGD("l2", 0.8, 1.5, 1, "margin_unclipped"), linear, x, y, jax.random.key(0), start)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_an_l1_start_outside_of_the_cube_is_projected_first():
  rng = np.random.default_rng(4)
  x = rng.uniform(0, 1, (6, *SHAPE)).astype(np.float32)
  y = rng.integers(0, 2, 6)
  start = jnp.asarray(x + rng.normal(0, 3, x.shape), jnp.float32)
  attack = PGD("l1", 0.8, 0.1, 1)
  got = run(attack, linear, x, y, jax.random.key(0), start)
  inside = norms.project(start, jnp.asarray(x), 0.8, "l1")
  gradient = jnp.asarray(np.where(y == 1, -1, 1)[:, None] * W).reshape(x.shape)
  expected = norms.project(norms.l1_step(inside, gradient, 0.1), jnp.asarray(x), 0.8, "l1")
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_margin_gradient_is_zero_once_misclassified():
  z = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
  y = jnp.array([0, 0, 0])
  np.testing.assert_array_equal(losses.margin(z, y), [-1, 0, 0])
  np.testing.assert_array_equal(losses.margin_unclipped(z, y), [-1, 1, 0])
  gradient = jax.grad(lambda z: losses.margin(z, y).sum())(z)
  np.testing.assert_array_equal(gradient, [[-1, 1, 0], [0, 0, 0], [-1, 1, 0]])


@pytest.mark.floor
def test_losses_against_values_by_hand():
  z = jnp.array([[3.0, 1.0, 0.5, -2.0], [0.0, 4.0, 1.0, 2.0]])
  y = jnp.array([0, 2])
  # (z_y - best other) / (largest - third): (3 - 1) / (3 - 0.5) and (1 - 4) / (4 - 1).
  np.testing.assert_allclose(losses.dlr(z, y), [-0.8, 1.0], rtol=1e-6)
  log_p = np.float64(z) - np.log(np.exp(np.float64(z)).sum(1, keepdims=True))
  np.testing.assert_allclose(losses.ce(z, y), [-log_p[0, 0], -log_p[1, 2]], rtol=1e-6)
  np.testing.assert_allclose(
    losses.cross_entropy(z, y, 0.1),
    [-0.9 * log_p[i, k] - 0.1 * log_p[i].mean() for i, k in enumerate(y)],
    rtol=1e-6,
  )
  p, q = np.exp(log_p[:1]), np.exp(log_p[1:])
  np.testing.assert_allclose(losses.kl(z[:1], z[1:])[0], (p * np.log(p / q)).sum(), rtol=1e-6)
  assert losses.ce(z.astype(jnp.bfloat16), y).dtype == jnp.float32


@pytest.mark.floor
@pytest.mark.parametrize(
  "fields, message",
  [
    ({"norm": "inf"}, "choices are linf, l2, l1"),
    ({"loss": "cw"}, "choices are ce, margin, margin_unclipped, dlr"),
    ({"radius": -0.1}, "radius is -0.1; it must be at least 0 and finite"),
    ({"step_size": float("inf")}, "step_size is inf"),
    ({"radius": float("nan")}, "radius is nan"),
    ({"num_steps": -1}, "num_steps is -1"),
    ({"restarts": 0}, "restarts is 0"),
    ({"restarts": 2, "random_start": False}, "every run would be the same"),
  ],
)
def test_bad_fields_are_one_clear_line(fields, message):
  with pytest.raises(InputError, match=message) as error:
    ATTACKS["pgd"](**fields)
  assert "\n" not in str(error.value)


def test_dlr_needs_three_classes():
  with pytest.raises(InputError, match="at least 3 classes, found 2"):
    losses.dlr(jnp.zeros((1, 2)), jnp.array([0]))


@pytest.mark.parametrize("name, loss", [("cw", "margin"), ("ce", "ce")])
def test_evaluation_attack_agrees_with_the_reference(name, loss):
  golden = np.load(shared_dir("golden", "at_step", "pgd40_eval_resnet4b_linf.npz"))
  logits_fn = load_graph(shared_dir("golden", "autoattack", "net_resnet4b.npz"))
  archive = np.load(shared_dir("golden", "autoattack", "images_test0-127.npz"))
  images = next(a for a in archive.values() if a.dtype == np.uint8 and a.ndim == 4)
  x, y = jnp.array(images.astype(np.float32) / 255), jnp.array(golden["labels"].astype(np.int32))
  noise = (2 * np.random.RandomState(44).rand(128, 3, 32, 32) - 1).astype(np.float32)
  np.testing.assert_allclose(noise.ravel()[:4], golden["noise_first4"], atol=1e-6)
  radius = 2 / 255
  start = jnp.clip(x + radius * noise.transpose(0, 2, 3, 1), 0, 1)
  x_adv = run(PGD("linf", radius, 0.5 / 255, 40, loss), logits_fn, x, y, jax.random.key(0), start)
  gap = -losses.margin_unclipped(logits_fn(x_adv), y)
  robust = np.array(logits_fn(x_adv).argmax(1) == y)
  assert (robust != golden[f"{name}_robust"]).sum() <= 1
  np.testing.assert_allclose(gap, golden[f"{name}_margin"], atol=0.02)
  np.testing.assert_allclose(norms.lengths(x_adv - x, "linf"), golden[f"{name}_norm"], atol=1e-6)
  same = np.abs(x_adv[:4].transpose(0, 3, 1, 2) - golden[f"{name}_x_adv_first4"]) < 1e-4
  assert same.mean() > 0.99
