"""The stamp codec against values of the original, its sizes, and its state_dicts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import shared_dir

from jax_trustdiff.interop import stamp_names
from jax_trustdiff.models.registry import num_params
from jax_trustdiff.models.watermark_codec import StampCodec
from jax_trustdiff.types import InputError, WatermarkCodec, to_unit


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
  "fields, message",
  [
    (dict(num_bits=0), "num_bits must be at least 1"),
    (dict(image_shape=(48, 48, 3)), "whose side 32 divides"),
    (dict(dtype="float16"), "must be one of"),
  ],
)
def test_fields_that_do_not_fit(fields, message):
  with pytest.raises(InputError, match=message):
    StampCodec(**fields)
