"""The reader of EDM snapshots: genuine ones bit by bit, and every hostile one refused before anything runs."""

import collections
import copyreg
import io
import json
import pickle
import struct
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff.interop import pickle_data
from jax_trustdiff.interop.edm_snapshot import Part, read_snapshot
from jax_trustdiff.interop.torch_reader import DTYPES, read_torch
from jax_trustdiff.types import InputError

# ------------------------------------------------------------------------------------- a writer of snapshots


class Name:
  """Pickled as this global name, whether there is such a thing or not."""

  def __init__(self, module, name):
    self.module, self.name = module, name

  def __call__(self):
    """The pickler wants a function to be callable, and does not call it."""


class Call(Name):
  """Pickled as a call of a name (or of the result of a call), and a state given to the result."""

  def __init__(self, function, *args, state=None):
    self.reduced = (function, args, state)

  def __reduce_ex__(self, protocol):
    return self.reduced


class Raw:
  """Pickled as these opcodes."""

  def __init__(self, opcodes):
    self.opcodes = opcodes


class Writer(pickle._Pickler):
  dispatch = dict(pickle._Pickler.dispatch)

  def _save_name(self, obj):
    self.write(f"c{obj.module}\n{obj.name}\n".encode())

  def _save_raw(self, obj):
    self.write(obj.opcodes)

  dispatch[Name] = _save_name
  dispatch[Raw] = _save_raw


def dumps(obj, protocol=4):
  file = io.BytesIO()
  Writer(file, protocol).dump(obj)
  return file.getvalue()


def opcodes_of(obj):
  """Opcodes that leave `obj` on the stack and the memo as it is."""
  file = io.BytesIO()
  writer = Writer(file, 3)
  writer.fast = True
  writer.dump(obj)
  return file.getvalue()[2:-1]


PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
LOAD_FROM_BYTES = Name("torch.storage", "_load_from_bytes")
REBUILD_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Name("collections", "OrderedDict")
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


def storage_bytes(data=b"", kind="FloatStorage", size=0, *, third=None, keys=("7",), count=None):
  """A storage as torch.save writes it in the older format; `third` replaces the identifier of the storage."""
  identifier = opcodes_of(("storage", Name("torch", kind), "7", "cpu", size, None))
  head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
  parts = [pickle.dumps(value, 2) for value in head]
  parts.append(b"\x80\x02" + identifier + b"Q." if third is None else third)
  return b"".join(
    [*parts, pickle.dumps(list(keys), 2), struct.pack("<q", size if count is None else count), data]
  )


def storage(array):
  return Call(LOAD_FROM_BYTES, storage_bytes(array.tobytes(), KINDS[array.dtype], array.size))


def tensor(array, *, offset=0, shape=None, strides=None, of=None):
  array = np.asarray(array)
  strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides
  shape = array.shape if shape is None else shape
  return Call(REBUILD_TENSOR, of or storage(array), offset, shape, strides, False, Call(ORDERED_DICT))


def parameter(array):
  return Call(Name("torch._utils", "_rebuild_parameter"), tensor(array), True, Call(ORDERED_DICT))


def module(
  class_name, parameters=None, buffers=None, modules=None, hidden=(), kwargs=None, src="raise 1", **state
):
  state = {
    "training": False,
    "_parameters": parameters or {},
    "_buffers": buffers or {},
    "_non_persistent_buffers_set": set(hidden),
    "_forward_hooks": Call(ORDERED_DICT),
    "_modules": modules or {},
    "_init_args": (),
    "_init_kwargs": kwargs or {},
    **state,
  }
  meta = {"type": "class", "version": 6, "module_src": src, "class_name": class_name, "state": state}
  return Call(PERSISTENT, meta)


def container(name, modules):
  """An instance of a container of torch.nn."""
  opcodes = f"ctorch.nn.modules.container\n{name}\n)".encode() + b"\x81"
  state = {"_parameters": Call(ORDERED_DICT), "_buffers": Call(ORDERED_DICT), "_modules": modules}
  return Raw(opcodes + opcodes_of(state) + b"b")


def arrays(seed=0):
  draw = np.random.default_rng(seed).normal
  return {
    name: np.float32(draw(size=shape)) for name, shape in {"weight": (3, 2, 1, 1), "bias": (3,)}.items()
  }


def network(**changes):
  conv = arrays()
  layer = module(
    "Conv2d", {"weight": parameter(conv["weight"]), "bias": parameter(conv["bias"]), "none": None}
  )
  model = module(
    "SongUNet",
    modules={"map_noise": module("PositionalEmbedding"), "enc": container("ModuleDict", {"8x8_conv": layer})},
    kwargs={"img_resolution": 8, "channel_mult": [1, 2]},
  )
  fields = {"kwargs": {"sigma_data": 0.5, "model_type": "SongUNet"}, "modules": {"model": model}}
  return module("EDMPrecond", **(fields | changes))


def snapshot(**changes):
  content = {"ema": network(), "loss_fn": module("EDMLoss", P_mean=-1.2), "augment_pipe": None}
  return content | {"dataset_kwargs": {"path": "x.zip", "xflip": False}} | changes


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else dumps(content))
  return path


def refused(path, content, message=""):
  """The one line with which the file is refused."""
  with pytest.raises(InputError, match=message or None) as caught:
    read_snapshot(write(path, content))
  line = str(caught.value)
  assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 400, line
  return line


# ----------------------------------------------------------------------------------------------- genuine ones


@pytest.mark.floor
def test_every_tensor_of_a_genuine_snapshot_bit_by_bit():
  folder = shared_dir("golden", "edm_networks")
  found = read_snapshot(folder / "snapshot_ddpmpp_edm.pkl")
  with np.load(folder / "snapshot_ddpmpp_edm_expected.npz") as file:
    expected = {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}
    config = json.loads(str(file["config"]))
  assert len(expected) == 149 and found.state_dict.keys() == expected.keys()
  for name, array in expected.items():
    assert found.state_dict[name].dtype == array.dtype == np.float32
    assert found.state_dict[name].shape == array.shape
    assert found.state_dict[name].tobytes() == array.tobytes(), name
  assert found.class_name == config.pop("precond") == "EDMPrecond" and found.init_kwargs == config
  assert found.model.class_name == "SongUNet" and found.model.init_kwargs["channel_mult"] == [1, 2]
  assert found.dataset_kwargs["use_labels"] is True and found.loss_fn == Part("EDMLoss", {})
  assert found.augment_pipe.init_kwargs["xflip"] == 1e8


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_snapshot_written_here_is_read_whole(tmp_path, protocol):
  found = read_snapshot(write(tmp_path / "x.pkl", dumps(snapshot(), protocol)))
  assert list(found.state_dict) == ["model.enc.8x8_conv.weight", "model.enc.8x8_conv.bias"]
  for name, array in arrays().items():
    np.testing.assert_array_equal(found.state_dict[f"model.enc.8x8_conv.{name}"], array)
  assert found.init_kwargs == {"sigma_data": 0.5, "model_type": "SongUNet"}
  assert found.model == Part("SongUNet", {"img_resolution": 8, "channel_mult": [1, 2]})
  assert found.loss_fn == Part("EDMLoss", {}) and found.augment_pipe is None
  assert found.dataset_kwargs == {"path": "x.zip", "xflip": False}


def test_buffers_views_and_other_types(tmp_path):
  base = np.arange(12, dtype=np.float32)
  values = {
    "half": np.float16([1.5, -2]),
    "bf16": np.array([1, 3.25], ml_dtypes.bfloat16),
    "long": np.int64([[1, -(2**60)]]),
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "nan": np.array([0x7FC00123, 0xFF800000, 0x80000000], np.uint32).view(np.float32),
  }
  views = {
    "transposed": tensor(base, shape=(3, 4), strides=(1, 3)),
    "slice": tensor(base, offset=2, shape=(2, 2), strides=(6, 2)),
  }
  buffers = {name: tensor(value) for name, value in values.items()} | views | {"skip": tensor(base)}
  content = snapshot(ema=network(buffers=buffers, hidden=["skip"]))
  found = read_snapshot(write(tmp_path / "x.pkl", content)).state_dict
  assert "skip" not in found
  for name, value in values.items():
    assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    assert found[name].shape == value.shape
  np.testing.assert_array_equal(found["transposed"], base.reshape(4, 3).T)
  np.testing.assert_array_equal(found["slice"], [[2, 4], [8, 10]])
  assert all(array.flags.writeable and array.flags.c_contiguous for array in found.values())


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arguments_may_hold_numbers_of_numpy_and_dictionaries_with_attributes(tmp_path, core):
  dtype = Call(Name("numpy", "dtype"), "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
  number = Call(Name(f"numpy.{core}.multiarray", "scalar"), dtype, np.float64(2**0.5).tobytes())
  easy = Raw(b"cdnnlib.util\nEasyDict\n)\x81" + opcodes_of("a") + opcodes_of((1, None)) + b"s")
  found = read_snapshot(
    write(tmp_path / "x.pkl", snapshot(ema=network(kwargs={"std": number, "more": easy})))
  )
  assert found.init_kwargs == {"std": 2**0.5, "more": {"a": (1, None)}}


# ------------------------------------------------------------------- calls: nothing may run, whatever is named

SYSTEM = Name("os", "system")


def touch(canary):
  return f"touch {canary}"


# Each of these creates the canary when Python's own reader loads it, which is tested too.
RUNS = {
  "__reduce__ to os.system": lambda c: Call(SYSTEM, touch(c)),
  "posix.system": lambda c: Call(Name("posix", "system"), touch(c)),
  "in a container": lambda c: [{"a": (Call(SYSTEM, touch(c)),)}],
  "builtins.eval": lambda c: Call(Name("builtins", "eval"), f"open({str(c)!r}, 'w')"),
  "builtins.exec": lambda c: Call(Name("builtins", "exec"), f"open({str(c)!r}, 'w')"),
  "builtins.getattr, its result called": lambda c: Call(
    Call(Name("builtins", "getattr"), Call(Name("builtins", "__import__"), "os"), "system"), touch(c)
  ),
  "a nested pickle": lambda c: Call(Name("pickle", "loads"), dumps(Call(SYSTEM, touch(c)))),
  "copyreg": lambda c: Call(
    Name("copyreg", "_reconstructor"), *[Name("subprocess", "Popen")] * 2, ["touch", str(c)]
  ),
  "INST": lambda c: Raw(b"(" + opcodes_of(touch(c)) + b"ios\nsystem\n"),
  "OBJ": lambda c: Raw(b"(csubprocess\nPopen\n" + opcodes_of(["touch", str(c)]) + b"o"),
  "a dotted name": lambda c: Raw(
    opcodes_of("os") + opcodes_of("path.os.system") + b"\x93" + opcodes_of((touch(c),)) + b"R"
  ),
  "EXT1": lambda c: Raw(b"\x82\xf0" + opcodes_of((touch(c),)) + b"R"),
  "EXT2": lambda c: Raw(b"\x83\xf0\x00" + opcodes_of((touch(c),)) + b"R"),
  "EXT4": lambda c: Raw(b"\x84\xf0\x00\x00\x00" + opcodes_of((touch(c),)) + b"R"),
}


@pytest.fixture
def extension():
  """os.system under the extension code 240, with the function in the cache that pickle asks first."""
  copyreg.add_extension("os", "system", 240)
  yield
  copyreg.remove_extension("os", "system", 240)


PLACES = {
  "for the network": lambda evil: snapshot(ema=evil),
  "beside the network": lambda evil: snapshot(dataset_kwargs={"path": evil}),
  "as an unknown entry": lambda evil: snapshot(more=evil),
  "as the whole file": lambda evil: evil,
  "among the arguments": lambda evil: snapshot(ema=network(kwargs={"a": evil})),
  "among the attributes": lambda evil: snapshot(ema=network(anything=evil)),
  "as the state of a container": lambda evil: snapshot(
    ema=network(
      modules={"model": Raw(b"ctorch.nn.modules.container\nModuleDict\n)\x81" + opcodes_of(evil) + b"b")}
    )
  ),
  "in the stream of a storage": lambda evil: snapshot(
    ema=network(buffers={"a": tensor([0.0], of=Call(LOAD_FROM_BYTES, storage_bytes(third=dumps(evil))))})
  ),
  "for the stream of a storage": lambda evil: snapshot(
    ema=network(buffers={"a": tensor([0.0], of=Call(LOAD_FROM_BYTES, dumps(evil)))})
  ),
  "as the keys of a storage": lambda evil: snapshot(
    ema=network(
      buffers={"a": tensor([0.0], of=Call(LOAD_FROM_BYTES, storage_bytes(size=1)[:-30] + dumps(evil)))}
    )
  ),
  "as the shape of a tensor": lambda evil: snapshot(ema=network(buffers={"a": tensor([0.0], shape=evil)})),
}


@pytest.mark.parametrize("name", RUNS)
def test_pythons_own_reader_runs_these(tmp_path, name, extension):
  """The other side: the hostile pickles below do what they are for when nothing stops them."""
  canary = tmp_path / "canary"
  pickle.loads(dumps(RUNS[name](canary)))
  deadline = time.monotonic() + 20
  while not canary.exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert canary.exists()


@pytest.mark.floor
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RUNS)
def test_what_would_run_is_refused(tmp_path, name, place, extension):
  canary = tmp_path / "canary"
  line = refused(tmp_path / "x.pkl", PLACES[place](RUNS[name](canary)))
  assert "refused" in line
  assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]


def test_the_source_text_in_a_snapshot_is_not_run(tmp_path):
  source = f"open({str(tmp_path / 'canary')!r}, 'w')\nclass EDMPrecond: pass"
  read_snapshot(write(tmp_path / "x.pkl", snapshot(ema=network(src=source))))
  assert [p.name for p in tmp_path.iterdir()] == ["x.pkl"]
  exec(source)
  assert (tmp_path / "canary").exists()


NAMES = [
  ("builtins", "type"),
  ("collections", "Counter"),
  ("collections", "OrderedDict.fromkeys"),
  ("torch", "load"),
  ("torch", "FloatStorage.__reduce__"),
  ("torch", "FloatStorage"),
  ("torch._utils", "_rebuild_tensor_v2.__globals__"),
  ("torch._utils", "_rebuild_sparse_tensor"),
  ("torch.nn.modules.container", "ModuleDict.forward"),
  ("torch.nn.modules.container", "__builtins__"),
  ("torch_utils.persistence", "_src_to_module"),
  ("torch_utils.persistence", "persistent_class"),
  ("numpy", "load"),
  ("numpy", "ndarray"),
  ("numpy.core.multiarray", "_reconstruct"),
  ("numpy._core.multiarray", "_reconstruct"),
  ("numpy.core.multiarray", "fromfile"),
  ("jax_trustdiff.interop.pickle_data", "Function"),
  ("evil\x1b[2J\u2028name", "a\nb"),
]


@pytest.mark.parametrize("module, name", NAMES)
def test_no_other_name_is_known(tmp_path, module, name):
  named = Raw(opcodes_of(module) + opcodes_of(name) + b"\x93" + opcodes_of(()) + b"R")
  line = refused(tmp_path / "x.pkl", snapshot(more=named), "refused: the file names ")
  assert line.isprintable()


# --------------------------------------------------- calls, items and states of what the reader itself hands out

OBJECT = opcodes_of(module("Linear"))
STATE = opcodes_of({"__class__": 1, "__init__": 2, "_parameters": {}})
DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR"
SCALAR = b"cnumpy.core.multiarray\nscalar\n"
ABUSE = {
  "call of an object": OBJECT + b")R",
  "call of a class by NEWOBJ": OBJECT + b")\x81",
  "call of a tensor": opcodes_of(tensor([1.0])) + b")R",
  "call of text": opcodes_of("os.system") + opcodes_of(("true",)) + b"R",
  "call of a dtype": DTYPE + b")R",
  "call with no tuple": b"ccollections\nOrderedDict\n]R",
  "call with too many arguments": b"ctorch_utils.persistence\n_reconstruct_persistent_obj\nK\x01K\x02\x86R",
  "call with opcodes of keywords": b"ccollections\nOrderedDict\n)}\x92",
  "state of an object that has one": OBJECT + STATE + b"b",
  "state that is no dictionary": b"ctorch.nn.modules.container\nModuleDict\n)\x81N" + STATE + b"\x86b",
  "state of a tensor": opcodes_of(tensor([1.0])) + STATE + b"b",
  "state of a function": b"ccollections\nOrderedDict\n" + STATE + b"b",
  "state of a list": b"]" + STATE + b"b",
  "items of an object": OBJECT + b"K\x01K\x02s",
  "items of a function": b"ccollections\nOrderedDict\nK\x01a",
  "items of a tuple": b"K\x01\x85K\x02a",
  "an odd number of items": b"}(K\x01u",
  "a list as a key": b"}]K\x01s",
  "an object in a set": b"\x8f(" + OBJECT + b"\x90",
  "an object that is not a class": opcodes_of(
    Call(PERSISTENT, {"type": "module", "class_name": "a", "state": {}})
  ),
  "an object without a state": opcodes_of(Call(PERSISTENT, {"type": "class", "class_name": "a"})),
  "an object with a class that is no name": opcodes_of(
    Call(PERSISTENT, {"type": "class", "class_name": "a.b(c)", "state": {}})
  ),
  "a parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n)R",
  "a tensor without a storage": opcodes_of(Call(REBUILD_TENSOR, "x", 0, (1,), (1,))),
  "a storage from text": opcodes_of(Call(LOAD_FROM_BYTES, "x")),
  "a storage from nothing": opcodes_of(Call(LOAD_FROM_BYTES, b"")),
  "a storage in a storage": opcodes_of(
    Call(LOAD_FROM_BYTES, storage_bytes(third=dumps(storage(np.zeros(1, np.float32)), 2)))
  ),
  "a storage of another type": opcodes_of(Call(LOAD_FROM_BYTES, storage_bytes(kind="Size"))),
  "a storage that is a tensor": opcodes_of(Call(LOAD_FROM_BYTES, storage_bytes(third=pickle.dumps("x")))),
  "objects of numpy": DTYPE.replace(b"f8", b"O8"),
  "structures of numpy": b"cnumpy\ndtype\n(X\x03\x00\x00\x00V99\x89\x88tR",
  "a huge type of numpy": b"cnumpy\ndtype\n(X\x0c\x00\x00\x00V99999999999\x89\x88tR",
  "a hostile state of a dtype": DTYPE + opcodes_of((3, "|O", None, None, None, -1, -1, 63)) + b"b",
  "a dtype of a dtype": b"cnumpy\ndtype\n(" + DTYPE + b"\x89\x88tR",
  "a number without bytes": SCALAR + DTYPE + b"\x85R",
  "a number from text": SCALAR + DTYPE + opcodes_of("12345678") + b"\x86R",
  "a number of too few bytes": SCALAR + DTYPE + opcodes_of(Raw(b"C\x03123")) + b"\x86R",
  "a number without a type": SCALAR + opcodes_of("f8") + opcodes_of(Raw(b"C\x0812345678")) + b"\x86R",
  "an object outside the file": opcodes_of(("storage", Name("torch", "Size"), "0", "cpu", 1, None)) + b"Q",
  "an object outside the file, by text": b"Pos.system\n",
  "a memo that is not there": b"h\xff",
  "a mark that is not there": b"1",
  "an empty stack": b"000000000",
  "an unknown opcode": b"\xff",
  "the end inside of a list": b"(",
}


@pytest.mark.parametrize("name", ABUSE)
def test_what_the_reader_hands_out_cannot_be_abused(tmp_path, name):
  refused(tmp_path / "x.pkl", snapshot(more=Raw(ABUSE[name])))


def test_a_state_does_not_change_the_reader(tmp_path):
  """A BUILD on a class would last beyond the file; the snapshot after the attacks is read as before them."""
  for opcodes in ABUSE.values():
    refused(tmp_path / "x.pkl", snapshot(more=Raw(opcodes)))
  found = read_snapshot(write(tmp_path / "x.pkl", snapshot()))
  np.testing.assert_array_equal(found.state_dict["model.enc.8x8_conv.bias"], arrays()["bias"])


# ----------------------------------------------------------------------------------- memory and time


def doubled(seed: bytes, times: int, opcode: bytes = b"\x86") -> bytes:
  """`times` pairs, each of the last one twice: a value of 2**times parts in a few bytes."""
  return seed + b"".join(
    b"r%sj%s" % (at, at) + opcode for at in map(struct.Struct("<I").pack, range(900, 900 + times))
  )


PUT, GET = b"r\x84\x03\x00\x00", b"j\x84\x03\x00\x00"


def of_memo(value: bytes, count: int, call: bytes) -> bytes:
  """A list of `count` results of a call whose argument is one value of the memo."""
  return value + PUT + b"0](" + count * (call + GET + b"\x85R") + b"e"


def with_storage(**changes):
  return snapshot(
    ema=network(buffers={"a": tensor([0.0], of=Call(LOAD_FROM_BYTES, storage_bytes(**changes)))})
  )


def with_tensor(**changes):
  return snapshot(ema=network(buffers={"a": tensor([0.0], **changes)}))


def many_tensors(**changes):
  shared = storage(np.zeros(1, np.float32))
  return snapshot(ema=network(buffers={f"b{i}": tensor([0.0], of=shared, **changes) for i in range(400)}))


def with_more(opcodes):
  return snapshot(more=Raw(opcodes))


def with_arguments(opcodes):
  return snapshot(ema=network(kwargs={"a": Raw(opcodes)}))


LONGEST = 20_000  # opcodes, for these tests
HUGE = (2**40, 2**62, 2**63 - 1, 2**64 - 1)
BOMBS = {
  **{f"BINBYTES8 of {n} bytes": lambda n=n: with_more(b"\x8e" + struct.pack("<Q", n)) for n in HUGE},
  **{f"BINUNICODE8 of {n} bytes": lambda n=n: with_more(b"\x8d" + struct.pack("<Q", n)) for n in HUGE},
  **{f"BYTEARRAY8 of {n} bytes": lambda n=n: with_more(b"\x96" + struct.pack("<Q", n)) for n in HUGE},
  "BINBYTES of 4 GiB": lambda: with_more(b"B\xff\xff\xff\xff"),
  "BINUNICODE of 4 GiB": lambda: with_more(b"X\xff\xff\xff\xff"),
  "a FRAME of 2**62 bytes": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
  "LONG4 of 2 GiB": lambda: with_more(b"\x8b\xff\xff\xff\x7f"),
  "LONG4 of a million bytes": lambda: with_more(b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20),
  "a million decimals": lambda: with_more(b"I" + b"9" * 2**20 + b"\n"),
  "a memo of 2**32 places": lambda: with_more(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff)R"),
  "a storage of 2**40 values": lambda: with_storage(size=2**40),
  "a storage of 2**61 values": lambda: with_storage(size=2**61),
  "a storage of 2**70 values": lambda: with_storage(size=2**70, count=0),
  "a storage of -1 values": lambda: with_storage(size=-1),
  "a storage of two sizes": lambda: with_storage(data=bytes(8), size=1, count=2),
  "a storage without its bytes": lambda: with_storage(size=4),
  "a storage without its key": lambda: with_storage(size=1, keys=()),
  "an unknown storage key": lambda: with_storage(size=1, keys=("8",)),
  "too many storage keys": lambda: with_storage(size=0, keys=("7",) * LONGEST),
  "a tensor beyond its storage": lambda: with_tensor(shape=(2,), strides=(1,)),
  "a tensor before its storage": lambda: with_tensor(offset=-1),
  "a tensor of negative strides": lambda: with_tensor(shape=(1,), strides=(-1,)),
  "a tensor of 2**80 values": lambda: with_tensor(shape=(2**40, 2**40), strides=(0, 0)),
  "a tensor of 2**8000 values": lambda: with_tensor(shape=(2**2000,) * 4, strides=(0,) * 4),
  "a tensor of rank 1000": lambda: with_tensor(shape=(1,) * 1000, strides=(0,) * 1000),
  "a shape of 2**90 lists": lambda: with_tensor(shape=(Raw(doubled(b"]", 90)),), strides=(0,)),
  "an offset of 2**90 lists": lambda: with_tensor(offset=Raw(doubled(b"]", 90))),
  "many expanded tensors": lambda: many_tensors(shape=(2**26,), strides=(0,)),
  "arguments of 2**90 lists": lambda: with_arguments(doubled(b"]", 90)),
  "dataset arguments of 2**90 lists": lambda: snapshot(dataset_kwargs={"a": Raw(doubled(b"]", 90))}),
  "arguments that contain themselves": lambda: with_arguments(b"]" + PUT + GET + b"a"),
  "a thousand lists in lists": lambda: with_arguments(b"]" * 1000 + b"a" * 999),
  "a key of 2**90 tuples": lambda: with_arguments(b"}" + doubled(b")", 90) + b"Ns"),
  "a set of 2**90 tuples": lambda: with_arguments(b"\x8f(" + doubled(b")", 90) + b"\x90"),
  "a frozen set of 2**90 tuples": lambda: with_arguments(b"(" + doubled(b")", 90) + b"\x91"),
  "a name of 2**90 tuples": lambda: with_arguments(2 * doubled(b")", 90) + b"\x93"),
  "an identifier of 2**90 tuples": lambda: with_arguments(doubled(b")", 90) + b"Q"),
  "a class of 2**90 tuples": lambda: with_arguments(opcodes_of(module(Raw(doubled(b")", 90))))),
  "a storage key of 2**90 tuples": lambda: with_storage(
    third=b"\x80\x02"
    + opcodes_of(("storage", Name("torch", "FloatStorage"), Raw(doubled(b")", 90)), "cpu", 1, None))
    + b"Q."
  ),
  "a module that contains itself": lambda: snapshot(
    ema=network(
      modules={
        "model": Raw(
          b"ctorch.nn.modules.container\nModuleDict\n)\x81"
          + PUT
          + opcodes_of({"_parameters": {}, "_buffers": {}, "_modules": {"a": Raw(GET)}})
          + b"b"
        )
      }
    )
  ),
  "a long list copied many times": lambda: with_arguments(
    of_memo(b"](" + b"NN\x86" * 1000 + b"e", 1000, b"ctorch\nSize\n")
  ),
  "a long text copied many times": lambda: with_arguments(
    of_memo(b"X" + struct.pack("<I", 10_000) + b"x" * 10_000, 2000, b"ctorch\nSize\n")
  ),
  "a frozen set copied many times": lambda: with_arguments(
    of_memo(
      b"(" + b"".join(b"M" + struct.pack("<H", i) for i in range(2000)) + b"\x91", 2000, b"ctorch\nSize\n"
    )
  ),
  "too many opcodes": lambda: with_arguments(b"]" * LONGEST),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory_and_time(tmp_path, name, monkeypatch):
  monkeypatch.setattr(pickle_data, "LONGEST", LONGEST)
  content = BOMBS[name]()
  content = content if isinstance(content, bytes) else dumps(content)
  tracemalloc.start()
  began = time.process_time()
  try:
    refused(tmp_path / "x.pkl", content)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2**22 + 10 * len(content), f"{peak / 2**20:.1f} MiB for a file of {len(content)} bytes"
  assert seconds < 10, seconds


def test_one_storage_loaded_many_times_is_held_once(tmp_path):
  stream = storage_bytes(bytes(2**20), size=2**18)
  value = b"B" + struct.pack("<I", len(stream)) + stream
  path = write(tmp_path / "x.pkl", with_more(of_memo(value, 1000, b"ctorch.storage\n_load_from_bytes\n")))
  tracemalloc.start()
  try:
    read_snapshot(path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
  finally:
    tracemalloc.stop()


def test_memory_of_numpy_is_counted_by_the_tests_above():
  tracemalloc.start()
  array = np.zeros(2**24, np.uint8)
  assert tracemalloc.get_traced_memory()[1] > array.nbytes
  tracemalloc.stop()


# ------------------------------------------------------------------------------------------- damaged files


def test_a_truncated_file_is_one_line(tmp_path):
  whole = dumps(snapshot())
  for cut in range(0, len(whole), 7):
    refused(tmp_path / "x.pkl", whole[:cut], "truncated|expected")


def test_a_changed_byte_never_runs_anything_else_than_the_reader(tmp_path):
  """Either the file is still read, or it is refused in one line; no other error comes out."""
  whole = bytearray(dumps(snapshot()))
  random = np.random.RandomState(0)
  counts = collections.Counter()
  for _ in range(1500):
    changed = bytearray(whole)
    for at in random.randint(0, len(whole), 3):
      changed[at] = random.randint(256)
    write(tmp_path / "x.pkl", bytes(changed))
    try:
      read_snapshot(tmp_path / "x.pkl")
      counts["read"] += 1
    except InputError as error:
      assert "\n" not in str(error)
      counts["refused"] += 1
  assert counts["refused"] > 300, counts


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not an EDM snapshot, or truncated"),
    (b"<html>quota exceeded</html>", "not an EDM snapshot, or truncated"),
    (pickle.dumps([1, 2]), "expected a dictionary with a network as 'ema'"),
    (pickle.dumps({"ema": 3}), "expected a dictionary with a network as 'ema'"),
    (snapshot(ema=module("EDMPrecond")), "holds no 'model'"),
    (snapshot(ema=network(parameters={"a": 3})), "_parameters of a EDMPrecond holds something else"),
    (snapshot(ema=network(buffers={"a": storage(np.zeros(1))})), "_buffers of a EDMPrecond holds something"),
    (snapshot(ema=network(modules={"model": 3})), "_modules of a EDMPrecond holds something else"),
    (snapshot(ema=network(_modules=[])), "a EDMPrecond without _modules"),
    (snapshot(ema=network(_non_persistent_buffers_set=3)), "refused: the buffers of the module"),
    (snapshot(ema=network(_init_args=(1,))), "the arguments of EDMPrecond have no names"),
    (snapshot(ema=network(kwargs={"a": storage(np.zeros(1))})), "arguments of EDMPrecond hold a Storage"),
    (snapshot(ema=network(kwargs=[1])), "arguments of EDMPrecond are no dictionary"),
    (snapshot(dataset_kwargs={1: 2}), "dataset_kwargs are no dictionary with names"),
    (snapshot(loss_fn=3), "loss_fn is a int"),
  ],
)
def test_another_content_is_one_clear_line(tmp_path, content, message):
  refused(tmp_path / "x.pkl", content, message)


def test_a_missing_file_is_one_clear_line(tmp_path):
  with pytest.raises(InputError, match=r"absent.pkl: no such file; expected an EDM snapshot \(.pkl\)"):
    read_snapshot(tmp_path / "absent.pkl")


@pytest.mark.parametrize("name", ["a memo of 2**32 places", "many expanded tensors"])
def test_checkpoints_of_torch_go_through_the_same_reader(tmp_path, name):
  with pytest.raises(InputError, match="refused"):
    read_torch(write(tmp_path / "x.pt", BOMBS[name]()))
