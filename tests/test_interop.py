"""Exports, the safe reader of torch checkpoints, and the names of the reference's state_dicts."""

import collections
import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_trustdiff
from jax_trustdiff.interop import export, safetensors_io
from jax_trustdiff.interop.pretrained import load_variables, save_torch
from jax_trustdiff.interop.torch_names import from_torch, to_torch
from jax_trustdiff.interop.torch_reader import read_torch
from jax_trustdiff.models import MODELS
from jax_trustdiff.types import InputError

SECTION = {"name": "wide_resnet", "depth": 10, "width": 1, "image_shape": (8, 8, 1), "mean": (0.5,)}


def network_of(section=SECTION):
  return MODELS[section["name"]](**{key: value for key, value in section.items() if key != "name"})


def random_variables(network):
  """Variables of the right shapes that are all different."""
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  leaves, structure = jax.tree.flatten(shapes)
  draw = np.random.RandomState(0).rand
  return jax.tree.unflatten(structure, [np.float32(draw(*leaf.shape)) + 0.1 for leaf in leaves])


def assert_equal_trees(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ----------------------------------------------------------------------------------------------- exports


@pytest.mark.floor
def test_an_export_comes_back_as_the_same_classifier(tmp_path):
  network = network_of()
  variables = random_variables(network)
  export.save_export(tmp_path / "a" / "export", SECTION, variables, {"metrics": {"clean_accuracy": 0.5}})
  loaded, again, meta = export.load_export(tmp_path / "a" / "export")
  assert loaded == network
  assert_equal_trees(again, variables)
  assert meta["metrics"] == {"clean_accuracy": 0.5}
  x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
  classifier = jax_trustdiff.load_classifier(tmp_path / "a" / "export")
  np.testing.assert_array_equal(
    jax.jit(lambda f, x: f(x))(classifier, x), jax.jit(network.logits)(variables, x)
  )
  assert sorted(path.name for path in (tmp_path / "a" / "export").iterdir()) == [
    "model.json",
    "model.safetensors",
  ]


def test_a_transposed_or_bfloat16_array_is_saved_as_it_reads(tmp_path):
  tree = {
    "a": {"b": np.arange(6.0).reshape(2, 3).T, "s": np.float32(3)},
    "c": jnp.ones((2, 1), jnp.bfloat16) / 3,
  }
  safetensors_io.save(tmp_path / "x.safetensors", tree)
  found = safetensors_io.load(tmp_path / "x.safetensors")
  assert_equal_trees(found, jax.tree.map(np.asarray, tree))
  assert found["c"].dtype == ml_dtypes.bfloat16
  assert found["a"]["s"].shape == ()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  file = tmp_path / "x.safetensors"
  safetensors_io.save(file, {"a": np.zeros(3)})

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="No space"):
    safetensors_io.save(file, {"a": np.ones(3)})
  assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
  np.testing.assert_array_equal(safetensors_io.load(file)["a"], np.zeros(3))


def test_a_name_that_would_not_come_back_is_refused():
  with pytest.raises(InputError, match="cannot be saved by name"):
    safetensors_io.flatten({"a.b": np.zeros(1)})


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a"), ("a.b.c", "a.b")])
def test_an_array_inside_an_array_is_one_clear_line(tmp_path, names):
  safetensors_io.save_flat(tmp_path / "x.safetensors", {name: np.zeros(2) for name in names})
  with pytest.raises(InputError, match=rf"x.safetensors: '{min(names)}' is an array") as caught:
    safetensors_io.load(tmp_path / "x.safetensors")
  assert "truncated" not in str(caught.value)
  with pytest.raises(InputError, match="would be inside it"):
    safetensors_io.unflatten({name: np.zeros(2) for name in names})


def test_extras_of_an_export_cannot_replace_its_description(tmp_path):
  with pytest.raises(InputError, match="extra holds format, model"):
    export.save_export(tmp_path, SECTION, random_variables(network_of()), {"model": {}, "format": 2})
  assert not any(tmp_path.iterdir())


def _damage(directory, how):
  arrays, description = directory / "model.safetensors", directory / "model.json"
  meta = json.loads(description.read_text())
  if how == "no description":
    description.unlink()
  elif how == "no arrays":
    arrays.unlink()
  elif how == "truncated arrays":
    arrays.write_bytes(arrays.read_bytes()[:-10])
  elif how == "truncated description":
    description.write_text(description.read_text()[:-10])
  elif how == "binary description":
    description.write_bytes(b"\xff\xfe\x00")
  elif how == "a list":
    description.write_text("[]")
  elif how == "other width":
    description.write_text(json.dumps({**meta, "model": {**meta["model"], "width": 2}}))
  elif how == "other name":
    description.write_text(json.dumps({**meta, "model": {"name": "vgg"}}))
  elif how == "other argument":
    description.write_text(json.dumps({**meta, "model": {**meta["model"], "wide": 2}}))
  elif how == "other depth":
    description.write_text(json.dumps({**meta, "model": {**meta["model"], "depth": 11}}))


@pytest.mark.parametrize(
  "how, message",
  [
    ("no description", "expected model.json"),
    ("no arrays", "no such file"),
    ("truncated arrays", "truncated"),
    ("truncated description", "truncated"),
    ("binary description", "not JSON"),
    ("a list", "not the description of an export"),
    ("other width", "does not fit"),
    ("other name", "preact_resnet, residual_codec, stamp_codec, uvit, uvit_head, wide_resnet"),
    ("other argument", "wide"),
    ("other depth", "4 \\+ 6n"),
  ],
)
def test_a_damaged_export_is_one_clear_line(tmp_path, how, message):
  export.save_export(tmp_path, SECTION, random_variables(network_of()))
  _damage(tmp_path, how)
  with pytest.raises(InputError, match=message) as caught:
    export.load_export(tmp_path)
  assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- names of state_dicts

NETWORKS = [
  {"name": "wide_resnet", "depth": 16, "width": 2},
  {"name": "preact_resnet", "depth": 18, "width": 8},
  {"name": "preact_resnet", "depth": 34, "width": 2, "shortcut": "1x1"},
]


@pytest.mark.parametrize("section", NETWORKS)
def test_state_dicts_go_both_ways(section):
  network = network_of(section)
  variables = random_variables(network)
  state_dict = to_torch(network, variables)
  assert all(value.flags["C_CONTIGUOUS"] for value in state_dict.values())
  assert_equal_trees(from_torch(network, state_dict), variables)
  for prefix in ("module.", "0.", "module.0."):
    renamed = {prefix + name: value for name, value in state_dict.items()}
    renamed[f"{prefix}batchnorm.num_batches_tracked"] = np.int64(7)
    assert_equal_trees(from_torch(network, {"model_state_dict": renamed}), variables)


# Written by hand from the names that the reference's code prints; the tables of torch_names are not used.
NAMES = {
  "wide_resnet": {
    "init_conv.weight": "params conv kernel",
    "layer.0.block.0.batchnorm_0.weight": "params group0_block0 norm0 scale",
    "layer.0.block.1.batchnorm_0.running_mean": "batch_stats group0_block1 norm0 mean",
    "layer.1.block.0.conv_0.weight": "params group1_block0 conv0 kernel",
    "layer.1.block.1.conv_1.weight": "params group1_block1 conv1 kernel",
    "layer.2.block.0.batchnorm_1.bias": "params group2_block0 norm1 bias",
    "layer.2.block.1.batchnorm_1.running_var": "batch_stats group2_block1 norm1 var",
    "layer.2.block.0.shortcut.weight": "params group2_block0 shortcut kernel",
    "batchnorm.weight": "params norm scale",
    "batchnorm.running_var": "batch_stats norm var",
    "logits.weight": "params logits kernel",
    "logits.bias": "params logits bias",
  },
  "preact_resnet": {
    "conv_2d.weight": "params conv kernel",
    "layer_0.0.batchnorm_0.weight": "params group0_block0 norm0 scale",
    "layer_0.1.conv_2d_1.weight": "params group0_block1 conv0 kernel",
    "layer_2.1.conv_2d_2.weight": "params group2_block1 conv1 kernel",
    "layer_3.0.batchnorm_1.bias": "params group3_block0 norm1 bias",
    "layer_3.1.batchnorm_1.running_mean": "batch_stats group3_block1 norm1 mean",
    "layer_1.0.shortcut.weight": "params group1_block0 shortcut kernel",
    "batchnorm.bias": "params norm bias",
    "batchnorm.running_mean": "batch_stats norm mean",
    "logits.weight": "params logits kernel",
    "logits.bias": "params logits bias",
  },
}


@pytest.mark.floor
@pytest.mark.parametrize("section", NETWORKS[:2])
def test_names_and_layouts_are_the_references(section):
  variables = random_variables(network_of(section))
  state_dict = to_torch(network_of(section), variables)
  for name, path in NAMES[section["name"]].items():
    ours = variables
    for part in path.split():
      ours = ours[part]
    np.testing.assert_array_equal(
      state_dict[name], ours.transpose(3, 2, 0, 1) if ours.ndim == 4 else ours.T, name
    )


def test_the_layout_of_a_convolution_and_of_a_linear_layer():
  network = network_of()
  variables = random_variables(network)
  state_dict = to_torch(network, variables)
  kernel = variables["params"]["group1_block0"]["conv0"]["kernel"]
  assert state_dict["layer.1.block.0.conv_0.weight"][5, 3, 0, 2] == kernel[0, 2, 3, 5]
  assert state_dict["logits.weight"][4, 9] == variables["params"]["logits"]["kernel"][9, 4]


def test_every_tensor_must_be_used_and_none_may_be_missing():
  network = network_of()
  state_dict = to_torch(network, random_variables(network))
  without = {name: value for name, value in state_dict.items() if name != "logits.bias"}
  with pytest.raises(InputError, match="missing or of another shape: logits.bias; left over: none"):
    from_torch(network, without)
  with pytest.raises(InputError, match="missing or of another shape: none; left over: fc.weight"):
    from_torch(network, {**state_dict, "fc.weight": np.zeros((2, 2))})
  with pytest.raises(InputError, match=r"another shape: logits.bias; left over: logits.bias \(3,\)"):
    from_torch(network, {**state_dict, "logits.bias": np.zeros(3)})
  with pytest.raises(InputError, match="differ only in the prefix"):
    from_torch(network, {**state_dict, "module.logits.bias": state_dict["logits.bias"]})


def test_stored_normalisation_must_be_that_of_the_network():
  network = network_of()
  state_dict = to_torch(network, random_variables(network))
  from_torch(network, {**state_dict, "mean": np.full((1, 1, 1), 0.5), "std": np.ones((1, 1, 1))})
  with pytest.raises(InputError, match=r"made for mean \[0.25\]"):
    from_torch(network, {**state_dict, "mean": np.full((1, 1, 1), 0.25)})


def torch_net(section):
  """The torch module that `section` describes, with random values, in evaluation mode."""
  torch = pytest.importorskip("torch", reason="torch is not installed")
  import torch_nets

  if section["name"] == "wide_resnet":
    net = torch_nets.WideResNet(section["depth"], section["width"], 3)
  else:
    net = torch_nets.PreActResNet({18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[section["depth"]], section["width"], 3)
  torch.manual_seed(0)
  for module in net.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      for value in (module.weight, module.bias, module.running_mean, module.running_var):
        torch.nn.init.uniform_(value, 0.1, 1.0)
  return net.eval()


def logits_of_both(net, network, variables):
  import torch

  x = np.random.RandomState(0).rand(2, 16, 16, 3).astype(np.float32)
  with torch.no_grad():
    theirs = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
  return theirs, jax.jit(network.logits)(variables, x)


TORCH_NETWORKS = [
  {"name": "wide_resnet", "depth": 16, "width": 1, "image_shape": (16, 16, 3)},
  {"name": "preact_resnet", "depth": 34, "width": 4, "image_shape": (16, 16, 3)},
]


@pytest.mark.parametrize("section", TORCH_NETWORKS)
@pytest.mark.parametrize("ending", ["pt", "pth", "safetensors"])
def test_a_torch_file_is_loaded_as_the_same_network(tmp_path, section, ending):
  net, network = torch_net(section), network_of(section)
  import torch

  if ending == "safetensors":
    from safetensors.torch import save_file

    save_file(net.state_dict(), tmp_path / "x.safetensors")
  else:
    wrapped = {"pt": net.state_dict(), "pth": {"model": torch.nn.DataParallel(net).state_dict(), "epoch": 3}}[
      ending
    ]
    torch.save(wrapped, tmp_path / f"x.{ending}")
  variables, stored = load_variables(tmp_path / f"x.{ending}", network)
  assert stored is None
  np.testing.assert_allclose(*logits_of_both(net, network, variables), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("section", TORCH_NETWORKS)
def test_a_saved_network_gives_the_same_logits_in_torch(tmp_path, section):
  net, network = torch_net(section), network_of(section)
  from safetensors.torch import load_file

  variables = jax.tree.map(
    lambda fresh, drawn: fresh if fresh.ndim > 1 else drawn,  # kernels as initialised, or the logits overflow
    jax.jit(network.init)(jax.random.key(0)),
    random_variables(network),
  )
  save_torch(tmp_path / "x.safetensors", network, variables)
  net.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)
  np.testing.assert_allclose(*logits_of_both(net, network, variables), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- variables to start a training from


@pytest.mark.floor
def test_variables_come_from_an_export_of_the_same_network(tmp_path):
  variables = random_variables(network_of())
  export.save_export(tmp_path, {**SECTION, "dtype": "bfloat16", "remat": True, "bn_groups": 4}, variables)
  found, stored = load_variables(tmp_path, network_of())
  assert_equal_trees(found, variables)
  assert stored["dtype"] == "bfloat16" and stored["depth"] == 10


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"activation": "relu"}, "activation is 'swish' there, 'relu' here$"),
    ({"mean": (0.4,), "std": (2.0,)}, r"mean is \(0.5,\) there, \(0.4,\) here; std is"),
    ({"width": 2}, "width is 1 there, 2 here$"),
    ({"name": "preact_resnet", "depth": 18}, "WideResNet there, PreActResNet here$"),
  ],
)
def test_an_export_of_another_network_is_refused_by_its_keys(tmp_path, changes, message):
  export.save_export(tmp_path, SECTION, random_variables(network_of()))
  with pytest.raises(InputError, match=message):
    load_variables(tmp_path, network_of({**SECTION, **changes}))


def test_variables_that_cannot_be_loaded_are_one_clear_line(tmp_path):
  network = network_of()
  export.save_export(tmp_path / "export", SECTION, random_variables(network))
  safetensors_io.save(tmp_path / "ours.safetensors", random_variables(network))
  safetensors_io.save(tmp_path / "other.safetensors", {"fc": {"weight": np.zeros((2, 2))}})
  write_checkpoint(tmp_path / "list.pt", pickle.dumps([1, 2], 2))
  write_checkpoint(tmp_path / "epoch.pt", pickle.dumps({"epoch": 3, "net": {"a": [1, [2]]}}, 2))
  for name, message in {
    "absent": "absent: expected the folder of an export, or a file with one of the endings .pt, .pth, .safetensors",
    "absent.pt": "no such file",
    "export/model.safetensors": "give the folder",
    "ours.safetensors": "ours.safetensors: the state_dict does not fit",
    "other.safetensors": "left over: fc.weight",
    "list.pt": "list.pt: expected a state_dict",
    "epoch.pt": r"left over: epoch \(\), net",
  }.items():
    with pytest.raises(InputError, match=message) as caught:
      load_variables(tmp_path / name, network)
    assert "\n" not in str(caught.value), name
  with pytest.raises(InputError, match="a .safetensors file"):
    save_torch(tmp_path / "x.pt", network, random_variables(network))


# --------------------------------------------------------------------------------- the safe pickle reader


@pytest.mark.parametrize("new_format", [True, False])
def test_checkpoints_of_torch_are_read_without_torch(tmp_path, new_format):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  kinds = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
  ]
  tensors = {kind: (torch.rand(3, 4) * 9).to(getattr(torch, kind)) for kind in kinds}
  base = torch.arange(24.0).reshape(4, 6)
  tensors |= {
    "transposed": base.T,
    "slice": base[1:3, ::2],
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "expanded": torch.ones(1, 3).expand(5, 3),
    "parameter": torch.nn.Parameter(torch.rand(2)),
  }
  module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
  optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
  module(torch.rand(2, 2, 4, 4)).sum().backward()
  optimizer.step()
  path = tmp_path / "x.pt"
  checkpoint = {
    "tensors": tensors,
    "model": module.state_dict(),
    "optimizer": optimizer.state_dict(),
    "epoch": (3, "a"),
  }
  torch.save(checkpoint, path, _use_new_zipfile_serialization=new_format)
  found = read_torch(path)
  assert found["tensors"].keys() == tensors.keys()
  for name, tensor in tensors.items():
    tensor = tensor.detach()
    array = found["tensors"][name]
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    expected = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
    np.testing.assert_array_equal(array.astype(expected.dtype), expected)
  for name, tensor in module.state_dict().items():
    np.testing.assert_array_equal(found["model"][name], tensor.numpy())
  assert found["epoch"] == (3, "a") and found["optimizer"]["param_groups"][0]["lr"] == 0.1
  for cut in (10, 100, path.stat().st_size // 2, path.stat().st_size - 30):
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="cut.pt") as caught:
      read_torch(tmp_path / "cut.pt")
    assert "\n" not in str(caught.value)


def write_checkpoint(path, program: bytes, data: bytes = b""):
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", program)
    archive.writestr("archive/data/0", data)


def tensor_program(shape, strides, offset=0, size=6, storage=b"ctorch\nFloatStorage\n"):
  """The opcodes of one tensor in a checkpoint (pickle protocol 2)."""
  pid = b"(" + _text("storage") + storage + _text("0") + _text("cpu") + _int(size) + b"tQ"
  arguments = pid + _int(offset) + _tuple(shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)R"
  return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


def _text(text):
  return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _int(value):
  return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _tuple(values):
  return b"(" + b"".join(map(_int, values)) + b"t"


@pytest.mark.floor
def test_a_tensor_is_read_where_there_is_no_torch(tmp_path):
  write_checkpoint(
    tmp_path / "x.pt", tensor_program((2, 3), (1, 2)), np.arange(6, dtype=np.float32).tobytes()
  )
  np.testing.assert_array_equal(read_torch(tmp_path / "x.pt"), np.arange(6).reshape(3, 2).T)


class Bomb:
  def __reduce__(self):
    return (print, ("executed",))


EVIL = {
  "builtins.print": pickle.dumps(Bomb(), 2).replace(b"__builtin__", b"builtins"),
  "os.system": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
  "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
  "torch.load": b"ctorch\nload\n(X\x01\x00\x00\x001tR.",
  "collections.Counter": pickle.dumps(collections.Counter("aab")),
  "a nested attribute": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
}


@pytest.mark.floor
@pytest.mark.parametrize("name", EVIL)
def test_a_pickle_that_would_call_something_is_refused(tmp_path, name, capsys):
  path = tmp_path / "x.pt"
  write_checkpoint(path, EVIL[name])
  with pytest.raises(InputError, match=r"refused: the file names \S+\.\S+"):
    read_torch(path)
  path.write_bytes(EVIL[name])  # the older format: bare pickles
  with pytest.raises(InputError, match="x.pt"):
    read_torch(path)
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  "program, message",
  [
    (tensor_program((2, 4), (4, 1)), "beyond its storage"),
    (tensor_program((2, 3), (3, 1), offset=1), "beyond its storage"),
    (tensor_program((-2, 3), (3, 1)), "offset 0, shape"),
    (tensor_program((2, 3), (3,)), "offset 0, shape"),
    (tensor_program((10**9, 10**9), (0, 0)), "repeats a storage"),
    (tensor_program((2, 3), (3, 1), size=7), "truncated"),
    (tensor_program((2, 3), (3, 1), storage=b"ctorch\nSize\n"), "refused: a storage"),
    (b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.", "not a torch checkpoint"),
    (b"garbage", "not a torch checkpoint"),
    (b"", "not a torch checkpoint"),
  ],
)
def test_a_malformed_checkpoint_is_one_clear_line(tmp_path, program, message):
  write_checkpoint(tmp_path / "x.pt", program, np.arange(6, dtype=np.float32).tobytes())
  with pytest.raises(InputError, match=message) as caught:
    read_torch(tmp_path / "x.pt")
  assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_refused(tmp_path):
  with pytest.raises(InputError, match="no such file"):
    read_torch(tmp_path / "absent.pt")
  np.savez(tmp_path / "x.npz", a=np.zeros(3))
  with pytest.raises(InputError, match="not .npz"):
    read_torch(tmp_path / "x.npz")
  (tmp_path / "x.txt").write_text("<html>quota exceeded</html>")
  with pytest.raises(InputError, match="x.txt"):
    read_torch(tmp_path / "x.txt")
