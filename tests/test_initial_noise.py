"""Marks on the initial noise: what they leave of its distribution, and what is read back after noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_trustdiff.types import InputError
from jax_trustdiff.watermark import detection, keys
from jax_trustdiff.watermark.initial_noise import GaussianShading, Rings

SHAPE = (16, 16, 3)
SECRET = jax.random.key(5)


def standard_noise(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (count, *SHAPE))


def test_bits_are_read_back_and_the_values_keep_their_size():
  shading = GaussianShading(40, SHAPE)
  bits = keys.draw("s", np.arange(1), 40)[0]
  noise = standard_noise(3)
  marked = shading.mark(SECRET, bits, noise)
  np.testing.assert_array_equal(jnp.abs(marked), jnp.abs(noise))
  logits = shading.read(SECRET, marked)
  np.testing.assert_array_equal((logits > 0).astype(int), jnp.tile(bits, (3, 1)))
  np.testing.assert_allclose(jnp.abs(logits).mean(), np.sqrt(768 / 40) * np.sqrt(2 / np.pi), rtol=0.05)


@pytest.mark.parametrize("nonces", [None, jnp.arange(4000)])
def test_only_a_stream_for_each_image_leaves_images_independent(nonces):
  """Values are normal either way; the signs of two images agree in half of the places only with streams of their own."""
  shading = GaussianShading(8, SHAPE)
  marked = np.asarray(shading.mark(SECRET, jnp.ones(8, int), standard_noise(4000), nonces)).reshape(4000, -1)
  means = marked.mean(0) * np.sqrt(4000)  # over images, at each place
  if nonces is None:
    assert np.abs(means).min() > 40
    assert (np.sign(marked[0]) == np.sign(marked[1])).all()
    assert stats.kstest(np.abs(marked[:, 0]), stats.halfnorm.cdf).pvalue > 1e-3
  else:
    assert stats.kstest(means, "norm").pvalue > 1e-3
    assert stats.kstest(marked[:, 7], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(np.sign(marked[0]), np.sign(marked[1]))[0, 1]) < 4 / np.sqrt(768)


def test_logits_of_unmarked_noise_are_standard_normal():
  logits = np.asarray(GaussianShading(50, SHAPE).read(SECRET, standard_noise(200)))  # 50 does not divide 768
  assert stats.kstest(logits.ravel(), "norm").pvalue > 1e-3


def test_another_key_or_nonce_reads_nothing():
  shading, bits = GaussianShading(64, SHAPE), keys.draw("s", np.arange(1), 64)
  nonces = jnp.arange(40)
  marked = shading.mark(SECRET, bits[0], standard_noise(40), nonces)
  for logits in (
    shading.read(jax.random.key(6), marked, nonces),
    shading.read(SECRET, marked, nonces + 1),
    shading.read(SECRET, marked),
  ):
    verdict = detection.judge(logits, bits, 1e-3, scheme="gaussian_shading", key_id="k")
    assert not verdict.decision and abs(verdict.bit_accuracy - 0.5) < 0.06
  verdict = detection.judge(
    shading.read(SECRET, marked, nonces), bits, 1e-3, scheme="gaussian_shading", key_id="k"
  )
  assert verdict.decision and verdict.detected_share == 1


def test_strong_noise_on_the_estimate_is_survived():
  """Of 12 values for a bit, with as much noise as there is mark, 99 % are read right: what the sum of them promises."""
  shading, bits = GaussianShading(64, SHAPE), keys.draw("s", np.arange(1), 64)[0]
  marked = shading.mark(SECRET, bits, standard_noise(200))
  logits = shading.read(SECRET, marked + 0.5 * standard_noise(200, 1))
  right = float(((logits > 0) == (bits > 0)).mean())
  # a sum of 12 half-normals of mean .798 and variance .363, with noise of variance .25 on each
  expected = stats.norm.cdf(12 * 0.798 / np.sqrt(12 * (0.363 + 0.25)))
  assert abs(right - expected) < 0.003 and right > 0.99


def test_rings_are_real_of_unit_variance_and_found():
  rings = Rings(SHAPE, low=2, high=6, channel=1)
  noise = standard_noise(300)
  marked = rings.mark(SECRET, noise)
  np.testing.assert_array_equal(marked[..., [0, 2]], noise[..., [0, 2]])
  found = np.fft.fftshift(np.fft.fft2(np.asarray(marked[..., 1], float), norm="ortho"), axes=(1, 2))
  inside, values = rings._pattern(SECRET)
  np.testing.assert_allclose(
    found[:, inside], np.broadcast_to(values[inside], (300, int(inside.sum()))), atol=1e-4
  )
  outside = np.fft.fftshift(np.fft.fft2(np.asarray(noise[..., 1], float), norm="ortho"), axes=(1, 2))
  np.testing.assert_allclose(found[:, ~inside], outside[:, ~inside], atol=1e-4)
  assert float(rings.distance(SECRET, marked).max()) < 1e-6
  np.testing.assert_allclose(rings.distance(SECRET, noise).mean(), 1, atol=0.02)
  assert float(rings.p_value(SECRET, marked).max()) < 1e-9
  assert rings.p_value(SECRET, marked + 0.5 * standard_noise(300, 1)).max() < 1e-3


def test_p_values_of_rings_without_a_mark_are_uniform():
  rings = Rings(SHAPE, low=1, high=6)
  p = np.concatenate([rings.p_value(jax.random.key(i), standard_noise(100, i)) for i in range(20)])
  assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: GaussianShading(0, SHAPE), "carries 1 to 768 bits, not 0"),
    (lambda: GaussianShading(769, SHAPE), "carries 1 to 768 bits, not 769"),
    (lambda: Rings(SHAPE, high=8), "rings from 1 to 8 do not fit 16x16"),
    (lambda: Rings(SHAPE, high=5, channel=3), "there is no channel 3 among 3"),
  ],
)
def test_marks_that_do_not_fit(make, message):
  with pytest.raises(InputError, match=message):
    make()
