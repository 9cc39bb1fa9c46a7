"""The strings that are written into images: drawn from a secret, one for each of many users, and what a key file says.

A key that is to prove anything is random and secret (`draw`): the p-values of `detection` are probabilities of its draw.
The published demo keys are neither.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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
  bytes before anything else saw them, else 'none'. secret_sha256: of the secret that `draw` was given, never the secret; '' for
  given bits. user: its number in a set of keys.
  """

  bits: str
  scheme: str = "codec"
  codec_sha256: str = ""
  image_shape: tuple[int, ...] = (32, 32, 3)
  quantisation: str = "uint8"
  secret_sha256: str = ""
  user: int = 0

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if not self.bits or set(self.bits) - {"0", "1"}:
      raise InputError(f"a key is a string of 0 and 1, got {self.bits!r}")
    if self.quantisation not in QUANTISATIONS:
      raise InputError(
        f"quantisation of a key is one of {', '.join(QUANTISATIONS)}; got {self.quantisation!r}"
      )
    if len(self.image_shape) != 3 or min(self.image_shape) < 1:
      raise InputError(f"image_shape of a key is (height, width, channels), got {self.image_shape}")

  @property
  def array(self) -> Int[np.ndarray, "n"]:
    return np.array([int(bit) for bit in self.bits], np.int32)

  @property
  def key_id(self) -> str:
    """Sixteen hexadecimal digits that name the key without giving its bits away to those who know only them."""
    return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

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


def draw(secret: str, users: Int[Array, "users"] | np.ndarray, num_bits: int) -> Int[Array, "users n"]:
  """Fair bits for each of these users from the secret: the string of a user is the same in any set.

  InputError for an empty secret.
  """
  if not secret:
    raise InputError("keys are drawn from a secret, and this one is empty")
  seeds = np.frombuffer(hashlib.sha256(b"jax_trustdiff key\0" + secret.encode()).digest(), np.uint32)
  root = functools.reduce(jax.random.fold_in, seeds[1:], jax.random.key(seeds[0]))
  return jax.vmap(lambda user: jax.random.bernoulli(jax.random.fold_in(root, user), 0.5, (num_bits,)))(
    jnp.asarray(users, jnp.uint32)
  ).astype(jnp.int32)


def secret_sha256(secret: str) -> str:
  """What a key file says of the secret, for its owner to recognise it."""
  return hashlib.sha256(b"jax_trustdiff secret\0" + secret.encode()).hexdigest()


def as_text(bits: Int[Array, "n"] | Int[np.ndarray, "n"]) -> str:
  """Bits as '0110...'."""
  return "".join(str(int(bit)) for bit in np.asarray(bits))
