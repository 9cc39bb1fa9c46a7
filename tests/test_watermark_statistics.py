"""Exact probabilities of matches, thresholds, many users, and keys."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir
from scipy import stats

from jax_trustdiff.types import InputError
from jax_trustdiff.watermark import detection, keys


def test_p_values_are_the_reference_ones():
  rows = json.loads((shared_dir("golden", "smoothing") / "certify.json").read_text())[
    "watermark_one_sided_binomial"
  ]
  assert rows
  for row in rows:
    found = detection.p_value(row["matches"], row["bits"])
    assert found == pytest.approx(row["p_value"], rel=1e-9)


@pytest.mark.parametrize("num_bits", [1, 8, 63, 512])
def test_p_values_against_scipy(num_bits):
  matches = np.unique(np.linspace(0, num_bits, 20).astype(int))
  found = [detection.p_value(int(m), num_bits) for m in matches]
  np.testing.assert_allclose(found, stats.binom.sf(matches - 1, num_bits, 0.5), rtol=1e-9)
  logs = [detection.log10_p_value(int(m), num_bits) for m in matches]
  np.testing.assert_allclose(logs, np.log10(found), rtol=1e-9, atol=1e-12)


def test_the_logarithm_reaches_where_floats_do_not():
  assert detection.p_value(2000, 2000) == 0.0
  assert detection.log10_p_value(2000, 2000) == pytest.approx(-2000 * np.log10(2))


@pytest.mark.parametrize(
  "num_bits, thresholds",  # for false-positive rates of 1e-2, 1e-3, 1e-6 and 1e-9
  [
    (4, (None, None, None, None)),
    (8, (8, None, None, None)),
    (16, (14, 15, None, None)),
    (32, (24, 26, 30, 32)),
    (48, (33, 36, 41, 44)),
    (64, (42, 45, 51, 56)),
    (128, (78, 82, 92, 98)),
    (256, (148, 154, 167, 176)),
  ],
)
def test_thresholds(num_bits, thresholds):
  for rate, wanted in zip((1e-2, 1e-3, 1e-6, 1e-9), thresholds, strict=True):
    if wanted is None:
      with pytest.raises(InputError, match=f"{num_bits} bits cannot reach a false-positive rate"):
        detection.threshold(num_bits, rate)
      continue
    found = detection.threshold(num_bits, rate)
    assert found == wanted
    assert detection.p_value(found, num_bits) <= rate < detection.p_value(found - 1, num_bits)


@pytest.mark.parametrize(
  "num_bits, thresholds",  # at 1e-6, among 1, 10^3, 10^6 and 10^9 users
  [(64, (51, 56, 59, 62)), (48, (41, 44, 47, None)), (256, (167, 176, 184, 191))],
)
def test_thresholds_among_many_users(num_bits, thresholds):
  for users, wanted in zip((1, 10**3, 10**6, 10**9), thresholds, strict=True):
    if wanted is None:
      with pytest.raises(InputError, match="take at least 50 bits"):
        detection.threshold(num_bits, 1e-6, users)
    else:
      assert detection.threshold(num_bits, 1e-6, users) == wanted


def test_false_positives_of_a_million_random_strings():
  """The rate is that of the exact tail; one match fewer, or `more than` in place of `at least`, is told apart."""
  num_bits, rate, draws = 64, 1e-3, 10**6
  read = np.random.RandomState(0).rand(num_bits) < 0.7  # what some decoder reads, with a bias
  matches = (np.asarray(keys.draw("a secret", range(draws), num_bits)) == read).sum(1)
  needed = detection.threshold(num_bits, rate)
  low, high = stats.binom.interval(0.999, draws, detection.p_value(needed, num_bits))
  assert low <= (matches >= needed).sum() <= high and (matches >= needed).mean() <= rate
  for wrong in ((matches >= needed - 1).sum(), (matches > needed).sum()):
    assert not low <= wrong <= high
  assert (matches >= needed - 1).mean() > rate


@pytest.mark.parametrize(
  "p, users, wanted", [(0.5, 2, 0.75), (1e-20, 10**6, 1e-14), (1.0, 3, 1.0), (0.0, 5, 0.0)]
)
def test_family_wise(p, users, wanted):
  assert detection.family_wise(p, users) == pytest.approx(wanted, rel=1e-9)


def test_a_user_among_a_million_is_traced():
  secret, num_bits, users = "owner", 64, 10**6
  codebook = keys.draw(secret, range(users), num_bits)
  bits = np.asarray(codebook[123456]).copy()
  bits[[3, 17, 40, 41, 63]] ^= 1
  assert detection.trace(bits, codebook) == (123456, 59)
  logits = np.where(bits, 1.0, -1.0)[None] * np.ones((4, 1), np.float32)
  verdict = detection.judge(jnp.asarray(logits), codebook, 1e-6, scheme="codec", key_id="k")
  assert (verdict.user, verdict.matches, verdict.threshold, verdict.decision) == (123456, 59, 59, True)
  assert (
    verdict.p == pytest.approx(detection.family_wise(detection.p_value(59, 64), users)) and verdict.p <= 1e-6
  )
  one_less = detection.judge(
    jnp.asarray(logits * np.where(np.arange(64) == 0, -1, 1)), codebook, 1e-6, scheme="codec", key_id="k"
  )
  assert not one_less.decision and one_less.p > 1e-6
  assert json.loads(json.dumps(verdict.to_dict()))["false_positive_rate"] == 1e-6


def test_images_of_one_source_are_read_by_the_mean_of_their_logits():
  """Bits that most images get wrong by little are read right where the others are sure; no vote would do so."""
  key = np.array([1, 0, 1, 1, 0, 0, 1, 0] * 4)
  signs = 2.0 * key - 1
  logits = np.stack([-0.1 * signs, -0.1 * signs, signs])
  np.testing.assert_array_equal(detection.read(logits), key)
  np.testing.assert_array_equal(detection.count_matches(logits, key), [0, 0, 32])
  verdict = detection.judge(jnp.asarray(logits), key[None], 1e-3, scheme="codec", key_id="k")
  assert (verdict.matches, verdict.num_images, verdict.user) == (32, 3, None)
  assert (verdict.bit_accuracy, verdict.detected_share) == pytest.approx((1 / 3, 1 / 3))
  assert verdict.log10_p == pytest.approx(-32 * np.log10(2))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32])
def test_keys_of_any_integers_are_traced(kind):
  codebook = keys.draw("s", range(100), 32).astype(kind)
  assert detection.trace(codebook[42], codebook) == (42, 32)


def test_numbers_of_numpy_are_numbers():
  assert detection.p_value(np.int64(60), np.int64(64)) == detection.p_value(60, 64) > 0


def test_what_is_not_finite_is_no_evidence():
  for logits in (np.full((2, 16), np.nan), np.zeros((0, 16))):
    with pytest.raises(InputError, match="finite logits of at least one image"):
      detection.judge(logits, np.zeros((1, 16), np.int32), 1e-2, scheme="codec", key_id="k")


def test_bits_that_do_not_belong_to_the_key():
  with pytest.raises(InputError, match="reads 8 bits and the key has 16"):
    detection.judge(jnp.zeros((1, 8)), np.zeros((1, 16), np.int32), 1e-2, scheme="codec", key_id="k")


def test_keys_are_fair_and_those_of_a_user_the_same_in_any_set():
  many = keys.draw("s", range(20_000), 64)
  assert abs(many.mean() - 0.5) < 4 * 0.5 / many.size**0.5
  np.testing.assert_allclose(np.corrcoef(many.T), np.eye(64), atol=0.04)
  np.testing.assert_array_equal(keys.draw("s", [777, 3], 64), many[[777, 3]])
  for other in (keys.draw("t", [0], 64), keys.draw("s", [0], 65)[:, :64], keys.draw("s", [0], 64, "rings")):
    assert 10 < (other != many[:1]).sum() < 54
  for wrong in (dict(secret="", users=[0]), dict(secret="s", users=[-1]), dict(secret="s", users=[2**64])):
    with pytest.raises(InputError):
      keys.draw(num_bits=64, **wrong)


def test_keys_of_today_are_those_of_tomorrow():
  """An owner's key must not change with a version of anything."""
  assert keys.as_text(keys.draw("a secret", [7], 32)[0]) == "01001110000010001011001110001101"


def test_published_keys():
  assert keys.demo_bits(4) == "0100" and keys.demo_bits(16) == "0100010001000010"
  for length in keys.DEMO_LENGTHS:
    assert len(keys.demo_bits(length)) == length and keys.demo_bits(128).startswith(keys.demo_bits(length))
  with pytest.raises(InputError, match="4, 8, 16, 32, 64, 128 bits; got 5"):
    keys.demo_bits(5)


def test_published_keys_are_the_draws_of_torch():
  torch = pytest.importorskip("torch", reason="torch draws the published keys")
  for length in keys.DEMO_LENGTHS:
    torch.manual_seed(42)
    drawn = torch.zeros((1, length), dtype=torch.float).random_(0, 2)[0]
    assert keys.as_text(drawn.numpy().astype(int)) == keys.demo_bits(length)


def test_a_key_file_comes_back():
  key = keys.WatermarkKey(
    "0110", codec_sha256="ab", image_shape=(64, 64, 3), drawn=True, user=7, salt=keys.salt("secret", 7)
  )
  again = keys.from_json(key.to_json(), "key.json")
  assert again == key and again.key_id == key.key_id
  assert keys.as_text(key.array) == key.bits
  assert key.key_id != keys.WatermarkKey("0111", codec_sha256="ab", image_shape=(64, 64, 3)).key_id


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda e: e.pop("bits"), "k.json is no key file: expected a JSON object with bits, codec_sha256"),
    (lambda e: e.update(bits="01x"), "k.json: a key is a string of 0 and 1"),
    (lambda e: e.update(quantisation="uint4"), "k.json: quantisation of a key is one of none, uint8"),
    (lambda e: e.update(image_shape=[32]), "k.json: image_shape of a key is"),
    (lambda e: e.update(user="7"), "k.json: user of a key is like 0, got '7'"),
  ],
)
def test_key_files_that_are_none(change, message):
  entries = json.loads(keys.WatermarkKey("01").to_json())
  change(entries)
  with pytest.raises(InputError, match=message):
    keys.from_json(json.dumps(entries), "k.json")
  with pytest.raises(InputError, match="is no key file"):
    keys.from_json("bits = 01", "k.json")


def test_the_best_key_of_each_image():
  rng = np.random.default_rng(0)
  logits, codebook = rng.normal(size=(37, 24)), rng.integers(0, 2, (50, 24))
  wanted = ((logits > 0)[:, None] == (codebook > 0)).sum(2)
  np.testing.assert_array_equal(detection.most_matches(logits, codebook), wanted.max(1))
  read = (logits.mean(0) > 0) == (codebook[3] > 0)
  assert detection.matches_together(logits, codebook[3]) == read.sum()
