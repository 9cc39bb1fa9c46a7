"""CIFAR's own archives: both versions give the same records, and no pickle gets further than integers."""

import os
import pickle
import tarfile

import numpy as np
import pytest
from data_checks import assert_holds, source_of

from jax_trustdiff.data import cifar_archives
from jax_trustdiff.types import InputError


def cifar_records(n: int, classes: int, seed: int):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), rng.integers(0, classes, n)


def flat(images):
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def tar_of(folder):
  path = folder.with_suffix(".tar.gz")
  with tarfile.open(path, "w:gz") as archive:
    archive.add(folder, folder.name)
  return path


class Python2:
  """Protocol 2 pickles as Python 2 and numpy 1 wrote CIFAR's, opcode by opcode: strings without an encoding."""

  def __init__(self):
    self.memo = 0

  def dump(self, value) -> bytes:
    return b"\x80\x02" + self.write(value) + b"."

  def write(self, value) -> bytes:
    if isinstance(value, dict):
      items = b"".join(self.write(key) + self.write(item) for key, item in value.items())
      return b"}" + self.put() + b"(" + items + b"u"
    if isinstance(value, list):
      return b"]" + self.put() + b"(" + b"".join(map(self.write, value)) + b"e"
    if isinstance(value, str):
      return self.string(value.encode("latin1"))
    if isinstance(value, np.ndarray):
      return self.array(value)
    return self.integer(value)

  def put(self) -> bytes:
    self.memo += 1
    return b"q" + bytes([self.memo - 1]) if self.memo <= 256 else b"r" + (self.memo - 1).to_bytes(4, "little")

  def string(self, data: bytes) -> bytes:
    if len(data) < 256:
      return b"U" + bytes([len(data)]) + data + self.put()  # SHORT_BINSTRING
    return b"T" + len(data).to_bytes(4, "little") + data + self.put()  # BINSTRING

  def integer(self, value) -> bytes:
    if 0 <= value < 256:
      return b"K" + bytes([value])
    return b"M" + int(value).to_bytes(2, "little")

  def array(self, array: np.ndarray) -> bytes:
    empty = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n" + self.put()
    empty += b"K\x00\x85" + self.put() + self.string(b"b") + b"\x87" + self.put() + b"R" + self.put()
    shape = b"".join(map(self.integer, array.shape)) + b"\x86" + self.put()
    dtype = (
      b"cnumpy\ndtype\n"
      + self.put()
      + self.string(b"u1")
      + b"K\x00K\x01\x87"
      + self.put()
      + b"R"
      + self.put()
    )
    dtype += (
      b"(K\x03" + self.string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + self.put() + b"b"
    )
    return (
      empty + b"(K\x01" + shape + dtype + b"\x89" + self.string(array.tobytes()) + b"t" + self.put() + b"b"
    )


def python2(content) -> bytes:
  return Python2().dump(content)


def python3(content) -> bytes:
  """What numpy 2 writes, with protocol 2."""
  return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("dump", [python2, python3])
def test_cifar10_binary_and_python_agree(tmp_path, dump):
  parts = [cifar_records(4, 10, seed) for seed in range(6)]
  names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
  binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py"
  binary.mkdir(), python.mkdir()
  classes = [f"class{i}" for i in range(10)]
  (binary / "batches.meta.txt").write_text("\n".join(classes) + "\n")
  (python / "batches.meta").write_bytes(
    dump({"num_cases_per_batch": 10000, "label_names": classes, "num_vis": 3072})
  )
  for name, (images, labels) in zip(names, parts, strict=True):
    records = np.concatenate([labels[:, None].astype(np.uint8), flat(images)], axis=1)
    (binary / f"{name}.bin").write_bytes(records.tobytes())
    (python / name).write_bytes(
      dump(
        {
          "batch_label": f"{name}, \xe9",
          "labels": labels.tolist(),
          "data": flat(images),
          "filenames": ["x.png"],
        }
      )
    )
  train = np.concatenate([p[0] for p in parts[:5]]), np.concatenate([p[1] for p in parts[:5]])
  for kind, folder in (("cifar_binary", binary), ("cifar_python", python)):
    for path in (folder, tar_of(folder)):
      source = source_of(kind, path)
      assert_holds(source, *train)
      assert source.class_names == tuple(classes) and source.num_classes == 10
      assert_holds(source_of(kind, path, split="test", class_names=source.class_names), *parts[5])
    assert source_of(kind, folder, num_classes=10).num_classes == 10
    with pytest.raises(InputError, match="is CIFAR-10; num_classes=100, expected 10 or 0"):
      source_of(kind, folder, num_classes=100)
    with pytest.raises(InputError, match="class 9 is 'class9'; in the training split it is 'frog'"):
      source_of(kind, folder, split="test", class_names=(*classes[:9], "frog"))
  assert_holds(source_of("cifar_python", tmp_path), *train)  # the folder above
  (binary / "data_batch_3.bin").write_bytes(b"\x01" * 3000)
  with pytest.raises(InputError, match="data_batch_3.bin: 3000 bytes; expected a multiple of 3073"):
    source_of("cifar_binary", binary)
  (binary / "data_batch_3.bin").unlink()
  with pytest.raises(InputError, match="has no data_batch_3.bin"):
    source_of("cifar_binary", binary)
  archive = python.with_suffix(".tar.gz")
  archive.write_bytes(archive.read_bytes()[:-2000])
  with pytest.raises(InputError, match="neither a folder nor a complete tar archive"):
    source_of("cifar_python", archive)


def test_cifar100_uses_fine_labels(tmp_path):
  images, labels = cifar_records(5, 100, 0)
  coarse = labels // 5
  records = np.concatenate([np.stack([coarse, labels], 1).astype(np.uint8), flat(images)], axis=1)
  (tmp_path / "train.bin").write_bytes(records.tobytes())
  (tmp_path / "train").write_bytes(
    pickle.dumps({"data": flat(images), "fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()})
  )
  for kind in ("cifar_binary", "cifar_python"):
    source = source_of(kind, tmp_path)
    assert source.num_classes == 100
    assert_holds(source, images, labels)


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_integers_in_pickles(dtype, order, protocol):
  array = np.arange(12).reshape(3, 4).astype(dtype, order=order)
  read = cifar_archives.load_array_pickle(pickle.dumps({"a": array, "b": array[1:]}, protocol), "x")
  np.testing.assert_array_equal(read["a"], array)
  np.testing.assert_array_equal(read["b"], array[1:])
  assert read["a"].dtype == array.dtype


class Evil:
  def __reduce__(self):
    return os.system, ("touch evil",)


EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"  # an array before its state
U1 = b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"


def state(shape: bytes, dtype: bytes = U1, data: bytes = b"S'AAAA'\n") -> bytes:
  return b"}S'data'\n" + EMPTY + b"(I1\n(" + shape + b"t" + dtype + b"I00\n" + data + b"tbs."


ATTACKS = {
  # np.ndarray over foreign bytes as objects, one of which is then overwritten: frees an address of choice
  "objects from bytes": (
    b"\x80\x05cnumpy\nndarray\n((I1\ntX\x01\x00\x00\x00O\x96\x08\x00\x00\x00\x00\x00\x00\x00AAAAAAAAtRI0\nNs.",
    "no readable pickle",
  ),
  "objects by state": (state(b"I1\n", b"cnumpy\ndtype\n(S'O'\ntR"), "refused an array of type 'O'"),
  "records": (state(b"I1\n", b"cnumpy\ndtype\n(S'u1,u1'\ntR"), "refused an array of type 'u1,u1'"),
  "a dtype of fields": (
    state(b"I1\n", b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\n(S'O'\nI0\ntNNI-1\nI-1\nI63\ntb"),
    "refused the state of a dtype",
  ),
  "a dtype of large items": (
    state(b"I1\n", b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'|'\nNNNI4096\nI1\nI0\ntb"),
    "refused the state of a dtype",
  ),
  "a second dtype state": (
    state(b"I4\n", U1 + b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"),
    "refused the state of a dtype",
  ),
  "a dtype without state": (state(b"I4\n", b"cnumpy\ndtype\n(S'u1'\ntR"), "another type than integers"),
  "more shape than bytes": (state(b"I5\n"), "whose bytes do not fit it"),
  "overflowing shape": (state(b"L4294967296L\nL4294967296L\nL4294967297L\n"), "whose bytes do not fit it"),
  "negative shape": (state(b"I-2\nI-2\n"), "refused the shape"),
  "shape of floats": (state(b"F4.0\n"), "refused the shape"),
  "bytearray": (
    state(b"I4\n", data=b"\x96\x04\x00\x00\x00\x00\x00\x00\x00AAAA"),
    "whose bytes do not fit it",
  ),
  "a second array state": (
    state(b"I4\n")[:-2] + b"(I1\n(I4\nt" + U1 + b"I00\nS'BBBB'\ntbs.",
    "refused the state of an array",
  ),
  "no state": (b"}S'data'\n" + EMPTY + b"s.", "an array without contents"),
  "item of an array": (EMPTY + b"I0\nNs.", "no readable pickle"),
  "attributes of an array": (EMPTY + b"N}S'array'\nI1\ns\x86b.", "refused the state of an array"),
  "a large array": (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I999999999\ntS'f8'\ntR.",
    "refused to build",
  ),
  "calling the class": (b"cnumpy\nndarray\n((I1\ntR.", "no readable pickle"),
  "new of the class": (b"\x80\x02cnumpy\nndarray\n(I1\nt\x81.", "no readable pickle"),
  "defaults of a helper": (
    b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__X\x06\x00\x00\x00latin1\x85s\x86b.",
    "no readable pickle",
  ),
  "dictionary of a helper": (b"c_codecs\nencode\n}S'function'\nI1\nsb.", "no readable pickle"),
  "another encoding": (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "refused another encoding"),
  "eval": (b"cbuiltins\neval\n(S'1'\ntR.", "refused to unpickle builtins.eval"),
  "a dotted name": (
    b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "refused to unpickle numpy.ndarray.dumps",
  ),
  "a name of numpy": (b"cnumpy\nload\n(S'x'\ntR.", "refused to unpickle numpy.load"),
  "key": (b"}I1\nI1\ns.", "a key of type int; expected text"),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_pickles_cannot_reach_numpy(what):
  """Given numpy's own types, the first of these ends the interpreter."""
  data, message = ATTACKS[what]
  with pytest.raises(InputError, match=message):
    cifar_archives.load_array_pickle(data, "x")
  assert cifar_archives._encode.__defaults__ is None
  good = cifar_archives.load_array_pickle(state(b"I2\nI2\n"), "x")["data"]  # no attack leaves a trace
  np.testing.assert_array_equal(good, np.full((2, 2), ord("A"), np.uint8))
  assert not good.flags.writeable


def test_pickles_cannot_execute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  images, labels = cifar_records(2, 10, 0)
  good = {"data": flat(images), "labels": labels.tolist()}
  for i in range(1, 6):
    (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(good))
  attacks = {
    "refused to unpickle posix.system": pickle.dumps(good | {"x": Evil()}),
    "is no readable pickle": pickle.dumps(good)[:-20],
    "holds a list": pickle.dumps([1, 2]),
    r"expected 'data' uint8 \[n, 3072\]": pickle.dumps({"data": [1, 2], "labels": [0, 1]}),
    "expected 'labels', a list of integers": pickle.dumps(good | {"labels": [0, [1, 2]]}),
    "label 10 is out of range": pickle.dumps(good | {"labels": [0, 10]}),
    "data_batch_2: 2 images and 1 labels": pickle.dumps(good | {"labels": [0]}),
  }
  for message, data in attacks.items():
    (tmp_path / "data_batch_2").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
      source_of("cifar_python", tmp_path)
    assert "\n" not in str(caught.value)
  for i in range(1, 6):
    (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(good))
  (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": "airplane"}))
  with pytest.raises(InputError, match="batches.meta: expected 'label_names', a list of names"):
    source_of("cifar_python", tmp_path)
  assert not (tmp_path / "evil").exists()
