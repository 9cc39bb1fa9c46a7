"""The augmentation pipe: against reference values, against numpy one transformation at a time, and its invariants."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff import config as config_lib
from jax_trustdiff.diffusion.augment import AUGMENT_PIPES, SYM6, TRANSFORMS, AugmentPipe, edm_pipe, resample
from jax_trustdiff.types import InputError, to_signed

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, size=(6, 16, 16, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(1), 6)
EVERYTHING = AugmentPipe(probability=1.0, **dict.fromkeys(TRANSFORMS, 1.0))


def golden():
  """(images, draws, augmented images, labels) of the reference, NHWC."""
  file = np.load(shared_dir("golden/edm_augment/edm6_p1.npz"))
  draws = {name.removeprefix("draw/"): jnp.asarray(file[name]) for name in file if name.startswith("draw/")}
  assert {name.split(".")[0] for name in draws} == set(json.loads(str(file["config"]))) - {"p"}
  draws["translate_frac.normal_xy"] = draws["translate_frac.normal_xy"].T
  images = to_signed(file["images_uint8"].transpose(0, 2, 3, 1))
  return images, draws, file["out"].transpose(0, 2, 3, 1), file["labels"]


def only(name, images=IMAGES, multiplier=1.0, coin=0.5, **draws):
  """Images and labels under one transformation with these draws, the same for all images."""
  pipe = AugmentPipe(**{name: multiplier})
  draws = {f"{name}.{kind}": value for kind, value in {"coin": coin, **draws}.items()}
  draws = {kind: jnp.tile(jnp.asarray(v), (len(images),) + (1,) * np.ndim(v)) for kind, v in draws.items()}
  return pipe.apply_draws(images, draws)


EDM = jax.jit(edm_pipe(1.0).apply_draws)


def test_images_and_labels_equal_the_reference():
  images, draws, out, labels = golden()
  found, found_labels = EDM(images, draws)
  np.testing.assert_allclose(found, out, rtol=0, atol=2e-5)
  assert np.abs(found - out).mean() < 1e-6
  np.testing.assert_allclose(found_labels, labels, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "wrong",
  [
    {"rotate_frac.u01": lambda u: 1 - u},
    {"scale.normal": lambda w: -w},
    {"aniso.u01_angle": lambda u: 1 - u},
    {"translate_frac.normal_xy": lambda w: w[:, ::-1]},
    {"translate_frac.normal_xy": lambda w: w * 1.001},
    {"xflip.bit": lambda bit: 1 - bit},
  ],
)
def test_a_wrong_draw_is_seen_by_the_reference(wrong):
  images, draws, out, labels = golden()
  draws = {name: wrong.get(name, lambda x: x)(value) for name, value in draws.items()}
  found, found_labels = EDM(images, draws)
  assert np.abs(found - out).max() > 1e-3
  assert np.abs(found_labels - labels).max() > 1e-4


@pytest.mark.slow
def test_resampling_in_float64_differs_from_the_reference_by_its_rounding(float64):
  images, draws, out, _ = golden()
  found, _ = edm_pipe(1.0).apply_draws(images.astype(jnp.float64), draws)
  assert found.dtype == jnp.float64
  np.testing.assert_allclose(found, out, rtol=0, atol=1e-5)


# ---- one transformation at a time ----


@pytest.mark.parametrize("name, axis", [("xflip", 2), ("yflip", 1)])
def test_flips(name, axis):
  flipped, labels = only(name, bit=1)
  np.testing.assert_array_equal(flipped, np.flip(IMAGES, axis))
  same, zeros = only(name, bit=0)
  np.testing.assert_array_equal(same, IMAGES)
  assert labels.shape == (6, 1) and (labels == 1).all() and (zeros == 0).all()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotate_int_is_a_quarter_turn(turns):
  turned, labels = only("rotate_int", quarter=turns)
  np.testing.assert_array_equal(turned, np.rot90(IMAGES, turns, axes=(1, 2)))
  angle = turns * np.pi / 2
  np.testing.assert_allclose(labels, np.tile([np.cos(angle) - 1, np.sin(angle)], (6, 1)), atol=1e-6)


@pytest.mark.parametrize("x, y", [(1.0, -0.9), (-0.4, 0.6)])
def test_translate_int_moves_whole_pixels_with_mirrored_edges(x, y):
  moved, labels = only("translate_int", u01_xy=((x + 1) / 2, (y + 1) / 2))
  right, down = round(x * 0.125 * 16), round(y * 0.125 * 16)
  padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
  np.testing.assert_array_equal(moved, padded[:, 2 - down : 18 - down, 2 - right : 18 - right])
  np.testing.assert_allclose(labels, np.tile([x, y], (6, 1)), atol=1e-6)
  fraction, _ = only("translate_frac", normal_xy=(right / 2, down / 2))  # 0.125 * 16 pixels each
  np.testing.assert_allclose(fraction, moved, atol=2e-5)


@pytest.mark.slow
def test_translate_int_is_uniform_over_the_range():
  draws = AugmentPipe(translate_int=1).draw(jax.random.split(jax.random.key(0), 4000))
  w = 2 * np.asarray(draws["translate_int.u01_xy"]) - 1
  assert w.shape == (4000, 2) and -1 <= w.min() < -0.99 and 0.99 < w.max() < 1
  pixels, counts = np.unique(np.round(w * 0.125 * 32), return_counts=True)
  np.testing.assert_array_equal(pixels, np.arange(-4, 5))
  np.testing.assert_allclose(counts / w.size, np.array([0.5] + [1] * 7 + [0.5]) / 8, atol=0.015)


def blob(x, y):
  """A smooth image without symmetry, at coordinates in pixels from the centre."""
  return np.exp(-((x - 2) ** 2) / 18 - (y + 1) ** 2 / 40 - x * y / 60) - 0.3 * np.exp(
    -((x + 4) ** 2 + (y - 4) ** 2) / 16
  )


# sym6 is not symmetric: its mean lies this far (0.05 pixels) beside the tap on the pixel, and maps act about there.
SHIFT = (np.arange(12) @ SYM6 / SYM6.sum() - 5) / 2
CENTERED = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
BLOB = jnp.asarray(np.repeat(blob(*CENTERED)[None, :, :, None], 2, axis=0), jnp.float32)


@pytest.mark.parametrize("turns", [1, 2])
def test_quarter_turns_agree_with_rotate_frac(turns):
  """The other two quarter turns do not."""
  fraction, labels = only("rotate_frac", BLOB, u01=(0.5 + turns / 4) % 1)
  np.testing.assert_allclose(labels, only("rotate_int", BLOB, quarter=turns)[1], atol=1e-6)
  for other in range(4):
    angle = other * np.pi / 2
    offset = (np.cos(angle) - np.sin(angle) - 1) * SHIFT, (np.sin(angle) + np.cos(angle) - 1) * SHIFT
    x, y = CENTERED  # of the image before it is turned
    nearby = jnp.asarray(np.repeat(blob(x + offset[0], y + offset[1])[None, :, :, None], 2, axis=0))
    turned, _ = only("rotate_int", nearby, quarter=other)
    error = np.abs(fraction - turned)[:, 4:-4, 4:-4].max()
    assert error < 0.006 if other == turns else error > 0.1, error


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["scale", "rotate_frac", "aniso", "translate_frac"])
def test_resampling_of_a_smooth_image_is_the_image_elsewhere(name, sign):
  """With the sign of the transformation turned round, the same comparison fails."""
  x, y = (part + SHIFT for part in CENTERED)
  if name == "scale":
    found, _ = only(name, BLOB, normal=0.7)
    factor = 2 ** (0.2 * 0.7 * sign)
    x, y = x / factor, y / factor
  elif name == "rotate_frac":  # to the left as seen: y points down
    found, _ = only(name, BLOB, u01=0.6)
    a = 0.2 * np.pi * sign
    x, y = np.cos(a) * x - np.sin(a) * y, np.sin(a) * x + np.cos(a) * y
  elif name == "aniso":
    found, labels = only(name, BLOB, normal=1.5, u01_angle=0.7, coin_rotate=0.4)
    r, factor = 0.4 * np.pi, 2 ** (0.2 * 1.5 * sign)
    u, v = (np.cos(r) * x - np.sin(r) * y) / factor, (np.sin(r) * x + np.cos(r) * y) * factor
    x, y = np.cos(r) * u + np.sin(r) * v, -np.sin(r) * u + np.cos(r) * v
    np.testing.assert_allclose(labels[0], [1.5 * np.cos(r), 1.5 * np.sin(r)], rtol=1e-6)
  else:
    found, _ = only(name, BLOB, normal_xy=(0.3, -0.8))
    x, y = x - sign * 0.3 * 0.125 * 32, y + sign * 0.8 * 0.125 * 32
  inside = (np.abs(x) < 12) & (np.abs(y) < 12)
  error = np.abs(np.asarray(found)[0, :, :, 0] - blob(x - SHIFT, y - SHIFT))[inside].max()
  assert error < 0.006 if sign == 1 else error > 0.1, error


def test_aniso_is_not_rotated_when_its_second_coin_says_no():
  turned = only("aniso", normal=1.0, u01_angle=0.9, coin_rotate=0.51)[1]
  np.testing.assert_allclose(turned, np.tile([1.0, 0.0], (6, 1)), atol=1e-7)


def test_identity_runs_the_resampler_and_changes_nothing():
  identity = jnp.broadcast_to(jnp.eye(2, 3), (6, 2, 3))
  run = jax.jit(resample)
  np.testing.assert_allclose(run(IMAGES, identity), IMAGES, atol=1e-6)
  off = identity.at[:, 0, 2].set(0.01)  # a hundredth of a pixel
  assert np.abs(run(IMAGES, off) - IMAGES).max() > 1e-3
  np.testing.assert_allclose(resample(IMAGES[:, :9], identity), IMAGES[:, :9], atol=1e-6)  # not square


V = np.full(3, 1 / np.sqrt(3))


def hue_matrix(angle):
  """Rotation about (1, 1, 1), from a basis of the plane across it."""
  e1 = np.array([1, -1, 0]) / np.sqrt(2)
  e2 = np.cross(V, e1)
  basis = np.stack([V, e1, e2], axis=1)
  c, s = np.cos(angle), np.sin(angle)
  return basis @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ basis.T


COLORS = {
  "brightness": ({"normal": 1.3}, lambda x: x + 0.2 * 1.3, [1.3]),
  "contrast": ({"normal": -0.8}, lambda x: x * 2 ** (0.5 * -0.8), [-0.8]),
  "lumaflip": ({"bit": 1}, lambda x: x - 2 * (x @ V)[..., None] * V, [1]),
  "hue": (
    {"u01": 0.8},
    lambda x: x @ hue_matrix(0.6 * np.pi).T,
    [np.cos(0.6 * np.pi) - 1, np.sin(0.6 * np.pi)],
  ),
  "saturation": (
    {"normal": 0.9},
    lambda x: (x @ V)[..., None] * V + 2**0.9 * (x - (x @ V)[..., None] * V),
    [0.9],
  ),
}


@pytest.mark.parametrize("name", COLORS)
def test_colors_equal_their_closed_form(name):
  draws, expected, label = COLORS[name]
  found, labels = only(name, **draws)
  np.testing.assert_allclose(found, expected(np.asarray(IMAGES, np.float64)), atol=2e-6)
  np.testing.assert_allclose(labels, np.tile(label, (6, 1)), atol=1e-6)


def test_hue_by_a_third_of_the_circle_permutes_the_channels():
  found, _ = only("hue", u01=0.5 + 1 / 3)
  np.testing.assert_allclose(found, np.roll(IMAGES, 1, axis=-1), atol=1e-6)  # red becomes green


def test_gray_images_take_colors_as_gray_rgb():
  gray = IMAGES[..., :1]
  for name, (draws, expected, _) in COLORS.items():
    rgb = np.repeat(np.asarray(gray, np.float64), 3, axis=-1)
    np.testing.assert_allclose(only(name, gray, **draws)[0], expected(rgb)[..., :1], atol=2e-6)


# ---- the pipe ----


@pytest.mark.slow
def test_everything_together_is_one_after_the_other():
  draws = EVERYTHING.draw(KEYS)
  whole, labels = EVERYTHING.apply_draws(IMAGES, draws)
  fractional = ("scale", "rotate_frac", "aniso", "translate_frac")
  x, parts = IMAGES, []
  for names in (*TRANSFORMS[:4], fractional, *TRANSFORMS[8:]):
    names = (names,) if isinstance(names, str) else names
    x, some = AugmentPipe(**dict.fromkeys(names, 1.0)).apply_draws(x, draws)
    parts.append(some)
  np.testing.assert_allclose(whole, x, atol=2e-5)
  np.testing.assert_allclose(labels, np.concatenate(parts, axis=1), atol=1e-6)
  assert labels.shape[1] == EVERYTHING.num_labels == 19
  assert TRANSFORMS[:4] == ("xflip", "yflip", "rotate_int", "translate_int")


def test_probability_0_is_the_identity_and_costs_nothing():
  pipe = edm_pipe(0.0)
  images, labels = pipe(IMAGES, KEYS)
  np.testing.assert_array_equal(images, IMAGES)
  np.testing.assert_array_equal(labels, np.zeros((6, 9)))
  assert not {"gather", "dot_general"} & {
    eqn.primitive.name for eqn in jax.make_jaxpr(pipe)(IMAGES, KEYS).eqns
  }


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 5, 12, 2)])
def test_edm_takes_images_of_any_shape(shape):
  """With all coins but that of xflip against them, the mirrored image comes out of the resampler."""
  images = jnp.asarray(RNG.uniform(-1, 1, size=shape), jnp.float32)
  run = jax.jit(edm_pipe(1.0).apply_draws)
  draws = edm_pipe(1.0).draw(KEYS[:2])
  found, labels = run(images, draws)
  assert found.shape == shape and labels.shape == (2, 9) and np.abs(found - images).max() > 0.1
  off = {name: jnp.ones_like(draw) if name.endswith(".coin") else draw for name, draw in draws.items()}
  flipped, labels = run(images, off | {"xflip.coin": jnp.zeros(2), "xflip.bit": jnp.array([0, 1])})
  np.testing.assert_allclose(flipped[0], images[0], atol=1e-6)
  np.testing.assert_allclose(flipped[1], images[1, :, ::-1], atol=1e-6)
  np.testing.assert_array_equal(labels, np.array([[0] * 9, [1] + [0] * 8]))


def test_pipes_are_built_from_a_section_of_a_config():
  build = lambda **section: config_lib.build(AUGMENT_PIPES, section)  # noqa: E731
  assert build(name="edm", probability=0.15) == edm_pipe(0.15)
  assert build(name="none").num_labels == 0
  assert build(name="custom", probability=0.5, hue=1.0, hue_max=0.25).num_labels == 2
  with pytest.raises(InputError, match="does not take 'hew'.*'hue'"):
    build(name="custom", hew=1.0)


def test_labels_of_edm():
  assert edm_pipe().num_labels == 9
  assert edm_pipe().enabled == ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")
  assert AugmentPipe().num_labels == 0 and AugmentPipe()(IMAGES, KEYS)[1].shape == (6, 0)


def test_an_image_does_not_depend_on_its_batch():
  run = jax.jit(EVERYTHING)
  images, labels = run(IMAGES, KEYS)
  order = np.array([4, 0, 2])
  some, some_labels = run(IMAGES[order], KEYS[order])
  np.testing.assert_allclose(some, images[order], atol=2e-6)
  np.testing.assert_allclose(some_labels, labels[order], atol=1e-6)
  other, _ = run(IMAGES[order], KEYS[order - 1])
  assert np.abs(other - some).max() > 0.1
  one, _ = run(IMAGES, jax.random.key(7))
  each = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(6))
  np.testing.assert_array_equal(one, run(IMAGES, each)[0])


def test_draws_do_not_depend_on_what_else_is_enabled():
  few, all_draws = AugmentPipe(scale=1, hue=1).draw(KEYS), EVERYTHING.draw(KEYS)
  assert set(few) == {"scale.coin", "scale.normal", "hue.coin", "hue.u01"}
  for name, value in few.items():
    np.testing.assert_array_equal(value, all_draws[name])


@pytest.mark.slow
def test_transformations_come_as_often_as_they_should():
  p = 0.12
  keys = jax.random.split(jax.random.key(3), 20_000)
  pipe = AugmentPipe(p, **{**dict.fromkeys(TRANSFORMS, 1.0), "xflip": 1e8})
  _, labels = jax.jit(pipe.apply_draws)(jnp.zeros((20_000, 1, 1, 3)), jax.jit(pipe.draw)(keys))
  changed = np.asarray(labels != 0)
  columns = iter(range(pipe.num_labels))
  for name in TRANSFORMS:
    own = AugmentPipe(**{name: 1.0}).num_labels
    found = changed[:, [next(columns) for _ in range(own)]].any(1).mean()
    # fair bits say nothing half of the time, a quarter turn one time in four
    expected = {"yflip": p / 2, "lumaflip": p / 2, "rotate_int": 0.75 * p, "xflip": 0.5}.get(name, p)
    error = 4.5 * np.sqrt(expected * (1 - expected) / 20_000)
    assert abs(found - expected) <= error, (name, found, expected)


@pytest.mark.slow
def test_draws_are_uncorrelated_with_the_right_moments():
  draws = EVERYTHING.draw(jax.random.split(jax.random.key(5), 20_000))
  columns = {
    f"{name}{i}": v for name, x in draws.items() for i, v in enumerate(np.asarray(x).reshape(20_000, -1).T)
  }
  moments = {"normal": (0, 1), "bit": (0.5, 0.25), "quarter": (1.5, 1.25)}
  for name, column in columns.items():
    mean, variance = moments.get(name.split(".")[1].split("_")[0].rstrip("01"), (0.5, 1 / 12))
    assert abs(column.mean() - mean) < 4.5 * np.sqrt(variance / 20_000), name
    assert abs(column.var() / variance - 1) < 0.06, name
  correlation = np.corrcoef(np.stack(list(columns.values()))) - np.eye(len(columns))
  assert np.abs(correlation).max() < 5 / np.sqrt(20_000)


def test_gradients_and_low_precision():
  loss = lambda x: jnp.sum(EVERYTHING(x, KEYS)[0] ** 2)  # noqa: E731
  assert np.isfinite(jax.grad(loss)(IMAGES)).all()
  images, labels = edm_pipe()(IMAGES.astype(jnp.bfloat16), KEYS)
  assert images.dtype == labels.dtype == jnp.float32


def test_one_line_errors():
  with pytest.raises(InputError, match="must lie in .0, 1., got 1.5"):
    AugmentPipe(probability=1.5)
  with pytest.raises(InputError, match="scale of the augment pipe multiplies a probability, got -1"):
    AugmentPipe(scale=-1)
  with pytest.raises(InputError, match="square images, got 8 x 16"):
    AugmentPipe(rotate_int=1)(IMAGES[:, :8], KEYS)
  with pytest.raises(InputError, match="1 or 3 channels, got 2"):
    AugmentPipe(hue=1)(IMAGES[..., :2], KEYS)
  with pytest.raises(InputError, match="lack scale.coin, scale.normal"):
    edm_pipe().apply_draws(IMAGES, {k: v for k, v in edm_pipe().draw(KEYS).items() if "scale" not in k})
