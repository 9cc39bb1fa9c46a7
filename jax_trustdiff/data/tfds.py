"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import io
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jax_trustdiff.data import readers, records
from jax_trustdiff.data.readers import Decoded
from jax_trustdiff.data.records import ImageSource, image_source
from jax_trustdiff.types import InputError


def tfds(
  dataset: str,
  path: str = "~/tensorflow_datasets",
  size: int = 0,
  download: bool = False,
  num_classes: int = 0,
  *,
  split: str = "train",
  class_names: tuple[str, ...] = (),
) -> ImageSource:
  """A data set that TensorFlow Datasets has prepared, without TensorFlow.

  dataset: e.g. 'cifar10', 'cifar10:3.0.2' or 'name/config'; `path` is the folder that holds it, or its own
    version folder.
  Reads the formats array_record and tfrecord. split: one of those the data set has; size: see `image_folder`.
  download: prepare it first, as array_record, if it is not there; needs a network, and for most data sets
    TensorFlow.
  num_classes: 0 is as many as the data set has names, or the largest label plus one.
  class_names: those of the training split.
  """
  import tensorflow_datasets

  folder = _prepared_folder(dataset, pathlib.Path(path).expanduser())
  if folder is None and download:
    folder = _prepare(tensorflow_datasets, dataset, path)
  if folder is None:
    raise InputError(
      f"no prepared data set {dataset!r} below {path}"
      f" (expected {dataset.split(':')[0]}/<version>/dataset_info.json);"
      " with a network, download=True prepares it"
    )
  builder = tensorflow_datasets.builder_from_directory(str(folder))
  if split not in builder.info.splits:
    raise InputError(f"unknown split {split!r}; {dataset} has {sorted(builder.info.splits)}")
  features = builder.info.features
  keys = builder.info.supervised_keys or ("image", "label")
  for key in keys:
    if key not in features:
      raise InputError(f"{folder} has features {sorted(features)}; expected an image and a label")
  image_key, label_key = keys
  encoded = isinstance(features[image_key], tensorflow_datasets.features.Image)
  shape, dtype = tuple(features[image_key].shape), features[image_key].np_dtype
  if len(shape) != 3 or shape[2] not in (1, 3) or dtype != np.uint8 or features[label_key].shape != ():
    raise InputError(
      f"{folder}: {image_key} {np.dtype(dtype)} {list(shape)}, {label_key} {list(features[label_key].shape)};"
      " expected images uint8 [h, w, 1 or 3] and one label for each"
    )
  if size and encoded:
    shape = (size, size, shape[2])
  if None in shape or size and shape[:2] != (size, size):
    raise InputError(
      f"the images of {dataset} "
      + ("differ in size; set size, e.g. size=64" if encoded else f"are {shape}; leave out size")
    )
  record = _records(tensorflow_datasets, builder, split, image_key if encoded else None)
  count = builder.info.splits[split].num_examples
  labels = np.array([record(i)[label_key] for i in range(count)])

  def decode(i: int) -> np.ndarray:
    value = record(i)[image_key]
    return (
      readers.decode_image(io.BytesIO(value), f"{folder}, image {i}", size, shape[2]) if encoded else value
    )

  names = records.agreed_names(getattr(features[label_key], "names", None) or (), class_names, str(folder))
  return image_source([Decoded(count, shape, decode).now()], [labels], str(folder), num_classes, names)


class TFRecords:
  """The records (bytes) of TFRecord files, by position. Framing: length u64, crc u32, data, crc u32."""

  def __init__(self, files: Sequence[pathlib.Path]):
    self.files = [
      np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8) for file in files
    ]
    self.places = []  # (file, start, stop)
    for i, data in enumerate(self.files):
      at = 0
      while at < len(data):
        length = int.from_bytes(data[at : at + 8].tobytes(), "little")
        if at + length + 16 > len(data):
          raise InputError(
            f"{files[i]} is cut short or no TFRecord file (record {len(self.places)}, byte {at})"
          )
        self.places.append((i, at + 12, at + 12 + length))
        at += length + 16

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, position: int) -> bytes:
    file, start, stop = self.places[position]
    return self.files[file][start:stop].tobytes()


# ---- helpers ----


def _prepared_folder(dataset: str, path: pathlib.Path) -> pathlib.Path | None:
  """The folder of the newest prepared version: name/[config/]version."""
  if (path / "dataset_info.json").exists():
    return path
  base, _, version = dataset.partition(":")
  found = [info.parent for info in (path / base).glob("**/dataset_info.json")]
  found = [folder for folder in found if not version or folder.name == version]
  configs = sorted({folder.parent.relative_to(path).as_posix() for folder in found})
  if len(configs) > 1:
    raise InputError(
      f"{dataset!r} is prepared in several configs below {path}: {', '.join(configs)}; name one"
    )
  return max(found, key=readers.natural, default=None)


def _prepare(tensorflow_datasets, dataset: str, path: str) -> pathlib.Path:
  path = str(pathlib.Path(path).expanduser())
  try:
    builder = tensorflow_datasets.builder(dataset, data_dir=path, file_format="array_record")
    builder.download_and_prepare()
  except ImportError as error:
    raise InputError(f"preparing {dataset} needs TensorFlow (pip install tensorflow-cpu): {error}") from error
  except Exception as error:  # network, unknown name, manual download: TFDS has many kinds
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(f"cannot prepare {dataset}: {line}") from error
  return pathlib.Path(builder.data_path)


def _records(tensorflow_datasets, builder, split: str, encoded_key: str | None) -> Callable[[int], dict]:
  """Function from position to decoded record; the feature `encoded_key` stays encoded (bytes)."""
  decoders = {encoded_key: tensorflow_datasets.decode.SkipDecoding()} if encoded_key else None
  path = pathlib.Path(builder.data_path)
  kind = json.loads((path / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
  if kind == "array_record":
    return builder.as_data_source(split, decoders=decoders).__getitem__
  if kind != "tfrecord":
    raise InputError(
      f"{path} is stored as {kind}; prepare it again as array_record:"
      f" tfds.builder('{builder.name}', file_format='array_record').download_and_prepare()"
    )
  info = builder.info.splits[split]
  files = [pathlib.Path(file) for file in info.filepaths]
  for file in files:
    if not file.exists():
      raise InputError(f"{path} is incomplete: {file.name} is missing")
  found = TFRecords(files)
  if len(found) != info.num_examples:
    raise InputError(f"{path}: {len(found)} records in the split '{split}', expected {info.num_examples}")
  return lambda i: builder.info.features.deserialize_example_np(found[i], decoders=decoders)
