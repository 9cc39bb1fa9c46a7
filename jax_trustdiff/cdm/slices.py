"""The order in which a shard's images are seen, such that removing some changes nothing that was learned before they came.

SISA training (Bourtoule et al. 2021, arXiv:1912.03817, section 4): a shard's data lie in R slices; stage r trains on slices 0 .. r and
its state at the end is kept. An image of slice r is first seen in stage r, so to forget it the stages from r on are run again
from the state before them.

An image's slice, its place in every epoch and the noise it gets hang on the SHA-256 of its content; what is drawn by the place in a batch
(flips, dropout) follows. So training again without it is, bit for bit, training that never had it.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from jax_trustdiff.types import InputError

ContentIds = Sequence[bytes]  # SHA-256 of each image and its label, 32 bytes


def content_ids(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
  """SHA-256 of the shape, the bytes and the label of each image: images uint8 [n h w c], labels integers [n]."""
  head = ",".join(map(str, images.shape[1:])).encode()
  return [
    hashlib.sha256(b"%s|%d|%s" % (head, label, np.ascontiguousarray(image).tobytes())).digest()
    for image, label in zip(images, labels, strict=True)
  ]


def slice_of(ids: ContentIds, num_slices: int, seed: int = 0) -> np.ndarray:
  """The slice of each image [n], by its content alone: about equal slices."""
  if num_slices < 1:
    raise InputError(f"the number of slices must be at least 1, got {num_slices}")
  return np.array([_number(b"slice|%d|" % seed + one) % num_slices for one in ids], np.int64)


def shard_of(ids: ContentIds, num_shards: int, seed: int = 0) -> np.ndarray:
  """The shard of each image [n] by its content alone, where nothing else says it."""
  if num_shards < 1:
    raise InputError(f"the number of shards must be at least 1, got {num_shards}")
  return np.array([_number(b"shard|%d|" % seed + one) % num_shards for one in ids], np.int64)


def epochs_of_stages(epochs: int, num_slices: int) -> list[int]:
  """Epochs of each stage, which cost as much as `epochs` on all data: 2 E / (R + 1) each, rounded so that their sums are.

  With equal slices stage r sees (r + 1) / R of the data. InputError where a stage would have none.
  """
  each = 2 * epochs / (num_slices + 1)
  ends = [math.floor(stage * each + 1e-9) for stage in range(num_slices + 1)]
  found = [after - before for before, after in zip(ends, ends[1:], strict=False)]
  if min(found) < 1:
    raise InputError(
      f"{epochs} epochs in {num_slices} slices leave stages without an epoch: take more epochs"
    )
  return found


def epoch_order(ids: ContentIds, context: bytes) -> tuple[np.ndarray, np.ndarray]:
  """(order, keys) of an epoch: positions [n] as they come, and for each a random key's data uint32 [n 2], in that order.

  context: names the seed, the shard, the stage and the epoch. Sorted by the hash of context and content: without an image the
  others come in the same order, with the same keys.
  """
  hashes = [hashlib.sha256(context + b"|" + one).digest() for one in ids]
  order = np.array(sorted(range(len(ids)), key=lambda i: (hashes[i], ids[i])), np.int64)
  words = np.frombuffer(b"".join(hashes[i][:8] for i in order), ">u4").reshape(-1, 2)
  return order, words.astype(np.uint32)


def expected_share(num_shards: int, num_slices: int) -> float:
  """Of the whole training, the share that a deletion of one image drawn at random costs: (2 R + 1) / (3 R S).

  Equal shards and slices; stage j costs as j + 1, and an image of slice r has the stages r .. R - 1 run again. 1/S without slices.
  """
  return (2 * num_slices + 1) / (3 * num_slices * num_shards)


def expected_share_of(sizes: Sequence[Sequence[int]], stage_epochs: Sequence[Sequence[int]]) -> float:
  """`expected_share` of shards and slices as they are: sizes[i][r] images, stage_epochs[i][r] epochs."""
  costs = [
    [epochs * sum(size[: r + 1]) for r, epochs in enumerate(of_stages)]
    for size, of_stages in zip(sizes, stage_epochs, strict=True)
  ]
  total, images = sum(map(sum, costs)), sum(map(sum, sizes))
  again = sum(
    size[r] / images * sum(cost[r:])
    for size, cost in zip(sizes, costs, strict=True)
    for r in range(len(size))
  )
  return again / total


def _number(text: bytes) -> int:
  return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
