"""A compartmentalized model on disk: its manifest, its shards, and what was made of several of them.

    bundle/ manifest.json                    sealed (`cdm.manifest`)
            report/                          of the run that made it (beside its config.json and result.json)
            salt.txt                         turns an image's hash into what the manifest has; for its owner alone
            backbone.safetensors             the network that all shards start from or adapt, if there is one
            shards/<name>-<n>-<digest>/      the n-th version of a shard
              images.json                    its images by slice, salted
              stages/<r>.safetensors         the whole training state after stage r, from which training can go on exactly
              export/                        the shard as a diffusion model of its own, averaged parameters
              adapter.safetensors            where shards are adapters, in its place: the shard without the backbone
              metrics.jsonl  config.json     how it was trained
            artefacts/<name>-<n>/            what was made of several shards, such as a classifier of shards

A version is there for the manifest or not at all: it is made in a folder that the manifest does not name yet, and once it does,
folders that it does not name are removed. Whoever changes a bundle holds its lock (`training.workdir.locked`).
"""

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.data.records import ImageSource
from jax_trustdiff.diffusion.denoisers import Denoiser
from jax_trustdiff.diffusion.losses import LOSSES
from jax_trustdiff.interop import export, safetensors_io
from jax_trustdiff.models.adapters import ADAPTERS
from jax_trustdiff.tasks import compartments, denoisers
from jax_trustdiff.tasks.compartments import Compartments
from jax_trustdiff.tasks.train_diffusion import Model
from jax_trustdiff.training.workdir import Workdir, locked, write_atomically
from jax_trustdiff.types import BACKBONE, InputError, Variables

FORMAT = 2  # of the manifest
MANIFEST, SALT, BACKBONE_FILE = "manifest.json", "salt.txt", "backbone.safetensors"
ADAPTER, IMAGES = "adapter.safetensors", "images.json"
CONFIG, REPORT, RESULT = "config.json", "report", "result.json"  # of the run that made the bundle
TRAINING = (
  "seed",
  "model",
  "adapter",
  "diffusion",
  "augment",
  "optimizer",
  "schedule",
  "ema",
  "train",
  "mesh",
)
PASSING = (".lock", ".seconds")  # files of a version's folder that come and go


class Bundle:
  """A compartmentalized model at `path`; InputError if there is none, or its manifest is not as it was sealed."""

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path).expanduser()
    self._splits: dict[int, Compartments] = {}
    file = self.path / MANIFEST
    _check_there(self.path)
    try:
      self.manifest = json.loads(file.read_text())
    except ValueError:
      raise InputError(f"{file} is not JSON: it is no manifest, or damaged") from None
    manifest_lib.check_seal(self.manifest, str(file))
    if self.manifest["format"] != FORMAT:
      raise InputError(f"{file} is of format {self.manifest['format']}, and this version reads {FORMAT}: train it again")

  @classmethod
  def create(
    cls, path: pathlib.Path, training: Mapping[str, Any], origin: Mapping[str, Any], backbone: Any, salt: str = ""
  ) -> "Bundle":
    """A bundle without shards, or the one that is there already.

    backbone: (variables, where they are from) or None. salt: 64 hexadecimal digits, drawn where there are none.
    """
    if not (path / MANIFEST).is_file():
      if salt or not (path / SALT).is_file():
        write_atomically(path / SALT, (salt or secrets.token_hex(32)) + "\n", private=True)
      if backbone:
        safetensors_io.save(path / BACKBONE_FILE, jax.tree.map(np.asarray, backbone[0]))
      found = {
        "format": FORMAT,
        "training": dict(training),
        "salt_sha256": file_digest(path / SALT),
        "backbone": backbone
        and {
          "from": backbone[1],
          "sha256": file_digest(path / BACKBONE_FILE),
          "parameters": manifest_lib.tree_digest(backbone[0]),
        },
        "origins": [dict(origin)],
        "shards": {},
        "config": file_digest(path / CONFIG),
        "report": {},
        "dropped": [],
        "forgotten": [],
        "artefacts": {},
        "deletions": [],
      }
      write_atomically(path / MANIFEST, text_of(found))
    return cls(path)

  def save(self) -> None:
    """Seals and writes the manifest, and removes what it does not name. Only its lock's owner may."""
    self.manifest = manifest_lib.sealed(self.manifest)
    write_atomically(self.path / MANIFEST, text_of(self.manifest))
    folder = os.open(self.path, os.O_RDONLY)
    try:
      os.fsync(folder)  # or a power cut could keep the manifest of before and lose what it names
    finally:
      os.close(folder)
    for stray in self.strays():
      shutil.rmtree(stray) if stray.is_dir() else stray.unlink()

  def strays(self) -> list[pathlib.Path]:
    """What lies beside the versions of shards and the artefacts that the manifest names."""
    named = {
      about["folder"] for about in (*self.manifest["shards"].values(), *self.active_artefacts().values())
    }
    return [
      one
      for kind in ("shards", "artefacts")
      if (self.path / kind).is_dir()
      for one in sorted((self.path / kind).iterdir())
      if f"{kind}/{one.name}" not in named
    ]

  def remove_report(self) -> None:
    """Removes pictures and numbers of the run that made the bundle, which show it as it was; its command writes them anew."""
    shutil.rmtree(self.path / REPORT, ignore_errors=True)
    (self.path / RESULT).unlink(missing_ok=True)
    self.manifest["report"] = {}

  def active_artefacts(self) -> dict[str, dict[str, Any]]:
    """{name: what the manifest says} of the artefacts that may be used."""
    artefacts = self.manifest["artefacts"].items()
    return {name: about for name, about in artefacts if about["status"] == manifest_lib.ACTIVE}

  @functools.cached_property
  def salt(self) -> bytes:
    """InputError where it is not there, or another."""
    file = self.path / SALT
    if not _is_as(file, self.manifest["salt_sha256"]):
      raise InputError(f"{file} is missing or was changed: without it nobody can say which image is meant")
    return bytes.fromhex(file.read_text().strip())

  @property
  def training(self) -> config_lib.ConfigDict:
    """The sections that every shard was trained with."""
    return _section(self.manifest["training"])

  @property
  def names(self) -> list[str]:
    """The shards in the order of their slots."""
    return sorted(self.manifest["shards"])

  @property
  def parameters(self) -> dict[str, str]:
    """`manifest.tree_digest` of the parameters of every shard."""
    return {name: self.manifest["shards"][name]["parameters"] for name in self.names}

  def check_names(self, names: Sequence[str]) -> None:
    """InputError for a name that is no shard's."""
    for name in names:
      if name not in self.manifest["shards"]:
        raise InputError(f"there is no shard {name!r}; there are {', '.join(self.names)}")

  def data(self, origin: int) -> Compartments:
    """The images of a data set with their shards; read once. InputError if a file that divides them was changed."""
    if origin not in self._splits:
      about = self.manifest["origins"][origin]
      sections = [_section(about[name]) for name in ("data", "shards")]
      for file, digest in about["files"].items():
        if not _is_as(pathlib.Path(file).expanduser(), digest):
          raise InputError(f"{file}, which divides the images of {self.path}, is missing or was changed")
      self._splits[origin] = compartments.split(*sections, self.training.seed)
    return self._splits[origin]

  def salted(self, content: bytes) -> str:
    """What the manifest has for an image."""
    return manifest_lib.salted(content, self.salt)

  def named(self, section: Any) -> list[str]:
    """What stands in the manifest for the images that a section of a task names; InputError for what cannot be read.

    section.positions: their places in the training split of data set section.origin, by commas. section.file: a text file of contents'
    SHA-256 (`slices.content_ids`) in hexadecimal, a line each.
    """
    contents: set[bytes] = set()
    if section.positions:
      if not 0 <= section.origin < len(self.manifest["origins"]):
        raise InputError(
          f"origin={section.origin}: there are data sets 0 .. {len(self.manifest['origins']) - 1}"
        )
      data = self.data(section.origin)
      try:
        rows = [int(text) for text in section.positions.strip("()").split(",")]
      except ValueError:
        raise InputError(
          f"positions has numbers separated by commas, found {section.positions!r}"
        ) from None
      if wrong := [row for row in rows if not 0 <= row < len(data.contents)]:
        raise InputError(f"positions: there are {len(data.contents)} images, none at {wrong[0]}")
      contents |= {data.contents[row] for row in rows}
    if section.file:
      file = pathlib.Path(section.file).expanduser()
      if not file.is_file():
        raise InputError(f"file: no such file {file}")
      try:
        contents |= {bytes.fromhex(line.strip()) for line in file.read_text().splitlines() if line.strip()}
      except ValueError:
        raise InputError(f"{file} has a line that is no SHA-256 in hexadecimal digits") from None
    return sorted(self.salted(one) for one in contents)

  def images(self, name: str) -> list[list[str]]:
    """The images that a shard was trained on, slice by slice, salted; InputError if its list is not as the manifest has it."""
    about = self.manifest["shards"][name]
    file = self.path / about["folder"] / IMAGES
    if not _is_as(file, about["files"][IMAGES]):
      raise InputError(f"{file} is missing or was changed: verify the bundle")
    return json.loads(file.read_text())

  def rows(self, origin: int, name: str) -> np.ndarray:
    """Positions in a data set of the images that a shard is to have: those of its compartment that are not forgotten."""
    data = self.data(origin)
    found = data.of(name)
    gone = set(self.manifest["forgotten"])
    kept = [self.salted(data.contents[i]) not in gone for i in found] if gone else np.ones(len(found), bool)
    return found[np.array(kept, bool)]

  def trained_rows(self, name: str, without: Collection[str] = ()) -> np.ndarray:
    """Positions in its data set of the images that a shard was trained on, less those of `without`, salted.

    What came to the data set since is not among them, nor are more copies of what they hold. InputError where one of them is no longer in
    the data set.
    """
    about = self.manifest["shards"][name]
    left = collections.Counter(image for of_slice in self.images(name) for image in of_slice)
    for image in without:
      left.pop(image, None)
    data, rows = self.data(about["origin"]), []
    for row in data.of(name):
      image = self.salted(data.contents[row])
      if left[image]:
        left[image] -= 1
        rows.append(row)
    if missing := left.total():
      raise InputError(
        f"{missing} images that shard {name} was trained on are no longer in its data set: forget them as well "
        "(forget.file), or bring them back"
      )
    return np.array(rows, np.int64)

  def source(self, name: str) -> ImageSource:
    """The images that a shard was trained on (`trained_rows`)."""
    return self.data(self.manifest["shards"][name]["origin"]).source.select(self.trained_rows(name))

  def stack(
    self, names: Sequence[str] = (), capacity: int | None = None
  ) -> tuple[cdm_shards.Shards, list[str]]:
    """(the stack of these shards, by default all; the names of its slots)."""
    names = list(names) or self.names
    self.check_names(names)
    if not names:
      raise InputError(f"{self.path} has no shards")
    model = self.model()
    common = Denoiser(
      model.network, model.preconditioning, {BACKBONE: self.backbone} if self.is_adapted else {}
    )
    own = [self.variables(name) for name in names]
    proportions = [float(self.manifest["shards"][name]["num_images"]) for name in names]
    return cdm_shards.stack(common, own, proportions, capacity), names

  def variables(self, name: str) -> Variables:
    """The averaged variables of a shard, the backbone left out."""
    folder = self.path / self.manifest["shards"][name]["folder"]
    file = folder / ADAPTER if self.is_adapted else folder / "export" / export.ARRAYS
    return jax.tree.map(jnp.asarray, safetensors_io.load(file))

  @property
  def is_adapted(self) -> bool:
    """Whether shards are adapters of the backbone, not networks of their own."""
    return self.training.adapter.name != "none"

  @property
  def backbone_digest(self) -> str | None:
    """`manifest.tree_digest` of the backbone, wherever it is from; None if there is none."""
    about = self.manifest["backbone"]
    return about and about["parameters"]

  @functools.cached_property
  def backbone(self) -> Variables | None:
    """The variables that all shards start from, or adapt; None if there are none."""
    if self.manifest["backbone"] is None:
      return None
    file = self.path / BACKBONE_FILE
    if not _is_as(file, self.manifest["backbone"]["sha256"]):
      raise InputError(f"{file} is missing or was changed: shards were trained on another")
    found = jax.tree.map(jnp.asarray, safetensors_io.load(file))
    if not self.is_adapted:
      return found
    return jax.jit(self.model().network.on)(found, jax.random.key(0))[BACKBONE]

  def plain_backbone(self) -> Variables:
    """The variables of the file, before an adapter took its part out of them."""
    return jax.tree.map(jnp.asarray, safetensors_io.load(self.path / BACKBONE_FILE))

  def model(self) -> Model:
    """The model that every shard is an instance of."""
    about = self.manifest["origins"][0]
    return build_model(self.training, tuple(about["image_shape"]), about["num_classes"])


def seal_of(config: Any) -> str:
  """The seal of the bundle config.cdm.path."""
  return Bundle(config.cdm.path).manifest[manifest_lib.SEAL]


def made_of_all(config: Any) -> str:
  """SHA-256 of the lists of images of all shards of config.cdm.path, and of what was forgotten."""
  manifest = Bundle(config.cdm.path).manifest
  return manifest_lib.digest([{n: one["root"] for n, one in manifest["shards"].items()}, manifest["forgotten"]])


def names_of(text: str) -> list[str]:
  """The shards that a key of a config names by commas, in brackets or not."""
  return [name.strip() for name in text.strip("()").split(",") if name.strip()]


def folder_of(config: Any, workdir: Workdir) -> pathlib.Path:
  """The folder of the bundle config.cdm.path; InputError if there is none, or if the run's folder lies in it."""
  path = pathlib.Path(config.cdm.path).expanduser()
  _check_there(path)
  folder = workdir.path.resolve()
  if path.resolve() in (folder, *folder.parents):
    raise InputError(f"workdir {workdir.path} lies in the bundle: take another --workdir")
  return path


@contextlib.contextmanager
def reading(config: Any, workdir: Workdir) -> Iterator[Bundle]:
  """The bundle config.cdm.path for those who only read it, beside others; InputError if it is changed before they are done.

  Versions of shards and artefacts have names of their own, and those that the manifest names are there.
  """
  bundle = Bundle(folder_of(config, workdir))

  def check():
    if Bundle(bundle.path).manifest[manifest_lib.SEAL] != bundle.manifest[manifest_lib.SEAL]:
      raise InputError(f"{bundle.path} was changed while it was read: give the command again")

  try:
    yield bundle
  except Exception:  # a file of a version that is gone, perhaps
    check()
    raise
  check()


def to_change(config: Any, workdir: Workdir) -> pathlib.Path:
  """The bundle config.cdm.path, or with config.cdm.copy a copy of it in workdir/bundle: what a task may change.

  Opens the workdir if it copies. InputError as `folder_of`, and for a manifest that is not as it was sealed.
  """
  path = Bundle(folder_of(config, workdir)).path
  if not config.cdm.copy:
    return path
  copied = workdir / "bundle"
  if not copied.exists():
    workdir.open()
    partial = workdir / ".bundle"
    shutil.rmtree(partial, ignore_errors=True)
    with locked(path):
      shutil.copytree(path, partial, ignore=shutil.ignore_patterns(*PASSING))
    partial.rename(copied)
  return copied


def build_model(training: Any, image_shape: tuple[int, int, int], num_classes: int) -> Model:
  """The model of the sections of training, with its adapter."""
  classes = num_classes if training.diffusion.conditional else 0
  plain = denoisers.build_network(training.model, image_shape, classes)
  return Model(
    config_lib.build(ADAPTERS, training.adapter, backbone=plain),
    denoisers.build_preconditioning(training.diffusion.preconditioning),
    config_lib.build(LOSSES, training.diffusion.loss),
  )


def _check_there(path: pathlib.Path) -> None:
  if not (path / MANIFEST).is_file():
    raise InputError(f"{path} holds no {MANIFEST}: give the folder of a run of configs/cdm_train.py")


def text_of(manifest: Mapping[str, Any]) -> str:
  """The text of manifest.json: there is one for every manifest."""
  return json.dumps(manifest_lib.sealed(manifest), indent=2, sort_keys=True) + "\n"


def environment() -> dict[str, Any]:
  """What bits depend on beside data and settings.

  The package's own code is among it: after a change of it a version of a shard that is not finished begins anew.
  """
  device = jax.devices()[0]
  options = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  return {
    **{name: importlib.metadata.version(name) for name in packages},
    "jax_trustdiff": jax_trustdiff.__version__,
    "code": code_digest(),
    "python": platform.python_version(),
    "device": f"{device.platform} {device.device_kind}",
    "processor": _processor() if device.platform == "cpu" else "",
    "devices": jax.device_count(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    **{option: getattr(jax.config, option) for option in options},
  }


@functools.cache
def _processor() -> str:
  """The model of the processor, whose instructions XLA chooses from."""
  file = pathlib.Path("/proc/cpuinfo")
  lines = file.read_text().splitlines() if file.is_file() else []
  models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return f"{platform.machine()} {models[0] if models else platform.processor()}".strip()


@functools.cache
def code_digest() -> str:
  """SHA-256 of the package's own source files."""
  root = pathlib.Path(jax_trustdiff.__file__).parent
  found = hashlib.sha256()
  for file in sorted(root.rglob("*.py")):
    found.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
  return found.hexdigest()


def file_digests(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file of a finished version or artefact, but for its lock and clock."""
  files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
  return {name: file_digest(file) for name, file in files.items() if name not in PASSING}


def _section(plain: Mapping[str, Any]) -> config_lib.ConfigDict:
  """A section as a recipe has it: JSON has no tuples."""

  def tupled(value):
    if isinstance(value, Mapping):
      return {key: tupled(one) for key, one in value.items()}
    return tuple(map(tupled, value)) if isinstance(value, list) else value

  return config_lib.from_plain(tupled(plain))


def _is_as(file: pathlib.Path, digest: str) -> bool:
  """Whether a file is there, and has this SHA-256."""
  return file.is_file() and file_digest(file) == digest


def file_digest(file: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  return hashlib.sha256(file.read_bytes()).hexdigest()
