"""Minimal filtering against the plain convolution in float64, and that the networks use it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_trustdiff.models import layers, winograd

CASES = [  # image size, pads
  ((8, 8), ((1, 1), (1, 1))),
  ((9, 11), ((1, 1), (1, 1))),
  ((10, 11), ((0, 0), (0, 0))),
  ((8, 10), ((2, 0), (0, 1))),
]


@contextlib.contextmanager
def float64():
  jax.config.update("jax_enable_x64", True)
  try:
    yield
  finally:
    jax.config.update("jax_enable_x64", False)


def plain(x, kernel, pads):
  return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layers.NHWC)


def through_layers(x, kernel, pads):
  return layers.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=layers.NHWC)


def drawn(size, channels=(32, 33)):
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, *size, channels[0])), rng.normal(size=(3, 3, *channels)) / np.sqrt(
    9 * channels[0]
  )


def test_a_tile_larger_than_the_image():
  x, kernel = (jnp.asarray(a, jnp.float32) for a in drawn((1, 2)))
  pads = ((1, 1), (1, 1))
  np.testing.assert_allclose(winograd.convolve(x, kernel, pads), plain(x, kernel, pads), atol=1e-5)


@pytest.mark.floor
@pytest.mark.parametrize("size, pads", CASES)
def test_values_and_gradients_are_those_of_the_plain_convolution(size, pads):
  with float64():
    x, kernel = (jnp.asarray(a) for a in drawn(size))

    @jax.jit
    def both(x, kernel):
      y, pullback = jax.vjp(lambda x, kernel: plain(x, kernel, pads), x, kernel)
      dy = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
      ours, our_pullback = jax.vjp(lambda x, kernel: through_layers(x, kernel, pads), x, kernel)
      direct = winograd.convolve(x, kernel, pads), winograd.kernel_gradient(x, dy, pads)
      return (y, *pullback(dy)), (ours, *our_pullback(dy)), direct

    (y, dx, dw), ours, direct = both(x, kernel)
    for found, expected in zip((*ours, *direct), (y, dx, dw, y, dw), strict=True):
      np.testing.assert_allclose(found, expected, atol=1e-12)


def test_float32_is_as_exact_as_the_plain_convolution():
  x, kernel = drawn((16, 16), (64, 64))
  pads = ((1, 1), (1, 1))
  with float64():
    exact = np.asarray(plain(jnp.asarray(x), jnp.asarray(kernel), pads))
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  ours, theirs = (
    np.sqrt(np.mean((np.asarray(jax.jit(conv, static_argnums=2)(x, kernel, pads), np.float64) - exact) ** 2))
    for conv in (winograd.convolve, plain)
  )
  assert ours < 2 * theirs and ours < 1e-6


def test_second_derivatives_and_stacked_kernels():
  x, kernel = (jnp.asarray(a, jnp.float32) for a in drawn((8, 8)))
  pads = ((1, 1), (1, 1))

  def ours(x, kernel):
    return through_layers(x, kernel, pads)

  def curvature(conv, x, kernel):
    slope = jax.grad(lambda x: jnp.sin(conv(x, kernel)).sum())
    return jax.grad(lambda x: jnp.square(slope(x)).sum())(x)

  found, expected = (
    jax.jit(curvature, static_argnums=0)(conv, x, kernel) for conv in (ours, lambda x, k: plain(x, k, pads))
  )
  np.testing.assert_allclose(found, expected, atol=2e-4 * float(jnp.abs(expected).max()))

  stacked = jnp.stack([kernel, -kernel, 2 * kernel])
  found = jax.jit(jax.vmap(ours, (None, 0)))(x, stacked)
  np.testing.assert_allclose(found, jnp.stack([plain(x, k, pads) for k in stacked]), atol=1e-4)


@pytest.mark.parametrize(
  "size, channels, dtype, stride, used",
  [
    (8, 32, "float32", 1, True),
    (8, 16, "float32", 1, False),
    (7, 32, "float32", 1, False),
    (8, 32, "bfloat16", 1, False),
    (8, 32, "float32", 2, False),
  ],
)
def test_only_where_it_pays(size, channels, dtype, stride, used):
  x, kernel = jnp.zeros((1, size, size, channels), dtype), jnp.zeros((3, 3, channels, channels), dtype)
  traced = jax.make_jaxpr(lambda x, k: layers.conv_general_dilated(x, k, (stride, stride), "SAME"))(x, kernel)
  assert ("conv_general_dilated" in str(traced)) != used


def test_groups_of_images_do_not_change_the_result(monkeypatch):
  x, kernel = (jnp.asarray(a, jnp.float32) for a in drawn((8, 8)))
  x = jnp.concatenate([x, -2 * x, x + 1])

  def evaluate(x, kernel):
    y, pullback = jax.vjp(lambda x, kernel: through_layers(x, kernel, ((1, 1), (1, 1))), x, kernel)
    return y, *pullback(jnp.sin(y))

  whole = jax.jit(evaluate)(x, kernel)
  asked = []
  monkeypatch.setattr(layers, "num_groups", lambda *args: asked.append(args) or 3)
  for found, expected in zip(jax.jit(lambda *args: evaluate(*args))(x, kernel), whole, strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
  assert len(asked) == 3  # value, input gradient, kernel gradient


def test_number_of_groups():
  x = jnp.zeros((12, 16, 16, 4))  # 4 KiB an image
  assert layers.num_groups(12 * 4096, x) == 1
  assert layers.num_groups(12 * 4096 - 1, x) == 2
  assert layers.num_groups(3 * 4096, x) == 4
  assert layers.num_groups(1, x) == 12
