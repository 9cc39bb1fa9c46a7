"""Augmentation policies draw what the papers say: whole distributions against Pillow and numpy, near misses rejected."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_augment_ops import noise, pillow

from jax_trustdiff import config as config_lib
from jax_trustdiff.data import policies
from jax_trustdiff.data.augment import AUGMENTATIONS
from jax_trustdiff.types import InputError

pytestmark = pytest.mark.computes


def repeated(image, number):
  return jnp.broadcast_to(jnp.asarray(image), (number, *image.shape))


def excess(counts, expected):
  """Chi-square statistic in standard deviations above its mean; categories of less than 8 are put together."""
  counts, expected = np.asarray(counts, float), np.asarray(expected, float)
  rare = expected < 8
  if rare.any():
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
  degrees = len(counts) - 1
  return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


def uniform_excess(values, low, high):
  """`excess` of whole numbers that should be uniform on low to high; infinite where one is outside."""
  values = np.asarray(values)
  if values.min() < low or values.max() > high:
    return math.inf
  return excess(
    np.bincount(values - low, minlength=high - low + 1), [len(values) / (high - low + 1)] * (high - low + 1)
  )


def tally(out):
  """{image as bytes: how often it is among `out`}."""
  return collections.Counter(image.tobytes() for image in np.asarray(out))


def counted(seen, candidates):
  """How often each candidate image is in the tally `seen`, but for pixels that are one off, and how many are none of them.

  A point on the border of a sheared or rotated image may also fall on the other side of it: one pixel in a hundred.
  """
  place = {}
  for i, image in enumerate(candidates):
    place.setdefault(image.tobytes(), i)
  pixels = np.stack([np.asarray(image, np.int16).ravel() for image in candidates])
  counts, others = np.zeros(len(candidates), int), 0
  for image, number in seen.items():
    nearest = place.get(image)
    if nearest is None:
      off = np.abs(pixels - np.frombuffer(image, np.uint8))
      nearest = np.argmin(off.sum(1))
      if (off[nearest] > 1).mean() > 0.01:
        others += number
        continue
    counts[nearest] += number
  return counts, others


def zero_boxes(out):
  """(first row, first column, rows, columns) of the zeros of each image, none of which was zero before; -1 without."""
  zero = (np.asarray(out) == 0).all(-1)
  boxes = []
  for image in zero:
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    if len(rows) == 0:
      boxes.append((-1, -1, 0, 0))
      continue
    assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and image.sum() == len(
      rows
    ) * len(columns)
    boxes.append((rows[0], columns[0], len(rows), len(columns)))
  return np.array(boxes)


# ---- RandAugment ----


def test_rand_augment_draws_sixteen_operations_alike_with_the_published_values():
  image, number = noise(16, 16, 3, 1)[0], 6000
  out = jax.jit(policies.rand_augment(num_ops=1, translate=20.0))(repeated(image, number), jax.random.key(0))
  level = 14 / 30
  plain = [("autocontrast", 0), ("equalize", 0), ("invert", 0), ("posterize", 1), ("solarize", 256 * level)]
  plain += [("solarize_add", 51)] + [(n, 0.94) for n in ("color", "contrast", "brightness", "sharpness")]
  signed = [("rotate", 14.0), ("shear_x", 0.14), ("shear_y", 0.14)]
  signed += [("translate_x", 20 * level), ("translate_y", 20 * level)]
  candidates = [(name, value, 1 / 16) for name, value in plain]
  candidates += [(name, sign * value, 1 / 32) for name, value in signed for sign in (1, -1)]
  counts, others = counted(tally(out), [pillow(name, image, value) for name, value, _ in candidates])
  expected = number * np.array([share for _, _, share in candidates] + [1 / 16])  # the others are cut out
  assert excess([*counts, others], expected) < 4
  near_miss = expected * np.r_[0.6, np.ones(len(expected) - 1)]
  assert excess([*counts, others], near_miss * number / near_miss.sum()) > 4

  gray = (np.asarray(out) == [125, 123, 114]).all(-1)
  cut = gray[gray.sum((1, 2)) > 8]  # side 18.67: the box is 19 pixels long, on an image of 16
  assert len(cut) == others and cut.shape[1] == 16
  assert (cut.sum((1, 2)) <= 256).all() and cut.sum((1, 2)).min() >= 64  # a corner at most in the middle


def test_rand_augment_applies_its_operations_one_after_the_other_before_the_crop():
  images = jnp.asarray(noise(32, 32, 3, 3000))
  for number_of_operations, blank in ((1, 2 / 16), (2, 2 / 16 * 15 / 16 + 14 / 16 * 2 / 16)):
    out = np.asarray(jax.jit(policies.rand_augment(number_of_operations))(images, jax.random.key(1)))
    constant = (out.reshape(3000, -1, 3) == out[:, :1, 0]).all((1, 2)).mean()
    # A translation by 46 pixels moves the image out of sight, and only cutout_abs, after it, puts something there.
    assert abs(constant - blank) < 4 * math.sqrt(blank / 3000)
  flat = jnp.full((1000, 16, 16, 3), 100, jnp.uint8)
  out = np.asarray(jax.jit(AUGMENTATIONS["rand_augment"](num_ops=1))(flat, jax.random.key(2)))
  padded = (out[:, [0, -1]] == 0).all((2, 3)).any(1) | (out[:, :, [0, -1]] == 0).all((1, 3)).any(1)
  assert padded.mean() > 0.97  # 80 of 81 crops show the padding, and no operation has brightened it


def test_rand_augment_refuses_what_it_cannot_draw():
  with pytest.raises(InputError, match="magnitude from 0 to 30, found 31"):
    policies.rand_augment(magnitude=31)
  with pytest.raises(InputError, match="num_ops=0"):
    policies.rand_augment(num_ops=0)


# ---- AutoAugment ----

# Cubuk et al. 2019, the sub-policies for CIFAR-10: operation, probability, magnitude.
CIFAR10_POLICY = """
  invert 0.1 7, contrast 0.2 6; rotate 0.7 2, translate_x 0.3 9; sharpness 0.8 1, sharpness 0.9 3;
  shear_y 0.5 8, translate_y 0.7 9; autocontrast 0.5 8, equalize 0.9 2; shear_y 0.2 7, posterize 0.3 7;
  color 0.4 3, brightness 0.6 7; sharpness 0.3 9, brightness 0.7 9; equalize 0.6 5, equalize 0.5 1;
  contrast 0.6 7, sharpness 0.6 5; color 0.7 7, translate_x 0.5 8; equalize 0.3 7, autocontrast 0.4 8;
  translate_y 0.4 3, sharpness 0.2 6; brightness 0.9 6, color 0.2 8; solarize 0.5 2, invert 0.0 3;
  equalize 0.2 0, autocontrast 0.6 0; equalize 0.2 8, equalize 0.6 4; color 0.9 9, equalize 0.6 6;
  autocontrast 0.8 4, solarize 0.2 8; brightness 0.1 3, color 0.7 0; solarize 0.4 5, autocontrast 0.9 3;
  translate_y 0.9 9, translate_y 0.7 9; autocontrast 0.9 2, solarize 0.8 3; equalize 0.8 8, invert 0.1 3;
  translate_y 0.7 9, autocontrast 0.9 1
"""


def values_of(name, magnitude, size):
  """The equally likely values of an operation of AutoAugment at a magnitude from 0 to 9."""
  share = magnitude / 9
  if name in ("color", "contrast", "brightness", "sharpness"):
    return (1 + 0.9 * share, 1 - 0.9 * share)
  if name in ("rotate", "shear_y", "translate_x", "translate_y"):
    highest = {"rotate": 30, "shear_y": 0.3}.get(name, 150 / 331 * size)
    return (highest * share, -highest * share)
  return ({"posterize": round(8 - 4 * share), "solarize": 256 - 256 * share}.get(name, 0),)


def outcomes(image, table):
  """{image as bytes: probability} of what AutoAugment makes of `image`, by Pillow."""
  found = {}
  for pair in table:
    branches = [(image, 1 / len(table))]
    for name, probability, magnitude in pair:
      values = values_of(name, magnitude, len(image))
      done = [(x, p * (1 - probability)) for x, p in branches]
      for value in values:
        done += [
          (pillow(name, x, value, 128, name == "shear_y"), p * probability / len(values))
          for x, p in branches
          if probability
        ]
      branches = done
    for x, p in branches:
      found[x.tobytes()] = found.get(x.tobytes(), 0) + p
  return found


def test_auto_augment_has_the_distribution_of_the_published_policy():
  table = [
    [(n, float(p), int(m)) for n, p, m in (operation.split() for operation in pair.split(","))]
    for pair in CIFAR10_POLICY.split(";")
  ]
  assert len(table) == 25
  # Black and white are far enough inside for Pillow's autocontrast to stretch in whole numbers.
  image, number = noise(10, 10, 3, 1)[0] // 5 * 3 + 51, 60000
  seen = tally(jax.jit(policies.auto_augment())(repeated(image, number), jax.random.key(3)))

  def compare(table):
    found = outcomes(image, table)
    counts, others = counted(seen, [np.frombuffer(x, np.uint8) for x in found])
    return excess(counts, number * np.array(list(found.values()))), others / number

  statistic, others = compare(table)
  assert statistic < 4 and others < 0.005
  for policy, operation, change in ((1, 0, 0.1), (7, 1, -0.1), (12, 1, 0.1)):
    wrong = [list(pair) for pair in table]
    name, probability, magnitude = wrong[policy][operation]
    wrong[policy][operation] = (name, probability + change, magnitude)
    assert compare(wrong)[0] > 4
  wrong = [list(pair) for pair in table]
  wrong[6][1] = ("brightness", 0.6, 8)
  assert compare(wrong)[1] > 0.02


def test_auto_augment_crops_first_and_cuts_out_last():
  flat = jnp.full((3000, 32, 32, 3), 100, jnp.uint8)
  out = np.asarray(jax.jit(AUGMENTATIONS["auto_augment"](length=1))(flat, jax.random.key(4)))
  filled = (out[:, [0, -1]] == 128).all(-1).sum(-1).max(
    1
  ) >= 31  # translated up or down, and not autocontrasted
  assert 0.065 < filled.mean() < 0.11  # half as often were the padding cropped after it
  images = jnp.asarray(noise(32, 32, 3, 2000)) // 2 + 100
  out = np.asarray(jax.jit(AUGMENTATIONS["auto_augment"](pad=0))(images, jax.random.key(5)))
  assert (out == 0).all(-1).sum(
    (1, 2)
  ).min() >= 81  # nothing moves or brightens the square: a corner of 9 x 9 at least


# ---- boxes ----


def test_cutout_squares_are_centred_uniformly_and_clipped():
  number = 8000
  images = jnp.full((number, 32, 24, 3), 9, jnp.uint8)
  for length in (18, 5):
    boxes = zero_boxes(jax.jit(policies.cutout(length))(images, jax.random.key(6)))
    for axis, size in ((0, 32), (1, 24)):
      first, seen = boxes[:, axis], boxes[:, 2 + axis]
      center = np.where(first > 0, first + length // 2, seen - (length - length // 2))
      assert uniform_excess(center, 0, size - 1) < 4
      assert uniform_excess(np.minimum(center, size - 2), 0, size - 1) > 4
      whole = (center >= length // 2) & (center + length - length // 2 <= size)
      assert whole.any() and (seen[whole] == length).all()  # odd or even
  with pytest.raises(InputError, match="length 18 hides all of an image of 8 x 8"):
    policies.cutout(18)(images[:, :8, :8], jax.random.key(0))
  with pytest.raises(InputError, match="at least 1 pixel, found 0"):
    policies.cutout(0)


def erasing_by_numpy(number, height, width, probability, area, ratio, seed=0):
  """Zero boxes of torchvision's RandomErasing, in plain Python."""
  rng, boxes = np.random.default_rng(seed), []
  for _ in range(number):
    box = (-1, -1, 0, 0)
    if rng.random() < probability:
      for _ in range(10):
        size, shape = (
          rng.uniform(*area) * height * width,
          math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]))),
        )
        h, w = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
        if h < height and w < width:
          box = (rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w)
          break
    boxes.append(box)
  return np.array(boxes)


@pytest.mark.parametrize("probability, area", [(0.5, (0.02, 0.33)), (1.0, (0.02, 0.5))])
def test_random_erasing_is_torchvision_s(probability, area):
  number, shape, ratio = 6000, (24, 32), (0.3, 3.3)
  images = jnp.full((number, *shape, 3), 9, jnp.uint8)
  found = zero_boxes(jax.jit(policies.random_erasing(probability, area))(images, jax.random.key(7)))

  def compare(expected):
    """p-values of shares, areas, shapes and places."""
    erased = [boxes[boxes[:, 2] > 0] for boxes in (found, expected)]
    share = stats.fisher_exact([[len(e), number - len(e)] for e in erased]).pvalue
    features = (
      lambda b: b[:, 2] * b[:, 3],
      lambda b: b[:, 2] / b[:, 3],
      lambda b: b[:, 0] / (shape[0] - b[:, 2]),
      lambda b: b[:, 1] / (shape[1] - b[:, 3]),
    )
    return [share] + [stats.ks_2samp(*(f(e) for e in erased)).pvalue for f in features]

  assert min(compare(erasing_by_numpy(number, *shape, probability, area, ratio))) > 0.003
  for wrong in (
    (probability - 0.05, area, ratio),
    (probability, (0.02, area[1] + 0.05), ratio),
    (probability, (0.05, area[1]), ratio),
    (probability, area, (0.5, 3.3)),
    (probability, area, (0.3, 2.5)),
  ):
    assert min(compare(erasing_by_numpy(number, *shape, *wrong))) < 1e-4


# ---- IDBH ----


@pytest.mark.parametrize("flip", [False, True])
def test_crop_shift_windows_and_places_are_uniform(flip):
  height, width, number = 20, 24, 16000
  grid = np.stack([*np.mgrid[1 : height + 1, 1 : width + 1], np.full((height, width), 7)], -1).astype(
    np.uint8
  )
  out = np.asarray(jax.jit(policies.crop_shift(6, flip))(repeated(grid, number), jax.random.key(8))).astype(
    int
  )
  seen = out[..., 2] > 0
  rows, columns = seen.any(2), seen.any(1)
  assert (seen == rows[:, :, None] & columns[:, None]).all()
  cuts = np.stack([height - rows.sum(1), width - columns.sum(1)], 1)
  starts = np.stack([rows.argmax(1), columns.argmax(1)], 1)
  corner = out[np.arange(number), starts[:, 0], starts[:, 1]]
  last = out[np.arange(number), starts[:, 0], starts[:, 1] + columns.sum(1) - 1]
  mirrored = last[:, 1] < corner[:, 1]
  assert abs(mirrored.mean() - 0.5 * flip) < 0.016 * flip + 1e-9
  places = np.stack([corner[:, 0], np.minimum(corner[:, 1], last[:, 1])], 1) - 1
  assert (
    np.abs(np.diff(out[..., 1], axis=2))[seen[:, :, 1:] & seen[:, :, :-1]] == 1
  ).all()  # the window is whole
  assert (np.diff(out[..., 0], axis=1)[seen[:, 1:] & seen[:, :-1]] == 1).all()
  total = cuts.sum(1)
  assert uniform_excess(total, 0, 6) < 4
  assert uniform_excess(np.where(total == 6, 5, total), 0, 6) > 4
  for s in range(1, 7):
    assert uniform_excess(cuts[total == s, 1], 0, s) < 4
  for axis in (0, 1):
    for cut in (1, 2, 3):
      mine = cuts[:, axis] == cut
      assert uniform_excess(places[mine, axis], 0, cut) < 4
      assert uniform_excess(starts[mine, axis], 0, cut) < 4
      both = places[mine, axis] * (cut + 1) + starts[mine, axis]
      assert uniform_excess(both, 0, (cut + 1) ** 2 - 1) < 4  # independent of each other
  with pytest.raises(InputError, match="cuts off up to 8 pixels, and images have 8 x 24"):
    policies.crop_shift(8)(jnp.zeros((1, 8, 24, 3), jnp.uint8), jax.random.key(0))


def classify(image, out):
  """[(operation, value)] that make `out` of `image`, whose values stay inside 0 to 255; shears get their sign and size."""
  size = len(image)
  fixed = {pillow("equalize", image, 0).tobytes(): ("equalize", 0.0)}
  fixed |= {pillow("rotate", image, float(a)).tobytes(): ("rotate", a) for a in range(-30, 31) if a}
  stretched = pillow("autocontrast", image, 0).astype(int)
  blended = {
    name: pillow(name, image, 0.0).astype(float) for name in ("color", "brightness", "contrast", "sharpness")
  }
  found = []
  for x in out:
    if x.tobytes() in fixed:
      found.append(fixed[x.tobytes()])
      continue
    if np.abs(stretched - x).max() <= 1:
      found.append(("autocontrast", 0.0))
      continue
    for name, other in blended.items():
      factor = ((x - other) * (image - other)).sum() / ((image - other) ** 2).sum()
      if np.abs(other + factor * (image - other) - x).max() < 1.5:
        found.append((name, factor))
        break
    else:
      zero = (x == 0).all(-1)
      vertical = zero.sum(0).max() < zero.sum(1).max() or zero[size // 2].any()
      lines = zero if not vertical else zero.T
      sign = 1 if lines[0, 0] else -1  # row 0 is read at negative places
      found.append((("shear_y" if vertical else "shear_x"), sign * lines.sum() / (size * size / 4)))
  return found


@pytest.mark.parametrize(
  "mode, shares, shear, degrees",
  [
    ("color", [1 / 8] * 8, 0.15, 10),
    ("shape", [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3], 0.35, 30),
  ],
)
def test_color_shape_draws_eight_operations_in_their_ranges(mode, shares, shear, degrees):
  number = 4000
  image = (noise(40, 40, 3, 1)[0] / 255 * 50 + 60).astype(np.uint8)
  out = np.asarray(jax.jit(policies.color_shape(mode))(repeated(image, number), jax.random.key(9)))
  found = classify(image, out)
  values = {name: np.array([v for n, v in found if n == name]) for name in {n for n, _ in found}}
  operations = ("color", "brightness", "contrast", "sharpness", "autocontrast", "equalize")
  counts = [len(values[name]) for name in operations]
  counts += [len(values["shear_x"]) + len(values["shear_y"]), len(values["rotate"])]
  assert excess(counts, number * np.array(shares)) < 4
  wrong = np.array(shares) * [0.7, 1, 1, 1, 1, 1, 1, 1]
  assert excess(counts, number * wrong / wrong.sum()) > 4

  for name, low in (("color", 0.1), ("brightness", 0.5), ("contrast", 0.5), ("sharpness", 0.1)):
    below = values[name][values[name] < 0.9]  # near 1 the operations look alike
    assert stats.kstest(below, stats.uniform(low, 0.9 - low).cdf).pvalue > 0.003
    assert stats.kstest(below, stats.uniform(low - 0.2, 1.1 - low).cdf).pvalue < 0.003
    assert 1.75 < values[name].max() < 1.92
  assert uniform_excess(np.abs(values["rotate"]).astype(int), 1, degrees) < 4
  shears = np.concatenate([values["shear_x"], values["shear_y"]])
  assert stats.binomtest(len(values["shear_x"]), len(shears)).pvalue > 0.003
  for signed in (values["rotate"], values["shear_x"], values["shear_y"]):
    assert stats.binomtest(int((signed > 0).sum()), len(signed)).pvalue > 0.003
  tangents = np.abs(shears)
  assert 0.04 < tangents.min() < 0.07 and 0 <= math.tan(shear) - tangents.max() < 0.05
  assert abs(tangents.mean() - (0.05 + shear) / 2) < 0.012
  with pytest.raises(InputError, match="known: color, shape"):
    policies.color_shape("svhn")


def test_idbh_s_kinds_crop_color_and_erase():
  images = jnp.asarray(noise(32, 32, 3, 1500) // 2 + 100)
  erased = {}
  for kind, most in (("cifar10-weak", 10), ("cifar10-strong", 10), ("svhn", 8)):
    out = np.asarray(jax.jit(policies.idbh(kind))(images, jax.random.key(10)))
    zero = (out == 0).all(-1)
    inner = zero[:, 12:20, 12:20].any((1, 2))  # neither shift nor shear nor rotation brings zeros here
    erased[kind] = inner.mean()
    border = zero.all(2).argmin(1)
    assert (
      border[~inner].max() <= most + 3
    )  # a shear or a rotation about the centre moves the border by two or three
  assert abs(erased["cifar10-strong"] / erased["cifar10-weak"] - 2) < 0.3
  assert erased["svhn"] > erased["cifar10-strong"] * 1.1  # larger boxes
  symmetric = jnp.asarray(np.tile(np.arange(32, dtype=np.uint8)[:, None] + 60, (1, 32)))[None, ..., None]
  assert symmetric.shape == (1, 32, 32, 1)
  ramp = jnp.broadcast_to(symmetric.swapaxes(1, 2), (1000, 32, 32, 1))
  for flip, share in ((True, 0.5), (False, 0.0)):
    out = np.asarray(jax.jit(policies.idbh("cifar10-weak", flip))(ramp, jax.random.key(11))).astype(int)
    right, left = out[:, 14:18, 24].max(1), out[:, 14:18, 8].max(1)
    both = (right > 0) & (left > 0) & (right != left)
    assert abs((right < left)[both].mean() - share) < (0.07 if flip else 0.01)
  with pytest.raises(InputError, match="no IDBH 'weak'; known: cifar10-weak, cifar10-strong, svhn"):
    policies.idbh("weak")


# ---- all of them ----


@pytest.mark.parametrize("name", ["cutout", "auto_augment", "rand_augment", "idbh"])
def test_policies_are_the_same_inside_jit_and_differ_between_images(name):
  image, augment = noise(32, 32, 3, 1)[0], AUGMENTATIONS[name]()
  images, key = repeated(image, 100), jax.random.key(12)
  out = np.asarray(jax.jit(augment)(images, key))
  np.testing.assert_array_equal(out, augment(images, key))
  assert len({x.tobytes() for x in out}) > 60
  with pytest.raises(InputError) if name in ("auto_augment", "rand_augment", "idbh") else _nothing():
    augment(jnp.zeros((2, 32, 32, 4), jnp.uint8), key)


class _nothing:
  def __enter__(self):
    return self

  def __exit__(self, *error):
    return False


def test_a_recipe_takes_a_policy_by_name():
  config = config_lib.load("configs/at_cifar.py")
  config_lib.override(config, {"augment.name": "rand_augment", "augment.magnitude": 9.0})
  assert config.augment.to_dict() == {
    "name": "rand_augment",
    "num_ops": 2,
    "magnitude": 9.0,
    "translate": 100.0,
    "pad": 4,
    "flip": True,
  }
  augment = config_lib.build(AUGMENTATIONS, config.augment)
  images = jnp.asarray(noise(32, 32, 3))
  assert (augment(images, jax.random.key(0)) != images).any()


# ---- CutMix ----


def test_cutmix_labels_are_the_shares_of_the_pixels():
  number, height, width = 40, 12, 20
  images = jnp.broadcast_to(
    jnp.arange(number, dtype=jnp.uint8)[:, None, None, None], (number, height, width, 3)
  )
  labels = jax.nn.one_hot(jnp.arange(number), number)
  out, mixed = jax.jit(policies.cutmix)(images, labels, jax.random.key(13))
  assert out.shape == (160, height, width, 3) and out.dtype == jnp.uint8 and mixed.dtype == jnp.float32
  shares = (np.asarray(out)[..., 0].reshape(160, -1, 1) == np.arange(number)).mean(1)
  np.testing.assert_allclose(mixed, shares, atol=1e-6)
  pasted = (np.asarray(out)[..., 0] != np.tile(np.arange(number), 4)[:, None, None]).reshape(
    4, number, height, width
  )
  boxes = pasted.any(1)
  assert (
    len({box.tobytes() for box in boxes}) > 1
  )  # each repeat has its own box, which is that of all its images
  for repeat, box in zip(pasted, boxes, strict=True):
    assert all((one == box).all() or not one.any() for one in repeat)
  partners = shares.reshape(4, number, number)
  assert (partners.sum(1) > 0.999).all()  # a permutation: every image is as often in the batch as it was
  with pytest.raises(InputError, match="at least 1 repeat, found 0"):
    policies.cutmix(images, labels, jax.random.key(0), repeats=0)


def cutmix_by_numpy(number, height, width, seed=0, power=0.5, odd=0):
  """(rows, columns) of the boxes of Yun et al. 2019, algorithm 1; `odd` and `power` make it another one."""
  rng, boxes = np.random.default_rng(seed), []
  for _ in range(number):
    root = (1 - rng.random()) ** power
    half, odd_half = int(height * root) // 2, int(width * root) // 2
    i, j = rng.integers(0, height), rng.integers(0, width)
    rows = min(i + half + odd, height) - max(i - half, 0)
    boxes.append((rows, min(j + odd_half + odd, width) - max(j - odd_half, 0)))
  return np.array(boxes)


def test_cutmix_boxes_have_the_published_sizes():
  number, height, width = 3000, 9, 14
  images = jnp.stack([jnp.zeros((height, width, 1), jnp.uint8), jnp.ones((height, width, 1), jnp.uint8)])
  labels = jnp.eye(2)
  out = jax.jit(jax.vmap(lambda key: policies.cutmix(images, labels, key, repeats=1)[0]))(
    jax.random.split(jax.random.key(14), 2 * number)
  )
  box = np.asarray(out)[:, 0, :, :, 0] == 1
  rows, columns = box.any(2).sum(1), box.any(1).sum(1)
  permuted = np.asarray(out)[:, 0, :, :, 0].any((1, 2))

  def compare(expected):
    expected = expected[expected.prod(1) > 0]
    return min(
      stats.chi2_contingency([np.bincount(a, minlength=15)[bins], np.bincount(b, minlength=15)[bins]]).pvalue
      for a, b in ((rows[permuted], expected[:, 0]), (columns[permuted], expected[:, 1]))
      for bins in [(np.bincount(a, minlength=15) + np.bincount(b, minlength=15)) > 10]
    )

  empty = (cutmix_by_numpy(20000, height, width).prod(1) == 0).mean()
  assert abs(permuted.mean() - (1 - empty) / 2) < 0.03  # of two images, half the permutations move none
  assert compare(cutmix_by_numpy(20000, height, width)) > 0.003
  assert compare(cutmix_by_numpy(20000, height, width, odd=1)) < 1e-4
  assert compare(cutmix_by_numpy(20000, height, width, power=0.6)) < 1e-4
  assert rows[permuted].max() == 8  # of a side of 9, which is odd, a pixel is lost
