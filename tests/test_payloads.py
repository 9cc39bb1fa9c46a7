"""Error-correcting payloads: every pattern of few errors, words that are too far, published parameters, the probability of reading nothing."""

import itertools

import numpy as np
import pytest

from jax_trustdiff.types import InputError
from jax_trustdiff.watermark.payloads import BCHCode

pytest.importorskip("galois", reason="no galois: pip install 'jax_trustdiff[ecc]'")


@pytest.mark.parametrize(
  "num_bits, num_errors, payload",
  [(15, 2, 7), (31, 3, 16), (63, 5, 36), (64, 5, 29), (32, 3, 14), (127, 10, 64)],
)
def test_sizes_are_those_of_the_tables(num_bits, num_errors, payload):
  """Primitive codes as in Lin and Costello, appendix C; those of 64 and 32 bits are shortened by 63 and 31 from (127, 92) and (63, 45)."""
  assert BCHCode(num_bits, num_errors).num_payload_bits == payload


def test_every_pattern_of_two_errors_is_corrected():
  code, rng = BCHCode(15, 2), np.random.default_rng(0)
  for count in (0, 1, 2):
    for where in itertools.combinations(range(15), count):
      payload = rng.integers(0, 2, 7)
      word = code.encode(payload)
      np.testing.assert_array_equal(word[:7], payload)
      word[list(where)] ^= 1
      found, errors = code.decode(word)
      np.testing.assert_array_equal(found, payload)
      assert errors == count


def test_random_words_are_accepted_as_often_as_is_said():
  """Of a shortened code too, where an error may seem to lie in bits that are not there."""
  code, rng = BCHCode(24, 2), np.random.default_rng(1)
  num_words = 2000
  accepted = sum(code.decode(rng.integers(0, 2, 24)) is not None for _ in range(num_words))
  expected = code.false_accept
  assert 0.05 < expected < 0.5
  assert abs(accepted / num_words - expected) < 4 * np.sqrt(expected * (1 - expected) / num_words)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: BCHCode(15, 0), "at least 1 error, not 0"),
    (lambda: BCHCode(2, 1), "3 to 1023 bits, not of 2"),
    (lambda: BCHCode(16, 7), "leave none for a payload"),
    (lambda: BCHCode(15, 2).encode(np.zeros(8, int)), "a payload of 7 bits, got 8"),
    (lambda: BCHCode(15, 2).decode(np.zeros(14, int)), "words of 15 bits, got 14"),
  ],
)
def test_codes_and_words_that_are_none(call, message):
  with pytest.raises(InputError, match=message):
    call()
