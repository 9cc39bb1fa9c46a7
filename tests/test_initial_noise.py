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
SECRET = "the owner knows it"


def standard_noise(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (count, *SHAPE))


def test_bits_are_read_back_and_the_values_keep_their_size():
  shading = GaussianShading(SECRET, 40, SHAPE)
  bits = keys.draw("s", np.arange(1), 40)[0]
  noise = standard_noise(3)
  marked = shading.mark(bits, noise)
  np.testing.assert_array_equal(jnp.abs(marked), jnp.abs(noise))
  logits = shading.read(marked)
  np.testing.assert_array_equal((logits > 0).astype(int), jnp.tile(bits, (3, 1)))
  np.testing.assert_allclose(jnp.abs(logits).mean(), np.sqrt(768 / 40) * np.sqrt(2 / np.pi), rtol=0.05)


@pytest.mark.parametrize("nonces", [None, np.arange(4000)])
def test_only_a_stream_for_each_image_leaves_images_independent(nonces):
  """Values are normal either way; the signs of two images agree in half of the places only with streams of their own."""
  shading = GaussianShading(SECRET, 8, SHAPE)
  marked = np.asarray(shading.mark(np.ones(8, int), standard_noise(4000), nonces)).reshape(4000, -1)
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
  logits = np.asarray(GaussianShading(SECRET, 50, SHAPE).read(standard_noise(200)))  # 50 does not divide 768
  assert stats.kstest(logits.ravel(), "norm").pvalue > 1e-3


def test_another_key_or_nonce_reads_nothing():
  shading, bits = GaussianShading(SECRET, 64, SHAPE), keys.draw("s", np.arange(1), 64)
  nonces = np.arange(40)
  marked = shading.mark(bits[0], standard_noise(40), nonces)
  for logits in (
    GaussianShading("another", 64, SHAPE).read(marked, nonces),
    shading.read(marked, nonces + 1),
    shading.read(marked),
  ):
    verdict = detection.judge(logits, bits, 1e-3, scheme="gaussian_shading", key_id="k")
    assert not verdict.decision and abs(verdict.bit_accuracy - 0.5) < 0.06
  verdict = detection.judge(shading.read(marked, nonces), bits, 1e-3, scheme="gaussian_shading", key_id="k")
  assert verdict.decision and verdict.detected_share == 1


def test_strong_noise_on_the_estimate_is_survived():
  """Of 12 values for a bit, with as much noise as there is mark, 99 % are read right: what the sum of them promises."""
  shading, bits = GaussianShading(SECRET, 64, SHAPE), keys.draw("s", np.arange(1), 64)[0]
  marked = shading.mark(bits, standard_noise(200))
  logits = shading.read(marked + 0.5 * standard_noise(200, 1))
  right = float(((logits > 0) == (bits > 0)).mean())
  # a sum of 12 half-normals of mean .798 and variance .363, with noise of variance .25 on each
  expected = stats.norm.cdf(12 * 0.798 / np.sqrt(12 * (0.363 + 0.25)))
  assert abs(right - expected) < 0.003 and right > 0.99


def test_rings_are_where_they_should_be():
  rings = Rings(SECRET, SHAPE, low=2, high=6, channel=1)
  noise = standard_noise(50)
  marked = rings.mark(noise)
  np.testing.assert_array_equal(marked[..., [0, 2]], noise[..., [0, 2]])
  before, after = (np.fft.fft2(np.asarray(n[..., 1], float), norm="ortho") for n in (noise, marked))
  seen = {}
  for i in range(16):
    for j in range(16):
      distance = round(np.hypot(min(i, 16 - i), min(j, 16 - j)))
      if 2 <= distance <= 6:
        seen.setdefault(distance, []).append(after[:, i, j])
      else:
        np.testing.assert_allclose(after[:, i, j], before[:, i, j], atol=1e-4)
  assert sorted(seen) == [2, 3, 4, 5, 6]
  values = [np.stack(found) for _, found in sorted(seen.items())]
  for found, wanted in zip(values, rings.values(), strict=True):
    np.testing.assert_allclose(found, np.full_like(found, wanted), atol=1e-4)
  many = np.concatenate([Rings(f"secret {i}", (64, 64, 1), high=30).values() for i in range(100)])
  assert stats.kstest(many, "norm").pvalue > 1e-3


def test_rings_are_found_by_their_secret_alone():
  rings = Rings(SECRET, (32, 32, 3), high=14)
  noise = jax.random.normal(jax.random.key(0), (50, 32, 32, 3))
  marked = rings.mark(noise)
  assert rings.p_value(marked).max() < 1e-20
  assert rings.p_value(marked + 0.5 * jax.random.normal(jax.random.key(1), noise.shape)).max() < 1e-6
  assert np.median(Rings("another", (32, 32, 3), high=14).p_value(marked)) > 1e-3


def test_rings_of_all_images_together():
  """Of images that are too noisy alone the mean is read; without a mark p is uniform over secrets, also for images that are alike."""
  rings = Rings(SECRET, (32, 32, 3), high=14)
  noise = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
  blurred = 0.1 * rings.mark(noise) + jax.random.normal(jax.random.key(1), noise.shape)
  assert np.median(rings.p_value(blurred)) > 1e-4 and rings.p_value_together(blurred) < 1e-9
  assert rings.p_value_together(noise[:1]) == pytest.approx(rings.p_value(noise[:1])[0])
  alike = standard_noise(1) + 0.1 * standard_noise(16, 1)
  p = [Rings(f"secret {i}", SHAPE, high=6).p_value_together(alike) for i in range(400)]
  assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("coloured", ["white", "constant", "bright", "smooth", "nothing"])
def test_p_values_of_rings_without_a_mark_are_uniform_over_secrets_for_any_image(coloured):
  image = {
    "white": standard_noise(1),
    "constant": jnp.full((1, *SHAPE), 5.0),
    "bright": standard_noise(1) + 2,
    "smooth": jnp.cumsum(standard_noise(1), axis=1),
    "nothing": jnp.zeros((1, *SHAPE)),
  }[coloured]
  p = np.array([Rings(f"secret {i}", SHAPE, high=6).p_value(image)[0] for i in range(400)])
  if coloured in ("constant", "nothing"):  # no ring has anything
    assert p.min() > 1e-3
  else:
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: GaussianShading("s", 0, SHAPE), "carries 1 to 768 bits, not 0"),
    (lambda: GaussianShading("s", 769, SHAPE), "carries 1 to 768 bits, not 769"),
    (lambda: GaussianShading("s", 9, SHAPE).mark(np.ones(8, int), standard_noise(1)), "carry 9 bits, got 8"),
    (
      lambda: GaussianShading("s", 9, SHAPE).read(jnp.zeros((1, 32, 32, 3))),
      "noise of .16, 16, 3., got .32, 32, 3.",
    ),
    (
      lambda: GaussianShading("s", 9, SHAPE).read(standard_noise(2), np.arange(1)),
      "2 images need as many nonces, got 1",
    ),
    (lambda: Rings("s", SHAPE, high=8), "rings from 1 to 8 do not fit 16x16"),
    (lambda: Rings("s", SHAPE, high=5, channel=3), "there is no channel 3 among 3"),
  ],
)
def test_marks_that_do_not_fit(make, message):
  with pytest.raises(InputError, match=message):
    make()
