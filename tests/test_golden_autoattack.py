"""The attacks of AutoAttack against numbers of the original, on a robust CIFAR-10 network with the same random draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG, shared_dir
from reference_nets import load_graph

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.apgd import APGD
from jax_trustdiff.attacks.fab import FAB, UNBROKEN
from jax_trustdiff.attacks.losses import margin_unclipped
from jax_trustdiff.attacks.runs import rank_target
from jax_trustdiff.attacks.square import STARTING, Draws, Square
from jax_trustdiff.pytrees import register_pytree

pytestmark = pytest.mark.computes

NORMS = {"linf": "Linf", "l2": "L2"}


@pytest.fixture(scope="module")
def world():
  """The network, the reference and the 48 images."""
  folder = shared_dir("golden", "autoattack")
  with np.load(folder / "images_test0-127.npz") as file:
    images = next(file[name] for name in file.files if file[name].ndim == 4)[:48]
  reference = dict(np.load(folder / "parity_resnet4b_48.npz"))
  x, y = jnp.asarray(images, jnp.float32) / 255, jnp.asarray(reference["labels"], jnp.int32)
  logits_fn = load_graph(folder / "net_resnet4b.npz")
  np.testing.assert_allclose(logits_fn(x), reference["clean_logits"], atol=2e-5)
  return logits_fn, reference, x, y


class Stream:
  """The counted stream of the reference: call c with shape s is RandomState(base + c).rand(*s) in float32."""

  def __init__(self, base):
    self.base, self.calls = int(base), 0

  def __call__(self, kind, *shape):
    self.calls += 1
    return getattr(np.random.RandomState(self.base + self.calls), kind)(*shape).astype(np.float32)

  def noise(self, norm, count):
    """The start of APGD [n h w c]."""
    if norm == "linf":
      return np.moveaxis(2 * self("rand", count, 3, 32, 32) - 1, 1, -1)
    return np.moveaxis(self("randn", count, 3, 32, 32), 1, -1)


def radius(reference, norm):
  return float(reference[f"eps_{norm}"])


def margins(logits_fn, x, y):
  return np.asarray(-margin_unclipped(logits_fn(x), y))


def compare(reference, norm, attack, robust):
  """Flags over all 48 points: at most one may differ, as the reference's README says."""
  expected = reference[f"{NORMS[norm]}/{attack}/robust"]
  assert (robust != expected).sum() <= 1, np.flatnonzero(robust != expected)
  assert 0 < expected.sum() < len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd(world, norm, loss):
  logits_fn, reference, x, y = world
  correct = np.flatnonzero(np.asarray(logits_fn(x).argmax(1) == y))
  noise = Stream(reference["rng_base"]).noise(norm, len(correct))
  attack = APGD(norm, radius(reference, norm), loss)
  trace = jax.jit(lambda x, y, noise: attack.ascend(logits_fn, x, y, noise))(x[correct], y[correct], noise)
  robust = np.zeros(48, bool)
  robust[correct] = margins(logits_fn, trace.x_adv, y[correct]) > 0
  np.testing.assert_array_equal(robust[correct], np.asarray(trace.when) < 0)
  compare(reference, norm, f"apgd_{loss}", robust)
  expected = reference[f"{NORMS[norm]}/apgd_{loss}/single_run_best_loss"]
  difference = np.abs(np.asarray(trace.best_loss) - expected)
  assert np.median(difference) < 1e-5
  if loss == "ce":
    np.testing.assert_allclose(trace.best_loss, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=LONG)])
def test_apgd_t(world, norm):
  logits_fn, reference, x, y = world
  attack = APGD(norm, radius(reference, norm), "dlr", num_targets=9)
  stream = Stream(reference["rng_base"])
  robust = np.array(logits_fn(x).argmax(1) == y)
  ascend = jax.jit(lambda x, y, noise, target: attack.ascend(logits_fn, x, y, noise, target))
  for rank in range(1, attack.num_runs(10) + 1):
    left = np.flatnonzero(robust)
    noise = np.zeros(x.shape, np.float32)  # one shape for every target: others are computed and left aside
    noise[left] = stream.noise(norm, len(left))
    target = rank_target(logits_fn(x), y, rank)
    trace = ascend(x, y, noise, target)
    robust &= np.asarray(trace.when) < 0
  compare(reference, norm, "apgd_t", robust)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=LONG)])
def test_fab_t(world, norm):
  logits_fn, reference, x, y = world
  attack = FAB(norm, radius(reference, norm))
  correct = np.asarray(logits_fn(x).argmax(1) == y)
  run = jax.jit(lambda x, y, i: attack.minimum(logits_fn, x, y, jax.random.key(0), i))
  found = [run(x, y, i) for i in range(9)]
  distances = np.array([f.distance for f in found])
  robust = correct & ~np.array([np.asarray(f.when) >= 0 for f in found]).any(0)
  compare(reference, norm, "fab_t", robust)
  expected = reference[f"{NORMS[norm]}/fab_t/single_run_min_norm_targets_2_3_6_10"]
  mine = distances[[0, 1, 4, 8]]
  there = expected > 0
  np.testing.assert_array_equal(mine[:, correct] < UNBROKEN, there[:, correct])
  ratio = np.abs(mine[there] / expected[there] - 1)
  print(norm, "FAB distances: median", np.median(ratio), "largest", ratio.max())
  assert np.median(ratio) < 1e-4
  # by up to 1e-6 the reference differs from itself with the network in float64
  returned = reference[f"{NORMS[norm]}/fab_t/norm"]
  broken = correct & ~robust & (returned > 0)
  first = np.argmax(np.array([np.asarray(f.when) >= 0 for f in found]), 0)
  np.testing.assert_allclose(distances[first, np.arange(48)][broken], returned[broken], rtol=1e-4, atol=1e-6)
  points = norms.lengths(found[0].x_adv - x, norm)
  np.testing.assert_allclose(points[there[0]], distances[0][there[0]], rtol=1e-6)


@register_pytree
@dataclasses.dataclass(frozen=True)
class Recorded:
  """Windows and signs that the reference drew, one row for a step."""

  columns: jax.Array  # [b w c]
  tables: Draws  # [steps 1 2 2], [steps 1], [steps b or 1, c]
  tiles: Draws

  def stripes(self):
    return self.columns

  def __call__(self, number, active):
    row = (
      jax.tree.map(
        lambda tile, table: jnp.where(number >= STARTING, tile[number - STARTING], table[number]),
        self.tiles,
        self.tables,
      )
      if self.tiles is not None
      else jax.tree.map(lambda table: table[number], self.tables)
    )
    # signs were drawn for the images that were still searched, in their order
    signs = row.signs
    if len(signs) > 1:
      rank = jnp.cumsum(active) - 1
      signs = jnp.where(number >= STARTING, signs, signs[rank])
    return row._replace(signs=signs)


def sign(u):
  return np.sign(2 * u - 1).astype(np.float32)


def recorded(reference, norm, count, steps):
  stream = Stream(reference["rng_base"])
  empty = np.zeros((count, 32, 3), np.float32)
  if norm == "linf":
    columns = np.moveaxis(sign(stream("rand", count, 3, 1, 32))[:, :, 0], 1, -1)
    corners, signs = [], []
    for _ in range(steps):
      corners.append([[stream("rand", 1)[0], stream("rand", 1)[0]]] * 2)
      signs.append(sign(stream("rand", 3, 1, 1)).reshape(1, 3))
    tables = Draws(np.array(corners)[:, None], np.zeros((steps, 1), bool), np.array(signs))
    return Recorded(columns, tables, None)
  turned, signs = [], []
  for _ in range(25):
    turned.append([stream("rand", 1)[0] > 0.5])
    signs.append(sign(stream("rand", count, 3, 1, 1)).reshape(count, 3))
  tiles = Draws(np.zeros((25, 1, 2, 2), np.float32), np.array(turned), np.array(signs))
  corners, turned, signs = [], [], []
  for _ in range(steps):
    corners.append([[[stream("rand", 1)[0] for _ in range(2)] for _ in range(2)]])
    turned.append([stream("rand", 1)[0] > 0.5])
    signs.append(sign(stream("rand", count, 3, 1, 1)).reshape(count, 3))
  return Recorded(empty, Draws(np.array(corners), np.array(turned), np.array(signs)), tiles)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_square(world, norm):
  logits_fn, reference, x, y = world
  correct = np.flatnonzero(np.asarray(logits_fn(x).argmax(1) == y))
  x, y = x[correct], y[correct]
  attack = Square(norm, radius(reference, norm), num_steps=1000)
  draw = jax.tree.map(jnp.asarray, recorded(reference, norm, len(correct), 1000))
  found = jax.jit(lambda x, y, draw: attack.search(logits_fn, x, y, draw))(x, y, draw)
  name = f"{NORMS[norm]}/square"
  robust = np.zeros(48, bool)
  robust[correct] = np.asarray(found.margin) > 0
  compare(reference, norm, "square", robust)
  same = np.asarray(found.queries) == reference[f"{name}/single_run_queries"]
  assert same.sum() >= len(correct) - 2, np.flatnonzero(~same)
  expected = np.moveaxis(reference[f"{name}/single_run_x_best_first8"], 1, -1)
  close = np.abs(np.asarray(found.x[:8]) - expected).max((1, 2, 3)) < 1e-5
  assert close.sum() >= 6, close
  margin = np.abs(np.asarray(found.margin) - reference[f"{name}/single_run_margin"])
  assert np.median(margin) < 1e-5
