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
from jaxtyping import Array, Bool, Complex, Float, Int, Key
from scipy import stats

from jax_trustdiff.types import Image, InputError, PerExample

_ORDER, _STREAM = 0, 1  # folded into the secret key


@dataclasses.dataclass(frozen=True)
class GaussianShading:
  """Bits in the signs of the noise: each bit in about d / num_bits of an image's d values, which the key chooses.

  A value's sign is its bit xor a bit of the key's stream, its magnitude that of the given noise. With a stream of its own for
  every image (`mark` with nonces) the marked noise is N(0, I) given anything but the key, images are as diverse as
  unmarked ones, and who reads must know which image it is. With one stream for all (no nonces) every image has the same signs: anyone's
  images can be read, and they resemble each other.
  """

  num_bits: int
  image_shape: tuple[int, int, int]

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if not 1 <= self.num_bits <= self.size:
      raise InputError(f"noise of {self.size} values carries 1 to {self.size} bits, not {self.num_bits}")

  @property
  def size(self) -> int:
    return math.prod(self.image_shape)

  def mark(
    self, key: Key[Array, ""], bits: Int[Array, "n"], noise: Image, nonces: Int[Array, "b"] | None = None
  ) -> Image:
    """The noise with the signs that say `bits` (0 or 1)."""
    carried = jnp.asarray(bits)[self._which(key)] > 0
    up = carried ^ self._stream(key, noise.shape[0], nonces)
    return jnp.where(up.reshape(noise.shape), jnp.abs(noise), -jnp.abs(noise))

  def read(
    self, key: Key[Array, ""], noise: Image, nonces: Int[Array, "b"] | None = None
  ) -> Float[Array, "b n"]:
    """Logits of the bits, positive for 1: the values of each, with the signs of the stream taken back, summed and of unit variance.

    So they are N(0, 1) for noise without a mark; a vote of signs alone would throw away how sure each value is.
    """
    turned = jnp.where(self._stream(key, noise.shape[0], nonces), -1, 1) * noise.reshape(-1, self.size)
    which = self._which(key)
    totals = jax.vmap(lambda row: jax.ops.segment_sum(row, which, self.num_bits))(turned)
    return totals / jnp.sqrt(jnp.bincount(which, length=self.num_bits))

  def _which(self, key: Key[Array, ""]) -> Int[Array, "d"]:
    """The bit of each value: each bit has as many values as any other, or one more."""
    return jax.random.permutation(jax.random.fold_in(key, _ORDER), jnp.arange(self.size) % self.num_bits)

  def _stream(self, key: Key[Array, ""], batch: int, nonces: Int[Array, "b"] | None) -> Bool[Array, "b d"]:
    stream = jax.random.fold_in(key, _STREAM)
    if nonces is None:
      return jnp.broadcast_to(jax.random.bernoulli(stream, 0.5, (self.size,)), (batch, self.size))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(stream, nonces)
    return jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (self.size,)))(keys)


@dataclasses.dataclass(frozen=True)
class Rings:
  """Rings of the key's values in the Fourier transform of one channel, at distances from low to high of its middle.

  On each ring the transform has one value, of unit variance as that of the noise, real, so that the marked noise is real: the
  transform of an image is Hermitian, and a complex value would be lost by half (the original keeps the real part of it).
  """

  image_shape: tuple[int, int, int]
  low: int = 1
  high: int = 10
  channel: int = 0

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    height, width, channels = self.image_shape
    if not 1 <= self.low <= self.high < min(height, width) // 2:
      raise InputError(f"rings from {self.low} to {self.high} do not fit {height}x{width} frequencies")
    if not 0 <= self.channel < channels:
      raise InputError(f"there is no channel {self.channel} among {channels}")

  def mark(self, key: Key[Array, ""], noise: Image) -> Image:
    """The noise with the rings of the key in its channel."""
    rings, values = self._pattern(key)
    spectrum = jnp.where(rings, values, self._spectrum(noise))
    channel = jnp.fft.ifft2(jnp.fft.ifftshift(spectrum, axes=(-2, -1)), norm="ortho").real
    return noise.at[..., self.channel].set(channel)

  def distance(self, key: Key[Array, ""], noise: Image) -> PerExample:
    """The sum of |transform - key|^2 over the frequencies of the rings, over its mean for noise without a mark."""
    rings, values = self._pattern(key)
    found = jnp.where(rings, jnp.square(jnp.abs(self._spectrum(noise) - values)), 0).sum((1, 2))
    return found / jnp.where(rings, 1 + jnp.square(values), 0).sum()

  def p_value(self, key: Key[Array, ""], noise: Image) -> Float[np.ndarray, "b"]:
    """P(a sum of squares as small or smaller) for normal noise of the channel's own variance (Wen et al. 2023, eq. 5).

    The frequencies u and -u of real noise are one, so there are M / 2 pairs: 2 sum / variance is noncentral chi-squared with M
    degrees of freedom, for M frequencies, of which none is its own opposite.
    """
    rings, values = self._pattern(key)
    spectrum = self._spectrum(noise)
    height, width, _ = self.image_shape
    before = np.arange(height * width).reshape(height, width) < height // 2 * width + width // 2
    half = np.asarray(rings) & before  # one of each pair
    variance = np.asarray(jnp.square(noise[..., self.channel]).mean((1, 2)))
    squares = np.where(half, np.square(np.abs(np.asarray(spectrum) - np.asarray(values))), 0).sum((1, 2))
    centre = np.where(half, np.square(np.asarray(values)), 0).sum()
    return stats.ncx2.cdf(2 * squares / variance, 2 * half.sum(), 2 * centre / variance)

  def _spectrum(self, noise: Image) -> Complex[Array, "b h w"]:
    return jnp.fft.fftshift(jnp.fft.fft2(noise[..., self.channel], norm="ortho"), axes=(-2, -1))

  def _pattern(self, key: Key[Array, ""]) -> tuple[Bool[Array, "h w"], Float[Array, "h w"]]:
    """(which frequencies are on rings, the value of each)."""
    height, width, _ = self.image_shape
    rows, columns = jnp.meshgrid(
      jnp.arange(height) - height // 2, jnp.arange(width) - width // 2, indexing="ij"
    )
    ring = jnp.round(jnp.hypot(rows, columns)).astype(int)
    values = jax.random.normal(key, (self.high + 1,))
    inside = (ring >= self.low) & (ring <= self.high)
    return inside, jnp.where(inside, values[jnp.clip(ring, 0, self.high)], 0)
