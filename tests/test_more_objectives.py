"""Soft labels, SCORE, Consistency and IKL against independent numpy and torch calculations on a linear network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training as training
from reference_nets import CentredLinear
from test_objectives import (
  KERNEL,
  NET,
  ROWS,
  VARIABLES,
  X64,
  X_ADV,
  X_ADV64,
  X,
  Y,
  ascend_by_hand,
  kl,
  logits,
  softmax,
)

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.attacks import losses
from jax_trustdiff.attacks.pgd import PGD
from jax_trustdiff.data.augment import AUGMENTATIONS
from jax_trustdiff.robustness.objectives import (
  IKL,
  MART,
  OBJECTIVES,
  PGDAT,
  SCORE,
  TRADES,
  Consistency,
  Standard,
  initial_collections,
  loss_and_collections,
)
from jax_trustdiff.tasks import classifiers, train_classifier
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.types import InputError, Stopped

SOFT64 = softmax(np.random.default_rng(0).normal(size=(6, 4)))
SOFT = jnp.asarray(SOFT64, jnp.float32)
ONE_HOT = jnp.eye(4)[Y]
TABLE64 = softmax(np.random.default_rng(1).normal(size=(4, 4)))
P, Q = softmax(logits(X64)), softmax(logits(X_ADV64))


def with_table(table=TABLE64):
  return VARIABLES | {"objective": IKL().init_state(4) | {"table": jnp.asarray(table, jnp.float32)}}


def torch_gradient(loss_of):
  """The gradient of mean loss_of(functional, z, z_adv) with respect to the kernel, by torch in float64."""
  torch = pytest.importorskip("torch")
  kernel = torch.tensor(KERNEL, requires_grad=True)
  z, z_adv = (
    (flat - flat.mean(0)) @ kernel for flat in (torch.tensor(a.reshape(6, -1)) for a in (X64, X_ADV64))
  )
  loss_of(torch, z, z_adv).mean().backward()
  return kernel.grad.numpy()


def our_gradient(objective, y, variables=VARIABLES):
  def loss(params):
    return objective.loss(NET, {**variables, "params": params}, X, X_ADV, y)[0].mean()

  return jax.grad(loss)(VARIABLES["params"])["kernel"]


# ---- soft labels ----


def test_losses_of_soft_labels_without_smoothing():
  ce, ce_adv = -(SOFT64 * np.log(P)).sum(1), -(SOFT64 * np.log(Q)).sum(1)
  np.testing.assert_allclose(Standard(0.3).loss(NET, VARIABLES, X, X, SOFT)[0], ce, rtol=1e-5)
  np.testing.assert_allclose(
    PGDAT(label_smoothing=0.3).loss(NET, VARIABLES, X, X_ADV, SOFT)[0], ce_adv, rtol=1e-5
  )
  loss, _, metrics = TRADES(beta=2.0, label_smoothing=0.3).loss(NET, VARIABLES, X, X_ADV, SOFT)
  np.testing.assert_allclose(loss, kl(SOFT64, P) + 2 * kl(P, Q), rtol=1e-4)
  np.testing.assert_allclose(metrics["ce"], ce, rtol=1e-5)
  np.testing.assert_array_equal(metrics["clean_correct"], P.argmax(1) == SOFT64.argmax(1))
  np.testing.assert_array_equal(metrics["adversarial_correct"], Q.argmax(1) == SOFT64.argmax(1))


@pytest.mark.parametrize("name", ["standard", "pgd_at", "trades", "score", "consistency", "ikl"])
def test_certain_soft_labels_are_the_classes(name):
  """0 log 0 is 0 in value and gradient."""
  objective, variables = OBJECTIVES[name](), with_table() if name == "ikl" else VARIABLES
  for got, expected in zip(*(objective.loss(NET, variables, X, X_ADV, y) for y in (ONE_HOT, Y)), strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
  np.testing.assert_allclose(
    our_gradient(objective, ONE_HOT, variables), our_gradient(objective, Y, variables), rtol=1e-4, atol=1e-6
  )


def test_trades_gradient_of_soft_labels_agrees_with_torch():
  def loss(torch, z, z_adv):
    functional, y = torch.nn.functional, torch.tensor(SOFT64)
    natural = functional.kl_div(z.log_softmax(1), y, reduction="none").sum(1)
    return natural + 5 * functional.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="none").sum(1)

  got = our_gradient(TRADES(beta=5.0, label_smoothing=0.2), SOFT)
  np.testing.assert_allclose(got, torch_gradient(loss), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("norm, radius, step_size", [("linf", 0.2, 0.05), ("l2", 0.5, 0.11)])
def test_attacks_of_soft_labels_by_hand(norm, radius, step_size):
  start = jnp.clip(X + 0.05 * jax.random.normal(jax.random.key(3), X.shape), 0, 1)
  settings = dict(norm=norm, radius=radius, step_size=step_size, num_steps=4)
  for objective, target, mean in (
    (TRADES(**settings), SOFT64, None),
    (TRADES(**settings, mixed_target=False), P, None),
    (PGDAT(**settings), SOFT64, np.array(VARIABLES["batch_stats"]["mean"], np.float64)),
    (Consistency(**settings), SOFT64, None),
    (IKL(**settings), SOFT64, None),
    (Consistency(**settings, mixed_target=False), P, None),
    (IKL(**settings, mixed_target=False), P, None),
  ):
    x_adv = objective.attack(NET, VARIABLES, X, SOFT, jax.random.key(0), start)
    expected = ascend_by_hand(
      np.array(start, np.float64), radius, step_size, 4, norm, lambda q, target=target: q - target, mean
    )
    np.testing.assert_allclose(x_adv, expected, atol=1e-4, err_msg=str(objective))


def test_attacks_that_need_a_class_refuse_soft_labels():
  with pytest.raises(InputError, match="mart takes classes as labels"):
    MART().loss(NET, VARIABLES, X, X_ADV, SOFT)
  with pytest.raises(InputError, match="mart takes classes as labels"):
    MART().attack(NET, VARIABLES, X, SOFT, jax.random.key(0))
  logits_fn = lambda x: NET.logits(VARIABLES, x)  # noqa: E731
  with pytest.raises(InputError, match="'margin', which takes classes.*use 'ce'"):
    PGD(loss="margin")(logits_fn, X, SOFT, jax.random.key(0))
  several = PGD(radius=0.2, step_size=0.1, num_steps=2, restarts=3)
  np.testing.assert_allclose(
    several(logits_fn, X, ONE_HOT, jax.random.key(0)), several(logits_fn, X, Y, jax.random.key(0)), atol=1e-6
  )


# ---- SCORE ----


def test_score_loss_and_gradient():
  """Squared distances; some of the robust ones lie below the clip and have no gradient."""
  robust = ((Q - P) ** 2).sum(1)
  clip = float(np.median(robust))
  objective = SCORE(beta=3.0, clip=clip, label_smoothing=0.3)
  target = np.full((6, 4), 0.1)
  target[ROWS, Y] = 0.7
  loss, moments, metrics = objective.loss(NET, VARIABLES, X, X_ADV, Y)
  expected = ((P - target) ** 2).sum(1) + 3 * np.maximum(robust - clip, 0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["robust_distance"], robust, rtol=1e-4)
  np.testing.assert_allclose(moments[0]["mean"], X64.reshape(6, -1).mean(0), rtol=1e-5)
  np.testing.assert_allclose(moments[1]["mean"], X_ADV64.reshape(6, -1).mean(0), rtol=1e-5)
  soft_loss = objective.loss(NET, VARIABLES, X, X_ADV, SOFT)[0]
  np.testing.assert_allclose(
    soft_loss, ((P - SOFT64) ** 2).sum(1) + 3 * np.maximum(robust - clip, 0), rtol=1e-5
  )

  def by_torch(torch, z, z_adv):
    p, q = z.softmax(1), z_adv.softmax(1)
    between = torch.relu(((q - p) ** 2).sum(1) - clip)
    return ((p - torch.tensor(target)) ** 2).sum(1) + 3 * between

  np.testing.assert_allclose(our_gradient(objective, Y), torch_gradient(by_torch), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("norm, radius", [("linf", 0.2), ("l2", 0.5)])
def test_score_attack_by_hand(norm, radius):
  start = X + 0.05 * jax.random.normal(jax.random.key(3), X.shape)

  def gradient(q):
    return 2 * q * ((q - P) - (q * (q - P)).sum(1, keepdims=True))

  objective = SCORE(norm=norm, radius=radius, step_size=0.11, num_steps=4)
  x_adv = objective.attack(NET, VARIABLES, X, Y, jax.random.key(0), start)
  expected = ascend_by_hand(np.array(start, np.float64), radius, 0.11, 4, norm, gradient, None)
  np.testing.assert_allclose(x_adv, expected, atol=1e-4)


# ---- Consistency ----


def test_consistency_loss_and_gradient():
  """Example i and example 3 + i are the two augmentations of one image."""
  objective = Consistency(consistency=2.0, temperature=0.7, beta=3.0, label_smoothing=0.1)
  loss, moments, metrics = objective.loss(NET, VARIABLES, X, X_ADV, Y)
  one, two = np.split(softmax(logits(X_ADV64) / 0.7), 2)
  middle = (one + two) / 2
  jsd = np.tile((kl(one, middle) + kl(two, middle)) / 2, 2)
  trades = TRADES(beta=3.0, label_smoothing=0.1).loss(NET, VARIABLES, X, X_ADV, Y)[0]
  np.testing.assert_allclose(loss, trades + 2 * jsd, rtol=1e-5)
  np.testing.assert_allclose(metrics["jsd"], jsd, rtol=1e-4)
  assert len(moments) == 2

  def by_torch(torch, z, z_adv):
    functional, y = torch.nn.functional, torch.tensor(np.array(Y), dtype=torch.long)
    natural = functional.cross_entropy(z, y, reduction="none", label_smoothing=0.1)
    between = functional.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="none").sum(1)
    p, q = (z_adv / 0.7).softmax(1).chunk(2)
    log_mean = ((p + q) / 2).clamp(min=1e-8).log()
    agree = sum(functional.kl_div(log_mean, v, reduction="none").sum(1) for v in (p, q)) / 2
    return (natural + 3 * between).mean() + 2 * agree.mean()

  np.testing.assert_allclose(our_gradient(objective, Y), torch_gradient(by_torch), rtol=2e-4, atol=1e-6)
  with pytest.raises(InputError, match="found 5 images, an odd number"):
    objective.loss(NET, VARIABLES, X[:5], X_ADV[:5], Y[:5])


def test_training_augments_every_image_once_for_each_view():
  images = jax.random.randint(jax.random.key(0), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
  batch, key = {"image": images, "label": jnp.arange(16)}, jax.random.key(1)
  shift = AUGMENTATIONS["pad_crop_flip"](pad=2)
  x, y = train_classifier._views(1, shift, 0, 10, batch, key)
  np.testing.assert_allclose(x, shift(images, key) / np.float32(255), rtol=1e-6)
  np.testing.assert_array_equal(y, batch["label"])
  x, y = train_classifier._views(2, shift, 0, 10, batch, key)
  assert x.shape == (32, 8, 8, 1) and (np.array(y) == np.tile(np.arange(16), 2)).all()
  same = [np.array_equal(x[i], x[16 + i]) for i in range(16)]
  assert sum(same) <= 4  # of 50 places and reflections
  plain, _ = train_classifier._views(2, AUGMENTATIONS["none"](), 0, 10, batch, key)
  np.testing.assert_array_equal(plain[:16], plain[16:])


# ---- IKL ----


def test_ikl_loss_and_gradient():
  objective = IKL(mse_weight=7.0, ce_weight=2.0, label_smoothing=0.1)
  loss, moments, metrics = objective.loss(NET, with_table(), X, X_ADV, Y)
  z, z_adv, s = logits(X64), logits(X_ADV64), TABLE64[Y]
  pairs = lambda v: v[:, :, None] - v[:, None, :]  # noqa: E731
  mse = (s[:, :, None] * s[:, None, :] * (pairs(z) - pairs(z_adv)) ** 2).sum((1, 2)) / 4
  ce = -0.9 * np.log(P[ROWS, Y]) - 0.1 * np.log(P).mean(1)
  soft_ce = -(P * np.log(Q)).sum(1)
  np.testing.assert_allclose(loss, ce + 7 * mse + 2 * soft_ce, rtol=1e-5)
  np.testing.assert_allclose(metrics["weighted_mse"], mse, rtol=1e-4)
  assert len(moments) == 2

  def by_torch(torch, z, z_adv):
    s = torch.tensor(TABLE64[Y])
    natural = torch.nn.functional.cross_entropy(
      z, torch.tensor(np.array(Y), dtype=torch.long), reduction="none", label_smoothing=0.1
    )
    difference = (z[:, :, None] - z[:, None, :]) - (z_adv[:, :, None] - z_adv[:, None, :])
    squares = (s[:, :, None] * s[:, None, :] * difference**2).sum((1, 2)) / 4
    return natural + 7 * squares - 2 * (z.softmax(1).detach() * z_adv.log_softmax(1)).sum(1)

  got = our_gradient(objective, Y, with_table())
  np.testing.assert_allclose(got, torch_gradient(by_torch), rtol=2e-4, atol=1e-6)
  mixed = objective.loss(NET, with_table(), X, X_ADV, SOFT)[2]["weighted_mse"]
  s = SOFT64 @ TABLE64
  mse = (s[:, :, None] * s[:, None, :] * (pairs(z) - pairs(z_adv)) ** 2).sum((1, 2)) / 4
  np.testing.assert_allclose(mixed, mse, rtol=1e-4)


def test_the_two_terms_have_the_gradient_of_kl(float64):
  """Theorem 1 of Cui et al. 2024: with the weights of the image itself, and stopped gradients."""
  z, z_adv = (jnp.asarray(3 * np.random.default_rng(i).normal(size=(8, 5))) for i in range(2))
  stop = jax.lax.stop_gradient

  def decoupled(z, z_adv):
    p = stop(jax.nn.softmax(z))
    return (losses.pairwise_squares(z - stop(z_adv), p) + losses.cross_entropy(z_adv, p)).sum()

  expected = jax.grad(lambda z, z_adv: losses.kl(z, z_adv).sum(), (0, 1))(z, z_adv)
  for got, of_kl in zip(jax.grad(decoupled, (0, 1))(z, z_adv), expected, strict=True):
    np.testing.assert_allclose(got, of_kl, atol=1e-12)
    assert np.abs(of_kl).max() > 0.1


def test_table_is_the_class_means_of_the_epoch_before():
  """Two epochs of three batches; nobody is of class 3, whose row stays uniform."""
  objective = IKL(temperature=2.0)
  rng = np.random.default_rng(3)
  batches = [(rng.uniform(size=(5, 2, 3, 1)), rng.integers(0, 3, 5)) for _ in range(6)]
  collections = initial_collections(objective, 4)
  np.testing.assert_array_equal(collections["objective"]["table"], np.full((4, 4), 0.25))
  tables = []
  for step, (x, y) in enumerate(batches):
    args = (jnp.asarray(x, jnp.float32), jnp.asarray(x[::-1], jnp.float32), jnp.asarray(y, jnp.int32))
    *found, collections = loss_and_collections(
      objective, NET, VARIABLES | collections, *args, jnp.int32(step // 3)
    )
    tables.append(collections["objective"]["table"])
    expected = objective.loss(NET, VARIABLES | collections, *args)
    jax.tree.map(np.testing.assert_array_equal, tuple(found), expected)

  def means(first):
    p = np.concatenate([softmax(logits(x) / 2.0) for x, _ in batches[first : first + 3]])
    y = np.concatenate([y for _, y in batches[first : first + 3]])
    return np.array([p[y == c].mean(0) if (y == c).any() else np.full(4, 0.25) for c in range(4)])

  for table in tables[:3]:
    np.testing.assert_array_equal(table, np.full((4, 4), 0.25))
  for table in tables[3:]:
    np.testing.assert_allclose(table, means(0), rtol=1e-5)
  last = collections["objective"]
  y = np.concatenate([y for _, y in batches[3:]])
  np.testing.assert_allclose(last["counts"], np.bincount(y, minlength=4))
  turned = loss_and_collections(objective, NET, VARIABLES | collections, X, X, Y, jnp.int32(2))[3]
  np.testing.assert_allclose(turned["objective"]["table"], means(3), rtol=1e-5)
  np.testing.assert_allclose(turned["objective"]["table"].sum(1), 1, rtol=1e-6)


def test_soft_labels_count_for_every_class_by_weight():
  objective = IKL(temperature=1.0)
  start = VARIABLES | initial_collections(objective, 4)
  seen = loss_and_collections(objective, NET, start, X, X_ADV, SOFT, jnp.int32(0))[3]["objective"]
  np.testing.assert_allclose(seen["sums"], SOFT64.T @ P, rtol=1e-5)
  np.testing.assert_allclose(seen["counts"], SOFT64.sum(0), rtol=1e-5)


def test_objectives_without_a_state_add_no_collection():
  for name in sorted(OBJECTIVES.keys() - {"ikl"}):
    objective = OBJECTIVES[name]()
    assert initial_collections(objective, 4) == {}
    assert loss_and_collections(objective, NET, VARIABLES, X, X_ADV, Y, jnp.int32(0))[3] == {}


# ---- IKL in training ----

DIGITS = CentredLinear(num_classes=10, image_shape=(8, 8, 1))
SETTINGS = {
  "objective.name": "ikl",
  "objective.num_steps": 1,
  "objective.temperature": 1.0,
  "train.log_every": 4,
  "train.checkpoint_every": 100,
  "train.num_validation": 64,
}


def build(**train):
  config = config_lib.load(
    "configs/at_cifar.py:smoke", SETTINGS | {f"train.{k}": v for k, v in train.items()}
  )
  data = classifiers.load_data(config)
  return data, train_classifier.build_trainer(config, DIGITS, data, parallel.make_mesh())


def test_accumulation_sums_over_the_whole_batch_and_turns_once_an_epoch():
  """Micro-batches of a step that begins an epoch: the first makes the table, the others leave it."""
  _, trainer = build(accumulate=4)
  fresh = state.create(trainer.init, trainer.optimizer, jax.random.key(0))
  before = {k: np.array(v) for k, v in fresh.collections["objective"].items()}
  before |= {"sums": np.eye(10, dtype=np.float32) * 3, "counts": np.full(10, 3, np.float32)}
  fresh = dataclasses.replace(
    fresh, step=jnp.int32(8), collections=fresh.collections | {"objective": jax.tree.map(jnp.array, before)}
  )
  images = jax.random.randint(jax.random.key(2), (64, 8, 8, 1), 0, 256).astype(jnp.uint8)
  batch = {"image": images, "label": jnp.arange(64, dtype=jnp.int32) % 10}
  after, _ = jax.jit(trainer.step)(fresh, batch)
  found = after.collections["objective"]
  np.testing.assert_array_equal(found["table"], np.eye(10))
  np.testing.assert_array_equal(found["counts"], np.bincount(np.arange(64) % 10))
  expected = np.zeros((10, 10))
  for part in range(4):  # row i of the batch is in micro-batch i % 4
    rows = np.arange(part, 64, 4)
    x = np.array(images[rows], np.float64).reshape(16, -1) / 255
    p = softmax((x - x.mean(0)) @ np.array(fresh.params["kernel"], np.float64))
    np.add.at(expected, rows % 10, p)
  np.testing.assert_allclose(found["sums"], expected, rtol=1e-4)
  assert found["epoch"] == 1


def test_a_stopped_run_goes_on_bit_for_bit_with_its_table(tmp_path):
  """Stopped in the second of two epochs, with a table from the first and sums of the second."""

  class Run(training.Run):
    def __init__(self, path):
      super().__init__(path)
      _, self.trainer = build()
      self.feed = self.trainer.feed
      self.plan = dataclasses.replace(self.trainer.plan, validate_every=0)

    def __call__(self):
      self.workdir.open()
      fresh = state.create(self.trainer.init, self.trainer.optimizer, jax.random.key(0))
      with Checkpoints(self.workdir / "checkpoints") as self.checkpoints:
        try:
          return loop.fit(fresh, self.trainer.step, self.feed, self.plan, self.workdir, self.checkpoints, 64)
        finally:
          self.workdir.close()

  whole = Run(tmp_path / "a")()
  table = whole.collections["objective"]["table"]
  assert whole.collections["objective"]["epoch"] == 1 and np.abs(table - 0.1).max() > 0.01
  run = Run(tmp_path / "b")
  training.signal_at(run, 11)
  with pytest.raises(Stopped):
    run()
  resumed = Run(tmp_path / "b")()
  assert training.bits(resumed) == training.bits(whole)
  assert training.lines(tmp_path / "a") == training.lines(tmp_path / "b")
  assert set(resumed.ema_variables) == {"params", "batch_stats"}  # what is evaluated and exported


def test_a_run_from_an_export_starts_with_a_fresh_table():
  optimizer = optimizers.sgd(optimizers.constant(0.1, 1, 1))
  init = lambda key: NET.init(key) | initial_collections(IKL(), 4)  # noqa: E731
  fresh = state.create(init, optimizer, jax.random.key(0))
  tuned = state.with_variables(fresh, jax.device_get(NET.init(jax.random.key(5))))
  np.testing.assert_array_equal(tuned.params["kernel"], NET.init(jax.random.key(5))["params"]["kernel"])
  np.testing.assert_array_equal(
    tuned.collections["batch_stats"]["mean"], NET.init(jax.random.key(5))["batch_stats"]["mean"]
  )
  jax.tree.map(np.testing.assert_array_equal, tuned.collections["objective"], fresh.collections["objective"])
