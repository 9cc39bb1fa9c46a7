"""Reads the network of an EDM snapshot (.pkl) without torch and without executing anything.

A snapshot is a pickled dictionary {'ema', 'loss_fn', 'augment_pipe', 'dataset_kwargs'}. Its objects are stored with
the source text of their classes, which the usual way of loading would run. Here that text is never looked at: the
values are taken from the objects' attributes, as torch's `state_dict` would list them.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_trustdiff.interop import edm_names
from jax_trustdiff.interop.network_weights import about
from jax_trustdiff.interop.numpy_pickle import SCALAR_NAMES
from jax_trustdiff.interop.pickle_data import BROKEN, Function, Stateful, load, one_line
from jax_trustdiff.interop.torch_reader import TENSOR_NAMES, Storage, Tensor, read_legacy, to_arrays
from jax_trustdiff.models.registry import DIFFUSION_NETWORKS
from jax_trustdiff.types import DiffusionNetwork, InputError, Variables

KEYS = ("ema", "loss_fn", "augment_pipe", "dataset_kwargs")
LARGEST_ARGUMENTS = 10_000  # values in the constructor arguments of one object
DEEPEST = 50  # modules in modules, lists in lists


@dataclasses.dataclass(frozen=True)
class Part:
  """An object of a snapshot: the name of its class and the keyword arguments it was made with, plain values."""

  class_name: str
  init_kwargs: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """What an EDM snapshot holds.

  class_name, init_kwargs: of the preconditioned network, such as 'EDMPrecond'; nothing of its class is imported
  model: the raw network in it, such as SongUNet, with all its arguments
  state_dict: {name: array}, parameters and persistent buffers in torch's order, names and layouts (convolutions
    OIHW, linear layers [out, in])
  dataset_kwargs: of the training set; {} where the file has none
  loss_fn, augment_pipe: None where the file has none
  """

  class_name: str
  init_kwargs: dict[str, Any]
  model: Part
  state_dict: dict[str, np.ndarray]
  dataset_kwargs: dict[str, Any]
  loss_fn: Part | None
  augment_pipe: Part | None

  @property
  def model_section(self) -> dict[str, Any]:
    """{'name': in DIFFUSION_NETWORKS, **arguments}; InputError for a network we have not."""
    section = edm_names.network_section(self.model.class_name, self.model.init_kwargs)
    blocks, levels = section.get("num_blocks", 1), section.get("channel_mult", ())
    if type(blocks) is not int or type(levels) is not tuple or blocks * len(levels) > len(self.state_dict):
      raise InputError(f"{self.model.class_name}: more blocks than there are tensors, or no number of blocks")
    return section

  @property
  def denoiser_section(self) -> dict[str, Any]:
    """{'name': of the preconditioning, **arguments}; InputError for one we have not."""
    return edm_names.denoiser_section(self.class_name, self.init_kwargs, self.model.init_kwargs)

  @property
  def network(self) -> DiffusionNetwork:
    """The network, computing in float32."""
    arguments = self.model_section
    with _fitting():
      return DIFFUSION_NETWORKS[arguments.pop("name")](**arguments)

  @property
  def variables(self) -> Variables:
    """The variables of `network`; InputError if the tensors are not those of it."""
    network = self.network
    with _fitting():
      return edm_names.from_edm(network, self.state_dict, iddpm_levels=self.class_name == "iDDPMPrecond")


def read_snapshot(path: str | os.PathLike) -> Snapshot:
  """The network of an EDM snapshot: every tensor bit by bit, and the arguments to build it again.

  Raises InputError, in one line, when the file is missing, truncated, no snapshot, or names or calls anything but
  what a snapshot of a network consists of; nothing is executed in any case.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path}: no such file; expected an EDM snapshot (.pkl)")
  with about(path):
    try:
      content = load(io.BytesIO(path.read_bytes()), _names())
      return _snapshot(content, path.stat().st_size)
    except InputError:
      raise
    except BROKEN as error:
      reason = one_line(str(error)) or type(error).__name__
      raise InputError(f"not an EDM snapshot, or truncated ({reason})") from None


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
  """What a network of impossible arguments raises is an InputError."""
  try:
    yield
  except InputError:
    raise
  except BROKEN as error:
    raise InputError(f"its arguments make no network ({one_line(str(error), 200)})") from None


# ---- what the names in a snapshot stand for ----


class _Object(Stateful):
  """Stands for an object of the training program or of torch.nn; `attributes` is what was stored of it."""

  def __init__(self, class_name: str = "", attributes: dict[str, Any] | None = None):
    self.class_name, self.attributes = class_name, attributes

  def set_state(self, state: Any) -> None:
    if self.attributes is not None or type(state) is not dict:
      raise InputError("refused the state of an object")
    self.attributes = state


def _persistent_object(meta: Any) -> _Object:
  if type(meta) is not dict or meta.get("type") != "class":
    raise InputError("refused: an object that is not stored by its class")
  name, state = meta.get("class_name"), meta.get("state")
  if type(name) is not str or not name.isidentifier() or type(state) is not dict:
    raise InputError("refused: an object without the name of its class or without its attributes")
  return _Object(name, state)


def _names() -> Mapping[tuple[str, str], Any]:
  """{(module, name): stand-in} for one file."""
  loaded: dict[int, tuple[bytes, Storage]] = {}

  def load_from_bytes(data: Any) -> Storage:
    if type(data) is not bytes:
      raise InputError(f"refused: a storage in a {type(data).__name__}; expected bytes")
    if id(data) not in loaded:
      storage = read_legacy(data, names={})
      if type(storage) is not Storage:
        raise InputError(f"refused: {one_line(storage)} where a storage was expected")
      loaded[id(data)] = data, storage
    return loaded[id(data)][1]

  modules = {
    ("torch.nn.modules.container", name): Function(lambda name=name: _Object(name))
    for name in ("ModuleDict", "ModuleList", "Sequential")
  }
  return {
    **TENSOR_NAMES,
    **SCALAR_NAMES,
    **modules,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(_persistent_object),
    ("torch.storage", "_load_from_bytes"): Function(load_from_bytes),
    ("torch.nn.modules.linear", "Identity"): Function(lambda: _Object("Identity")),
    ("dnnlib.util", "EasyDict"): Function(lambda: {}),
    ("builtins", "set"): Function(_set),
    ("__builtin__", "set"): Function(_set),
  }


def _set(values: Any = ()) -> set[str]:
  if not all(type(value) is str for value in values):
    raise InputError("refused: a set of anything but text")
  return set(values)


# ---- from the objects to the snapshot ----


def _snapshot(content: Any, file_size: int) -> Snapshot:
  if type(content) is not dict or type(content.get("ema")) is not _Object:
    raise InputError(
      f"not an EDM snapshot: expected a dictionary with a network as 'ema' ({', '.join(KEYS)})"
    )
  network = content["ema"]
  tensors: dict[str, Tensor] = {}
  _collect(network, "", tensors, set(), 0)
  model = _members(network, "_modules", _Object).get("model")
  if model is None:
    raise InputError("not an EDM snapshot: its network holds no 'model'")
  ema = _part(network)
  return Snapshot(
    class_name=ema.class_name,
    init_kwargs=ema.init_kwargs,
    model=_part(model),
    state_dict=to_arrays(tensors, file_size, expansion=0),
    dataset_kwargs=_plain_dict(content.get("dataset_kwargs"), "dataset_kwargs"),
    loss_fn=_optional_part(content.get("loss_fn"), "loss_fn"),
    augment_pipe=_optional_part(content.get("augment_pipe"), "augment_pipe"),
  )


def _collect(module: _Object, prefix: str, tensors: dict[str, Tensor], seen: set[int], depth: int) -> None:
  """Adds the tensors of a module and of those in it, in the order of torch's `state_dict`."""
  if id(module) in seen or depth > DEEPEST:
    raise InputError(f"refused: the module {one_line(prefix)} contains itself or is part of two others")
  seen.add(id(module))
  hidden = (module.attributes or {}).get("_non_persistent_buffers_set", set())
  if type(hidden) is not set:
    raise InputError(f"refused: the buffers of the module {one_line(prefix)}")
  buffers = _members(module, "_buffers", Tensor)
  for name, tensor in _members(module, "_parameters", Tensor).items():
    tensors[prefix + name] = tensor
  for name, tensor in buffers.items():
    if name not in hidden:
      tensors[prefix + name] = tensor
  for name, child in _members(module, "_modules", _Object).items():
    _collect(child, f"{prefix}{name}.", tensors, seen, depth + 1)


def _members(module: _Object, attribute: str, kind: type) -> dict[str, Any]:
  """{name: member} of a module's `_parameters`, `_buffers` or `_modules`; those that are None are left out."""
  members = (module.attributes or {}).get(attribute)
  if type(members) is not dict:
    raise InputError(f"refused: a {one_line(module.class_name)} without {attribute}")
  found = {name: member for name, member in members.items() if member is not None}
  if not all(type(name) is str and type(member) is kind for name, member in found.items()):
    raise InputError(f"refused: {attribute} of a {one_line(module.class_name)} holds something else")
  return found


def _part(value: _Object) -> Part:
  attributes = value.attributes or {}
  where = f"the arguments of {value.class_name}"
  if attributes.get("_init_args", ()) != ():
    raise InputError(f"{where} have no names; expected keyword arguments")
  return Part(value.class_name, _plain_dict(attributes.get("_init_kwargs"), where))


def _optional_part(value: Any, where: str) -> Part | None:
  if value is None:
    return None
  if type(value) is not _Object:
    raise InputError(f"refused: {where} is a {one_line(value)}")
  return _part(value)


def _plain_dict(value: Any, where: str) -> dict[str, Any]:
  plain = _plain({} if value is None else value, where)
  if type(plain) is not dict or not all(type(key) is str for key in plain):
    raise InputError(f"refused: {where} are no dictionary with names")
  return plain


def _plain(value: Any, where: str) -> Any:
  """A copy of a value made of numbers, text and containers; InputError for any other, or for a very large one."""
  left = LARGEST_ARGUMENTS

  def copy(node: Any, depth: int) -> Any:
    nonlocal left
    left -= 1
    if left < 0 or depth > DEEPEST:
      raise InputError(f"refused: {where} are more than {LARGEST_ARGUMENTS} values, or contain themselves")
    if type(node) is dict:
      return {key: copy(child, depth + 1) for key, child in node.items()}
    if type(node) in (list, tuple):
      return type(node)([copy(child, depth + 1) for child in node])
    if node is not None and type(node) not in (bool, int, float, str):
      raise InputError(f"refused: {where} hold a {one_line(node)}; expected numbers, text and lists")
    return node

  return copy(value, 0)
