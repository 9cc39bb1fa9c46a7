"""How sure one may be that an image, or a model, carries a string of bits.

The null hypothesis is that the bits of the key are fair coins of which the image knows nothing. Then the number of matches
with what any decoder reads, however biased, is X ~ Bin(n, 1/2) exactly, and p = P(X >= matches). The key must be random
for that: with a chosen one, such as a published demo key, the number says nothing.

Images of one suspect model share the key, and a decoder errs on them alike, so n bits of m images are no m n coins. Their
logits are averaged first (`read`), which leaves n.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jax_trustdiff.types import InputError

# on the host or on a device
Key = Integer[np.ndarray, "n"] | Integer[Array, "n"]
Keys = Integer[np.ndarray, "users n"] | Integer[Array, "users n"]
Whole = int | np.integer
BitLogits = Float[np.ndarray, "m bits"] | Float[Array, "m bits"]


@functools.lru_cache(maxsize=64)
def _ways(num_bits: int) -> tuple[int, ...]:
  """[n + 2]: of the 2^n strings, how many match a given one in at least so many places."""
  counts = [math.comb(num_bits, k) for k in range(num_bits + 1)]
  found = [0]
  for count in reversed(counts):
    found.append(found[-1] + count)
  return tuple(reversed(found))


def p_value(matches: Whole, num_bits: Whole) -> float:
  """P(Bin(n, 1/2) >= matches), exact; 0.0 only where a float cannot hold it (beyond a thousand bits)."""
  matches, num_bits = _checked(matches, num_bits)
  return float(Fraction(_ways(num_bits)[matches], 2**num_bits))


def log10_p_value(matches: Whole, num_bits: Whole) -> float:
  """The decimal logarithm of `p_value`, of any size."""
  matches, num_bits = _checked(matches, num_bits)
  return math.log10(_ways(num_bits)[matches]) - num_bits * math.log10(2)


def family_wise(p: float, num_users: int) -> float:
  """1 - (1 - p)^N: the probability that the best of N keys does as well as p by chance (Sidak 1967)."""
  if num_users < 1 or not 0 <= p <= 1:
    raise InputError(f"expected a p-value in [0, 1] and at least one user, got p={p} and {num_users} users")
  return p if p == 1 or num_users == 1 else -math.expm1(num_users * math.log1p(-p))


def threshold(num_bits: int, false_positive_rate: float, num_users: int = 1) -> int:
  """The fewest matches that are called a detection: the smallest t with 1 - (1 - P(X >= t))^N <= the rate.

  At least t, not more than t. InputError where even n matches are too few for the rate: n bits have no p-value below 2^-n.
  """
  if not 0 < false_positive_rate < 1:
    raise InputError(f"the false-positive rate must lie between 0 and 1, got {false_positive_rate}")
  for matches in range(num_bits + 1):
    if family_wise(p_value(matches, num_bits), num_users) <= false_positive_rate:
      return matches
  least = family_wise(p_value(num_bits, num_bits), num_users)
  raise InputError(
    f"{num_bits} bits cannot reach a false-positive rate of {false_positive_rate:g} among {num_users} key(s): "
    f"all bits right has probability {least:.3g}; take at least {_least_bits(false_positive_rate, num_users)} bits"
  )


def read(logits: BitLogits) -> Int[Array, "bits"]:
  """The string that m images carry together: a 1 where the mean of its logits over the images is positive."""
  logits = jnp.asarray(logits)
  return (logits.astype(jnp.promote_types(logits.dtype, jnp.float32)).mean(0) > 0).astype(jnp.int32)


def count_matches(logits: BitLogits, key: Key) -> Int[Array, "m"]:
  """In how many places each image has the bit of the key."""
  return ((jnp.asarray(logits) > 0) == (jnp.asarray(key) > 0)).sum(1)


def matches_together(logits: BitLogits, key: Key) -> int:
  """In how many places the string that all images carry together agrees with the key."""
  return int((read(logits) == (jnp.asarray(key) > 0)).sum())


def most_matches(logits: BitLogits, keys: Keys) -> Int[np.ndarray, "m"]:
  """In how many places each image has the bit of the key that fits it best."""
  signs = jnp.where(jnp.asarray(keys) > 0, 1, -1).astype(jnp.bfloat16)
  found = []
  for start in range(0, len(logits), 16):  # 16 x 10^6 agreements take 64 MB
    rows = jnp.where(jnp.asarray(logits[start : start + 16]) > 0, 1, -1).astype(jnp.bfloat16)
    best = jnp.matmul(rows, signs.T, preferred_element_type=jnp.float32).max(1)
    found.append(np.rint((np.asarray(best) + keys.shape[1]) / 2).astype(np.int64))
  return np.concatenate(found)


def trace(bits: Key, keys: Keys) -> tuple[int, int]:
  """(user, matches): of many keys, the one that agrees with `bits` in the most places; of equals the first.

  A product of matrices of signs, which bfloat16 holds exactly and sums in float32. The p-value of that many matches is to be
  corrected for the number of keys (`family_wise`).
  """
  signs = [jnp.where(jnp.asarray(b) > 0, 1, -1).astype(jnp.bfloat16) for b in (keys, bits)]
  agreement = jnp.matmul(*signs, preferred_element_type=jnp.float32)
  best = int(agreement.argmax())
  return best, round((float(agreement[best]) + keys.shape[1]) / 2)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What was found about one key, or the best of several; `to_dict` is for JSON.

  matches: places in which the string that was read agrees with the key, of num_bits. p: of that many or more by chance,
  corrected for num_users keys. threshold: the matches that false_positive_rate asks for. bit_accuracy: of single images, mean.
  detected_share: of single images, those that reach the threshold alone.
  """

  scheme: str
  num_bits: int
  matches: int
  p: float
  log10_p: float
  false_positive_rate: float
  threshold: int
  decision: bool
  num_users: int
  user: int | None
  num_images: int
  bit_accuracy: float
  detected_share: float
  key_id: str
  codec_sha256: str

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def judge(
  logits: BitLogits,
  keys: Keys,
  false_positive_rate: float,
  *,
  scheme: str,
  key_id: str,
  codec_sha256: str = "",
) -> Verdict:
  """The verdict on m images of one source whose bits have these logits, for one key or for the best of many.

  InputError where the images have other numbers of bits than the keys, or too few for the rate.
  """
  num_users, num_bits = keys.shape
  if not len(logits) or not np.isfinite(np.asarray(logits)).all():
    raise InputError("a verdict needs finite logits of at least one image")
  if logits.shape[1] != num_bits:
    raise InputError(
      f"the decoder reads {logits.shape[1]} bits and the key has {num_bits}: they do not belong together"
    )
  needed = threshold(num_bits, false_positive_rate, num_users)
  user, matches = trace(read(logits), keys)
  singles = np.asarray(count_matches(logits, keys[user]))
  p = family_wise(p_value(matches, num_bits), num_users)
  log10_p = log10_p_value(matches, num_bits) + math.log10(num_users) if p < 1e-12 else math.log10(p)
  return Verdict(
    scheme=scheme,
    num_bits=num_bits,
    matches=matches,
    p=p,
    log10_p=log10_p,
    false_positive_rate=false_positive_rate,
    threshold=needed,
    decision=matches >= needed,
    num_users=num_users,
    user=user if num_users > 1 else None,
    num_images=len(logits),
    bit_accuracy=float(singles.mean() / num_bits),
    detected_share=float((singles >= needed).mean()),
    key_id=key_id,
    codec_sha256=codec_sha256,
  )


def _checked(matches: Whole, num_bits: Whole) -> tuple[int, int]:
  """Both as Python's integers, which hold 2^n."""
  if num_bits < 1 or not 0 <= matches <= num_bits:
    raise InputError(f"expected matches from 0 to the number of bits, got {matches} of {num_bits}")
  return int(matches), int(num_bits)


def _least_bits(false_positive_rate: float, num_users: int) -> int:
  bits = 1
  while family_wise(2.0**-bits, num_users) > false_positive_rate:
    bits += 1
  return bits
