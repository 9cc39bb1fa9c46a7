"""Filling an image store shard by shard, alone or shared out: who makes which shard, what is there, space, progress, stopping.

Worker w of n makes the shards s with s mod n = w, the processes of a multi-host run are workers of their own, and whoever finds
all shards complete writes the manifest.
"""

import contextlib
import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.data.image_store import ImageStore
from jax_trustdiff.training.progress import ProgressReport, duration, say
from jax_trustdiff.types import InputError, Stopped

# (positions in the store, progress with the number of those done) -> (images uint8 [n h w c], labels [n], ids [n])
Make = Callable[[range, Callable[[int], None]], tuple[np.ndarray, np.ndarray, np.ndarray]]


def maker() -> str:
  """Where images are computed: version of JAX and kind of device, on which, among other things, their rounding depends."""
  device = jax.devices()[0]
  return f"jax {jax.__version__}, {device.platform} {device.device_kind}"


def fingerprint(described: Any, variables: Any) -> str:
  """SHA-256, in hexadecimal digits, of what a config says of a network and of names, types, shapes and values of its arrays."""
  digest = hashlib.sha256(json.dumps(config_lib.to_plain(described), sort_keys=True).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    array = np.asarray(leaf, order="C")
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def worker(section, name: str) -> tuple[int, int]:
  """(number of this worker, how many there are) of a section `name` with worker, num_workers and store.

  Every process of a multi-host run is counted as one.
  """
  if not 0 <= section.worker < section.num_workers:
    raise InputError(
      f"{name}.worker={section.worker} of {name}.num_workers={section.num_workers}: workers are 0, 1, ..."
    )
  if section.num_workers > 1 and not section.store:
    raise InputError(f"several workers need one store: give all of them the same --config.{name}.store=DIR")
  processes = jax.process_count()
  return section.worker * processes + jax.process_index(), section.num_workers * processes


def fill(store: ImageStore, shards: range, make: Make, verify: bool, what: str) -> tuple[int, float]:
  """Makes those of `shards` that are missing: (images made, seconds it took). Stopped after SIGTERM.

  verify: by the hashes of what is there, not the sizes alone. what: is to happen to the images, in the line that says how many.
  """
  todo = _todo(store, shards, verify)
  plan = store.plan
  total, left = (sum(len(plan.rows(shard)) for shard in part) for part in (shards, todo))
  say(
    f"{total - left:,} of {total:,} images are there already" if left < total else f"{total:,} images {what}"
  )
  if not todo:
    return 0, 0.0
  _check_space(store, left)
  began, made = time.perf_counter(), 0
  with _stop_signals(), ProgressReport("image", total, total - left) as progress:
    estimate = _Estimate(left)

    def update(count):
      estimate(made + count)
      progress.update(total - left + made + count)

    for shard in todo:
      rows = plan.rows(shard)
      store.write(shard, *make(rows, update))
      made += len(rows)
  return made, time.perf_counter() - began


def _todo(store: ImageStore, shards: range, verify: bool) -> list[int]:
  found = {shard: store.fault(shard, thorough=verify) for shard in shards}
  for shard, fault in found.items():
    if fault:
      say(f"{fault}: shard {shard} is made again")
  return [shard for shard, fault in found.items() if fault is not None]


def _check_space(store: ImageStore, num_images: int) -> None:
  needed, free = (
    store.plan.bytes_of_images * num_images // store.plan.num_images,
    shutil.disk_usage(store.path).free,
  )
  say(f"estimate: {_size(needed)} in {store.path}, of {_size(free)} free")
  if needed > free:
    raise InputError(
      f"the images need {_size(needed)} in {store.path} and {_size(free)} are free: take another store"
    )


class _Estimate:
  """Says once, as soon as a program that is compiled has run, how long the rest takes."""

  def __init__(self, total: int):
    self._total, self._first, self._said = total, None, False

  def __call__(self, done: int) -> None:
    now = time.perf_counter()
    if self._first is None:
      self._first = (now, done)
    elif not self._said and done > self._first[1] and now - self._first[0] > 1:
      self._said = True
      speed = (done - self._first[1]) / (now - self._first[0])
      say(f"estimate: {speed:,.1f} images/s, about {duration((self._total - done) / speed)} to go")


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
  """SIGTERM raises Stopped at once: nothing is half written. A second one kills."""

  def handler(number, frame):
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise Stopped("every shard written so far is kept; the same command goes on from there", 128 + number)

  try:
    before = signal.signal(signal.SIGTERM, handler)
  except ValueError:  # not the main thread (a notebook server): its owner has the signals
    yield
    return
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _size(count: int) -> str:
  unit = next(u for u in (2**40, 2**30, 2**20, 2**10) if count >= u or u == 2**10)
  return f"{count / unit:.1f} {dict(zip((2**40, 2**30, 2**20, 2**10), ('TiB', 'GiB', 'MiB', 'KiB'), strict=True))[unit]}"
