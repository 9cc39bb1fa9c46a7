"""Which image of a data set belongs to which shard and slice, and the batches that a shard is trained on.

An image is known by the hash of its content (`cdm.slices`). Batches come from the host in one shape, the last of an epoch filled up and
masked, so that a shard's program does not know how many images it has.
"""

import collections
import dataclasses
import hashlib
import pathlib
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.cdm import slices
from jax_trustdiff.data import sources
from jax_trustdiff.data.records import ImageSource, check_labelled
from jax_trustdiff.types import InputError, PyTree

WAYS = ("class", "owner", "hash", "score", "one")
LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Compartments:
  """A source with the shard and the slice of each image."""

  source: ImageSource
  names: tuple[str, ...]  # of the shards
  shard: np.ndarray  # [n] position in names
  slice: np.ndarray  # [n]
  contents: list[bytes]  # SHA-256 of each image with its label

  def of(self, name: str) -> np.ndarray:
    """Positions of a shard's images in the source."""
    return np.flatnonzero(self.shard == self.names.index(name))


def split(config_data: Any, section: Any, seed: int) -> Compartments:
  """The training split of a section of SOURCES, divided as `section` says.

  section.by: 'class', a shard for every class, or groups of classes as in groups='0,1;2,3'; 'owner', by the names in `file`, a text file
  with one line for each image; 'score', by the numbers in `file` (.npy, one for each image) and increasing `thresholds`; 'hash',
  `num_shards` by content; 'one', all in one. classes: only images of these are there, () for all. name: what the only shard of 'one' is
  called. num_slices; slice_file: an .npy file of each image's slice where it is not to be drawn, such as late slices for images likely to
  be removed.
  """
  source = config_lib.build(sources.SOURCES, config_data, split="train")
  if section.classes:
    check_labelled(source, "shards.classes chooses by them")
    source = source.select(np.flatnonzero(np.isin(source.labels, section.classes)))
  if not len(source):
    raise InputError(f"no image is of shards.classes={section.classes}")
  contents = slices.content_ids(source.images[np.arange(len(source))], source.labels)
  names, shard = _shards(source, contents, section, seed)
  empty = [name for i, name in enumerate(names) if not (shard == i).any()]
  if empty:
    raise InputError(f"shard {empty[0]!r} has no images")
  return Compartments(source, names, shard, _slices(contents, section, seed), contents)


def files_of(section: Any) -> dict[str, str]:
  """{file: its SHA-256} of the files that `section` divides images by."""
  files = [one for one in (section.file, section.slice_file) if one]
  return {one: hashlib.sha256(pathlib.Path(one).expanduser().read_bytes()).hexdigest() for one in files}


def _shards(
  source: ImageSource, contents: list[bytes], section: Any, seed: int
) -> tuple[tuple[str, ...], np.ndarray]:
  if section.by == "one":
    return _names([section.name]), np.zeros(len(source), np.int64)
  if section.by == "class":
    check_labelled(source, "divide them by shards.by='hash' or 'owner'")
    return _by_class(source, section.groups)
  if section.by == "hash":
    found = slices.shard_of(contents, section.num_shards, seed)
    return tuple(f"part{i}" for i in range(section.num_shards)), found
  if section.by == "owner":
    lines = _file(section.file, "a text file with an owner for each image").read_text().splitlines()
    _check_count(lines, source, section.file)
    owners = sorted({line.strip() for line in lines})
    number = {owner: i for i, owner in enumerate(owners)}
    return _names(owners), np.array([number[line.strip()] for line in lines], np.int64)
  if section.by == "score":
    scores = np.load(_file(section.file, "an .npy file with a score for each image"), allow_pickle=False)
    _check_count(scores, source, section.file)
    if scores.ndim != 1 or not np.issubdtype(scores.dtype, np.number) or not np.isfinite(scores).all():
      raise InputError(f"{section.file} holds {scores.dtype} {list(scores.shape)}; expected a finite number for each image")
    limits = list(section.thresholds)
    if not limits or limits != sorted(set(limits)):
      raise InputError(f"shards.thresholds must increase, found {section.thresholds}")
    names = (f"below_{limits[0]:g}", *(f"from_{limit:g}" for limit in limits))
    return names, np.searchsorted(limits, scores, side="right").astype(np.int64)
  raise InputError(f"unknown shards.by={section.by!r}; there are {', '.join(WAYS)}")


def _by_class(source: ImageSource, groups: str) -> tuple[tuple[str, ...], np.ndarray]:
  if not groups:
    chosen = [[label] for label in range(source.num_classes)]
  else:
    try:
      chosen = [[int(label) for label in group.split(",")] for group in groups.strip("()").split(";")]
    except ValueError:
      raise InputError(f"shards.groups has classes as in '0,1;2,3', found {groups!r}") from None
  flat = sum(chosen, [])
  if sorted(flat) != sorted(set(flat)) or not all(0 <= label < source.num_classes for label in flat):
    raise InputError(
      f"shards.groups names each of the classes 0..{source.num_classes - 1} at most once, found {groups!r}"
    )
  if left := sorted({int(label) for label in np.unique(source.labels)} - set(flat)):
    raise InputError(f"shards.groups={groups!r} leaves out class {left[0]}: every image belongs to a shard")
  group_of = {label: i for i, group in enumerate(chosen) for label in group}
  names = _names(["+".join(source.class_names[label] for label in group) for group in chosen])
  return names, np.array([group_of[int(label)] for label in source.labels], np.int64)


def _slices(contents: list[bytes], section: Any, seed: int) -> np.ndarray:
  if not section.slice_file:
    return slices.slice_of(contents, section.num_slices, seed)
  found = np.load(_file(section.slice_file, "an .npy file with the slice of each image"), allow_pickle=False)
  if found.shape != (len(contents),) or not np.issubdtype(found.dtype, np.integer):
    raise InputError(
      f"{section.slice_file} holds {found.dtype} {list(found.shape)}; expected an integer for each of {len(contents)} images"
    )
  if found.min() < 0 or found.max() >= section.num_slices:
    raise InputError(f"{section.slice_file}: slice {found.max()}; slices are 0..{section.num_slices - 1}")
  return found.astype(np.int64)


def _names(wanted: Sequence[str]) -> tuple[str, ...]:
  """Names that folders and lists can have; InputError for an empty one, and where two become one."""
  found = tuple(re.sub(r"[^\w.+-]", "_", name)[:LONGEST_NAME] for name in wanted)
  for name, cleaned in zip(wanted, found, strict=True):
    if not cleaned or cleaned.startswith("."):
      raise InputError(f"a shard needs a name that a folder can have, found {name!r}")
    if found.count(cleaned) > 1:
      raise InputError(f"two shards would be called {cleaned!r}: give {name!r} another name")
  return found


def _file(path: str, what: str) -> pathlib.Path:
  file = pathlib.Path(path).expanduser()
  if not path or not file.is_file():
    raise InputError(f"shards.file: {what} is needed, found {path!r}")
  return file


def _check_count(values: Any, source: ImageSource, path: str) -> None:
  if len(values) != len(source):
    raise InputError(f"{path} has {len(values)} entries for {len(source)} images")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Stages, epochs and steps of a shard: functions of how many images its slices have."""

  sizes: tuple[int, ...]  # images of each slice
  stage_epochs: tuple[int, ...]
  batch_size: int

  def steps_of(self, stage: int) -> int:
    """Optimizer steps of a stage, which sees slices 0 .. stage; batches at the ends of epochs are filled up."""
    return self.stage_epochs[stage] * self.steps_per_epoch(stage)

  def steps_per_epoch(self, stage: int) -> int:
    """Batches of an epoch of a stage."""
    return -(-sum(self.sizes[: stage + 1]) // self.batch_size)

  def ends(self) -> list[int]:
    """The step at which each stage ends."""
    return np.cumsum([self.steps_of(stage) for stage in range(len(self.sizes))]).tolist()

  def locate(self, step: int) -> tuple[int, int, int]:
    """(stage, epoch in it, batch in that) of a step."""
    for stage, end in enumerate(self.ends()):
      if step < end:
        start = end - self.steps_of(stage)
        return stage, *divmod(step - start, self.steps_per_epoch(stage))
    raise IndexError(step)


class ShardFeed:
  """A `loop.Feed` of one shard: every batch is a function of the step and of the contents of the images.

  A batch has 'image', 'label', 'key' (data of a random key of the image in this epoch, uint32 [b 2]) and 'mask' (False where the
  batch was filled up).
  """

  arrays: PyTree = {}

  def __init__(self, data: Compartments, rows: np.ndarray, schedule: Schedule, context: str, mesh: Any):
    parallel.check_batch(schedule.batch_size, mesh)
    self._data, self._rows, self._schedule, self._mesh = data, rows, schedule, mesh
    self._context = context
    self._step = 0
    self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()
    self._lock = threading.Lock()

  def take(self, arrays: PyTree, payload: PyTree) -> PyTree:
    """The batch is the payload."""
    return payload

  def start(self, step: int) -> None:
    """The following `next` begins with the batch of `step`."""
    self._step = step

  def next(self, num_steps: int) -> PyTree:
    """The batches of the following steps."""
    mine = parallel.process_rows(self._schedule.batch_size, self._mesh)
    batches = [self.batch(step) for step in range(self._step, self._step + num_steps)]
    self._step += num_steps
    stacked = {name: np.stack([batch[name][mine] for batch in batches]) for name in batches[0]}
    return parallel.to_global(self._mesh, stacked, parallel.batch_sharding(self._mesh, axis=1))

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """The whole batch of a step, on the host."""
    stage, epoch, number = self._schedule.locate(step)
    rows, keys = self._epoch(stage, epoch)
    size = self._schedule.batch_size
    chosen = np.arange(number * size, (number + 1) * size)
    mask = chosen < len(rows)
    chosen = np.minimum(chosen, len(rows) - 1)
    taken = self._data.source.take(rows[chosen])
    return {"image": taken["image"], "label": taken["label"], "key": keys[chosen], "mask": mask}

  def _epoch(self, stage: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    with self._lock:
      if (stage, epoch) not in self._orders:
        seen = self._rows[self._data.slice[self._rows] <= stage]
        context = f"{self._context}|stage {stage}|epoch {epoch}".encode()
        order, keys = slices.epoch_order([self._data.contents[i] for i in seen], context)
        if len(self._orders) > 1:
          self._orders.popitem(last=False)
        self._orders[stage, epoch] = seen[order], keys
      return self._orders[stage, epoch]

  def close(self) -> None:
    """Nothing is read ahead."""


def sizes_of(data: Compartments, rows: np.ndarray, num_slices: int) -> tuple[int, ...]:
  """Images of each slice among `rows`."""
  return tuple(np.bincount(data.slice[rows], minlength=num_slices).tolist())
