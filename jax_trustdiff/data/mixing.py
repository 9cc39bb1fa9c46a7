"""Generated images beside real ones: one source of both, and batches with a fixed share of each.

"Better Diffusion Models Further Improve Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638) fills a part of every
batch with generated images. An epoch is counted in batches of the real data set, however many images were generated.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from jax_trustdiff.data.pipeline import EpochSampler
from jax_trustdiff.data.readers import Rows
from jax_trustdiff.data.records import ImageSource, agreed_names, given_names
from jax_trustdiff.data.sources import parts
from jax_trustdiff.types import InputError

WALKS = ("with_replacement", "permutation")
GENERATED_KEY = 2**31 - 5  # of the generated part's draws, beside the seed: no number of an epoch


def generated_source(path: str, real: ImageSource) -> ImageSource:
  """The generated images that `sources.parts` reads at `path`, with the classes of `real`; InputError if they do not fit to it.

  Images without labels are of those classes too, and `labelled` stays False.
  """
  found = parts(path, real.num_classes)
  if found.image_shape != real.image_shape:
    raise InputError(
      f"the images of {path} are {list(found.image_shape)} and the real ones {list(real.image_shape)}"
    )
  agreed_names(given_names(found), given_names(real), path, "the real images")
  return dataclasses.replace(found, class_names=real.class_names)


def together(real: ImageSource, generated: ImageSource) -> ImageSource:
  """Both as one source: positions 0 .. len(real) - 1 are the real images, those after them the generated ones.

  A generated image's id is -1 - (its id among the generated), so that no two images share one. If the generated images have soft
  labels, those of a real image are 1 for its class and 0 for the others.
  """
  both = dataclasses.replace(
    real,
    images=Rows([real.images, generated.images]),
    labels=np.concatenate([real.labels, generated.labels]),
    ids=np.concatenate([real.ids, -1 - generated.ids]),
  )
  if generated.soft_labels is None:
    return both
  certain = np.eye(real.num_classes, dtype=generated.soft_labels.dtype)[real.labels]
  return dataclasses.replace(both, soft_labels=Rows([certain, generated.soft_labels]))


class MixedSampler:
  """Batches of which `num_real_rows` are real images and the rest generated ones, in a drawn order; see `pipeline.EpochSampler`.

  num_real, num_generated: images of the two parts of the source that `together` makes. real_fraction: of a batch, in [0, 1];
  the generated images of a batch are int(batch_size (1 - real_fraction)), as the original counts.
  walk: 'with_replacement' is the original: every epoch of `steps_per_epoch` batches begins a fresh permutation of the real
  images and takes consecutive slices; where a permutation ends, its last batch has fewer real images, generated ones in their
  place, and the next batch begins another; generated images are drawn uniformly with replacement.
  'permutation' walks through both parts without replacement across epochs: every image of a part is seen once before any is
  seen again, and every batch has the same share.

  A batch is a pure function of (seed, step), so that a run resumes in both parts from its step alone.
  """

  def __init__(
    self,
    num_real: int,
    num_generated: int,
    batch_size: int,
    real_fraction: float,
    steps_per_epoch: int,
    walk: str = "with_replacement",
    seed: int = 0,
  ):
    if walk not in WALKS:
      raise InputError(f"unknown walk {walk!r} of generated data; there are {', '.join(WALKS)}")
    if not 0 <= real_fraction <= 1:
      raise InputError(f"the real fraction of a batch lies in [0, 1], found {real_fraction}")
    if num_real < 1 or num_generated < 1 or steps_per_epoch < 1:
      raise InputError(f"{num_real} real and {num_generated} generated images; both are needed")
    self.num_examples, self.batch_size = num_real + num_generated, batch_size
    self.steps_per_epoch = steps_per_epoch
    generated_rows = int(
      batch_size * (1 - real_fraction) + 1e-9
    )  # 512 (1 - 0.3) is 358.4, 100 (1 - 0.9) is 10
    self.num_real_rows = batch_size - generated_rows
    self._num_real, self._num_generated, self._walk, self._seed = num_real, num_generated, walk, seed
    self._real = EpochSampler(num_real, max(1, self.num_real_rows), seed)
    self._generated = EpochSampler(num_generated, max(1, generated_rows), seed ^ 0x5EED)

  def indices(self, step: int) -> Int64[np.ndarray, "b"]:
    """Positions in the source of the examples of batch `step`."""
    draws = np.random.RandomState([self._seed, GENERATED_KEY, step])  # a generator whose stream never changes
    if self._walk == "permutation":
      real = self._real.indices(step) if self.num_real_rows else np.zeros(0, np.int64)
      missing = self.batch_size - len(real)
      generated = self._generated.indices(step)[:missing]
    else:
      real = self._slice_of_epoch(step) if self.num_real_rows else np.zeros(0, np.int64)
      generated = draws.randint(0, self._num_generated, self.batch_size - len(real), np.int64)
    return draws.permutation(np.concatenate([real, self._num_real + generated]))

  def _slice_of_epoch(self, step: int) -> np.ndarray:
    """The real images of a batch: the next slice of the epoch's permutation, or of the one that follows when it has ended."""
    epoch, batch = divmod(step, self.steps_per_epoch)
    per_permutation = -(-self._num_real // self.num_real_rows)
    number, slice_ = divmod(batch, per_permutation)
    permutations = -(-self.steps_per_epoch // per_permutation)
    order = self._real.permutation(epoch * permutations + number)
    return order[slice_ * self.num_real_rows : (slice_ + 1) * self.num_real_rows].astype(np.int64)
