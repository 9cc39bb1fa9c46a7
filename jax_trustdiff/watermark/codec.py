"""Training a codec: what it is asked to do, and when the image begins to count.

Zhao et al. 2023 (arXiv:2303.10137), section 3.2, with the schedule of Yu et al. 2021 (arXiv:2007.08457): the bits alone until they
are read, then the image more and more.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import Bits, InputError, Logits, Unit, Variables, WatermarkCodec
from jax_trustdiff.watermark.distortions import quantise

NOT_YET = -1  # the counter of a gate that is shut


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class BoundCodec:
  """A codec with its variables, as a pytree: the variables are its leaves."""

  network: WatermarkCodec = dataclasses.field(metadata={"static": True})
  variables: Variables

  def encode(self, x: Shaped[Array, "b h w c"], bits: jax.typing.ArrayLike) -> Unit:
    """The images, in [0, 1], with these bits in them; bits [b n], or [n] for the same in all. InputError for bytes and for other numbers of bits."""
    bits, num_bits = jnp.asarray(bits), self.network.num_bits
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise InputError(f"a codec marks images in [0, 1], floating point; these are {jnp.result_type(x)}")
    if bits.shape not in ((num_bits,), (len(x), num_bits)):
      raise InputError(f"the codec writes {num_bits} bits into each of {len(x)} images, got {bits.shape}")
    return self.network.encode(self.variables, x, jnp.broadcast_to(bits, (len(x), num_bits)))

  def decode(self, x: Unit) -> Logits:
    """Logits [b n] of the bits: positive for a 1."""
    return self.network.decode(self.variables, x)


@dataclasses.dataclass(frozen=True)
class ImageGate:
  """The weight of the image's error: 0 until a batch is read well enough, and then rising.

  A counter is -1 at first, 0 at the step whose batch has a bit accuracy above `opens_above`, and one more at every step after it,
  whatever happens. The weight is clip(largest (counter - wait) / ramp, 0, largest). InputError for numbers that make no gate.
  """

  opens_above: float = 0.9
  wait: int = 1000
  ramp: int = 3000
  largest: float = 10.0

  def __post_init__(self):
    if not 0.5 < self.opens_above < 1:
      raise InputError(f"a gate opens above a bit accuracy between 0.5 and 1, got {self.opens_above}")
    if self.ramp < 1 or self.wait < 0 or self.largest < 0:
      raise InputError(
        f"a gate needs ramp of at least 1, wait and largest of at least 0; got {self.ramp}, {self.wait} and {self.largest}"
      )

  def weight(self, counter: Int[Array, ""]) -> Float[Array, ""]:
    return jnp.clip(self.largest * (counter - self.wait) / self.ramp, 0, self.largest)

  def advance(self, counter: Int[Array, ""], bit_accuracy: Float[Array, ""]) -> Int[Array, ""]:
    return jnp.where(counter == NOT_YET, jnp.where(bit_accuracy > self.opens_above, 0, NOT_YET), counter + 1)


@dataclasses.dataclass(frozen=True)
class CodecLoss:
  """BCE(bits, logits) + weight * mean (marked - image)^2, of images in [0, 1], bits fresh for every image and step.

  The decoder sees the marked images after `distort`; None: as they are, as in both papers. quantised: rounded to bytes first,
  as they will be on disk. The error is that of what the encoder returned.
  """

  codec: WatermarkCodec
  gate: ImageGate = ImageGate()
  distort: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  quantised: bool = False

  def __call__(
    self, variables: Variables, x: Unit, key: Key[Array, ""], counter: Int[Array, ""]
  ) -> tuple[Float[Array, ""], tuple[Int[Array, ""], dict[str, Float[Array, ""]]]]:
    """(loss, (the gate's next counter, metrics)); the weight is that of `counter`, before it moves."""
    bits_key, distort_key = jax.random.split(key)
    bits = jax.random.bernoulli(bits_key, 0.5, (x.shape[0], self.codec.num_bits)).astype(jnp.int32)
    marked = self.codec.encode(variables, x, bits)
    error = jnp.square(marked - x).mean()
    seen = quantise(marked) if self.quantised else marked
    if self.distort is not None:
      seen = self.distort(distort_key, seen)
    logits = self.codec.decode(variables, seen)
    bce = optax.sigmoid_binary_cross_entropy(logits, bits).mean()
    accuracy = bit_accuracy(logits, bits)
    weight = self.gate.weight(counter)
    metrics = {"bce": bce, "bit_accuracy": accuracy, "psnr": psnr(error), "image_weight": weight}
    return bce + weight * error, (self.gate.advance(counter, accuracy), metrics)


def bit_accuracy(logits: Logits, bits: Bits) -> Float[Array, ""]:
  """The part of the bits that is read right, where a positive logit is a 1."""
  return ((logits > 0) == (bits > 0)).mean()


def psnr(mean_square_error: Float[Array, "*any"]) -> Float[Array, "*any"]:
  """Decibels of images in [0, 1]: -10 log10 of the error; 100 at most."""
  return -10 * jnp.log10(jnp.maximum(mean_square_error, 1e-10))
