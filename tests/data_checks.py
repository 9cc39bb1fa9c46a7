"""What the tests of the data sources share."""

import numpy as np

from jax_trustdiff.data.sources import SOURCES


def source_of(name: str, path, **options):
  """The source `name` of files at `path`."""
  return SOURCES[name](path=str(path), **options)


def images_labels(n: int = 7, side: int = 5, classes: int = 3, seed: int = 0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, side, side, 3)).astype(np.uint8), np.arange(n, dtype=np.int32) % classes


def assert_holds(source, images, labels):
  np.testing.assert_array_equal(np.asarray(source.images), images)
  np.testing.assert_array_equal(source.labels, labels)
  assert source.labels.dtype == np.int32 and source.ids.dtype == np.int64
  assert source.images.dtype == np.uint8 and source.image_shape == images.shape[1:]
  assert source.nbytes == images.nbytes and len(source) == len(images)
  order = [len(images) - 1, 0, 2, 2]
  records = source.take(order)
  np.testing.assert_array_equal(records["image"], images[order])
  np.testing.assert_array_equal(records["label"], labels[order])
  np.testing.assert_array_equal(records["id"], source.ids[order])
