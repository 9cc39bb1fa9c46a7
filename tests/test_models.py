"""Networks: parameter counts, reference logits and moments, the contract of types.Classifier, binding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.interop.torch_names import from_torch
from jax_trustdiff.models import MODELS, bind, forward_flops, num_params
from jax_trustdiff.types import InputError

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
TINY = {
  "wide_resnet": {"depth": 10, "width": 1, "image_shape": (8, 8, 1)},
  "preact_resnet": {"width": 4, "image_shape": (8, 8, 1)},
}


def tiny(name="wide_resnet", **changes):
  return MODELS[name](**{**TINY[name], **changes})


def fresh(network):
  return jax.jit(network.init)(jax.random.key(0))


@pytest.mark.parametrize(
  "name, arguments, millions",
  [
    ("wide_resnet", {"depth": 28, "width": 10}, 36.479194),
    ("wide_resnet", {"depth": 34, "width": 10}, 46.160474),
    ("wide_resnet", {"depth": 70, "width": 16}, 266.796506),
    ("wide_resnet", {"depth": 10, "width": 2}, 0.303706),
    ("preact_resnet", {"shortcut": "3x3"}, 12.548426),
    ("preact_resnet", {"shortcut": "1x1", "activation": "relu"}, 11.172170),
    # 34 has 1, 2, 4 and 1 more blocks than 18, each of 18 c^2 + 4 c values, with c = 64, 128, 256, 512 channels.
    ("preact_resnet", {"depth": 34}, 12.548426 + 10.108160),
    ("preact_resnet", {"depth": 34, "shortcut": "1x1", "activation": "relu"}, 11.172170 + 10.108160),
  ],
)
def test_parameter_counts(name, arguments, millions):
  variables = jax.eval_shape(MODELS[name](**arguments).init, jax.random.key(0))
  assert num_params(variables) == round(millions * 1e6)


def test_flops_of_published_networks():
  assert forward_flops(MODELS["wide_resnet"](depth=28, width=10)) == pytest.approx(2 * 5.24e9, rel=2e-3)
  assert forward_flops(MODELS["preact_resnet"]()) == pytest.approx(2 * 0.61e9, rel=1e-2)
  network = tiny(remat=True)
  assert forward_flops(network, batch=3) == 3 * forward_flops(tiny())


GOLDEN = [
  ("trades_linf_wrn10-2-swish.npz", "wide_resnet", {"depth": 10, "width": 2}),
  ("preact18_swish_width8.npz", "preact_resnet", {"depth": 18, "width": 8}),
]


def golden(file, name, arguments):
  """(network, variables, images of the first batch, the file)"""
  data = np.load(shared_dir("golden", "at_step", file))
  network = MODELS[name](**arguments, **CIFAR10)
  state_dict = {key.removeprefix("param/"): data[key] for key in data.files if key.startswith("param/")}
  x = jnp.asarray(data["images_uint8"][: json.loads(str(data["meta"]))["batch"]], jnp.float32) / 255
  return network, from_torch(network, state_dict), x, data


@pytest.mark.parametrize("file, name, arguments", GOLDEN)
def test_logits_are_those_of_the_reference(file, name, arguments):
  network, variables, x, data = golden(file, name, arguments)
  logits = jax.jit(network.logits)(variables, x)
  np.testing.assert_allclose(logits, data["eval_logits"], rtol=0, atol=5e-6)
  logits, _ = jax.jit(network.train_logits)(variables, x)
  np.testing.assert_allclose(logits, data["train_logits"], rtol=0, atol=5e-6)


def test_moments_are_those_of_the_reference():
  network, variables, x, data = golden(*GOLDEN[1])
  _, moments = jax.jit(network.train_logits)(variables, x)
  moved = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, variables["batch_stats"], moments)
  buffers = {k.removeprefix("buffers_after/"): data[k] for k in data.files if k.startswith("buffers_after/")}
  state_dict = {key.removeprefix("param/"): data[key] for key in data.files if key.startswith("param/")}
  expected = from_torch(network, {**state_dict, **buffers})["batch_stats"]
  assert jax.tree.structure(moved) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, expected)


@pytest.mark.floor
@pytest.mark.parametrize("name", MODELS)
def test_a_network_keeps_the_contract_of_a_classifier(name):
  network = tiny(name, dtype="bfloat16", num_classes=7)
  variables = fresh(network)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
  logits = jax.jit(network.logits)(variables, x)
  train_logits, moments = jax.jit(network.train_logits)(variables, x)
  assert logits.shape == train_logits.shape == (4, 7)
  assert logits.dtype == train_logits.dtype == jnp.float32
  shapes = jax.tree.map(jnp.shape, variables["batch_stats"])
  assert jax.tree.map(jnp.shape, moments) == shapes
  exact = jax.jit(tiny(name, num_classes=7).train_logits)(variables, x)[0]
  assert float(jnp.abs(train_logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("name", MODELS)
def test_groups_of_batch_normalisation_are_batches_of_their_own(name):
  network = tiny(name)
  variables = fresh(network)
  x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1)) * jnp.arange(1, 7)[:, None, None, None]
  logits, moments = jax.jit(tiny(name, bn_groups=2).train_logits)(variables, x)
  apart = [jax.jit(network.train_logits)(variables, half) for half in (x[:3], x[3:])]
  np.testing.assert_allclose(logits, jnp.concatenate([z for z, _ in apart]), rtol=1e-3, atol=1e-4)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *[m for _, m in apart])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), moments, mean)
  together, _ = jax.jit(network.train_logits)(variables, x)
  assert float(jnp.abs(together - logits).max()) > 0.01


@pytest.mark.parametrize("name", ["wide_resnet", pytest.param("preact_resnet", marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_value(name):
  variables = fresh(tiny(name))
  x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))

  def gradients(network):
    def loss(params):
      logits, moments = network.train_logits({**variables, "params": params}, x)
      return jnp.sum(jnp.square(logits)), moments

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

  again, plain = gradients(tiny(name, remat=True)), gradients(tiny(name))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), again, plain)


def test_initial_kernels_have_the_documented_spread():
  params = fresh(tiny(width=4))["params"]
  kernel = np.asarray(params["group2_block0"]["conv1"]["kernel"])  # 3 x 3 x 256 x 256
  assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
  assert abs(kernel).max() > 3 * kernel.std()  # not truncated
  weights = np.asarray(params["logits"]["kernel"])  # uniform in +-1/16
  assert 0.95 / 16 < abs(weights).max() <= 1 / 16
  assert not np.any(params["logits"]["bias"])


def test_normalisation_is_inside_the_network():
  x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
  variables = fresh(tiny())
  inside = jax.jit(tiny(mean=(0.25,), std=(0.5,)).logits)(variables, x)
  outside = jax.jit(tiny().logits)(variables, (x - 0.25) / 0.5)
  np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-6)


def test_patches_are_squares_in_the_order_of_einops():
  """'b (h p) (w q) c -> b h w (p q c)': the network sees what it would see of an image rearranged beforehand."""
  x = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3))
  network = tiny(image_shape=(8, 12, 3), patch=4)
  variables = fresh(network)
  rows = [jnp.concatenate([x[:, 4 * i + p, q::4] for p in range(4) for q in range(4)], -1) for i in range(2)]
  rearranged = jnp.stack(rows, 1)
  assert rearranged.shape == (2, 2, 3, 48) and variables["params"]["conv"]["kernel"].shape == (3, 3, 48, 16)
  plain = tiny(image_shape=(2, 3, 48))
  np.testing.assert_allclose(network.logits(variables, x), plain.logits(variables, rearranged), rtol=1e-6)


@pytest.mark.floor
def test_an_equal_network_with_other_values_is_not_compiled_again():
  traces = []

  @jax.jit
  def predict(classifier, x):
    traces.append(1)
    return classifier(x)

  x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
  variables = fresh(tiny())
  first = predict(bind(tiny(), variables), x)
  second = predict(bind(tiny(), jax.tree.map(lambda v: v * 1.1, variables)), x)
  assert len(traces) == 1
  assert float(jnp.abs(first - second).max()) > 0
  predict(bind(tiny(activation="relu"), variables), x)
  assert len(traces) == 2


@pytest.mark.parametrize(
  "name, arguments, message",
  [
    ("wide_resnet", {"depth": 12}, "4 + 6n"),
    ("wide_resnet", {"activation": "gelu"}, "swish, relu"),
    ("wide_resnet", {"dtype": "float16"}, "float32, bfloat16"),
    ("wide_resnet", {"mean": (0.1, 0.2)}, "1 or 3 numbers"),
    ("wide_resnet", {"std": (0.0,)}, "positive"),
    ("wide_resnet", {"width": 0}, "at least 1"),
    ("wide_resnet", {"patch": 3}, "patch=3 does not divide images of 32x32"),
    ("wide_resnet", {"patch": 0}, "patch=0"),
    ("preact_resnet", {"depth": 50}, "18, 34"),
    ("preact_resnet", {"shortcut": "5x5"}, "3x3, 1x1"),
    ("preact_resnet", {"num_classes": 1}, "at least 2"),
  ],
)
def test_a_bad_argument_is_one_line_that_says_what_is_right(name, arguments, message):
  with pytest.raises(InputError) as caught:
    MODELS[name](**arguments)
  assert message in str(caught.value) and "\n" not in str(caught.value)
