"""Codecs: the stamp codec against values of the original, sizes, state_dicts, images of other sizes, the loss of training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shared_dir

from jax_trustdiff.interop import stamp_names
from jax_trustdiff.models.registry import num_params
from jax_trustdiff.models.watermark_codec import ResidualCodec, StampCodec
from jax_trustdiff.types import InputError, WatermarkCodec, to_unit
from jax_trustdiff.watermark.codec import NOT_YET, BoundCodec, CodecLoss, ImageGate, bit_accuracy, psnr


@pytest.fixture(scope="module")
def reference():
  with np.load(shared_dir("golden", "watermark_codec") / "codec_8bit_r32.npz") as file:
    return dict(file)


def state_dicts(reference):
  return [
    {name.removeprefix(f"{part}/"): value for name, value in reference.items() if name.startswith(f"{part}/")}
    for part in ("encoder", "decoder")
  ]


def test_codec_computes_what_the_original_does(reference):
  config = json.loads(str(reference["config"]))
  codec, variables = stamp_names.from_torch(*state_dicts(reference))
  assert (codec.num_bits, codec.image_shape) == (config["bits"], (32, 32, config["channels"]))
  assert isinstance(codec, WatermarkCodec)
  x, bits = to_unit(reference["images_uint8"]), jnp.asarray(reference["bits"], jnp.int32)
  marked = jax.jit(codec.encode)(variables, x, bits)
  np.testing.assert_allclose(marked, np.moveaxis(reference["encoded"], 1, -1), atol=1e-5)
  logits = jax.jit(codec.decode)(variables, marked)
  np.testing.assert_allclose(logits, reference["decoder_logits_on_encoded"], atol=2e-5)
  np.testing.assert_allclose(
    jax.jit(codec.decode)(variables, x), reference["decoder_logits_on_clean"], atol=2e-5
  )
  bce = optax.sigmoid_binary_cross_entropy(logits, bits).mean()
  np.testing.assert_allclose(bce, reference["bce"], atol=1e-6)
  np.testing.assert_allclose(jnp.square(marked - x).mean(), reference["mse"], atol=1e-6)


def test_state_dicts_survive_a_round_trip(reference):
  given = state_dicts(reference)
  codec, variables = stamp_names.from_torch(*given)
  for written, original in zip(stamp_names.to_torch(codec, variables).values(), given, strict=True):
    assert written.keys() == original.keys()
    for name, value in original.items():
      np.testing.assert_array_equal(written[name], value.astype(np.float32), err_msg=name)


def test_larger_images_keep_the_order_of_their_maps():
  """With 64x64 the decoder's last map has 2x2 positions, in which the order of channels and positions shows."""
  codec = StampCodec(4, (64, 64, 3))
  variables = codec.init(jax.random.key(0))
  written = stamp_names.to_torch(codec, variables)
  kernel = written["decoder"]["dense.0.weight"].reshape(512, 128, 2, 2)
  ours = np.asarray(variables["params"]["decoder"]["hidden"]["kernel"]).reshape(2, 2, 128, 512)
  np.testing.assert_array_equal(kernel.transpose(2, 3, 1, 0), ours)
  again, back = stamp_names.from_torch(written["encoder"], written["decoder"])
  assert again == codec
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize(
  "num_bits, side, encoder, decoder",
  [
    (4, 32, 995_587, 392_036),
    (64, 32, 1_041_667, 422_816),
    (128, 32, 1_090_819, 455_648),
    (8, 32, 998_659, 394_088),
    (4, 64, 995_587, 588_644),
    (64, 64, 1_041_667, 619_424),
    (128, 64, 1_090_819, 652_256),
    (64, 256, 1_041_667, 4_551_584),
  ],
)
def test_numbers_of_parameters_are_the_original_ones(num_bits, side, encoder, decoder):
  params = jax.eval_shape(StampCodec(num_bits, (side, side, 3)).init, jax.random.key(0))["params"]
  assert [num_params({"params": params[part]}) for part in ("encoder", "decoder")] == [encoder, decoder]


def test_initial_values_are_those_of_torch():
  params = StampCodec(16).init(jax.random.key(0))["params"]
  for layer, fan_in in (("down1", 288), ("up0", 1024), ("secret", 16)):
    for leaf in params["encoder"][layer].values():
      assert 0.9 / fan_in**0.5 < float(jnp.abs(leaf).max()) <= 1 / fan_in**0.5


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda e, d: e.pop("conv6.bias"), "missing or of another shape: encoder.conv6.bias"),
    (lambda e, d: d.update(extra=np.zeros(3)), "left over: decoder.extra"),
    (lambda e, d: e.pop("secret_dense.weight"), "the encoder has no secret_dense.weight"),
    (lambda e, d: d.update({"dense.2.weight": np.zeros((4, 512))}), "writes 8 bits and the decoder reads 4"),
  ],
)
def test_state_dicts_that_do_not_fit(reference, change, message):
  given = state_dicts(reference)
  change(*given)
  with pytest.raises(InputError, match=message):
    stamp_names.from_torch(*given)


@pytest.mark.parametrize(
  "kind, fields, message",
  [
    (StampCodec, dict(num_bits=0), "num_bits must be at least 1"),
    (StampCodec, dict(image_shape=(48, 48, 3)), "whose side 32 divides"),
    (StampCodec, dict(dtype="float16"), "must be one of"),
    (ResidualCodec, dict(image_shape=(31, 32, 3)), "even sides, got 31x32"),
    (ResidualCodec, dict(strength=0.0), "strength must lie in"),
    (ResidualCodec, dict(width=0), "width must be at least 1"),
  ],
)
def test_fields_that_do_not_fit(kind, fields, message):
  with pytest.raises(InputError, match=message):
    kind(**fields)


def test_the_residual_codec_marks_and_reads_images_of_any_size():
  codec = ResidualCodec(12, (32, 32, 3), width=16, strength=0.1)
  assert isinstance(codec, WatermarkCodec)
  variables = codec.init(jax.random.key(0))
  bits = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 12)).astype(jnp.int32)
  for shape in ((32, 32, 3), (24, 64, 3), (57, 33, 3)):
    x = jax.random.uniform(jax.random.key(2), (2, *shape))
    marked = codec.encode(variables, x, bits)
    assert marked.shape == x.shape and 0 <= float(marked.min()) and float(marked.max()) <= 1
    assert 0 < float(jnp.abs(marked - x).max()) <= 0.1 + 1e-6
    assert float(jnp.abs(codec.encode(variables, x, 1 - bits) - marked).max()) > 1e-5
    assert codec.decode(variables, marked[:, 1:, 3:]).shape == (2, 12)
    np.testing.assert_array_equal(codec.encode(variables, x, bits.astype(jnp.uint8)), marked)


def test_what_a_codec_cannot_mark_is_one_line():
  codec = ResidualCodec(num_bits=4, image_shape=(8, 8, 1), width=4, num_blocks=1)
  bound = BoundCodec(codec, codec.init(jax.random.key(0)))
  for x, bits, message in (
    (jnp.ones((2, 8, 8, 1), jnp.uint8), jnp.zeros(4), r"images in \[0, 1\].*uint8"),
    (jnp.ones((2, 8, 8, 1)), jnp.zeros(2), r"writes 4 bits into each of 2 images, got \(2,\)"),
    (jnp.ones((2, 8, 8, 1)), jnp.zeros((3, 4)), r"got \(3, 4\)"),
  ):
    with pytest.raises(InputError, match=message):
      bound.encode(x, bits)


@pytest.mark.parametrize("counter, weight", [(-1, 0), (0, 0), (1000, 0), (2500, 5), (4000, 10), (9999, 10)])
def test_the_image_counts_as_in_the_original(counter, weight):
  np.testing.assert_allclose(ImageGate().weight(jnp.array(counter)), weight, atol=1e-6)


def test_the_gate_opens_once():
  """At the first batch above 0.9; 0.9 itself is not enough, and afterwards nothing shuts it."""
  gate, counter, seen = ImageGate(), jnp.array(NOT_YET), []
  for accuracy in (0.5, 0.9, 0.91, 0.2, 0.95):
    counter = gate.advance(counter, jnp.array(accuracy))
    seen.append(int(counter))
  assert seen == [-1, -1, 0, 1, 2]


class Written:
  """A codec that adds `level` to the red of an image whose first bit is 1, and reads it there."""

  num_bits, image_shape, level = 1, (4, 4, 3), 0.1

  def init(self, key):
    return {"params": {}}

  def encode(self, variables, x, bits):
    return x.at[..., 0].add(self.level * bits[:, :, None])

  def decode(self, variables, x):
    return (x[..., 0].mean((1, 2)) - 0.25)[:, None] * 100


def test_the_loss_is_that_of_the_bits_and_of_the_image():
  x = jnp.full((64, 4, 4, 3), 0.2)
  loss = CodecLoss(Written())
  value, (counter, metrics) = loss({"params": {}}, x, jax.random.key(0), jnp.array(2500))
  ones = (10 ** (-float(metrics["psnr"]) / 10)) * 3 / 0.01  # the part of the images with a 1
  assert 0.2 < ones < 0.8
  error = ones * 0.01 / 3
  np.testing.assert_allclose(metrics["bce"], np.log1p(np.exp(-5.0)), rtol=1e-4)
  np.testing.assert_allclose(value, metrics["bce"] + 5 * error, rtol=1e-4)
  assert float(metrics["bit_accuracy"]) == 1 and int(counter) == 2501
  first = loss({"params": {}}, x, jax.random.key(0), jnp.array(NOT_YET))
  np.testing.assert_allclose(first[0], first[1][1]["bce"])
  assert int(first[1][0]) == 0


def test_the_decoder_sees_what_was_distorted():
  x = jnp.full((64, 4, 4, 3), 0.2)
  loss = CodecLoss(Written(), distort=lambda key, x: 0.5 - x)  # dark becomes light: every bit is read wrong
  _, (_, metrics) = loss({"params": {}}, x, jax.random.key(0), jnp.array(0))
  assert float(metrics["bit_accuracy"]) == 0 and float(metrics["psnr"]) > 20
  dim = Written()
  dim.level = 0.001  # less than half a byte: lost on disk, were 0.25 not so near
  x = jnp.full((64, 4, 4, 3), 0.2498)
  for quantised, wanted in ((False, True), (True, False)):
    _, (_, metrics) = CodecLoss(dim, quantised=quantised)({"params": {}}, x, jax.random.key(0), jnp.array(0))
    assert (float(metrics["bit_accuracy"]) == 1) == wanted


def test_accuracy_and_decibels():
  assert float(bit_accuracy(jnp.array([[1.0, -2.0, 0.0, 3.0]]), jnp.array([[1, 0, 0, 0]]))) == 0.75
  np.testing.assert_allclose(psnr(jnp.array([1e-3, 0.0])), [30, 100], rtol=1e-6)
