"""Inpainting by a sampler of whole images: pixels that are known are put back, with noise, after every step."""

import dataclasses

import jax
from jaxtyping import Array, Float

from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """The pixels that an image must have; an argument of every fixed-grid sampler: `sampler(denoise, noise, keys, known=...)`.

  At the start and after every step (every correction, too) the sampler takes

      x <- (1 - mask) x + mask * scale * (image + sigma * noise)

  with sigma and scale of that time (Song et al. 2021, arXiv:2011.13456, appendix I.2) and noise of the image's key that no
  other draw uses. The last step ends at sigma 0, so that known pixels come out exactly.

  The free pixels are only nearly of the conditional distribution: they see known ones as noisy as themselves, hence late. Steps
  alone do not mend that, corrections do. For two pixels of variance v and covariance r v the sampler of the reverse SDE tends
  to the mean (1 - sqrt(1 - r^2)) / r of the known one, r in the limit of many corrections at every noise level.
  """

  image: jax.Array  # [b h w c] in [-1, 1]; of any value where it is not known
  mask: jax.Array  # [b h w c], or 1 in place of any of them: 1 where known, 0 where free

  def put_back(
    self,
    x: Float[Array, "b h w c"],
    sigma: Float[Array, ""],
    scale: Float[Array, ""],
    noise: Float[Array, "b h w c"],
  ) -> Float[Array, "b h w c"]:
    """`x` at noise level `sigma` and `scale`, with the known pixels in place of its own."""
    mask = self.mask.astype(x.dtype)
    return (1 - mask) * x + mask * scale * (self.image.astype(x.dtype) + sigma * noise)

  def check(self, shape: tuple[int, ...]) -> None:
    """InputError unless the image and mask are for images of `shape`."""
    fits = self.mask.ndim == len(shape) and all(
      m in (1, n) for m, n in zip(self.mask.shape, shape, strict=True)
    )
    if self.image.shape != shape or not fits:
      found = f"{self.image.shape} and {self.mask.shape}"
      raise InputError(f"known image and mask must fit the noise, {shape}; got {found}")
