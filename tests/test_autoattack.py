"""AutoAttack: schedules, projections, worlds with known answers, and results that depend on nothing but the images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import LONG, shared_dir
from reference_nets import load_graph
from workers import answer, start

from jax_trustdiff.attacks import norms, square
from jax_trustdiff.attacks.apgd import APGD, _windows
from jax_trustdiff.attacks.autoattack import NOT_BROKEN, WRONG, Advance, AutoAttack, attacks_of
from jax_trustdiff.attacks.fab import FAB, to_hyperplane
from jax_trustdiff.attacks.runs import NEVER, rank_target
from jax_trustdiff.attacks.square import Square
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError, RunError

KEY = jax.random.key(0)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Linear:
  """logits = x kernel + bias."""

  kernel: jax.Array  # [d k]
  bias: jax.Array  # [k]

  def __call__(self, x):
    return x.reshape(x.shape[0], -1) @ self.kernel + self.bias


def linear(num_classes=5, shape=(6, 8, 2), scale=1.0, seed=0):
  """A linear classifier that is least sure at grey."""
  r = np.random.RandomState(seed)
  kernel = scale * r.randn(int(np.prod(shape)), num_classes).astype(np.float32)
  return Linear(jnp.asarray(kernel), jnp.asarray(-0.5 * kernel.sum(0)))


def images(n=24, shape=(6, 8, 2), seed=1, low=0.3, high=0.7):
  return np.random.RandomState(seed).uniform(low, high, (n, *shape)).astype(np.float32)


def labelled(classifier, x):
  """Every image with the class it is seen as."""
  return np.array(classifier(jnp.asarray(x)).argmax(1), int)


def minimal_distance(classifier, x, y, dual):
  """min_t (z_y - z_t) / ||w_t - w_y||_q, where the walls are far."""
  kernel, logits = (
    np.asarray(classifier.kernel, np.float64),
    np.asarray(classifier(jnp.asarray(x)), np.float64),
  )
  found = []
  for logit, label in zip(logits, y, strict=True):
    slopes = np.linalg.norm(kernel - kernel[:, label, None], dual, axis=0)
    gaps = logit[label] - logit
    found.append(min(gaps[t] / slopes[t] for t in range(len(gaps)) if t != label))
  return np.array(found)


def quietly(**options):
  return AutoAttack(warn=lambda line: None, **options)


# ---- schedules, sizes, patterns, targets ----


def test_checkpoints_are_those_of_the_paper():
  windows = _windows(100)
  assert (np.flatnonzero(windows) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
  assert windows[windows > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
  assert _windows(4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
  "norm, expected", [("linf", (29, 20, 14, 10, 7, 5, 4, 3)), ("l2", (29, 21, 15, 11, 7, 5, 5, 3))]
)
def test_windows_of_square(norm, expected):
  sizes = Square(norm, num_steps=5000).window_sizes(32, 32)
  assert sizes[[0, 11, 51, 201, 501, 1001, 2001, 4001]].tolist() == list(expected)
  changes = np.flatnonzero(np.diff(sizes)) + 1
  assert set(changes) <= {11, 51, 201, 501, 1001, 2001, 4001}
  scaled = Square(norm, num_steps=500, rescale=True).window_sizes(32, 32)
  assert scaled[51] == expected[5] and sizes[51] == expected[2]  # 51 of 500 are 1020 of 10,000
  assert Square(norm, num_steps=10).window_sizes(4, 6).max() <= 4


def test_pattern_of_square():
  np.testing.assert_allclose(
    square._hill(2, 5, 2),
    [[0.070, 0.226, 0.226, 0.226, 0.070], [0.070, 0.226, 0.852, 0.226, 0.070]],
    atol=5e-4,
  )
  for size in (3, 6, 11):
    pattern = square.eta(size, 2)
    np.testing.assert_allclose((pattern**2).sum(), 1)
    assert (pattern[: size // 2] > 0).all() and (pattern[size // 2 :] < 0).all()
    np.testing.assert_allclose(np.abs(square.eta(size, 4)).sum(), 1)


def test_targets_are_the_likeliest_classes_but_the_label():
  logits = jnp.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, 5.0]])
  y = jnp.array([0, 1])
  found = np.stack([rank_target(logits, y, rank) for rank in (1, 2, 3)])
  np.testing.assert_array_equal(found.T, [[2, 1, 3], [3, 2, 0]])


# ---- FAB's projection ----


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_on_a_hyperplane_is_the_nearest_point(norm):
  r = np.random.RandomState(0)
  for case in range(20):
    x, slope = r.uniform(size=5), r.randn(5) * (r.uniform(size=5) < 0.8)
    if not slope.any():
      continue
    room = np.where(slope > 0, x, 1 - x)  # moved against the slope
    value = r.uniform(0.05, 1.3) * (np.abs(slope) * room).sum()  # sometimes out of reach
    arrays = [jnp.asarray(a, jnp.float32).reshape(1, 1, 5, 1) for a in (x, slope)]
    found = np.asarray(to_hyperplane(*arrays, jnp.asarray([value], jnp.float32), norm)).ravel()
    assert ((x + found > -1e-6) & (x + found < 1 + 1e-6)).all()
    if value >= (np.abs(slope) * room).sum():
      np.testing.assert_allclose(found, np.where(slope == 0, 0, -np.sign(slope) * room), atol=1e-6)
      continue
    np.testing.assert_allclose(value + slope @ found, 0, atol=1e-5)
    length = np.linalg.norm(found, {"linf": np.inf, "l2": 2, "l1": 1}[norm])
    assert length <= _smallest(x, slope, value, norm) + 1e-5, case


def _smallest(x, slope, value, norm):
  """The length of the smallest displacement, by a solver that knows nothing of ours."""
  bounds = [(-a, 1 - a) for a in x]
  if norm == "l2":
    found = scipy.optimize.minimize(
      lambda d: d @ d,
      np.zeros(5),
      jac=lambda d: 2 * d,
      bounds=bounds,
      constraints={"type": "eq", "fun": lambda d: value + slope @ d, "jac": lambda d: slope},
      options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.sqrt(found.fun)
  eye, column = np.eye(5), np.ones((5, 1))
  size = column if norm == "linf" else eye  # one bound for all, or one each
  upper = np.block([[eye, -size], [-eye, -size]])
  cost = np.concatenate([np.zeros(5), np.ones(size.shape[1])])
  equal = np.concatenate([slope, np.zeros(size.shape[1])])[None]
  found = scipy.optimize.linprog(
    cost, upper, np.zeros(10), equal, [-value], bounds + [(0, None)] * size.shape[1]
  )
  return found.fun


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2), ("l1", np.inf)])
def test_fab_finds_the_distance_of_a_linear_classifier_and_nothing_beats_it(norm, dual):
  classifier, x = linear(), images()
  y = labelled(classifier, x)
  exact = minimal_distance(classifier, x, y, dual)
  run = jax.jit(
    lambda x, y, index: FAB(norm, 1.0, num_steps=30, final_steps=16).minimum(classifier, x, y, KEY, index)
  )
  distances = np.min([run(x, jnp.asarray(y, jnp.int32), i).distance for i in range(4)], axis=0)
  rounding = {"linf": 2e-7, "l2": 1e-6, "l1": 4e-6}[norm]  # of pixels in float32
  np.testing.assert_allclose(distances, exact, rtol=1e-4, atol=rounding)
  if norm != "l1":  # all classes at once
    attack = FAB(norm, 1.0, num_steps=30, num_targets=0, final_steps=16)
    found = jax.jit(lambda x, y: attack.minimum(classifier, x, y, KEY).distance)(x, jnp.asarray(y, jnp.int32))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=rounding)
  middle = float(np.median(exact))
  attacks = {
    "apgd_ce": APGD(norm, middle, "ce", num_steps=40),
    "apgd_t": APGD(norm, middle, "dlr", num_steps=40, num_targets=4),
    "fab_t": FAB(norm, middle, num_steps=40),
    "square": Square(norm, middle, num_steps=200),
  }
  result = quietly(norm=norm, radius=middle, version=attacks)(classifier, x, y, KEY)
  assert result.robust[exact > middle * (1 + 1e-4)].all()
  breakable = exact < middle * (1 - 1e-2)
  assert not result.robust[breakable].any() and breakable.sum() >= 8
  assert not result.after["apgd_t"][breakable].any() or norm == "l1"


@pytest.mark.slow
@pytest.mark.parametrize("norm, dual", [("linf", 1), pytest.param("l2", 2, marks=LONG), ("l1", np.inf)])
def test_every_attack_alone_breaks_what_is_well_within_its_radius(norm, dual):
  """The linear world again: by gradients what has a distance of 0.9 of the radius, by random search 0.25."""
  classifier, x = linear(), images(40)
  y = labelled(classifier, x)
  exact = minimal_distance(classifier, x, y, dual)
  radius = 2 * float(np.median(exact))
  attacks = {
    "apgd_ce": (APGD(norm, radius, "ce", num_steps=40, large_radii=norm == "l1"), 0.9),
    "apgd_plain": (APGD(norm, radius, "ce", num_steps=40), 0.9),
    "apgd_t": (APGD(norm, radius, "dlr", num_steps=40, num_targets=4), 0.9),
    "fab": (FAB(norm, radius, num_steps=20, num_targets=0), 0.99),
    "square": (Square(norm, radius, num_steps=300), 0.25),
  }
  for name, (attack, share) in attacks.items():
    result = quietly(norm=norm, radius=radius, version={name: attack})(classifier, x, y, KEY)
    assert not result.robust[exact < share * radius].any() and result.robust[exact > radius * 1.001].all(), (
      name
    )
    assert (exact < share * radius).sum() >= 8


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=LONG), pytest.param("l1", marks=LONG)])
def test_a_classifier_in_bfloat16_is_attacked_all_the_same(norm):
  classifier, x, y = world()
  half = lambda x: classifier(x).astype(jnp.bfloat16)  # noqa: E731
  attacks = small_attacks(norm, RADII[norm]) | {"fab": FAB(norm, RADII[norm], num_steps=3, num_targets=0)}
  result = quietly(norm=norm, radius=RADII[norm], version=attacks)(classifier, x, y, KEY, attack_fn=half)
  assert result.robust.sum() < result.clean.sum() and not result.standard


# ---- the harness ----


def small_attacks(norm, radius, **changes):
  """Every kind, in a few steps."""
  return {
    "apgd_ce": APGD(norm, radius, "ce", num_steps=8, restarts=2, large_radii=norm == "l1"),
    "apgd_t": APGD(norm, radius, "dlr", num_steps=6, num_targets=3),
    "fab_t": FAB(norm, radius, num_steps=5, num_targets=2, restarts=2),
    "square": Square(norm, radius, num_steps=60),
  }


def world(n=40):
  """Images some of which are wrong, some fragile and some not."""
  classifier, x = linear(seed=3), images(n, low=0.0, high=1.0, seed=4)
  y = labelled(classifier, x)
  y[::7] = (y[::7] + 1) % 5
  return classifier, x, y


RADII = {"linf": 0.03, "l2": 0.22, "l1": 0.8}


@pytest.mark.parametrize("norm", norms.NORMS)
def test_what_a_result_promises(norm):
  classifier, x, y = world()
  seen: list[Advance] = []
  attack = quietly(norm=norm, radius=RADII[norm], version=small_attacks(norm, RADII[norm]), chunk_size=16)
  result = attack(classifier, x, y, KEY, progress=seen.append)
  delta = (result.x_adv.astype(np.float64) - x).reshape(len(x), -1)
  length = np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
  assert length.max() <= RADII[norm] * (1 + 1e-5) + 1e-6 and length[result.broken_by >= 0].min() > 0
  assert 0 <= result.x_adv.min() and result.x_adv.max() <= 1
  np.testing.assert_array_equal(result.x_adv[result.broken_by < 0], x[result.broken_by < 0])
  np.testing.assert_array_equal(labelled(classifier, result.x_adv) == y, result.robust)
  np.testing.assert_array_equal(result.prediction, labelled(classifier, result.x_adv))
  np.testing.assert_array_equal(result.clean, labelled(classifier, x) == y)
  np.testing.assert_array_equal(result.broken_by == WRONG, ~result.clean)
  np.testing.assert_array_equal(result.broken_by == NOT_BROKEN, result.robust)
  assert ((result.when > 0) == (result.broken_by >= 0)).all() and result.when[result.robust].max(
    initial=NEVER
  ) == NEVER
  flags = [result.clean, *result.after.values()]
  assert all((after <= before).all() for before, after in zip(flags, flags[1:], strict=False))
  assert 0 < result.robust.sum() < result.clean.sum() < len(x) and not result.standard
  assert [a.done for a in seen] == sorted(a.done for a in seen) and seen[-1].done == seen[-1].total
  for name, single in small_attacks(norm, RADII[norm]).items():  # never more than one attack alone leaves
    alone = quietly(norm=norm, radius=RADII[norm], version={name: single})(classifier, x, y, KEY)
    assert (result.robust <= alone.robust).all()


def test_an_attack_as_a_function_finds_what_the_harness_finds():
  classifier, x, y = world()
  for name, attack in small_attacks("linf", RADII["linf"]).items():
    x_adv = jax.jit(attack)(classifier, jnp.asarray(x), jnp.asarray(y, jnp.int32), KEY)
    assert norms.lengths(x_adv - x, "linf").max() <= RADII["linf"] + 1e-6
    broken = (labelled(classifier, x_adv) != y) & (labelled(classifier, x) == y)
    alone = quietly(radius=RADII["linf"], version={name: attack})(classifier, x, y, KEY)
    assert abs(int(broken.sum()) - int((alone.clean & ~alone.robust).sum())) <= 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_chunks_and_order_make_no_difference(norm):
  classifier, x, y = world()
  options = dict(norm=norm, radius=RADII[norm], version=small_attacks(norm, RADII[norm]))
  ids = np.arange(100, 100 + len(x))
  whole = quietly(chunk_size=100, **options)(classifier, x, y, KEY, ids=ids)
  for chunk_size, n in ((1, 12), (16, len(x))):
    part = quietly(chunk_size=chunk_size, **options)(classifier, x[:n], y[:n], KEY, ids=ids[:n])
    np.testing.assert_array_equal(part.broken_by, whole.broken_by[:n])
    np.testing.assert_allclose(part.x_adv, whole.x_adv[:n], atol=1e-5)
  order = np.random.RandomState(0).permutation(len(x))[:25]
  some = quietly(chunk_size=16, **options)(classifier, x[order], y[order], KEY, ids=ids[order])
  np.testing.assert_array_equal(some.broken_by, whole.broken_by[order])
  other = quietly(chunk_size=16, **options)(classifier, x, y, jax.random.key(1), ids=ids)
  assert (other.x_adv != whole.x_adv).any()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=LONG), pytest.param("l1", marks=LONG)])
def test_eight_devices_find_what_one_finds(norm):
  pair = [start("autoattack_worker.py", devices, norm) for devices in (1, 8)]
  one, eight = (answer(process) for process in pair)
  assert (one.pop("devices"), eight.pop("devices")) == (1, 8)
  assert one == eight and sum(by >= 0 for by in one["broken_by"]) > 5


class Torn(Exception):
  pass


class MemoryJournal(dict):
  """Dies after so many chunks."""

  def __init__(self, left):
    self.left = left

  def put(self, name, arrays):
    if not self.left:
      raise Torn
    self.left -= 1
    self[name] = arrays


def test_an_evaluation_goes_on_where_it_was_cut_off():
  classifier, x, y = world()
  options = dict(radius=RADII["linf"], version=small_attacks("linf", RADII["linf"]), chunk_size=16)
  undisturbed = MemoryJournal(10**6)
  expected = quietly(**options)(classifier, x, y, KEY, journal=undisturbed)
  for chunks in (0, 1, 3, 7, len(undisturbed) - 1):
    journal = MemoryJournal(chunks)
    with pytest.raises(Torn):
      quietly(**options)(classifier, x, y, KEY, journal=journal)
    journal.left = 10**6
    found = quietly(**options)(classifier, x, y, KEY, journal=journal)
    for name in ("x_adv", "broken_by", "when", "robust"):
      np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.flat == expected.flat and journal.keys() == undisturbed.keys()
  other = Linear(-classifier.kernel, classifier.bias)
  for change in (
    dict(ids=np.arange(1, 41)),
    dict(key=jax.random.key(1)),
    dict(logits_fn=other),
    dict(chunk_size=8),
  ):
    arguments = dict(logits_fn=classifier, x=x, y=y, key=KEY) | change
    settings = options | {name: arguments.pop(name) for name in ("chunk_size",) if name in arguments}
    with pytest.raises(RunError, match="belongs to another evaluation"):
      quietly(**settings)(**arguments, journal=undisturbed)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_radius_0_and_radius_1(norm):
  classifier, x, y = world()
  size = x[0].size
  nothing = quietly(norm=norm, radius=0.0, version=small_attacks(norm, 0.0))(classifier, x, y, KEY)
  np.testing.assert_array_equal(nothing.robust, nothing.clean)
  np.testing.assert_array_equal(nothing.x_adv, x)
  large = {"linf": 1.0, "l2": float(np.sqrt(size)), "l1": float(size)}[norm]
  everything = quietly(norm=norm, radius=large, version=small_attacks(norm, large))(classifier, x, y, KEY)
  assert not everything.robust.any() and everything.clean.any()


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_few_classes(num_classes, version):
  attacks = attacks_of(version, "linf", 0.05, num_classes)
  attacks = {name: dataclasses.replace(attack, num_steps=4, restarts=1) for name, attack in attacks.items()}
  classifier, x = linear(num_classes), images()
  y = labelled(classifier, x)
  said = []
  result = AutoAttack("linf", 0.05, attacks, warn=said.append)(classifier, x, y, KEY)
  assert result.robust.sum() < len(x)
  replaced = {"standard": 3, "plus": 3, "rand": 2}[version]  # with fewer classes than DLR needs
  assert any("the DLR loss of" in line for line in said) == (num_classes <= replaced)
  if num_classes < 4 and version == "standard":
    exact = minimal_distance(classifier, x, y, 1)
    assert result.robust[exact > 0.0501].all()


def test_versions():
  names = {
    version: list(attacks_of(version, "linf", 0.1, 10)) for version in ("standard", "plus", "rand", "rapid")
  }
  assert names == {
    "standard": ["apgd_ce", "apgd_t", "fab_t", "square"],
    "plus": ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"],
    "rand": ["apgd_ce", "apgd_dlr"],
    "rapid": ["apgd_ce", "apgd_t"],
  }
  plus, l1 = attacks_of("plus", "l2", 0.1, 10), attacks_of("standard", "l1", 12.0, 10)
  assert (plus["apgd_ce"].restarts, plus["fab"].num_runs(10), plus["apgd_t"].num_runs(10)) == (5, 5, 9)
  assert l1["apgd_ce"].large_radii and (l1["apgd_ce"].num_runs(10), l1["apgd_t"].num_runs(10)) == (5, 5)
  assert attacks_of("rand", "linf", 0.1, 10)["apgd_ce"].num_draws == 20
  plus_l1 = attacks_of("plus", "l1", 12.0, 10)
  assert not plus_l1["apgd_ce"].large_radii and plus_l1["apgd_t"].num_runs(10) == 9
  assert attacks_of("standard", "linf", 0.1, 5)["fab_t"].num_runs(5) == 4
  assert attacks_of("standard", "linf", 0.1, 10)["square"].num_steps == 5000


# ---- warnings ----


@register_pytree
@dataclasses.dataclass(frozen=True)
class Masked:
  """The same decisions on rounded pixels, which hide the gradient."""

  inner: Linear

  def __call__(self, x):
    return self.inner(jnp.round(x * 255) / 255)


def test_a_masked_gradient_is_noticed():
  classifier, x, _ = world()
  y, said = labelled(Masked(classifier), x), []
  result = AutoAttack("linf", 0.08, small_attacks("linf", 0.08), warn=said.append)(
    Masked(classifier), x, y, KEY
  )
  assert any("square, which uses no gradient, lowered the accuracy" in line for line in said)
  assert any("of the gradients of apgd_ce were zero" in line for line in said)
  assert result.warnings == tuple(said) and result.flat["apgd_ce"] == 1 and result.flat["square"] == 0
  said.clear()
  AutoAttack("linf", 0.08, small_attacks("linf", 0.08), warn=said.append)(classifier, x, y, KEY)
  assert said == []


def test_probabilities_are_noticed():
  classifier, x, y = world()
  with pytest.warns(UserWarning, match="seems to return probabilities"):
    AutoAttack(radius=0.01, version={"square": Square("linf", 0.01, num_steps=2)})(
      lambda x: jax.nn.softmax(classifier(x)), x, y, KEY
    )


@register_pytree
@dataclasses.dataclass(frozen=True)
class Noisy:
  """A defence that adds noise to the image."""

  inner: Linear
  std: float

  def draw(self, key):
    def logits(x):
      return self.inner(x + self.std * norms.normal_like(key, x))

    return logits


def test_a_classifier_that_draws():
  classifier, x, y = world(80)
  noisy, said = Noisy(classifier, 0.02), []
  rand = {
    name: dataclasses.replace(attack, num_steps=8)
    for name, attack in attacks_of("rand", "linf", 0.03, 5).items()
  }
  result = AutoAttack("linf", 0.03, rand, warn=said.append, chunk_size=16)(noisy, x, y, KEY)
  assert any("draws random numbers" in line for line in said)
  again = AutoAttack("linf", 0.03, rand, warn=said.append, chunk_size=40)(noisy, x, y, KEY)
  np.testing.assert_array_equal(result.broken_by, again.broken_by)
  plain = quietly(radius=0.03, version=rand)(classifier, x, y, KEY)
  assert (
    abs(result.robust_accuracy - plain.robust_accuracy) < 0.15 < plain.clean_accuracy - plain.robust_accuracy
  )


def test_a_classifier_that_is_random_behind_our_back():
  classifier, x, y = world()
  r, said = np.random.RandomState(0), []

  def logits(x):  # another constant in each trace
    return classifier(x) + jnp.asarray(r.randn(5), jnp.float32)

  attack = AutoAttack(radius=0.01, version={"square": Square("linf", 0.01, num_steps=2)}, warn=said.append)
  attack(logits, x, y, KEY)
  assert any("draws random numbers" in line for line in said)


def test_verdicts_are_those_of_the_first_classifier():
  """What the attacked one takes for broken counts only where the other agrees."""
  classifier, x, y = world()
  brittle = Linear(classifier.kernel, classifier.bias + 0.3 * jnp.arange(5.0))
  attacks = small_attacks("linf", 0.03)
  result = quietly(radius=0.03, version=attacks)(classifier, x, y, KEY, attack_fn=brittle)
  np.testing.assert_array_equal(labelled(classifier, result.x_adv) == y, result.robust)
  own = quietly(radius=0.03, version=attacks)(classifier, x, y, KEY)
  assert own.robust.sum() < result.robust.sum() < own.clean.sum()


@pytest.mark.parametrize(
  "change, says",
  [
    (dict(y=np.zeros(3, int)), "labels are int64 [3]; expected integers [40]"),
    (dict(y=np.full(40, 5)), "labels 5 to 5 for a classifier of 5 classes"),
    (dict(x=np.full((40, 6, 8, 2), 1.5, np.float32)), "images lie in [1.5, 1.5]"),
    (dict(x=np.zeros((40, 6, 8, 2), np.uint8)), "images are uint8"),
    (dict(x=np.zeros((0, 6, 8, 2), np.float32), y=np.zeros(0, int)), "images are float32 [0, 6, 8, 2]"),
  ],
)
def test_bad_input(change, says):
  classifier, x, y = world()
  arguments = dict(x=x, y=y) | change
  with pytest.raises(InputError) as error:
    quietly(radius=0.01)(classifier, arguments["x"], arguments["y"], KEY)
  assert says in str(error.value)


def test_bad_settings():
  with pytest.raises(InputError, match="unknown AutoAttack version 'fast'; known: standard"):
    AutoAttack(version="fast")
  with pytest.raises(InputError, match="all must have the norm 'linf'"):
    AutoAttack(radius=0.1, version={"a": APGD("l2", 0.1)})
  with pytest.raises(InputError, match="large_radii needs the norm 'l1'"):
    APGD("l2", 0.1, large_radii=True)
  with pytest.raises(InputError, match="attack loss is 'mse'"):
    APGD("l2", 0.1, "mse")
  with pytest.raises(InputError, match="at least 5 x 5 pixels"):
    jax.eval_shape(
      lambda x, y: Square("l2", 0.1)(linear(5, (4, 4, 1)), x, y, KEY),
      jnp.zeros((2, 4, 4, 1)),
      jnp.zeros(2, int),
    )


# ---- real images ----


@LONG
@pytest.mark.computes
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_counts_on_a_robust_network_are_those_of_the_original(norm):
  """Independent draws: the standard count within 1 of 128, as the reference's README says."""
  folder = shared_dir("golden", "autoattack")
  reference = dict(np.load(folder / "resnet4b_test0-127.npz"))
  with np.load(folder / "images_test0-127.npz") as file:
    x = next(file[name] for name in file.files if file[name].ndim == 4).astype(np.float32) / 255
  theirs = {"linf": "Linf", "l2": "L2"}[norm]
  attack = quietly(norm=norm, radius=float(reference[f"{theirs}_eps"]), chunk_size=64)
  result = attack(load_graph(folder / "net_resnet4b.npz"), x, reference["labels"].astype(int), KEY)
  np.testing.assert_array_equal(result.clean, reference["clean_correct"])
  for name, flags in result.after.items():
    expected = reference[f"{theirs}_seq_{name}_robust"]
    assert (flags != expected).sum() <= 1, name
  assert abs(int(result.robust.sum()) - int(expected.sum())) <= 1
