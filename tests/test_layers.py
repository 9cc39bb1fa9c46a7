"""The convolution's own gradients against lax, and BatchNorm against its definition."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from workers import flags

from jax_trustdiff.models import layers

CASES = [  # image size, kernel, stride, padding
  ((8, 8), 3, 1, "SAME"),
  ((7, 9), 3, 1, "SAME"),
  ((8, 8), 3, 2, "SAME"),
  ((7, 9), 3, 2, "SAME"),
  ((7, 8), 3, 2, "VALID"),
  ((9, 7), 3, 1, "VALID"),
  ((8, 7), 3, 2, ((1, 1), (1, 1))),
  ((8, 8), 3, 3, ((2, 0), (0, 3))),
  ((7, 8), 1, 1, "SAME"),
  ((7, 8), 1, 2, "SAME"),
  ((8, 7), 1, 2, "VALID"),
  ((8, 8), 4, 2, "SAME"),
  ((4, 4), 3, 1, "SAME"),  # here and below one matrix product
  ((4, 4), 3, 2, "SAME"),
  ((3, 5), 3, 2, ((2, 0), (0, 3))),
  ((4, 3), 3, 1, "VALID"),
  ((1, 1), 3, 1, "SAME"),
]


def _setting(size, kernel, stride, padding, dtype=jnp.float32, channels=5):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, *size, channels), dtype)
  w = jax.random.normal(keys[1], (kernel, kernel, channels, 5), dtype)

  def loss(conv, x, w):
    y = conv(x, w, (stride, stride), padding, dimension_numbers=layers.NHWC)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)) * jax.random.normal(keys[2], y.shape))

  return x, w, loss


def _both(function, *args):
  """`function(conv, *args)` with our convolution and with that of lax."""
  convs = (layers.conv_general_dilated, lax.conv_general_dilated)
  return jax.jit(lambda *args: tuple(function(conv, *args) for conv in convs))(*args)


@pytest.mark.floor
@pytest.mark.parametrize("channels", [3, 5])  # 3: an image, in windows
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_lax(case, channels):
  x, w, loss = _setting(*case, channels=channels)
  found, expected = _both(jax.value_and_grad(loss, (1, 2)), x, w)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])  # rows that windows of 4 outputs fill, and others
@pytest.mark.parametrize("stride", [1, 2])
def test_windows_of_images_in_float64_are_exact(size, stride):
  with jax.enable_x64(True):
    x, w, _ = _setting(size, 3, stride, ((1, 1), (1, 1)), jnp.float64, channels=1)

    def values(conv, x, w):
      y, back = jax.vjp(
        lambda x, w: conv(x, w, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layers.NHWC), x, w
      )
      return y, *back(jnp.sin(y))

    for a, b in zip(*_both(values, x, w), strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_bfloat16_gradients_keep_the_type_and_the_value():
  x, w, loss = _setting((8, 8), 3, 2, "SAME", jnp.bfloat16)
  grad = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)
  found = grad(layers.conv_general_dilated, x, w)
  expected = grad(lax.conv_general_dilated, x.astype(jnp.float32), w.astype(jnp.float32))
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shape, kernel, stride, padding", [
  ((2, 8, 9, 3), (1, 3, 3, 4), (1, 3), "SAME"),
  ((2, 9, 8, 1), (5, 1, 1, 4), (2, 1), "VALID"),
  ((2, 6, 6, 3), (2, 2, 3, 4), (3, 3), "VALID"),
  ((2, 5, 5, 3), (7, 7, 3, 4), (1, 1), "SAME"),
  ((0, 8, 8, 3), (3, 3, 3, 4), (1, 1), "SAME"),
  ((2, 2, 8, 3), (3, 3, 3, 4), (1, 1), "VALID"),  # no output
])  # fmt: skip
def test_the_value_of_odd_convolutions_of_images_is_that_of_lax(shape, kernel, stride, padding):
  x, w = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), kernel)
  found, expected = _both(lambda conv, x, w: conv(x, w, stride, padding, dimension_numbers=layers.NHWC), x, w)
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "shape, dtype, error", [((2, 8, 8, 3), jnp.float32, ValueError), ((2, 8, 8, 1), jnp.bfloat16, TypeError)]
)
def test_what_does_not_fit_is_refused_by_lax(shape, dtype, error):
  w = jnp.ones((3, 3, 1, 4))
  with pytest.raises(error):
    layers.conv_general_dilated(jnp.ones(shape, dtype), w, (1, 1), "SAME", dimension_numbers=layers.NHWC)


@pytest.mark.floor
@pytest.mark.parametrize("channels", [3, 5])
def test_gradients_under_vmap_scan_remat_and_twice(channels):
  x, w, loss = _setting((6, 6), 3, 2, "SAME", channels=channels)
  grad = jax.grad(loss, 1)

  def second(conv, x, w):  # a gradient of a gradient, with rematerialisation, inside a scan
    inner = jax.checkpoint(lambda x: jnp.sum(jnp.square(grad(conv, x, w))))
    return lax.scan(lambda x, _: (x - 1e-3 * jax.grad(inner)(x), None), x, None, length=2)[0]

  found, expected = _both(second, x, w)
  assert float(jnp.abs(expected - x).max()) > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

  stacked = jnp.stack([w, -w, 2 * w])
  found, expected = _both(jax.vmap(jax.grad(loss, 2), (None, None, 0)), x, stacked)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_grouped_and_dilated_convolutions_are_left_to_lax():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
  w = jax.random.normal(jax.random.key(1), (3, 3, 2, 6))

  def loss(conv, w):
    y = conv(x, w, (1, 1), "SAME", (1, 1), (2, 2), layers.NHWC, feature_group_count=2)
    return jnp.sum(jnp.square(y))

  found, expected = _both(jax.grad(loss, 1), w)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.floor
@pytest.mark.parametrize("channels, least", [(3, 0), (5, 2)])
def test_no_gradient_in_a_loop_is_left_to_a_slow_convolution(channels, least):
  """The compiled loop holds only convolutions that XLA:CPU is fast at: NHWC, HWIO order, kernel not reversed.

  The gradients that lax derives have other dimension labels, or a reversed kernel; those fall to the naive loop.
  """

  def convolutions(conv):
    def body(_, state):
      x, w = state
      dx, dw = jax.grad(loss, (1, 2))(conv, x, w)
      return x - dx, w - dw

    text = jax.jit(lambda x, w: lax.fori_loop(0, 3, body, (x, w))).lower(x, w).compile().as_text()
    return re.findall(r" convolution\(.*window={(.*?)}.*dim_labels=([\w>-]*)", text)

  def is_fast(convolution):
    window, labels = convolution
    return labels == "b01f_01io->b01f" and "reversal" not in window

  x, w, loss = _setting((8, 8), 3, 1, "SAME", channels=channels)
  ours, derived = convolutions(layers.conv_general_dilated), convolutions(lax.conv_general_dilated)
  assert len(ours) >= least and all(map(is_fast, ours))
  assert not all(map(is_fast, derived))


def _batch_norm(x, train, groups=1, variables=None):
  module = layers.BatchNorm(groups=groups)
  if not train:
    return module.apply(variables, x, False)
  variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, False)
  y, updates = jax.jit(lambda x: module.apply(variables, x, True, mutable=["moments"]))(x)
  return y, updates["moments"]


@pytest.mark.floor
def test_batch_norm_in_training_is_its_definition_in_float64():
  x = (
    np.asarray(jax.random.normal(jax.random.key(0), (6, 3, 5, 4))) * 3 + 100
  )  # a large mean shows cancellation
  y, moments = _batch_norm(jnp.asarray(x), train=True)
  exact = x.astype(np.float64)
  mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
  np.testing.assert_allclose(y, (exact - mean) / np.sqrt(var + 1e-5), atol=2e-5)
  np.testing.assert_allclose(moments["mean"], mean, rtol=1e-6)
  np.testing.assert_allclose(moments["var"], exact.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_statistics():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))
  variables = {
    "params": {"scale": jnp.array([2.0, 3.0]), "bias": jnp.array([0.5, -1.0])},
    "batch_stats": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 9.0])},
  }
  expected = (x - jnp.array([1.0, 2.0])) / jnp.sqrt(jnp.array([4.0, 9.0]) + 1e-5) * jnp.array([2.0, 3.0])
  found = _batch_norm(x, train=False, variables=variables)
  np.testing.assert_allclose(found, expected + jnp.array([0.5, -1.0]), rtol=1e-5, atol=1e-6)
  assert _batch_norm(x.astype(jnp.bfloat16), train=False, variables=variables).dtype == jnp.bfloat16


def test_ghost_batch_norm_is_batch_norm_of_each_group():
  x = jax.random.normal(jax.random.key(0), (6, 3, 3, 2))
  y, moments = _batch_norm(x, train=True, groups=3)
  parts = [_batch_norm(x[i : i + 2], train=True) for i in (0, 2, 4)]
  np.testing.assert_allclose(y, jnp.concatenate([part[0] for part in parts]), rtol=1e-5, atol=1e-6)
  for name in ("mean", "var"):
    expected = np.mean([part[1][name] for part in parts], 0)
    np.testing.assert_allclose(moments[name], expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_refuses_batches_it_cannot_normalise():
  with pytest.raises(ValueError, match="batch of 5 does not split into 2"):
    _batch_norm(jnp.zeros((5, 2, 2, 1)), train=True, groups=2)
  with pytest.raises(ValueError, match="more than one value"):
    _batch_norm(jnp.zeros((1, 1, 1, 3)), train=True)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_trustdiff.models import MODELS

network = MODELS["wide_resnet"](depth=10, width=1, image_shape=(8, 8, 1))
variables = network.init(jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)) * jnp.arange(1.0, 9.0)[:, None, None, None]

def run(variables, x):
  def loss(params):
    logits, moments = network.train_logits({**variables, "params": params}, x)
    return jnp.sum(jnp.square(logits[:, 0])), moments
  return jax.value_and_grad(loss, has_aux=True)(variables["params"])

alone = jax.jit(run)(variables, x)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
together = jax.jit(run)(
  jax.device_put(variables, NamedSharding(mesh, PartitionSpec())),
  jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
)
assert len(jax.devices()) == 4
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), alone, together)
print("same")
"""


def test_a_batch_sharded_over_devices_has_the_statistics_and_gradients_of_the_whole_batch():
  env = {**os.environ, "XLA_FLAGS": flags(4), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False)
  assert done.stdout.strip() == "same", done.stderr
