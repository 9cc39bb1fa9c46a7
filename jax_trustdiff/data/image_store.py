"""Image stores: many uint8 images in shards that are written on their own, by any number of processes, killed at any moment.

    manifest.json                      of a complete store: counts, shape, classes, origin, makers, SHA-256 of every file
    plan.json                          the same before there is anything to hash: what every writer must agree on
    images-00000-of-00064.npy          uint8 [n h w c]
    labels-00000-of-00064.npy          int32 [n]
    ids-00000-of-00064.npy             int64 [n]
    shard-00000-of-00064.json          written last: bytes and SHA-256 of the three, and the maker; without it there is no shard

Every file appears whole or not at all (a temporary file beside it, fsync, rename), and what it holds is a function of the
plan, the images and the maker alone: a store that was interrupted is, in the end, byte for byte the one that was not.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jax_trustdiff.data.readers import existing, read_npy, split_folder
from jax_trustdiff.data.records import UNLABELLED, ImageSource, agreed_names, check_split, image_source
from jax_trustdiff.types import InputError, RunError

FORMAT = 2
MANIFEST, PLAN = "manifest.json", "plan.json"
TEMPORARY = ".tmp"
ARRAYS = {"images": np.dtype(np.uint8), "labels": np.dtype(np.int32), "ids": np.dtype(np.int64)}
# What JSON files hold that is read from them
PLAN_KEYS = {"num_images": int, "images_per_shard": int}
SHARD_KEYS = {"num_images": int, "maker": str, "files": dict}
MANIFEST_KEYS = {"num_images": int, "num_shards": int, "num_classes": int, "class_names": list, "files": dict}


@dataclasses.dataclass(frozen=True)
class StorePlan:
  """What a store is to hold. Writers of one store must have equal plans.

  num_classes: labels lie in [0, num_classes); images that have none are of one class. provenance: JSON, where the images
  come from, such that equal provenances give equal images.
  """

  num_images: int
  images_per_shard: int
  image_shape: tuple[int, int, int]  # (h, w, c)
  num_classes: int
  class_names: tuple[str, ...]  # () or one for each class
  provenance: Mapping[str, Any]

  def __post_init__(self):
    for name in ("num_images", "images_per_shard", "num_classes"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} of an image store must be at least 1, found {getattr(self, name)}")
    if self.class_names and len(self.class_names) != self.num_classes:
      raise InputError(
        f"an image store of {self.num_classes} classes has {len(self.class_names)} class names"
      )

  @property
  def num_shards(self) -> int:
    return -(-self.num_images // self.images_per_shard)

  @property
  def bytes_of_images(self) -> int:
    return self.num_images * math.prod(self.image_shape)

  def rows(self, shard: int) -> range:
    """Positions in the store of the images of a shard."""
    start = shard * self.images_per_shard
    return range(start, min(start + self.images_per_shard, self.num_images))

  def as_json(self) -> dict[str, Any]:
    """What plan.json holds."""
    return json.loads(_dump({"format": FORMAT} | dataclasses.asdict(self)))


class ImageStore:
  """A store at `path` to be written: shards in any order, by any process, each by one process at a time.

  maker: who writes, such as a kind of device and a version, where equal plans may give images that differ by rounding; kept with
  each shard, and counted in the manifest.
  Opening it creates the folder and plan.json. InputError if there is a store of another plan, with the differences.
  """

  def __init__(self, path: str | os.PathLike, plan: StorePlan, maker: str = ""):
    self.path, self.plan, self.maker = pathlib.Path(path).expanduser(), plan, maker
    self.check()
    self.path.mkdir(parents=True, exist_ok=True)
    if not (self.path / PLAN).exists():
      _write(self.path / PLAN, _dump(plan.as_json()))
    self.check()  # another process may have been faster

  def check(self) -> None:
    """InputError if the folder holds another store, or files that are none; writes nothing."""
    check_place(self.path, self.plan)

  def fault(self, shard: int, thorough: bool = False) -> str | None:
    """None for a complete shard, '' for one that is not there, and a line that says what is wrong with a damaged one.

    Looks at the sizes of its files, or, if thorough, at their hashes.
    """
    if not self._about(shard).exists():
      return ""
    try:
      files = _read_json(self._about(shard), SHARD_KEYS)["files"]
      _check_files(files, [self._name(kind, shard) for kind in ARRAYS])
    except InputError:
      return f"{self._about(shard)} is damaged"
    return next(
      filter(None, (_fault(self.path / name, about, thorough) for name, about in files.items())), None
    )

  def missing(self, thorough: bool = False) -> dict[int, str]:
    """{shard: fault} of the shards that are not complete."""
    faults = {shard: self.fault(shard, thorough) for shard in range(self.plan.num_shards)}
    return {shard: fault for shard, fault in faults.items() if fault is not None}

  def write(self, shard: int, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> None:
    """Writes a shard: uint8 images [n h w c], labels [n], ids [n], with n = len(plan.rows(shard)).

    What killed writers of the shard left half written is taken away. InputError for arrays that are not the shard's, and if the
    plan in the folder is no longer this one; RunError if another process writes the shard too, and not the same.
    """
    self.check()
    arrays = {"images": np.asarray(images), "labels": np.asarray(labels), "ids": np.asarray(ids)}
    self._check_arrays(shard, arrays)
    files = {}
    for kind, array in arrays.items():
      data = _npy_bytes(array.astype(ARRAYS[kind], copy=False))
      name = self._name(kind, shard)
      _write(self.path / name, data)
      files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    about = {"num_images": len(arrays["labels"]), "maker": self.maker, "files": files}
    _write(self._about(shard), _dump(about))
    _clear(self.path, f"*-{shard:05d}-of-*")
    if fault := self.fault(shard, thorough=True):
      raise RunError(f"{fault}: another process writes this shard too, and not the same")

  def finish(self, thorough: bool = False) -> str | None:
    """Writes manifest.json if every shard is complete, as `missing` sees it, and returns its SHA-256; else None.

    May be called by any process.
    """
    if self.missing(thorough):
      return None
    shards = [_read_json(self._about(shard), SHARD_KEYS) for shard in range(self.plan.num_shards)]
    files = {name: about for shard in shards for name, about in shard["files"].items()}
    makers = _count_makers(shards)
    data = _dump(self.plan.as_json() | {"num_shards": self.plan.num_shards, "makers": makers, "files": files})
    if not (self.path / MANIFEST).exists() or (self.path / MANIFEST).read_bytes() != data:
      _write(self.path / MANIFEST, data)
    for name in (MANIFEST, PLAN):
      _clear(self.path, name)
    return hashlib.sha256(data).hexdigest()

  def makers(self, shards: Iterable[int]) -> dict[str, int]:
    """{maker: number of images it made} of complete shards."""
    return _count_makers(_read_json(self._about(shard), SHARD_KEYS) for shard in shards)

  def read(self, shard: int) -> dict[str, np.ndarray]:
    """{'images', 'labels', 'ids'} of a complete shard, memory-mapped."""
    return {kind: read_npy(self.path / self._name(kind, shard)) for kind in ARRAYS}

  def _name(self, kind: str, shard: int, suffix: str = "npy") -> str:
    return _shard_name(kind, shard, self.plan.num_shards, suffix)

  def _about(self, shard: int) -> pathlib.Path:
    return self.path / self._name("shard", shard, "json")

  def _check_arrays(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
    if not 0 <= shard < self.plan.num_shards:
      raise InputError(f"shard {shard} of a store of {self.plan.num_shards}")
    count, labels = len(self.plan.rows(shard)), arrays["labels"]
    wanted = {"images": (count, *self.plan.image_shape), "labels": (count,), "ids": (count,)}
    for kind, array in arrays.items():
      integers = np.issubdtype(array.dtype, np.integer)
      if array.shape != wanted[kind] or not integers or kind == "images" and array.dtype != np.uint8:
        raise InputError(
          f"{kind} of shard {shard} are {array.dtype} {list(array.shape)}; expected "
          f"{ARRAYS[kind]} {list(wanted[kind])}"
        )
    if labels.min() < 0 or labels.max() >= self.plan.num_classes:
      bad = labels.min() if labels.min() < 0 else labels.max()
      raise InputError(f"label {bad} in shard {shard}; labels are 0..{self.plan.num_classes - 1}")


def check_place(path: str | os.PathLike, plan: StorePlan) -> None:
  """InputError unless `path` is absent, empty, or holds a store of this plan; writes nothing."""
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    return
  if not path.is_dir():
    raise InputError(f"{path} is a file; an image store is a folder")
  if not (path / PLAN).exists():
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
      raise InputError(f"{path} is not empty and holds no {PLAN}: it is no image store")
    return
  stored = _read_json(path / PLAN, {})
  changed = _differences(stored, plan.as_json())
  if changed:
    shown = "; ".join(changed[:6]) + ("; ..." if len(changed) > 6 else "")
    raise InputError(f"{path} holds images of another origin ({shown}): take another store")


def image_store(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """A complete image store, memory-mapped; ids are those of the store.

  The folders `path`/train and `path`/test are the splits if they are there; otherwise `path` is 'train'. File sizes are
  compared with the manifest, hashes are not: see `verify`. Images without labels are of one class, and `labelled` is False; `key_id`
  is that of the watermark that wm_embed.py wrote into them. InputError for a store that is not complete.
  """
  check_split(split)
  root = split_folder(existing(path, "the folder of an image store"), split)
  manifest = read_manifest(root)
  for name, about in manifest["files"].items():
    if fault := _fault(root / name, about, thorough=False):
      raise InputError(f"{fault}; generate the store again to mend it")
  files = {
    kind: [root / _shard_name(kind, shard, manifest["num_shards"]) for shard in range(manifest["num_shards"])]
    for kind in ARRAYS
  }
  parts = {kind: map(read_npy, of_kind) for kind, of_kind in files.items()}
  labelled = manifest["class_names"] != [UNLABELLED]
  if num_classes not in (0, manifest["num_classes"]):
    raise InputError(f"{root}: num_classes={num_classes}; the store has {manifest['num_classes']} classes")
  names = agreed_names(tuple(manifest["class_names"]), class_names if labelled else (), str(root))
  source = image_source(parts["images"], parts["labels"], str(root), manifest["num_classes"], names)
  ids = np.concatenate([np.array(part) for part in parts["ids"]])
  if not len(source) == len(ids) == manifest["num_images"]:
    raise InputError(
      f"{root} holds {len(source)} images and {len(ids)} ids, and {MANIFEST} says {manifest['num_images']}"
    )
  key_id = str(manifest.get("provenance", {}).get("key_id", ""))
  return dataclasses.replace(source, ids=ids, labelled=labelled, key_id=key_id)


def verify(path: str | os.PathLike) -> int:
  """Reads every file of a complete store and compares its SHA-256 with the manifest; the number of images.

  InputError names the first file that differs.
  """
  root = pathlib.Path(path).expanduser()
  manifest = read_manifest(root)
  for name, about in manifest["files"].items():
    if fault := _fault(root / name, about, thorough=True):
      raise InputError(fault)
  return manifest["num_images"]


# ---- helpers ----


def _shard_name(kind: str, shard: int, num_shards: int, suffix: str = "npy") -> str:
  return f"{kind}-{shard:05d}-of-{num_shards:05d}.{suffix}"


def _fault(file: pathlib.Path, about: Mapping[str, Any], thorough: bool) -> str | None:
  """What is wrong with a file that should have these 'bytes' and 'sha256'."""
  if not file.exists():
    return f"{file} is missing"
  found = file.stat().st_size
  if found != about["bytes"]:
    return f"{file} has {found} bytes, expected {about['bytes']}"
  if thorough:
    with open(file, "rb") as stream:
      if hashlib.file_digest(stream, "sha256").hexdigest() != about["sha256"]:
        return f"{file} is damaged: its SHA-256 is not the recorded one"
  return None


def read_manifest(root: pathlib.Path) -> dict[str, Any]:
  """The manifest of a complete store, with its provenance; InputError if it is not complete, or no store."""
  if not (root / MANIFEST).is_file():
    if (root / PLAN).is_file():
      plan = _read_json(root / PLAN, PLAN_KEYS)
      total = -(-plan["num_images"] // max(1, plan["images_per_shard"]))
      done = len(list(root.glob("shard-*-of-*.json")))
      raise InputError(
        f"{root} is not complete: {done} of {total} shards are there and no {MANIFEST}; finish its generation"
      )
    raise InputError(f"{root} is no image store: it holds no {MANIFEST}")
  manifest = _read_json(root / MANIFEST, MANIFEST_KEYS)
  if manifest.get("format") != FORMAT:
    raise InputError(f"{root / MANIFEST} is not the manifest of an image store of format {FORMAT}")
  num_shards = manifest["num_shards"]
  if not 1 <= num_shards <= len(manifest["files"]):
    raise InputError(f"{root / MANIFEST} names {len(manifest['files'])} files of {num_shards} shards")
  names = [_shard_name(kind, shard, num_shards) for shard in range(num_shards) for kind in ARRAYS]
  try:
    _check_files(manifest["files"], names)
  except InputError as error:
    raise InputError(f"{root / MANIFEST} is damaged: {error}") from None
  return manifest


def _read_json(file: pathlib.Path, keys: Mapping[str, type]) -> dict[str, Any]:
  """The object in a JSON file; InputError unless it has these keys with values of these types."""
  try:
    found = json.loads(file.read_text())
  except ValueError:
    found = None
  if not isinstance(found, dict):
    raise InputError(f"{file} is not JSON, or damaged")
  for key, kind in keys.items():
    if type(found.get(key)) is not kind:
      raise InputError(f"{file} is damaged: {key!r} must be there, a {kind.__name__}")
  return found


def _check_files(files: Mapping[str, Any], names: list[str]) -> None:
  """InputError unless `files` is {name: {'bytes': int, 'sha256': str}} for just these names."""
  if wrong := sorted(files.keys() ^ set(names)):
    raise InputError(f"{wrong[0]} is {'missing in' if wrong[0] in names else 'no file of'} the store")
  for name, about in files.items():
    if not (isinstance(about, dict) and type(about.get("bytes")) is int and type(about.get("sha256")) is str):
      raise InputError(f"{name} has no 'bytes' and 'sha256'")


def _dump(value: Any) -> bytes:
  """JSON, the same text for the same value; infinities as strings, which JSON does not have."""
  return (json.dumps(_strict(value), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _strict(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _strict(part) for key, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(part) for part in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
  """'key.key: old -> new' for every value in which two trees of JSON differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted(old.keys() | new.keys())
    return [
      line
      for key in keys
      for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    ]
  return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def _npy_bytes(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
  return buffer.getvalue()


def _write(file: pathlib.Path, data: bytes) -> None:
  """The file whole or not at all, whatever other processes do; the last of several writers wins."""
  temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{TEMPORARY}")
  try:
    with open(temporary, "wb") as stream:
      stream.write(data)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(temporary, file)
  except OSError as error:
    # Another writer of the file may have taken the temporary one for what a killed one left.
    gone = error.errno in (errno.ENOENT, errno.ESTALE)
    if not (gone and file.exists() and file.read_bytes() == data):
      temporary.unlink(missing_ok=True)
      raise
  _sync_folder(file.parent)


def _count_makers(shards: Iterable[Mapping[str, Any]]) -> dict[str, int]:
  """{maker: number of images} from what shards' JSON files say."""
  found = collections.Counter()
  for about in shards:
    found[about["maker"]] += about["num_images"]
  return dict(found)


def _clear(folder: pathlib.Path, pattern: str) -> None:
  """Takes away what killed writers of files with such names left."""
  for left in folder.glob(f".{pattern}.*{TEMPORARY}"):
    left.unlink(missing_ok=True)


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes a rename last, where the file system can (some network file systems cannot sync a folder)."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      os.fsync(descriptor)
  finally:
    os.close(descriptor)
