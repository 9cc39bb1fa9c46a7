"""The image operations of augmentation policies give Pillow's pixels, each image its own operation and value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from jax_trustdiff.data import image_ops
from jax_trustdiff.types import InputError

NUMBER = 40


def noise(height, width, channels, number=NUMBER):
  return np.random.default_rng(0).integers(0, 256, (number, height, width, channels)).astype(np.uint8)


def waves(height, width, channels, number=NUMBER):
  """Smooth images of different brightness and contrast, some of them clipped, none with all 256 values."""
  rng = np.random.default_rng(1)
  y, x = np.mgrid[:height, :width] / 32
  phase, size = rng.uniform(0, 6, (2, number, channels, 1, 1)), rng.uniform(20, 150, (number, channels, 1, 1))
  images = rng.uniform(80, 170, (number, 1, 1, 1)) + size * np.sin(6 * x + phase[0]) * np.cos(
    5 * y + phase[1]
  )
  return np.clip(images, 0, 255).transpose(0, 2, 3, 1).astype(np.uint8)


def to_pil(image):
  return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def pillow(name, image, value, fill=0, bicubic=False):
  """The same operation by Pillow, on one image [h w c]."""
  pil = to_pil(image)
  width, height = pil.size
  colour = fill if pil.mode == "L" else (fill,) * 3
  maps = {
    "shear_x": (1, value, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, value, 1, 0),
    "shear_x_centered": (1, value, -value * height / 2, 0, 1, 0),
    "shear_y_centered": (1, 0, 0, value, 1, -value * width / 2),
    "translate_x": (1, 0, value, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, value),
  }
  if name in maps:
    resample = Image.BICUBIC if bicubic else Image.NEAREST
    out = pil.transform(pil.size, Image.AFFINE, maps[name], resample, fillcolor=colour)
  elif name == "rotate":
    out = pil.rotate(value, fillcolor=colour)
  elif name in ("autocontrast", "equalize", "invert"):
    out = getattr(ImageOps, name)(pil)
  elif name == "posterize":
    out = ImageOps.posterize(pil, int(value))
  elif name == "solarize":
    out = ImageOps.solarize(pil, value)
  elif name == "solarize_add":
    out = ImageOps.solarize(to_pil(np.clip(image.astype(int) + int(value), 0, 255).astype(np.uint8)), 128)
  else:
    out = getattr(ImageEnhance, name.title())(pil).enhance(value)
  return np.asarray(out).reshape(image.shape)


VALUES = {
  "posterize": np.arange(NUMBER) % 8 + 1,
  "solarize": np.linspace(0, 256, NUMBER),
  "solarize_add": np.arange(NUMBER) * 3,
  "rotate": np.linspace(-40, 40, NUMBER),
  "translate_x": np.linspace(-20.3, 21, NUMBER),
  "translate_y": np.linspace(-20.3, 21, NUMBER),
  "autocontrast": np.zeros(NUMBER),
  "equalize": np.zeros(NUMBER),
  "invert": np.zeros(NUMBER),
}
for _name in ("shear_x", "shear_y", "shear_x_centered", "shear_y_centered"):
  VALUES[_name] = np.linspace(-0.4, 0.4, NUMBER)
for _name in ("brightness", "contrast", "color", "sharpness"):
  VALUES[_name] = np.linspace(0, 2, NUMBER)
# Where Pillow computes in float64 and rounds down, a pixel in so many may be one off.
NEARLY = {"autocontrast": 0.02, "bicubic": 0.02}


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def apply(images, names, which, values, fill=0, bicubic=False):
  return image_ops.apply(images, names, which, values, fill, bicubic)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("name", image_ops.OPERATIONS)
def test_operations_are_pillow_s(name, bicubic):
  if bicubic and name not in ("shear_x", "shear_y"):
    pytest.skip("only shears are bicubic")
  for shape, fill in (((32, 32, 3), 128), ((17, 30, 1), 0)):
    for make in (noise, waves):
      images, values = make(*shape), VALUES[name].astype(np.float32)
      out = np.asarray(apply(jnp.asarray(images), (name,), jnp.zeros(NUMBER, int), values, fill, bicubic))
      expected = [pillow(name, x, float(v), fill, bicubic) for x, v in zip(images, values, strict=True)]
      off = np.abs(out.astype(int) - np.stack(expected))
      allowed = NEARLY.get("bicubic" if bicubic else name, 0)
      # a point on the border of a sheared image may come out inside for one and outside for the other
      assert (off > 1).mean() <= (2e-3 if bicubic else 0)
      assert out.dtype == np.uint8 and np.minimum(off, 1).max() <= (allowed > 0)
      assert np.minimum(off, 1).mean() <= allowed
      changes = name != "color" or shape[2] == 3  # one channel has no color
      assert (out != images).any() == changes


def test_constant_and_nearly_constant_images_are_pillow_s():
  images = np.full((6, 12, 12, 3), 77, np.uint8)
  images[1:, 0, 0] = 80
  images[2:, 5, 5, 1] = 3
  images[3:, :6, :, 2] = 200
  for name in ("autocontrast", "equalize", "contrast"):
    values = jnp.full(6, 1.5)
    out = np.asarray(apply(jnp.asarray(images), (name,), jnp.zeros(6, int), values))
    expected = np.stack([pillow(name, x, 1.5) for x in images])
    assert np.abs(out.astype(int) - expected).max() <= (name == "autocontrast")
    assert (out[0] == images[0]).all()


@pytest.mark.parametrize("shape", [(2, 9), (9, 2), (3, 3), (1, 1)])
def test_sharpness_of_tiny_images_is_pillow_s(shape):
  images = noise(*shape, 3)
  out = apply(jnp.asarray(images), ("sharpness",), jnp.zeros(NUMBER, int), jnp.full(NUMBER, 0.3))
  np.testing.assert_array_equal(out, np.stack([pillow("sharpness", x, 0.3) for x in images]))


def test_each_image_has_its_own_operation():
  names = tuple(n for n in image_ops.OPERATIONS)
  which = np.arange(NUMBER) % (len(names) + 1) - 1  # and -1, none
  images = waves(20, 24, 3)
  values = np.array([VALUES[names[w]][i] if w >= 0 else 1.0 for i, w in enumerate(which)], np.float32)
  for bicubic in (False, True):
    out = np.asarray(apply(jnp.asarray(images), names, which, values, 128, bicubic)).astype(int)
    for i, w in enumerate(which):
      sheared = bicubic and w >= 0 and names[w] in ("shear_x", "shear_y")
      expected = images[i] if w < 0 else pillow(names[w], images[i], float(values[i]), 128, sheared)
      assert np.abs(out[i] - expected).max() <= (sheared or (w >= 0 and names[w] == "autocontrast"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [0.0, 5.0, 18.67])
def test_cutout_abs_is_what_pillow_draws(side, channels):
  images, rng = noise(20, 24, channels, 100), np.random.default_rng(2)
  centers = (rng.random((100, 2)) * [20, 24]).astype(np.float32)
  sides = np.where(np.arange(100) % 5, side, -1).astype(np.float32)
  out = image_ops.cutout_abs(jnp.asarray(images), jnp.asarray(centers), jnp.asarray(sides))
  for image, (y, x), s, mine in zip(images, centers, sides, np.asarray(out), strict=True):
    pil = to_pil(image)
    if s >= 0:
      x0, y0 = int(max(0, x - s / 2)), int(max(0, y - s / 2))
      box = (x0, y0, min(24, x0 + float(s)), min(20, y0 + float(s)))
      ImageDraw.Draw(pil).rectangle(box, (125, 123, 114) if channels == 3 else 123)
    np.testing.assert_array_equal(mine, np.asarray(pil).reshape(mine.shape))
  gray = Image.new("RGB", (1, 1), (125, 123, 114)).convert("L").getpixel((0, 0))
  assert gray == 123


def test_wrong_operations_and_channels_are_named():
  images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
  with pytest.raises(InputError, match="no image operation 'blur'; known: autocontrast"):
    image_ops.apply(images, ("blur",), jnp.zeros(2, int), jnp.zeros(2))
  with pytest.raises(InputError, match="1 or 3 channels.*found 2"):
    image_ops.apply(images[..., :2], ("invert",), jnp.zeros(2, int), jnp.zeros(2))
