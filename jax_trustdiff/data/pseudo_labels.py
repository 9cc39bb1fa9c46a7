"""What a classifier says about images that were generated: other labels for them, soft ones, and a choice of the surest.

Wang et al. 2023 (arXiv:2302.04638) generate 500,000 images of each class and train on the fifth of each class of which a
standard classifier is surest. The choice is a small file beside the images, which stay where they are.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np
from jaxtyping import Float, Int

from jax_trustdiff.data import readers
from jax_trustdiff.data.records import ImageSource, limit
from jax_trustdiff.types import InputError

NEEDED = ("position", "label", "confidence", "num_images", "num_classes", "fingerprint")
LOOKED_AT = 64  # images of a source whose bytes are in its fingerprint


@dataclasses.dataclass(frozen=True)
class PseudoLabels:
  """Of m chosen images among the first `num_images` of a source.

  position: int64 [m], ascending. label: int32 [m] in [0, num_classes). confidence: float32 [m] in [0, 1], the probability that the
  classifier gives to that label. probabilities: float16 [m num_classes], or None. fingerprint: that of those `num_images`.
  """

  position: np.ndarray
  label: np.ndarray
  confidence: np.ndarray
  probabilities: np.ndarray | None
  num_images: int
  num_classes: int
  fingerprint: str

  def __len__(self) -> int:
    return len(self.position)

  def apply(self, source: ImageSource, soft: bool = False) -> ImageSource:
    """The chosen images with these labels, and with soft ones if asked for. InputError if they are of another source."""
    if self.num_images > len(source) or self.num_classes != source.num_classes:
      raise InputError(
        f"these labels are of {self.num_images} images in {self.num_classes} classes, and there are {len(source)} images in"
        f" {source.num_classes}"
      )
    source = limit(source, self.num_images)
    if fingerprint(source) != self.fingerprint:
      raise InputError(
        f"these labels are of {self.num_images} other images, or of these in another order: give the images in the order in which"
        " they were labelled"
      )
    if soft and self.probabilities is None:
      raise InputError("these labels hold no probabilities: make them again with label.soft=True")
    chosen = dataclasses.replace(source.select(self.position), labels=self.label, labelled=True)
    if not soft:
      return chosen
    rows = readers.Rows([self.probabilities])
    return dataclasses.replace(chosen, soft_labels=rows)

  def save(self, path: pathlib.Path) -> None:
    """An uncompressed .npz file, whole or not at all."""
    arrays = {name: value for name, value in vars(self).items() if value is not None}
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
      np.savez(file, **arrays)
    temporary.replace(path)


def load(path: str | pathlib.Path) -> PseudoLabels:
  """The labels in a file of `PseudoLabels.save`; probabilities stay on disk. InputError for anything else."""
  file = readers.existing(path, "a file of labels that label_generated.py wrote")
  members = readers.npz_members(file)
  if missing := [name for name in NEEDED if name not in members]:
    raise InputError(f"{file} holds no {missing[0]!r}: it is no file of labels that label_generated.py wrote")
  found = {name: members[name]() for name in NEEDED}
  position, label, confidence = (np.asarray(found[name]) for name in NEEDED[:3])
  num_images, num_classes = int(found["num_images"]), int(found["num_classes"])
  of_images = str(found["fingerprint"])
  probabilities = members["probabilities"]() if "probabilities" in members else None
  shapes = {position.shape, label.shape, confidence.shape, (len(position),)}
  if probabilities is not None:
    shapes.add((len(probabilities),) if probabilities.shape[1:] == (num_classes,) else probabilities.shape)
  ordered = len(position) and position[0] >= 0 and position[-1] < num_images and (np.diff(position) > 0).all()
  if len(shapes) > 1 or not ordered or not 0 <= label.min() <= label.max() < num_classes:
    raise InputError(f"{file} is damaged: its positions or labels are not those of {num_images} images")
  return PseudoLabels(
    position, label.astype(np.int32), confidence, probabilities, num_images, num_classes, of_images
  )


def fingerprint(source: ImageSource) -> str:
  """Sixteen hexadecimal digits of the SHA-256 of all labels and of LOOKED_AT images that lie evenly apart."""
  digest = hashlib.sha256(np.ascontiguousarray(source.labels, np.int32).tobytes())
  positions = np.linspace(0, len(source) - 1, LOOKED_AT).astype(np.int64)
  digest.update(np.ascontiguousarray(source.images[positions]).tobytes())
  return digest.hexdigest()[:16]


def surest(
  label: Int[np.ndarray, "n"], confidence: Float[np.ndarray, "n"], fraction: float
) -> Int[np.ndarray, "m"]:
  """Positions of the int(fraction k) surest of the k images of each label, at least one, ascending.

  Among equals the first come first. InputError unless fraction lies in (0, 1].
  """
  if not 0 < fraction <= 1:
    raise InputError(f"the part of each class that is chosen lies in (0, 1], found {fraction}")
  chosen = []
  for value in np.unique(label):
    rows = np.flatnonzero(label == value)
    order = np.argsort(-confidence[rows], kind="stable")
    chosen.append(rows[order[: max(1, int(fraction * len(rows) + 1e-9))]])
  return np.sort(np.concatenate(chosen))
