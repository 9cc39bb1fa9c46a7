"""Distortions on the device against those of Pillow, and their gradients."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from jax_trustdiff.types import InputError
from jax_trustdiff.watermark import distortions


def photographs(size=40, channels=3, count=4):
  """Bytes [b h w c]: smooth shapes with edges and some grain."""
  rng = np.random.RandomState(0)
  smooth = ndimage.gaussian_filter(rng.normal(size=(count, size, size, channels)), (0, 4, 4, 0.7))
  smooth = 127 + 90 * smooth / smooth.std()
  smooth[:, size // 3 : size // 2, size // 4 : -size // 4] += 60
  return np.clip(smooth + rng.normal(size=smooth.shape) * 3, 0, 255).astype(np.uint8)


def pillow(images, function):
  squeezed = images[..., 0] if images.shape[3] == 1 else images
  found = np.stack([np.asarray(function(Image.fromarray(image))) for image in squeezed])
  return found.reshape(*found.shape[:3], -1)


def reopened(image, quality):
  file = io.BytesIO()
  image.save(file, "JPEG", quality=quality)
  return Image.open(file)


def ours(function, images, *strengths):
  strengths = [jnp.full(len(images), s, jnp.float32) for s in strengths]
  return 255 * np.asarray(jax.jit(function)(jnp.asarray(images, jnp.float32) / 255, *strengths))


@pytest.mark.parametrize("quality", [10, 25, 30, 35, 50, 75, 90])
@pytest.mark.parametrize("size, channels", [(40, 3), (32, 1)])
def test_jpeg_is_that_of_pillow(quality, size, channels):
  images = photographs(size, channels)
  wanted = pillow(images, lambda image: reopened(image, quality)).astype(float)
  found = ours(distortions.jpeg, images, quality)
  assert np.abs(found - wanted).mean() < (1.6 if quality == 35 else 1.5)
  assert np.abs(found - wanted).mean() < 0.4 * np.abs(images - wanted).mean()
  other = ours(distortions.jpeg, images, quality + 8)
  assert np.abs(other - wanted).mean() > 1.3 * np.abs(found - wanted).mean()


@pytest.mark.parametrize("factor", [0.5, 1.5])
@pytest.mark.parametrize(
  "name, enhancer",
  [
    ("brightness", ImageEnhance.Brightness),
    ("contrast", ImageEnhance.Contrast),
    ("saturation", ImageEnhance.Color),
  ],
)
def test_colours_are_those_of_pillow(name, enhancer, factor):
  images = photographs()
  wanted = pillow(images, lambda image: enhancer(image).enhance(factor)).astype(float)
  assert np.abs(ours(getattr(distortions, name), images, factor) - wanted).max() < 1.6


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_shrinking_is_that_of_pillow(share):
  images = photographs()
  small = int(40 * share)
  wanted = pillow(images, lambda i: i.resize((small, small), Image.BILINEAR).resize((40, 40), Image.BILINEAR))
  assert np.abs(ours(distortions.shrink_and_enlarge, images, share) - wanted).mean() < 0.6


def test_a_crop_is_enlarged_as_by_pillow():
  images = photographs()
  box = (4, 2, 34, 32)  # left, top, right, bottom
  wanted = pillow(images, lambda image: image.resize((40, 40), Image.BILINEAR, box=box))
  top_left, extent = np.tile([2 / 40, 4 / 40], (4, 1)), np.full((4, 2), 30 / 40)
  found = 255 * np.asarray(
    distortions.resample(jnp.asarray(images / 255.0), jnp.asarray(top_left), jnp.asarray(extent))
  )
  inner = (
    slice(None),
    slice(2, -2),
    slice(2, -2),
  )  # beyond the box Pillow repeats its edge, we look at the image
  assert np.abs(found - wanted)[inner].max() < 1.1


@pytest.mark.parametrize("degrees", [7.0, -30.0])
def test_rotation_is_that_of_pillow(degrees):
  images = photographs()
  wanted = pillow(images, lambda image: image.rotate(degrees, Image.BILINEAR)).astype(float)
  found = ours(distortions.rotate, images, degrees)
  assert np.abs(found - wanted)[:, 10:-10, 10:-10].mean() < 1.0
  assert np.abs(found - wanted).mean() < 2.5  # at the border Pillow leaves out what we blend with black


def test_blur_is_a_gaussian():
  images = photographs()
  wanted = ndimage.gaussian_filter(images / 255.0, (0, 1.2, 1.2, 0), mode="nearest", truncate=5)
  np.testing.assert_allclose(ours(distortions.blur, images, 1.2) / 255, wanted, atol=1e-4)


def test_hue_turns_colours_and_keeps_grey():
  red = jnp.tile(jnp.array([0.6, 0.3, 0.3]), (1, 4, 4, 1))
  third = distortions.hue(red, jnp.array([1 / 3]))
  assert set(np.asarray(third[0, 0, 0]).argsort()[-1:].tolist()) <= {1, 2}  # green or blue is largest now
  grey = jnp.full((1, 4, 4, 3), 0.4)
  np.testing.assert_allclose(distortions.hue(grey, jnp.array([0.2])), grey, atol=1e-5)
  np.testing.assert_allclose(distortions.hue(red, jnp.array([1.0])), red, atol=1e-5)
  turned = distortions.hue(red, jnp.array([0.1]))
  np.testing.assert_allclose(turned @ distortions._GREY, red @ distortions._GREY, atol=1e-5)


def test_erasing_takes_the_share_it_says():
  x = jnp.ones((200, 32, 32, 1))
  found = distortions.Distortion("erase", 0.25, 0.25)(jax.random.key(0), x)
  np.testing.assert_allclose(1 - found.mean(), 0.25, atol=0.01)
  assert set(np.unique(found).tolist()) == {0.0, 1.0}
  assert (np.asarray(found.reshape(200, -1).std(0)) > 0).mean() > 0.9  # not always at one place


def test_bytes_pass_gradients_through():
  x = jnp.linspace(0, 1, 97).reshape(1, 97, 1, 1)
  np.testing.assert_allclose(255 * distortions.quantise(x) % 1 % 0.999, 0, atol=1e-3)
  np.testing.assert_allclose(jax.grad(lambda x: (3 * distortions.quantise(x)).sum())(x), 3)


RANGES = {
  **{"jpeg": (50, 90), "crop": (0, 0.3), "resize": (0.5, 1), "rotate": (0, 20), "blur": (0, 1.5)},
  **{"noise": (0, 0.1), "brightness": (0.7, 1.4), "contrast": (0.7, 1.4), "saturation": (0.5, 1.5)},
  **{"hue": (0, 0.1), "erase": (0, 0.25), "flip": (0.5, 0.5)},
}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_keeps_the_range_and_has_gradients(channels):
  assert RANGES.keys() == distortions.KINDS.keys()
  x = jnp.asarray(photographs(32, channels, 2), jnp.float32) / 255
  weights = jax.random.normal(jax.random.key(1), x.shape)
  for kind, (low, high) in RANGES.items():
    distort = distortions.Distortion(kind, low, high)

    def weighed(x, distort=distort):
      y = distort(jax.random.key(0), x)
      return (y * weights).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(weighed, has_aux=True))(x)
    assert np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0, kind
    assert y.shape == x.shape and y.dtype == x.dtype, kind
    assert float(y.min()) >= -1e-6 and float(y.max()) <= 1 + 1e-6, kind
    if channels == 3 or kind not in ("saturation", "hue"):
      assert float(jnp.abs(y - x).max()) > 1e-3, kind


def test_one_of_several_and_sometimes_none():
  x = jnp.asarray(photographs(16, 1, 2), jnp.float32) / 255
  distort = jax.jit(
    distortions.one_of([distortions.Distortion("flip", 1, 1), distortions.Distortion("brightness", 0, 0)])
  )
  seen = {"none": 0, "flip": 0, "dark": 0}
  for i in range(60):
    y = distort(jax.random.key(i), x)
    if bool((y == 0).all()):
      seen["dark"] += 1
    elif bool((y == x).all()):
      seen["none"] += 1
    else:
      np.testing.assert_array_equal(y, x[:, :, ::-1])
      seen["flip"] += 1
  assert min(seen.values()) >= 8


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("sharpen", 0, 1), "unknown distortion 'sharpen'; known: jpeg, crop"),
    (("jpeg", 0, 90), "rise within 1 to 100, got 0 to 90"),
    (("noise", 0.2, 0.1), "rise within 0 to 1, got 0.2 to 0.1"),
  ],
)
def test_distortions_that_are_none(arguments, message):
  with pytest.raises(InputError, match=message):
    distortions.Distortion(*arguments)
  with pytest.raises(InputError, match="1 or 3 channels"):
    distortions.jpeg(jnp.zeros((1, 8, 8, 2)), jnp.ones(1))
