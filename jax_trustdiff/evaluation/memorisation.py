"""Whether generated images are copies: distances to training images, and how often a planted one comes out again.

Carlini et al. 2023, "Extracting Training Data from Diffusion Models" (arXiv:2301.13188): a generated image is taken for a copy of its
nearest training image if it is nearer to it than is usual around there (section 5.1, on CIFAR-10).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jax_trustdiff.evaluation.fid import nearest
from jax_trustdiff.types import InputError

Images = UInt8[Array | np.ndarray, "_ _ _ _"]


class Copies(NamedTuple):
  """What was found of every generated image."""

  distance: Any  # [n] to its nearest training image: root mean square over values of images in [0, 1]
  index: Any  # [n] int, of that one
  ratio: Any  # [n] the distance over alpha times the mean one to its `neighbours` nearest; below 1 a copy


def copies(generated: Images, training: Images, neighbours: int = 50, alpha: float = 0.5) -> Copies:
  """Distances of generated images to different training images; where those are fewer than `neighbours`, to all of them.

  The measure of Carlini et al. 2023, eq. 3, with their numbers for CIFAR-10. A training image that is there many times counts once: its
  duplicates would be all the neighbours of a copy of it, and the ratio 1 / alpha. InputError for images of two shapes.
  """
  if generated.shape[1:] != training.shape[1:]:
    raise InputError(
      f"generated images are {list(generated.shape[1:])} and training images {list(training.shape[1:])}"
    )
  first = np.sort(np.unique(np.asarray(training).reshape(len(training), -1), axis=0, return_index=True)[1])
  x, y = _flat(generated), _flat(np.asarray(training)[first])
  order = nearest(y, x, min(neighbours, len(y)))
  found = np.asarray(jax.lax.map(lambda row: _distances(row[0], jnp.asarray(y)[row[1]]), (x, order)))
  scale = alpha * np.maximum(found.mean(1), np.finfo(np.float32).tiny)
  return Copies(found[:, 0], first[order[:, 0]], found[:, 0] / scale)


def distances_to(generated: Images, target: UInt8[Array | np.ndarray, "_ _ _"]) -> Float[np.ndarray, "n"]:
  """The root mean square difference of each generated image to one image, of values in [0, 1]."""
  return np.asarray(_distances(jnp.asarray(_flat(target[None])[0]), jnp.asarray(_flat(generated))))


def _flat(images: Images) -> Float[np.ndarray, "n d"]:
  images = np.asarray(images)
  return images.reshape(len(images), -1).astype(np.float32) / 255


def _distances(one: Float[Array, "d"], others: Float[Array, "n d"]) -> Float[Array, "n"]:
  return jnp.sqrt(jnp.square(others - one).mean(-1))
