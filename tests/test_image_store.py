"""Image stores: whole or nothing, the same bytes by every way, and every kind of damage found."""

import hashlib
import json
import os
import re
import resource

import numpy as np
import pytest

from jax_trustdiff.data import image_store
from jax_trustdiff.data.image_store import ImageStore, StorePlan, verify
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.types import InputError, RunError

RNG = np.random.RandomState(0)
IMAGES = RNG.randint(0, 256, (10, 4, 4, 3), np.uint8)
LABELS = RNG.randint(0, 3, 10)
IDS = np.arange(100, 110)


def plan(**changes):
  values = dict(num_images=10, images_per_shard=4, image_shape=(4, 4, 3), num_classes=3)
  return StorePlan(
    **values | dict(class_names=("a", "b", "c"), provenance={"seed": 0, "s": (1, 2)}) | changes
  )


def write(store, *shards):
  for shard in shards:
    rows = np.asarray(store.plan.rows(shard))
    store.write(shard, IMAGES[rows], LABELS[rows], IDS[rows])


def complete(path):
  store = ImageStore(path, plan())
  write(store, 0, 1, 2)
  assert store.finish()
  return store


def contents(path):
  return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_a_store_comes_back_with_its_ids(tmp_path):
  complete(tmp_path)
  source = SOURCES["image_store"](str(tmp_path))
  np.testing.assert_array_equal(np.asarray(source.images), IMAGES)
  np.testing.assert_array_equal(source.labels, LABELS)
  np.testing.assert_array_equal(source.ids, IDS)
  assert source.class_names == ("a", "b", "c") and source.num_classes == 3
  np.testing.assert_array_equal(source.take([9, 3])["image"], IMAGES[[9, 3]])
  assert verify(tmp_path) == 10
  with pytest.raises(InputError, match="num_classes=5; the store has 3"):
    SOURCES["image_store"](str(tmp_path), 5)
  with pytest.raises(InputError, match="no folder test/"):
    SOURCES["image_store"](str(tmp_path), split="test")


def test_any_order_and_any_number_of_writers_give_the_same_files(tmp_path):
  complete(tmp_path / "one")
  first, second = (ImageStore(tmp_path / "two", plan()) for _ in range(2))
  write(second, 2)
  assert second.finish() is None and list(second.missing()) == [0, 1]
  write(first, 1, 0, 1)
  assert first.finish() == second.finish()
  assert contents(tmp_path / "one") == contents(tmp_path / "two")
  assert len(contents(tmp_path / "one")) == 3 * 4 + 2


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
  store = ImageStore(tmp_path / "a", plan())
  (tmp_path / "a/.images-00001-of-00003.npy.0123.tmp").write_bytes(b"torn")
  write(store, 0, 1, 2)
  store.finish()
  complete(tmp_path / "b")
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_makers_are_kept_and_counted(tmp_path):
  one, two = (ImageStore(tmp_path, plan(), maker) for maker in ("one", "two"))
  write(one, 0, 2)
  write(two, 1)
  two.finish()
  assert json.loads((tmp_path / "manifest.json").read_text())["makers"] == {"one": 6, "two": 4}
  assert one.makers([1]) == {"two": 4}


def test_two_writers_of_one_shard_that_differ_are_noticed(tmp_path, monkeypatch):
  one, two = ImageStore(tmp_path, plan(), "one"), ImageStore(tmp_path, plan(), "two")
  rows, written = np.asarray(one.plan.rows(0)), []

  def write_in_between(path, data):
    write_file(path, data)
    if path.name.startswith("ids") and not written:
      written.append(path)
      two.write(0, IMAGES[rows] ^ 1, LABELS[rows], IDS[rows])

  write_file = image_store._write
  monkeypatch.setattr(image_store, "_write", write_in_between)
  with pytest.raises(RunError, match="another process writes this shard too"):
    one.write(0, IMAGES[rows], LABELS[rows], IDS[rows])


def test_more_shards_than_files_may_be_open(tmp_path):
  store = ImageStore(tmp_path, plan(num_images=60, images_per_shard=1))
  for shard in range(60):
    store.write(shard, IMAGES[[shard % 10]], np.array([shard % 3]), np.array([shard]))
  store.finish()
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
  try:
    source = SOURCES["image_store"](str(tmp_path))
    taken = source.take(np.arange(60))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  np.testing.assert_array_equal(taken["image"], IMAGES[np.arange(60) % 10])
  np.testing.assert_array_equal(taken["label"], np.arange(60) % 3)
  np.testing.assert_array_equal(taken["id"], np.arange(60))


@pytest.mark.parametrize(
  "change, says",
  [
    (lambda m: m.pop("num_shards"), "'num_shards' must be there, a int"),
    (lambda m: m.update(num_images="ten"), "'num_images' must be there, a int"),
    (lambda m: m.update(num_images=11), "holds 10 images and 10 ids, and manifest.json says 11"),
    (lambda m: m.update(num_shards=2), "-of-00002.npy is missing in the store"),
    (lambda m: m.update(num_shards=10**9), "names 9 files of 1000000000 shards"),
    (lambda m: m.update(format=7), "not the manifest of an image store of format 2"),
    (lambda m: m.update(files=[1]), "'files' must be there, a dict"),
    (lambda m: m["files"].pop("ids-00001-of-00003.npy"), "ids-00001-of-00003.npy is missing in the store"),
    (lambda m: m["files"].update(other={}), "other is no file of the store"),
    (lambda m: m["files"].update({"ids-00001-of-00003.npy": 5}), "has no 'bytes' and 'sha256'"),
  ],
)
def test_an_edited_manifest_is_one_line(tmp_path, change, says):
  complete(tmp_path)
  manifest = json.loads((tmp_path / "manifest.json").read_text())
  change(manifest)
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(InputError, match=re.escape(says)):
    SOURCES["image_store"](str(tmp_path))


@pytest.mark.parametrize(
  "text", ["[]", "{", '{"num_images": 3}', '{"num_images": 3, "images_per_shard": null}']
)
def test_an_edited_plan_is_one_line(tmp_path, text):
  write(ImageStore(tmp_path, plan()), 0)
  (tmp_path / "plan.json").write_text(text)
  with pytest.raises(InputError, match="plan.json is "):
    SOURCES["image_store"](str(tmp_path))


def test_a_store_that_is_not_complete_is_not_read(tmp_path):
  store = ImageStore(tmp_path, plan())
  write(store, 0)
  with pytest.raises(InputError, match="not complete: 1 of 3 shards"):
    SOURCES["image_store"](str(tmp_path))
  with pytest.raises(InputError, match="no image store"):
    SOURCES["image_store"](str(tmp_path.parent))


def truncate(file):
  file.write_bytes(file.read_bytes()[:-7])


def flip(file):
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)


@pytest.mark.parametrize(
  "name, harm, thorough, says",
  [
    ("images-00001-of-00003.npy", truncate, False, "has 313 bytes, expected 320"),
    ("labels-00001-of-00003.npy", lambda file: file.unlink(), False, "is missing"),
    ("shard-00001-of-00003.json", truncate, False, "is damaged"),
    ("images-00001-of-00003.npy", flip, True, "SHA-256"),
  ],
)
def test_damage_is_found_and_mended(tmp_path, name, harm, thorough, says):
  store = complete(tmp_path)
  before = contents(tmp_path)
  harm(tmp_path / name)
  faults = store.missing(thorough)
  assert list(faults) == [1] and says in faults[1] and name in faults[1]
  assert bool(store.missing()) != thorough  # a flipped bit is seen by its hash alone
  if name.startswith("images"):
    with pytest.raises(InputError, match=says):
      verify(tmp_path)
  write(store, 1)
  store.finish()
  assert contents(tmp_path) == before


def test_another_origin_is_refused_with_the_difference(tmp_path):
  complete(tmp_path)
  with pytest.raises(InputError, match=r"another origin \(provenance.seed: 0 -> 1\)"):
    ImageStore(tmp_path, plan(provenance={"seed": 1, "s": (1, 2)}))
  with pytest.raises(InputError, match="num_images: 10 -> 12"):
    ImageStore(tmp_path, plan(num_images=12))
  ImageStore(tmp_path, plan())


def test_infinities_are_strict_json_and_do_not_differ_from_themselves(tmp_path):
  store = ImageStore(tmp_path, plan(provenance={"churn_max": float("inf")}))
  store.check()
  json.loads((tmp_path / "plan.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_what_is_no_store_is_not_written_to(tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  with pytest.raises(InputError, match="is not empty and holds no plan.json"):
    ImageStore(tmp_path, plan())
  with pytest.raises(InputError, match="is a file"):
    ImageStore(tmp_path / "letter.txt", plan())
  assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_wrong_arrays_are_refused(tmp_path):
  store = ImageStore(tmp_path, plan())
  with pytest.raises(InputError, match=r"images of shard 2 are uint8 \[4, 4, 4, 3\]; expected uint8 \[2,"):
    store.write(2, IMAGES[:4], LABELS[:4], IDS[:4])
  with pytest.raises(InputError, match="images of shard 0 are int64"):
    store.write(0, IMAGES[:4].astype(int), LABELS[:4], IDS[:4])
  with pytest.raises(InputError, match="label 3 in shard 0; labels are 0..2"):
    store.write(0, IMAGES[:4], LABELS[:4] + 3 - LABELS[:4], IDS[:4])
  with pytest.raises(InputError, match="images_per_shard of an image store must be at least 1"):
    plan(images_per_shard=0)
  assert list(store.missing()) == [0, 1, 2]
