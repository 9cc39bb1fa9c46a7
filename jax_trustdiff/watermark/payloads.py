"""Messages that survive a few wrong bits: BCH codes (Bose and Ray-Chaudhuri 1960, Hocquenghem 1959) under a secret mask.

The string that is written is the code word of a payload xor a mask of the secret's stream. The mask makes it uniform whatever the payload says, so
the p-values of `detection` hold for it; and it is read without knowing the payload, which then has a probability of its own of
being read from nothing (`false_accept`).

The code is shortened from the primitive one of length 2^m - 1, the next above the number of bits. galois computes it: optional, the extra 'ecc'.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from jax_trustdiff.types import InputError


@dataclasses.dataclass(frozen=True)
class BCHCode:
  """Code words of num_bits, of which num_errors may be wrong.

  InputError where no such code has room for a payload, and without galois.
  """

  num_bits: int
  num_errors: int

  def __post_init__(self):
    if self.num_errors < 1:
      raise InputError(f"an error-correcting code corrects at least 1 error, not {self.num_errors}")
    if not 3 <= self.num_bits <= 1023:
      raise InputError(f"there are codes here of 3 to 1023 bits, not of {self.num_bits}")
    if self.num_payload_bits < 1:
      raise InputError(
        f"{self.num_bits} bits with {self.num_errors} of them wrong leave none for a payload: take more bits or fewer errors"
      )

  @property
  def num_payload_bits(self) -> int:
    code = _primitive(self.num_bits.bit_length(), self.num_errors)
    return 0 if code is None else code.k - self._shortened

  @property
  def _shortened(self) -> int:
    return 2 ** self.num_bits.bit_length() - 1 - self.num_bits

  def encode(self, payload: Integer[np.ndarray, "k"]) -> Int[np.ndarray, "n"]:
    """The code word of num_payload_bits bits, which begins with them."""
    if payload.shape != (self.num_payload_bits,):
      raise InputError(f"the code takes a payload of {self.num_payload_bits} bits, got {len(payload)}")
    code = _primitive(self.num_bits.bit_length(), self.num_errors)
    return np.asarray(code.encode((payload > 0).astype(np.uint8)), np.int64)

  def decode(self, word: Integer[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "k"], int] | None:
    """(payload, number of wrong bits), or None if the word is not within num_errors of a code word."""
    if word.shape != (self.num_bits,):
      raise InputError(f"the code has words of {self.num_bits} bits, got {len(word)}")
    code = _primitive(self.num_bits.bit_length(), self.num_errors)
    payload, errors = code.decode(_galois().GF2((word > 0).astype(np.uint8)), errors=True)
    # of a code that is shortened, an error may be 'found' in the bits that are not there
    if (
      errors < 0
      or (self.encode(found := np.asarray(payload, np.int64)) != (word > 0)).sum() > self.num_errors
    ):
      return None
    return found, int(errors)

  @property
  def false_accept(self) -> float:
    """P(a uniformly random word is within num_errors of some code word): 2^(k - n) sum_{i <= t} C(n, i)."""
    near = sum(math.comb(self.num_bits, i) for i in range(self.num_errors + 1))
    return float(Fraction(near * 2**self.num_payload_bits, 2**self.num_bits))


def _galois() -> Any:
  try:
    import galois
  except ImportError:
    raise InputError(
      "error-correcting payloads need the package galois: pip install 'jax_trustdiff[ecc]'"
    ) from None
  return galois


@functools.lru_cache(maxsize=32)
def _primitive(degree: int, num_errors: int) -> Any:
  """The code of length 2^degree - 1 with the designed distance 2 num_errors + 1, None where it has no room for a bit."""
  galois, length = _galois(), 2**degree - 1
  if 2 * num_errors + 1 > length:
    return None
  try:
    return galois.BCH(length, d=2 * num_errors + 1)
  except ValueError:
    return None
