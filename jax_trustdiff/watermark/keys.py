"""The strings that are written into images: drawn from a secret, one for each of many users, and what a key file says.

A key that is to prove anything is random and secret (`draw`): the p-values of `detection` are probabilities of its draw.
The published demo keys are neither.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Array, Bool, Int, Int8, Integer

from jax_trustdiff.types import InputError

# The strings of the code released with Zhao et al. 2023 (arXiv:2303.10137), drawn after torch.manual_seed(42): shorter ones are
# beginnings of longer ones.
_DEMO = "01000100010000101110101111111100111010000011111011010101100000000110111101011101010100101111111111100111111110101101011010100110"
DEMO_LENGTHS = (4, 8, 16, 32, 64, 128)
QUANTISATIONS = ("none", "uint8")


@dataclasses.dataclass(frozen=True)
class WatermarkKey:
  """One string of bits, and of which codec and images it is: the contents of a key file.

  bits: '0' and '1', in order. scheme: 'codec', or that of a mark on the initial noise. codec_sha256: of the codec's parameters; ''
  for a scheme without. image_shape: (h, w, c) of the marked images. quantisation: 'uint8' where the images were rounded to
  bytes before anything else saw them, else 'none'. drawn: whether the bits are random, so that p-values mean something; false for given
  and published ones. user: its number in a set of keys. salt: random characters, so that `key_id` tells nothing of the bits.
  """

  bits: str
  scheme: str = "codec"
  codec_sha256: str = ""
  image_shape: tuple[int, ...] = (32, 32, 3)
  quantisation: str = "uint8"
  drawn: bool = False
  user: int = 0
  salt: str = ""
  num_errors: int = 0
  mask: str = ""
  version: int = 1

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if not self.bits or set(self.bits) - {"0", "1"}:
      raise InputError(f"a key is a string of 0 and 1, got {self.bits!r}")
    if self.quantisation not in QUANTISATIONS:
      raise InputError(
        f"quantisation of a key is one of {', '.join(QUANTISATIONS)}; got {self.quantisation!r}"
      )
    whole = all(type(size) is int and size >= 1 for size in self.image_shape)
    if len(self.image_shape) != 3 or not whole:
      raise InputError(f"image_shape of a key is (height, width, channels), got {self.image_shape}")
    if set(self.mask) - {"0", "1"} or len(self.mask) != (len(self.bits) if self.num_errors else 0):
      raise InputError(
        "the mask of a key with a payload has as many 0 and 1 as the key, that of any other none"
      )
    if self.user < 0:
      raise InputError(f"users have numbers from 0 on, got {self.user}")
    if self.version != 1:
      raise InputError(f"a key file of version {self.version}; this one of the library reads version 1")

  @property
  def array(self) -> Int[np.ndarray, "n"]:
    return np.array([int(bit) for bit in self.bits], np.int32)

  @property
  def mask_array(self) -> Int[np.ndarray, "n"]:
    return np.array([int(bit) for bit in self.mask], np.int32)

  @property
  def key_id(self) -> str:
    """Sixteen hexadecimal digits that name the key; with a salt they tell nothing of its bits."""
    named = (self.version, self.scheme, self.salt, self.bits, self.codec_sha256, self.user)
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)


def from_json(text: str, source: str) -> WatermarkKey:
  """The key in the text of a key file; InputError, which names `source`, for anything else."""
  defaults = dataclasses.asdict(WatermarkKey("0"))
  try:
    entries: Any = json.loads(text)
  except ValueError:
    entries = None
  if not isinstance(entries, dict) or entries.keys() != defaults.keys():
    raise InputError(f"{source} is no key file: expected a JSON object with {', '.join(sorted(defaults))}")
  if isinstance(entries["image_shape"], list):
    entries["image_shape"] = tuple(entries["image_shape"])
  for name, default in defaults.items():
    if type(entries[name]) is not type(default):
      raise InputError(f"{source}: {name} of a key is like {default!r}, got {entries[name]!r}")
  try:
    return WatermarkKey(**entries)
  except InputError as error:
    raise InputError(f"{source}: {error}") from None


def demo_bits(num_bits: int) -> str:
  """The published string of 4, 8, 16, 32, 64 or 128 bits: for comparisons, no secret."""
  if num_bits not in DEMO_LENGTHS:
    raise InputError(
      f"there are published strings of {', '.join(map(str, DEMO_LENGTHS))} bits; got {num_bits}"
    )
  return _DEMO[:num_bits]


def streams(
  secret: str, purpose: str, numbers: Iterable[SupportsInt], num_bits: int
) -> Bool[np.ndarray, "m n"]:
  """For each number fair bits that nobody without the secret can tell from chance.

  SHAKE-256 of the secret, of what they are for, of the number and of their count: the same on every machine and with every
  version of jax. InputError for an empty secret or a number that is not from 0 to 2^64 - 1.
  """
  if not secret:
    raise InputError("keys are drawn from a secret, and this one is empty")
  parts = (b"jax_trustdiff watermark 1", purpose.encode(), secret.encode())
  text = b"".join(len(part).to_bytes(8, "big") + part for part in parts) + num_bits.to_bytes(8, "big")
  numbers, digests = list(map(int, numbers)), []
  if numbers and not 0 <= min(numbers) <= max(numbers) < 2**64:
    raise InputError(
      f"users and images have numbers from 0 to 2^64 - 1, got {min(numbers)} to {max(numbers)}"
    )
  for number in numbers:
    digests.append(hashlib.shake_256(text + number.to_bytes(8, "big")).digest(-(-num_bits // 8)))
  found = np.frombuffer(b"".join(digests), np.uint8).reshape(len(numbers), -1)
  return np.unpackbits(found, axis=1, count=num_bits).astype(bool)


def draw(
  secret: str, users: Iterable[SupportsInt], num_bits: int, scheme: str = "codec"
) -> Int8[np.ndarray, "users n"]:
  """A string for each of these users: the same in any set, and another for every number of bits and scheme."""
  return streams(secret, f"key of {scheme}", users, num_bits).astype(np.int8)


def salt(secret: str, user: int) -> str:
  """32 hexadecimal digits that nobody without the secret can tell from chance: the salt of that user's key."""
  return np.packbits(streams(secret, "salt of a key", [user], 128)).tobytes().hex()


def mask(secret: str, user: int, num_bits: int, payload: tuple[int, int]) -> Int8[np.ndarray, "n"]:
  """Fair bits that hide a code word: without the secret nobody can tell the masked one from chance.

  payload: (what the word says, the errors of its code). Another payload has another mask, so the strings of two are as unlike as any others.
  """
  return streams(secret, f"mask of the payload {payload[0]} with {payload[1]} errors", [user], num_bits)[
    0
  ].astype(np.int8)


def as_text(bits: Integer[Array, "n"] | Integer[np.ndarray, "n"]) -> str:
  """Bits as '0110...'."""
  return "".join(str(int(bit)) for bit in np.asarray(bits))
