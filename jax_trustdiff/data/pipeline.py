"""From a source to global batches on the mesh: the order of examples, two feeds, and evaluation batches.

The order is a pure function of the step (`EpochSampler`), so a run resumes from its step alone, and both
feeds give the same batches. A feed hands the compiled step two things: `arrays`, kept on the devices, and
a payload for each dispatch of k steps; inside the step `take(arrays, payload of one step)` is the batch

    {'image': uint8 [b h w c], 'label': int32 [b], 'id': int32 [b]}

and of a source with soft labels also 'soft_label': float32 [b num_classes].
"""

import collections
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int64

from jax_trustdiff import parallel
from jax_trustdiff.data.records import ImageSource
from jax_trustdiff.types import InputError, PyTree

Batch = dict[str, Any]  # {'image': ..., 'label': ..., 'id': ...}

CPU_BUDGET = 2 * 2**30  # bytes of images kept in the memory of a CPU, over all its devices
DEVICE_FRACTION = 0.25  # of an accelerator's memory may hold images
PREFETCH_BYTES = 2**27  # batches that a streaming feed reads ahead


@runtime_checkable
class Sampler(Protocol):
  """What a feed asks: positions in a source of `num_examples`, in batches of `batch_size`, as a pure function of the step."""

  num_examples: int
  batch_size: int

  def indices(self, step: int) -> Int64[np.ndarray, "b"]: ...


class EpochSampler:
  """The endless concatenation of one fresh permutation per epoch, cut into consecutive batches.

  Batch `step` is the slice [step * b, (step + 1) * b). Every example is seen once before any is seen again; a
  batch at the end of a permutation is filled from the next one, so all batches are full. Permutation `e`
  depends on (seed, e) only, and is the same with every version of numpy. seed: in [0, 2^32).

  `steps_per_epoch` is ceil(n / b), the number of steps that have seen every example at least once.
  """

  def __init__(self, num_examples: int, batch_size: int, seed: int = 0):
    if num_examples < 1 or batch_size < 1:
      raise InputError(f"a sampler needs examples and a batch size; found {num_examples} and {batch_size}")
    if not 0 <= seed < 2**32:
      raise InputError(f"seed must be at least 0 and below 2**32; found {seed}")
    self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
    self.steps_per_epoch = -(-num_examples // batch_size)
    self._lock, self._cache = threading.Lock(), {}

  def indices(self, step: int) -> Int64[np.ndarray, "b"]:
    """Positions in the source of the examples of batch `step`."""
    start, stop = step * self.batch_size, (step + 1) * self.batch_size
    pieces = []
    while start < stop:
      epoch, offset = divmod(start, self.num_examples)
      length = min(stop - start, self.num_examples - offset)
      pieces.append(self.permutation(epoch)[offset : offset + length])
      start += length
    return np.concatenate(pieces).astype(np.int64)

  def permutation(self, epoch: int) -> np.ndarray:
    """The order of positions in an epoch, int32 or int64 [n]."""
    with self._lock:  # a streaming feed asks from several threads
      order = self._cache.pop(epoch, None)
      if order is None:
        small = self.num_examples <= np.iinfo(np.int32).max
        order = np.arange(self.num_examples, dtype=np.int32 if small else np.int64)
        np.random.RandomState([self.seed, epoch]).shuffle(order)  # this generator's stream never changes
      self._cache = dict([*self._cache.items(), (epoch, order)][-2:])  # the two used last
      return order


class ResidentFeed:
  """All images as uint8 on every device of the mesh; a payload is the positions, int32 [k, b]."""

  def __init__(self, source: ImageSource, sampler: Sampler, mesh: Mesh):
    _check(source, sampler, mesh)
    self.sampler, self.mesh, self.step = sampler, mesh, 0
    self.image_shape = source.image_shape
    everything = source.take(np.arange(len(source)))
    everything["id"] = everything["id"].astype(np.int32)
    # Rows are kept flat: the tiled layout of a TPU would pad 3 channels to 128.
    everything["image"] = everything["image"].reshape(len(source), -1)
    self.arrays = parallel.replicate_to_devices(mesh, everything)

  def take(self, arrays: PyTree, payload: PyTree) -> Batch:
    batch = {name: array.at[payload].get(mode="promise_in_bounds") for name, array in arrays.items()}
    return batch | {"image": batch["image"].reshape(-1, *self.image_shape)}

  def start(self, step: int) -> None:
    self.step = step

  def next(self, num_steps: int) -> PyTree:
    rows = parallel.process_rows(self.sampler.batch_size, self.mesh)
    steps = range(self.step, self.step + num_steps)
    index = np.stack([self.sampler.indices(step)[rows] for step in steps]).astype(np.int32)
    self.step += num_steps
    return parallel.to_global(self.mesh, index, parallel.batch_sharding(self.mesh, axis=1))

  def close(self) -> None:
    """Nothing is read ahead."""


class StreamingFeed:
  """Batches read ahead from the source by grain's threads; a payload is the batches themselves, stacked.

  Item i of the underlying `grain.MapDataset` is this process's rows of batch i, so a step is a
  position. About `prefetch_bytes` of batches are held in memory, and at least two.
  """

  def __init__(self, source: ImageSource, sampler: Sampler, mesh: Mesh, prefetch_bytes: int = PREFETCH_BYTES):
    import grain

    _check(source, sampler, mesh)
    self.mesh, self.arrays = mesh, {}
    rows = parallel.process_rows(sampler.batch_size, mesh)
    ahead = int(np.clip(prefetch_bytes // (len(rows) * int(np.prod(source.image_shape))), 2, 16))
    options = grain.ReadOptions(num_threads=min(ahead, 8), prefetch_buffer_size=ahead)
    self._dataset = grain.MapDataset.source(_Batches(source, sampler, rows)).to_iter_dataset(options)
    self._iterator = iter(self._dataset)

  def take(self, arrays: PyTree, payload: PyTree) -> Batch:
    return payload

  def start(self, step: int) -> None:
    self._iterator.set_state({"next_index": step})

  def next(self, num_steps: int) -> PyTree:
    batches = [next(self._iterator) for _ in range(num_steps)]
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    return parallel.to_global(self.mesh, stacked, parallel.batch_sharding(self.mesh, axis=1))

  def close(self) -> None:
    self._iterator.close()


class _Batches:
  """Random access to this process's rows of the batch of each step, for grain."""

  def __init__(self, source: ImageSource, sampler: Sampler, rows: np.ndarray):
    self.source, self.sampler, self.rows = source, sampler, rows

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, step: int) -> Batch:
    batch = self.source.take(self.sampler.indices(step)[self.rows])
    return batch | {"id": batch["id"].astype(np.int32)}


def make_feed(
  source: ImageSource,
  sampler: Sampler,
  mesh: Mesh,
  resident: str = "auto",
  budget_bytes: int | None = None,
) -> ResidentFeed | StreamingFeed:
  """A ResidentFeed if the images fit `budget_bytes` on each device, else a StreamingFeed.

  resident: 'auto', or 'yes' or 'no' to decide without looking at the size. Both feeds give the same batches.
  budget_bytes: by default a quarter of a device's memory, as it reports it; on CPUs 2 GiB over all devices.
  In a run of several processes the images must fit in every one; all must call this together.
  """
  if resident not in ("auto", "yes", "no"):
    raise InputError(f"resident={resident!r}; expected 'auto', 'yes' or 'no'")
  fits = resident == "yes"
  if resident == "auto":
    fits = _in_all_processes(source.nbytes <= (device_budget() if budget_bytes is None else budget_bytes))
  return (ResidentFeed if fits else StreamingFeed)(source, sampler, mesh)


def device_budget() -> int:
  """Bytes of images that one device may hold: see `make_feed`."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"] * DEVICE_FRACTION)
  return CPU_BUDGET // jax.local_device_count()


def eval_batches(source: ImageSource, batch_size: int, mesh: Mesh) -> Iterator[Batch]:
  """The source in order, as global batches of one shape with `mask` bool [b], False for filling rows.

  Rows that fill up the last batch repeat the last example: drop them with the mask, e.g.
  `sum(correct * mask) / len(source)`.
  Each process reads its own rows only. There are ceil(n / b) batches.
  """
  parallel.check_batch(batch_size, mesh)
  rows = parallel.process_rows(batch_size, mesh)
  for start in range(0, len(source), batch_size):
    index = start + rows
    batch = source.take(np.minimum(index, len(source) - 1))
    batch = batch | {"id": batch["id"].astype(np.int32), "mask": index < len(source)}
    yield parallel.to_global(mesh, batch)


def map_images(
  function: Callable[[Batch], PyTree],
  source: ImageSource,
  batch_size: int,
  mesh: Mesh,
  progress: Callable[[int], None] | None = None,
) -> PyTree:
  """What `function` finds of each image, on the host: its arrays [b ...] of `eval_batches` together, [n ...].

  progress: called with the number of images done so far.
  """
  parts, waiting, done = [], collections.deque(), 0

  def fetch():
    nonlocal done
    found, mask = parallel.gather_to_host(waiting.popleft())
    parts.append(jax.tree.map(lambda rows: rows[mask], found))
    done += int(mask.sum())
    if progress is not None:
      progress(done)

  for batch in eval_batches(source, batch_size, mesh):
    waiting.append((function(batch), batch["mask"]))
    if len(waiting) > 1:  # while one is computed, the one before is fetched
      fetch()
  while waiting:
    fetch()
  return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def _in_all_processes(here: bool) -> bool:
  """True if it is `here` and in every other process of the run, which must all ask."""
  return bool(np.min(multihost_utils.process_allgather(np.int32(here)))) if jax.process_count() > 1 else here


def _check(source: ImageSource, sampler: Sampler, mesh: Mesh) -> None:
  parallel.check_batch(sampler.batch_size, mesh)
  if sampler.num_examples != len(source):
    raise InputError(f"the sampler counts {sampler.num_examples} examples and the source {len(source)}")
  if len(source) and source.ids.max() > np.iinfo(np.int32).max:
    raise InputError(f"image id {source.ids.max()} does not fit the 32 bits an id has on the devices")
