"""Attacks on weights and, with a model or the decoder, on images: what each does to the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.models.watermark_codec import ResidualCodec
from jax_trustdiff.types import InputError
from jax_trustdiff.watermark import removal
from jax_trustdiff.watermark.codec import BoundCodec

PARAMS = {
  "a": {"kernel": jax.random.normal(jax.random.key(0), (64, 50)) * 3, "bias": jnp.linspace(-1, 1, 50)},
  "b": {"kernel": jax.random.normal(jax.random.key(1), (3, 3, 8, 8)), "bias": jnp.zeros(8)},
}


def differences(found):
  return jax.tree.map(lambda new, old: np.asarray(new - old), found, PARAMS)


def test_noise_has_the_standard_deviation_asked_for():
  noise = differences(removal.add_noise(PARAMS, jax.random.key(5), 0.01))
  for name in "ab":
    assert abs(noise[name]["kernel"].std() / 0.01 - 1) < 0.1
  assert noise["a"]["bias"].any() and noise["b"]["bias"].any()
  assert abs(np.corrcoef(noise["a"]["kernel"].ravel()[:576], noise["b"]["kernel"].ravel())[0, 1]) < 0.2
  twice = differences(removal.add_noise(PARAMS, jax.random.key(5), 0.02))
  np.testing.assert_allclose(twice["a"]["bias"], 2 * noise["a"]["bias"], rtol=1e-3, atol=1e-6)
  relative = differences(removal.add_noise(PARAMS, jax.random.key(5), 0.01, relative=True))
  rms = float(jnp.sqrt(jnp.square(PARAMS["a"]["kernel"]).mean()))
  np.testing.assert_allclose(relative["a"]["kernel"], rms * noise["a"]["kernel"], rtol=1e-2, atol=1e-5)
  assert not relative["b"]["bias"].any()


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_integers_are_few_and_near(num_bits):
  found = removal.to_integers(PARAMS, num_bits)
  kernel, most = np.asarray(found["a"]["kernel"]), 2 ** (num_bits - 1) - 1
  assert len(np.unique(kernel)) <= 2 * most + 1 and np.isfinite(jax.tree.leaves(found)[0]).all()
  largest = float(jnp.abs(PARAMS["a"]["kernel"]).max())
  assert np.abs(differences(found)["a"]["kernel"]).max() <= 0.5001 * largest / most
  np.testing.assert_allclose(np.abs(kernel).max(), largest, rtol=1e-6)
  assert not np.asarray(found["b"]["bias"]).any()


def test_bfloat16_keeps_eight_bits():
  found = removal.to_bfloat16(PARAMS)
  for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
    assert new.dtype == old.dtype == jnp.float32
    assert (np.abs(new - old) <= np.abs(old) * 2.0**-8).all()
  assert differences(found)["a"]["kernel"].any()


def test_pruning_takes_the_smallest():
  found = removal.prune(PARAMS, 0.25)
  kernel, old = np.asarray(found["a"]["kernel"]), np.asarray(PARAMS["a"]["kernel"])
  assert (kernel == 0).mean() == 0.25
  assert np.abs(old[kernel == 0]).max() < np.abs(kernel[kernel != 0]).min()
  np.testing.assert_array_equal(kernel[kernel != 0], old[kernel != 0])
  np.testing.assert_array_equal(found["a"]["bias"], PARAMS["a"]["bias"])
  np.testing.assert_array_equal(removal.prune(PARAMS, 0.0)["a"]["kernel"], old)


def test_regeneration_keeps_what_the_model_knows():
  """A denoiser of one normal distribution: from little noise images come back, from much they are new."""

  def denoise(x, sigma):
    return x * 0.25 / (0.25 + jnp.square(sigma)[:, None, None, None])  # of N(0, 0.5^2)

  x = 0.5 * jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
  noise = jax.random.normal(jax.random.key(1), x.shape)
  agreement = []
  for sigma in (0.05, 0.5, 50.0):
    found = removal.regenerate(denoise, EDMSampler(40, sigma_max=sigma), x, noise)
    agreement.append(np.corrcoef(np.ravel(found), np.ravel(x))[0, 1])
    assert abs(float(found.std()) / 0.5 - 1) < 0.05
  # x + noise of sigma, shrunk to the variance of x: correlation 1 / sqrt(1 + (sigma / 0.5)^2)
  np.testing.assert_allclose(agreement, [0.995, 0.5**0.5, 0.01], atol=0.03)


class Linear:
  """A decoder of 8 bits whose logits are products of the image, less a half, with patterns of -1 and 1."""

  num_bits, image_shape = 8, (8, 8, 1)
  patterns = np.random.default_rng(0).choice([-1.0, 1.0], (64, 8))

  def init(self, key):
    return {"scale": jnp.array(1.0)}

  def encode(self, variables, x, bits):
    return x

  def decode(self, variables, x):
    return (x.reshape(len(x), -1) - 0.5) @ self.patterns * variables["scale"]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_bits_of_a_linear_decoder_are_flipped_when_the_ball_is_large_enough(scale):
  """However sure the decoder is: with confident logits the gradient of a cross-entropy would be zero."""
  bound = BoundCodec(Linear(), {"scale": jnp.array(scale)})
  x = jax.random.uniform(jax.random.key(3), (16, 8, 8, 1), minval=0.3, maxval=0.7)
  before = np.asarray(bound.decode(x) > 0)
  shares = []
  for radius in (0.01, 0.1, 0.3):
    after = np.asarray(bound.decode(removal.flip_bits(bound, x, radius)) > 0)
    shares.append((after != before).mean())
  assert shares[0] < shares[1] <= shares[2] and shares[2] > 0.95


def test_flipping_bits_stays_in_the_ball():
  codec = ResidualCodec(8, (16, 16, 3), width=8)
  bound = BoundCodec(codec, codec.init(jax.random.key(0)))
  x = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
  found = removal.flip_bits(bound, x, 0.1, num_steps=20)
  assert float(jnp.abs(found - x).max()) <= 0.1 + 1e-6 and 0 <= float(found.min()) <= float(found.max()) <= 1
  before, after = np.asarray(bound.decode(x)), np.asarray(bound.decode(found))
  assert (np.where(before > 0, before - after, after - before).mean(1) > 0).all()  # towards the other side
  again = removal.flip_bits(bound, x, 0.1, num_steps=20, step_size=0.0125)
  np.testing.assert_allclose(found, again, atol=1e-6)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: removal.to_integers(PARAMS, 1), "2 to 16 bits, got 1"),
    (lambda: removal.prune(PARAMS, 1.5), "between 0 and 1, got 1.5"),
  ],
)
def test_strengths_that_are_none(call, message):
  with pytest.raises(InputError, match=message):
    call()


def test_every_attack_on_weights_has_a_name():
  for name, apply in removal.WEIGHT_ATTACKS.items():
    strength = 4.0 if name == "weight_bits" else 0.5
    found = apply(PARAMS, strength, jax.random.key(0))
    assert differences(found)["a"]["kernel"].any(), name
