"""Marks on the noise that a sampler starts from, for any diffusion model as it is; read by solving its ODE backwards.

`GaussianShading` (Yang et al. 2024, arXiv:2404.04956) carries bits and leaves each image's noise exactly normal. `Rings`
(Wen et al. 2023, "Tree-Ring Watermarks", arXiv:2305.20030) carries one yes or no in the Fourier transform of the noise, and
changes its distribution. Both take standard normal noise [b h w c] and return marked noise of unit scale, which a sampler multiplies
by its sigma_max; a sampler's `invert` gives the estimate that is read.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer
from scipy import special

from jax_trustdiff.types import Image, InputError, PerExample
from jax_trustdiff.watermark.keys import streams

Nonces = Int[np.ndarray, "nonces"] | None


@dataclasses.dataclass(frozen=True)
class GaussianShading:
  """Bits in the signs of the noise: each bit in about d / num_bits of an image's d values, which the secret chooses.

  A value's sign is its bit xor a bit of the secret's stream, its magnitude that of the given noise. With a stream of its own for
  every image (nonces, of which none comes twice) nobody without the secret can tell marked noise from N(0, I), images are as
  diverse as unmarked ones, and who reads must know which image it is; trying many nonces is trying many keys
  (`detection.family_wise`). With one stream for all (no nonces) every image has the same signs: an image is read without
  knowing which it is, and images resemble each other.
  """

  secret: str = dataclasses.field(repr=False)
  num_bits: int
  image_shape: tuple[int, int, int]

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if not 1 <= self.num_bits <= self.size:
      raise InputError(f"noise of {self.size} values carries 1 to {self.size} bits, not {self.num_bits}")

  @property
  def size(self) -> int:
    return math.prod(self.image_shape)

  def streams(self, nonces: Nonces = None) -> Bool[np.ndarray, "b d"]:
    """The stream of each image; b is 1 without nonces."""
    if nonces is None:
      return streams(self.secret, "stream of gaussian shading for all", [0], self.size)
    return streams(self.secret, "stream of gaussian shading", nonces, self.size)

  def which(self) -> Int[np.ndarray, "d"]:
    """The bit of each value: each bit has as many values as any other, or one more."""
    words = np.packbits(streams(self.secret, "order of gaussian shading", [0], 64 * self.size)).view(">u8")
    return np.argsort(words, kind="stable") % self.num_bits

  def mark(
    self, bits: Integer[np.ndarray, "n"] | Integer[Array, "n"], noise: Image, nonces: Nonces = None
  ) -> Image:
    """The noise with the signs that say `bits` (0 or 1). InputError for other numbers of bits or sizes of noise."""
    if bits.shape != (self.num_bits,):
      raise InputError(f"the noise is to carry {self.num_bits} bits, got {bits.shape[0]}")
    self._check(noise, nonces)
    up = (np.asarray(bits) > 0)[self.which()] ^ self.streams(nonces)
    magnitude = jnp.abs(noise)
    return jnp.where(up.reshape(-1, *self.image_shape), magnitude, -magnitude)

  def read(self, noise: Image, nonces: Nonces = None) -> Float[Array, "b n"]:
    """Logits of the bits, positive for 1: the values of each, with the signs of the stream taken back, summed and of unit variance.

    So they are N(0, 1) for normal noise without a mark; a vote of signs alone would throw away how sure each value is.
    """
    self._check(noise, nonces)
    turned = jnp.where(self.streams(nonces), -1, 1) * noise.reshape(-1, self.size)
    which = self.which()
    totals = jax.vmap(lambda row: jax.ops.segment_sum(row, which, self.num_bits))(turned)
    return totals / np.sqrt(np.bincount(which)).astype(np.float32)

  def _check(self, noise: Image, nonces: Nonces):
    if noise.shape[1:] != self.image_shape:
      raise InputError(f"the mark is for noise of {self.image_shape}, got {noise.shape[1:]}")
    if nonces is not None and len(nonces) != len(noise):
      raise InputError(f"{len(noise)} images need as many nonces, got {len(nonces)}")


@dataclasses.dataclass(frozen=True)
class Rings:
  """Rings of a secret's values in the Fourier transform of one channel, at distances from low to high of its middle.

  On each ring the transform has one value, normal as those of the noise, and real, so that the marked noise is real: the
  transform of an image is Hermitian, and a complex value would be lost by half (the original keeps the real part of it).
  """

  secret: str = dataclasses.field(repr=False)
  image_shape: tuple[int, int, int]
  low: int = 1
  high: int = 10
  channel: int = 0

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    height, width, channels = self.image_shape
    if not 1 <= self.low < self.high < min(height, width) // 2:
      raise InputError(f"rings from {self.low} to {self.high} do not fit {height}x{width} frequencies")
    if not 0 <= self.channel < channels:
      raise InputError(f"there is no channel {self.channel} among {channels}")

  def values(self) -> Float[np.ndarray, "rings"]:
    """The value of each ring, standard normal."""
    count = self.high - self.low + 1
    words = np.packbits(streams(self.secret, "values of rings", [0], 64 * count)).view(">u8")
    return special.ndtri((words.astype(np.float64) + 0.5) / 2.0**64).astype(np.float32)

  def mark(self, noise: Image) -> Image:
    """The noise with the rings of the secret in its channel."""
    ring = self._rings()
    known = np.where(ring >= 0, self.values()[ring], 0)
    spectrum = jnp.where(ring >= 0, known, jnp.fft.fft2(noise[..., self.channel], norm="ortho"))
    return noise.at[..., self.channel].set(jnp.fft.ifft2(spectrum, norm="ortho").real)

  def means(self, noise: Image) -> Float[Array, "b rings"]:
    """The mean of the transform's real part on each ring."""
    ring = self._rings()
    spectrum = jnp.fft.fft2(noise[..., self.channel], norm="ortho").real
    return jnp.stack([spectrum[:, ring == i].mean(1) for i in range(self.high - self.low + 1)], 1)

  def agreement(self, noise: Image) -> PerExample:
    """The cosine, from -1 to 1, between the secret's values and the mean of the transform's real part on each ring."""
    return self._cosine(self.means(noise))

  def p_value_together(self, noise: Image) -> float:
    """`p_value` of the mean over images, which may share whatever they like but knowledge of the secret."""
    return float(self._p_value(self._cosine(self.means(noise).mean(0, keepdims=True)))[0])

  def p_value(self, noise: Image) -> Float[np.ndarray, "b"]:
    """P(an agreement as large or larger), over the draw of the secret's values, for any image whatever.

    Normal values point in a uniform direction of the R = high - low + 1 dimensions, so for t >= 0 P(cos >= t) = I_{1 - t^2}((R - 1) / 2,
    1 / 2) / 2. (Wen et al. 2023, eq. 5, take the noise to be white and normal, which estimates of it are not.)
    """
    return self._p_value(self.agreement(noise))

  def _cosine(self, means: Float[Array, "b rings"]) -> PerExample:
    values = self.values()
    lengths = jnp.maximum(jnp.linalg.norm(means, axis=1) * np.linalg.norm(values), 1e-30)
    return (means * values).sum(1) / lengths

  def _p_value(self, cosine: PerExample) -> Float[np.ndarray, "b"]:
    t = np.clip(np.asarray(cosine, np.float64), -1, 1)
    half = special.betainc((self.high - self.low) / 2, 0.5, 1 - t**2) / 2
    return np.where(t >= 0, half, 1 - half)

  def _rings(self) -> Int[np.ndarray, "h w"]:
    """The number of the ring that each frequency of `fft2` is on, from 0; -1 for none."""
    height, width, _ = self.image_shape
    down, along = np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width)
    ring = np.rint(np.hypot(down[:, None], along)).astype(int)
    return np.where((ring >= self.low) & (ring <= self.high), ring - self.low, -1)


MARKS = {"gaussian_shading": GaussianShading, "rings": Rings}
