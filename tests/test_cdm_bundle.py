"""Bundles of shards: exact training again, forgetting that is training without, and a check that finds every changed byte."""

import importlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from workers import answer, start

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import slices
from jax_trustdiff.data import sources
from jax_trustdiff.tasks import (
  bundles,
  cdm_add,
  cdm_attribute,
  cdm_centroids,
  cdm_classifier,
  cdm_compose,
  cdm_forget,
  cdm_merge,
  cdm_protect,
  cdm_prove,
  cdm_train,
  cdm_verify,
  compartments,
  generate,
  sampling,
  seeds,
  shard_training,
)
from jax_trustdiff.tasks.bundles import Bundle
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError

SMALL = {
  "data.name": "npz",
  "model.name": "uvit",  # what compiles quickest
  "model.size": "tiny",
  "model.patch_size": 4,
  "model.embed_dim": 16,
  "model.depth": 2,
  "model.num_heads": 2,
  "train.batch_size": 32,
  "train.num_epochs": 4,
  "shards.groups": "0,1;2,3",
  "shards.num_slices": 3,
  "report.num_images": 4,
}


def complete(task, path, config):
  return seeds.complete(task, config, Workdir(path, config, of_parts=getattr(task, "OF_PARTS", False)))


def train_config(data, **overrides):
  return config_lib.load("configs/cdm_train.py:smoke", SMALL | {"data.path": str(data)} | overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A file of digits 0 to 3, 200 of them."""
  found = sources.digits()
  rows = np.flatnonzero(found.labels < 4)[:200]
  batch = found.select(rows).take(np.arange(200))
  path = tmp_path_factory.mktemp("data") / "train.npz"
  np.savez(path, image=batch["image"], label=batch["label"])
  return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
  """(bundle's folder, metrics)"""
  path = tmp_path_factory.mktemp("cdm") / "bundle"
  return path, complete(cdm_train, path, train_config(data))


@pytest.fixture
def bundle(trained, tmp_path):
  """A copy of the trained bundle."""
  shutil.copytree(trained[0], tmp_path / "bundle")
  return Bundle(tmp_path / "bundle")


def forget(bundle, tmp_path, name="forget", **section):
  overrides = {"cdm.path": str(bundle.path)} | {f"forget.{k}": v for k, v in section.items()}
  return complete(cdm_forget, tmp_path / name, config_lib.load("configs/cdm_forget.py", overrides))


def verify(bundle, tmp_path, name="verify", **section):
  overrides = {"cdm.path": str(bundle.path)} | {f"verify.{k}": v for k, v in section.items()}
  return complete(cdm_verify, tmp_path / name, config_lib.load("configs/cdm_verify.py", overrides))


def parameters(bundle):
  return {name: about["parameters"] for name, about in bundle.manifest["shards"].items()}


def test_a_bundle_says_what_it_is_made_of(trained, data):
  path, metrics = trained
  bundle = Bundle(path)
  assert bundle.names == ["0+1", "2+3"] and metrics["num_shards"] == 2
  assert metrics["num_images"] == 200 == sum(metrics[f"images/{name}"] for name in bundle.names)
  assert 1 / 2 > metrics["expected_deletion_share"] > 1 / 3
  for about in bundle.manifest["shards"].values():
    assert sum(part["num_images"] for part in about["slices"]) == about["num_images"]
    assert [stage["before"] for stage in about["stages"][1:]] == [s["after"] for s in about["stages"][:-1]]
    assert sum(about["class_counts"]) == about["num_images"]
  text = (path / "manifest.json").read_text()
  assert bundle.data(0).contents[0].hex() not in text and (path / "salt.txt").stat().st_mode & 0o077 == 0
  assert (path / "report/shards.png").is_file() and "2+3" in (path / "report/report.html").read_text()
  stack, names = bundle.stack(capacity=3)
  assert names == bundle.names and stack.capacity == 3
  np.testing.assert_allclose(stack.proportions[:2], [metrics[f"images/{n}"] for n in names])
  assert manifest_lib.tree_digest(bundle.variables("0+1")) == parameters(bundle)["0+1"]


def test_a_bundle_that_was_cut_off_ends_bit_for_bit_the_same(trained, data, tmp_path, monkeypatch):
  """Once in the middle of a stage, once between a stage and its shard's end."""
  real, calls = shard_training.loop.fit, []

  def dies(state, step, feed, plan, *rest, **more):
    calls.append(plan.num_steps)
    if len(calls) == 2:
      real(state, step, feed, shard_training.loop.Plan(plan.num_steps - 1, 2, 2), *rest, **more)
      raise KeyboardInterrupt
    return real(state, step, feed, plan, *rest, **more)

  monkeypatch.setattr(shard_training.loop, "fit", dies)
  with pytest.raises(KeyboardInterrupt):
    complete(cdm_train, tmp_path / "bundle", train_config(data))
  assert not Bundle(tmp_path / "bundle").manifest["shards"]
  monkeypatch.setattr(shard_training.Training, "_export", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    complete(cdm_train, tmp_path / "bundle", train_config(data))
  monkeypatch.undo()
  complete(cdm_train, tmp_path / "bundle", train_config(data))
  one, other = Bundle(trained[0]), Bundle(tmp_path / "bundle")
  assert parameters(one) == parameters(other)
  for name in one.names:
    assert one.manifest["shards"][name]["stages"] == other.manifest["shards"][name]["stages"]


def test_shards_of_one_bundle_are_trained_by_several_runs(trained, data, tmp_path):
  """Each names its own by cdm.only; what they train must be the same."""
  for name in ("2+3", "0+1"):
    complete(cdm_train, tmp_path / "bundle", train_config(data, **{"cdm.only": name}))
  bundle = Bundle(tmp_path / "bundle")
  assert parameters(bundle) == parameters(Bundle(trained[0])) and verify(bundle, tmp_path)["faults"] == 0
  start = str(bundle.path / bundle.manifest["shards"]["0+1"]["folder"] / "export")
  for other in ({"schedule.learning_rate": 0.5}, {"shards.num_slices": 1}, {"init_from": start}):
    with pytest.raises(InputError, match="holds a bundle of another training"):
      complete(cdm_train, tmp_path / "bundle", train_config(data, **other))
  assert verify(bundle, tmp_path)["faults"] == 0


def test_a_bundle_whose_second_run_was_cut_off_is_whole(bundle, data, tmp_path, monkeypatch):
  """Its config is that of the run that is not done; the report of before is gone."""
  complete(cdm_train, bundle.path, train_config(data))
  monkeypatch.setattr(shard_training.Training, "run", lambda self: 1 / 0)
  monkeypatch.setattr(cdm_train, "_report", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    complete(cdm_train, bundle.path, train_config(data, **{"cdm.only": "0+1"}))
  assert verify(Bundle(bundle.path), tmp_path)["faults"] == 0 and not (bundle.path / "report").exists()


SALT = "a1" * 32


def merge(bundle, tmp_path, name, *others):
  overrides = {"cdm.path": str(bundle.path), "merge.others": ",".join(str(one.path) for one in others)}
  return complete(cdm_merge, tmp_path / name, config_lib.load("configs/cdm_merge.py", overrides))


def test_bundles_of_several_machines_become_one(trained, data, tmp_path):
  salt = tmp_path / "salt.txt"
  salt.write_text(SALT + "\n")
  both = []
  for name in ("0+1", "2+3"):
    folder = tmp_path / f"of {name}"
    complete(cdm_train, folder, train_config(data, **{"cdm.only": name, "cdm.salt_file": str(salt)}))
    both.append(Bundle(folder))
  metrics = merge(both[0], tmp_path, "merge", both[1])
  assert metrics["merged_shards"] == 1 and metrics["num_shards"] == 2
  whole = Bundle(both[0].path)
  assert parameters(whole) == parameters(Bundle(trained[0]))
  assert verify(whole, tmp_path, replay="2+3")["faults"] == 0
  assert merge(whole, tmp_path, "again", both[1])["merged_shards"] == 0
  with pytest.raises(InputError, match="has a salt of its own"):
    merge(whole, tmp_path, "salt", Bundle(trained[0]))
  with pytest.raises(InputError, match="into itself"):
    merge(whole, tmp_path, "itself", whole)
  lost = both[1].path / both[1].manifest["shards"]["2+3"]["folder"] / "stages/0.safetensors"
  forget(whole, tmp_path, shards="2+3")
  with pytest.raises(InputError, match="dropped shard '2.3'"):
    merge(Bundle(whole.path), tmp_path, "dropped", both[1])
  third = tmp_path / "third"
  complete(cdm_train, third, train_config(data, **{"cdm.only": "0+1", "cdm.salt_file": str(salt)}))
  half = third / both[1].manifest["shards"]["2+3"]["folder"]
  (half / "checkpoints-0").mkdir(parents=True)  # of a training that was cut off
  shutil.copytree(third, tmp_path / "fourth")
  assert merge(Bundle(tmp_path / "fourth"), tmp_path, "fourth-merge", both[1])["merged_shards"] == 1
  assert verify(Bundle(tmp_path / "fourth"), tmp_path, "fourth-verify")["faults"] == 0
  shutil.copytree(both[1].path, tmp_path / "deleted")
  deleted = Bundle(tmp_path / "deleted")
  forget(deleted, tmp_path, "delete", positions=str(int(deleted.data(0).of("2+3")[0])))
  with pytest.raises(InputError, match="has forgotten what .* has not"):
    merge(Bundle(third), tmp_path, "forgotten", Bundle(deleted.path))
  with pytest.raises(InputError, match="two of these bundles have a shard '2.3', of other bits"):
    changed = Bundle(tmp_path / "deleted")
    changed.manifest["forgotten"] = []
    changed.save()
    merge(Bundle(third), tmp_path, "others", both[1], changed)
  shutil.rmtree(half)
  lost.write_bytes(lost.read_bytes() + b"x")
  with pytest.raises(InputError, match="was changed: verify"):
    merge(Bundle(third), tmp_path, "damaged", both[1])
  assert Bundle(third).names == ["0+1"] and not Bundle(third).strays()
  salt.write_text("zz\n")
  with pytest.raises(InputError, match="a line of 64 hexadecimal digits"):
    complete(cdm_train, tmp_path / "bad", train_config(data, **{"cdm.salt_file": str(salt)}))


def test_proofs_that_images_are_in_shards(bundle, tmp_path):
  """By manifest, salted hash and path alone; a forgotten image has none, nor has a stranger."""
  split = bundle.data(0)
  gone = int(np.flatnonzero((split.shard == 0) & (split.slice == 2))[0])
  forget(bundle, tmp_path, positions=str(gone))
  (tmp_path / "stranger.txt").write_text("ab" * 32)
  rows = [gone, *(int(split.of(name)[3]) for name in ("0+1", "2+3"))]
  section = {"prove.positions": ",".join(map(str, rows)), "prove.file": str(tmp_path / "stranger.txt")}
  config = config_lib.load("configs/cdm_prove.py", {"cdm.path": str(bundle.path)} | section)
  metrics = complete(cdm_prove, tmp_path / "prove", config)
  assert metrics == {"images": 4, "in_shards": 2, "forgotten": 1, "in_none": 2}
  manifest = json.loads((bundle.path / "manifest.json").read_text())
  found = {one["image"]: one for one in json.loads((tmp_path / "prove/proofs.json").read_text())}
  for row, name in zip(rows[1:], ("0+1", "2+3"), strict=True):
    image = manifest_lib.salted(split.contents[row], bundle.salt)
    one, root = found[image], manifest["shards"][name]["root"]
    assert one["shard"] == name and manifest_lib.is_in(root, image, one["proof"])
    assert not manifest_lib.is_in(root, bundle.salted(split.contents[gone]), one["proof"])
  assert found[bundle.salted(split.contents[gone])]["shard"] is None
  assert complete(cdm_prove, tmp_path / "prove", config) == metrics
  with pytest.raises(InputError, match="nothing to prove"):
    empty = config_lib.load("configs/cdm_prove.py", {"cdm.path": str(bundle.path)})
    complete(cdm_prove, tmp_path / "nothing", empty)


def test_a_user_has_parts_of_the_shards_of_its_rights(trained, tmp_path):
  rights = tmp_path / "rights.json"
  rights.write_text(json.dumps({"ann": ["2+3"], "bob": ["0+1", "2+3"], "cid": [], "dan": ["4"]}))

  def config(**section):
    section = {"access": str(rights)} | section
    return compose_config(trained[0], **{f"mixture.{name}": value for name, value in section.items()})

  bundle = Bundle(trained[0])
  names = {
    user: cdm_compose.load_mixture(bundle, config(user=user)).provenance["shards"] for user in ("ann", "bob")
  }
  assert names == {"ann": ["2+3"], "bob": ["0+1", "2+3"]}
  complete(cdm_compose, tmp_path / "ann", config(user="ann"))
  complete(cdm_compose, tmp_path / "alone", compose_config(trained[0], **{"mixture.shards": "2+3"}))
  one, other = (images_of(tmp_path / run).take(range(32))["image"] for run in ("ann", "alone"))
  np.testing.assert_array_equal(one, other)
  rights.write_text(json.dumps({"ann": ["2+3"], "bob": ["0+1", "2+3"], "cid": [], "dan": ["4"], "fay": [["2+3"]]}))
  with pytest.raises(InputError, match="is to hold"):
    complete(cdm_compose, tmp_path / "refused", config(user="ann"))
  rights.write_text(json.dumps({"ann": ["2+3"], "bob": ["0+1", "2+3"], "cid": [], "dan": ["4"]}))
  for section, message in (
    ({"user": "eve"}, "'eve' has no rights in .*; there are those of ann, bob, cid, dan"),
    ({"user": "cid"}, "parts of no shard"),
    ({"user": "dan"}, "there is no shard '4'"),
    ({"user": "ann", "shards": "0+1"}, "'ann' may not have parts of shard '0.1'; of 2.3"),
    ({"user": "ann", "access": ""}, "is needed for a user"),
    ({}, "'' has no rights"),
  ):
    with pytest.raises(InputError, match=message):
      complete(cdm_compose, tmp_path / "refused", config(**section))
  assert not (tmp_path / "refused").exists()


def test_what_came_to_the_data_set_later_is_in_no_artefact(bundle, data, tmp_path):
  """Classifier, centroids and pictures are of the images that shards were trained on; so is a shard that is trained again."""
  arrays = np.load(data)
  more = tmp_path / "train.npz"
  np.savez(
    more,
    image=np.concatenate([255 - arrays["image"][:40], arrays["image"], arrays["image"][:9]]),  # new ones, and copies
    label=np.concatenate([arrays["label"][:40], arrays["label"], arrays["label"][:9]]),
  )
  before = {name: np.sort(bundle.source(name).take(np.arange(5))["image"].ravel()) for name in bundle.names}
  bundle.manifest["origins"][0]["data"]["path"] = str(more)
  bundle.save()
  grown = Bundle(bundle.path)
  for name in grown.names:
    source = grown.source(name)
    assert len(source) == bundle.manifest["shards"][name]["num_images"] < len(grown.data(0).of(name))
    np.testing.assert_array_equal(np.sort(source.take(np.arange(5))["image"].ravel()), before[name])
  forget(grown, tmp_path, positions=str(int(grown.data(0).of("0+1")[-1])))
  number = bundle.manifest["shards"]["0+1"]["num_images"]
  assert Bundle(bundle.path).manifest["shards"]["0+1"]["num_images"] == number - 1
  assert verify(Bundle(bundle.path), tmp_path, data=False, replay="0+1")["faults"] == 0
  with pytest.raises(RunError, match="of the data set are not the"):
    verify(Bundle(bundle.path), tmp_path, "data")


def test_a_plan_of_a_deletion_is_what_it_takes(classified, tmp_path, image_of_last_slice):
  shutil.copytree(classified[0], tmp_path / "copy")
  bundle = Bundle(tmp_path / "copy")
  before = (bundle.path / "manifest.json").read_text()
  planned = forget(bundle, tmp_path, "plan", positions=str(image_of_last_slice), plan=True)
  assert (bundle.path / "manifest.json").read_text() == before and len(list(bundle.path.iterdir())) > 4
  about = json.loads((tmp_path / "plan/plan.json").read_text())
  assert list(about["retrained"]) == ["0+1"] and about["retrained"]["0+1"]["from_stage"] == 2
  assert about["stale"] == ["classifier"] and about["dropped"] == []
  done = forget(bundle, tmp_path, positions=str(image_of_last_slice))
  assert planned == {name: done[name] for name in planned}
  assert forget(Bundle(bundle.path), tmp_path, "shard", shards="2+3", plan=True)["dropped_shards"] == 1


@pytest.mark.parametrize("task", ["compose", "attribute", "protect", "forget", "verify", "add", "centroids", "classifier", "prove", "merge"])
def test_no_run_has_its_folder_in_a_bundle(trained, tmp_path, task):
  config = config_lib.load(f"configs/cdm_{task}.py:smoke", {"cdm.path": str(trained[0])})
  before = sorted(trained[0].rglob("*"))
  link = tmp_path / "link"
  link.symlink_to(trained[0])
  for place in (trained[0], link):
    with pytest.raises(InputError, match="lies in the bundle"):
      complete(importlib.import_module(f"jax_trustdiff.tasks.cdm_{task}"), place / "shards/run", config)
  assert sorted(trained[0].rglob("*")) == before


def test_a_bundle_that_changes_while_it_is_read(bundle, tmp_path):
  config = compose_config(bundle.path)
  with pytest.raises(InputError, match="was changed while it was read"):
    with bundles.reading(config, Workdir(tmp_path / "run", config)) as found:
      forget(bundle, tmp_path, shards="2+3")
      found.stack()
  other = Bundle(tmp_path / "bundle")
  with pytest.raises(InputError, match="was changed while it was read"):
    with bundles.reading(config, Workdir(tmp_path / "run", config)):  # and found nothing missing
      other.manifest["origins"][0]["class_names"] = ["other"]
      other.save()


def test_verification_makes_every_check_whatever_is_damaged(bundle, tmp_path):
  """A list of images and the salt are what other checks stand on: their faults, and those of the rest, are all in the report."""
  assert verify(bundle, tmp_path, replay="0+1")["faults"] == 0
  shard = bundle.path / bundle.manifest["shards"]["0+1"]["folder"]
  (shard / "images.json").write_text("[]")
  (bundle.path / "salt.txt").write_text("0" * 64)
  (tmp_path / "verify/replay-old").mkdir()  # of a verification that was cut off
  with pytest.raises(RunError, match="checks failed"):
    verify(bundle, tmp_path, replay="0+1")
  faults = {one["check"]: one["fault"] for one in json.loads((tmp_path / "verify/checks.json").read_text()) if one["fault"]}
  for what in ("salt.txt", "images of 0+1", "images of 2+3", "replay of 0+1", "images of 0+1 are below its roots"):
    assert what in faults, faults
  assert not (tmp_path / "verify/replay-old").exists()


def without(data, rows, path):
  arrays = np.load(data)
  np.savez(path, **{name: np.delete(arrays[name], rows, 0) for name in arrays})
  return path


@pytest.fixture
def image_of_last_slice(bundle):
  """Position of an image of shard 0+1 that comes in the last slice."""
  data = bundle.data(0)
  return int(np.flatnonzero((data.shard == 0) & (data.slice == 2))[0])


def test_forgetting_is_training_without(bundle, data, tmp_path, image_of_last_slice):
  """Bit for bit the shard that was trained without the images; the others keep their hashes; nothing is left of the version before."""
  split = bundle.data(0)
  rows = [image_of_last_slice, int(np.flatnonzero((split.shard == 0) & (split.slice == 1))[0])]
  before = parameters(bundle)
  folder = bundle.path / bundle.manifest["shards"]["0+1"]["folder"]
  metrics = forget(bundle, tmp_path, positions=",".join(map(str, rows)))
  after = Bundle(bundle.path)
  assert (metrics["images"], metrics["retrained_shards"], metrics["dropped_shards"]) == (2, 1, 0)
  assert 0 < metrics["steps_share"] < 0.5 and not folder.exists()
  assert parameters(after)["2+3"] == before["2+3"] and parameters(after)["0+1"] != before["0+1"]
  assert not (bundle.path / "report").exists() and not (bundle.path / "result.json").exists()

  scratch = tmp_path / "scratch"
  shorter = without(data, rows, tmp_path / "train.npz")
  complete(cdm_train, scratch, train_config(shorter, **{"cdm.only": "0+1"}))
  assert parameters(Bundle(scratch))["0+1"] == parameters(after)["0+1"]
  stages = [
    [stage["after"] for stage in Bundle(p).manifest["shards"]["0+1"]["stages"]]
    for p in (scratch, bundle.path)
  ]
  assert stages[0] == stages[1]
  # the first stage did not see them, and was not run again
  assert stages[0][0] == bundle.manifest["shards"]["0+1"]["stages"][0]["after"]
  assert stages[0][1] != bundle.manifest["shards"]["0+1"]["stages"][1]["after"]

  checks = verify(after, tmp_path, replay="0+1")
  assert checks["faults"] == 0 and checks["replayed"] == 1
  with pytest.raises(InputError, match="forgotten already"):
    forget(after, tmp_path, "again", positions=str(rows[0]))


def test_forgetting_from_the_first_slice_and_by_a_file(bundle, tmp_path):
  split = bundle.data(0)
  row = int(np.flatnonzero((split.shard == 1) & (split.slice == 0))[0])
  (tmp_path / "images.txt").write_text(split.contents[row].hex() + "\n")
  before = bundle.manifest["shards"]["2+3"]["stages"]
  forget(bundle, tmp_path, file=str(tmp_path / "images.txt"))
  after = Bundle(bundle.path).manifest["shards"]["2+3"]
  assert after["num_images"] == bundle.manifest["shards"]["2+3"]["num_images"] - 1
  assert (
    after["stages"][0]["before"] == before[0]["before"] and after["stages"][0]["after"] != before[0]["after"]
  )
  assert verify(Bundle(bundle.path), tmp_path)["faults"] == 0


def test_forgetting_that_was_cut_off(bundle, tmp_path, monkeypatch, image_of_last_slice):
  """Before the manifest is written nothing has changed; after it only cleaning up is left. Another request does not take over its work."""
  position, before = str(image_of_last_slice), (bundle.path / "manifest.json").read_text()
  monkeypatch.setattr(Bundle, "save", lambda self: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    forget(bundle, tmp_path, positions=position)
  assert (bundle.path / "manifest.json").read_text() == before
  monkeypatch.undo()

  other = int(np.flatnonzero((bundle.data(0).shard == 0) & (bundle.data(0).slice == 2))[1])
  one, two = (tmp_path / name for name in ("one", "two"))
  for path in (one, two):
    shutil.copytree(bundle.path, path / "bundle", ignore=shutil.ignore_patterns("*-1-*"))
  forget(bundle, tmp_path, "other", positions=str(other))
  forget(Bundle(one / "bundle"), tmp_path, "fresh", positions=str(other))
  assert parameters(Bundle(bundle.path)) == parameters(Bundle(one / "bundle"))
  assert len(list((bundle.path / "shards").iterdir())) == 2

  second = Bundle(two / "bundle")
  monkeypatch.setattr(bundles.shutil, "rmtree", lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    forget(second, tmp_path, "killed", positions=position)
  monkeypatch.undo()
  forget(second, tmp_path, "killed", positions=position)
  assert verify(Bundle(second.path), tmp_path)["faults"] == 0 and not Bundle(second.path).strays()


def test_a_dropped_shard_is_gone_and_stays_away(bundle, data, tmp_path):
  artefact = bundle.path / "artefacts/classifier-0"
  artefact.mkdir(parents=True)
  (artefact / "weights").write_text("of all shards")
  bundle.manifest["artefacts"]["classifier"] = {
    "status": manifest_lib.ACTIVE,
    "folder": "artefacts/classifier-0",
    "depends_on": bundle.names,
    "made_of": parameters(bundle),
    "files": bundles.file_digests(artefact),
  }
  bundle.save()
  assert verify(bundle, tmp_path, "before")["faults"] == 0
  metrics = forget(bundle, tmp_path, shards="2+3")
  after = Bundle(bundle.path)
  assert (metrics["dropped_shards"], metrics["stale_artefacts"], metrics["steps_share"]) == (1, 1, 0)
  assert after.names == ["0+1"] and parameters(after)["0+1"] == parameters(bundle)["0+1"]
  assert after.manifest["artefacts"]["classifier"]["status"] == manifest_lib.STALE
  assert not artefact.exists() and len(list((bundle.path / "shards").iterdir())) == 1
  assert verify(after, tmp_path, "after")["faults"] == 0
  complete(cdm_train, bundle.path, train_config(data))  # its report was removed, so it runs again
  assert Bundle(bundle.path).names == ["0+1"]


def files_of(bundle):
  found = (p for p in sorted(bundle.path.rglob("*")) if p.is_file())
  return [p for p in found if p.name not in (".lock", ".seconds")]


def test_verification_finds_a_flipped_byte_anywhere(bundle, tmp_path):
  """In every file, at its start, in its middle and at its end."""
  assert verify(bundle, tmp_path, "whole")["faults"] == 0
  files = files_of(bundle)
  names = {str(file.relative_to(bundle.path)) for file in files}
  assert len(files) > 15 and names > {"config.json", "result.json", "report/shards.png", "manifest.json", "salt.txt"}
  for number, file in enumerate(files):
    whole = file.read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1}:
      damaged = bytearray(whole)
      damaged[place] ^= 7 if damaged[place] == 10 else 1  # the end of a line becomes another kind of it
      file.write_bytes(damaged)
      name = f"damaged-{number}-{place}"
      with pytest.raises(RunError):
        verify(bundle, tmp_path, name, data=False)
      if file.name != "manifest.json":
        faults = [one["check"] for one in json.loads((tmp_path / name / "checks.json").read_text()) if one["fault"]]
        assert any(str(file.relative_to(bundle.path)) in what for what in faults), (file, faults)
      file.write_bytes(whole)


def test_verification_looks_again_in_the_folder_of_an_earlier_one(bundle, tmp_path):
  assert verify(bundle, tmp_path)["faults"] == 0
  file = files_of(bundle)[0]
  file.write_bytes(file.read_bytes() + b"x")
  with pytest.raises((RunError, InputError)):
    verify(bundle, tmp_path)


def test_images_that_are_there_are_not_made_again(bundle, tmp_path):
  config = compose_config(bundle.path)
  made = complete(cdm_compose, tmp_path / "run", config)
  assert made["generated"] == 32 and complete(cdm_compose, tmp_path / "run", config) == made


@pytest.mark.parametrize("what", ["removed", "added", "image", "stage", "undone"])
def test_verification_finds_other_faults(bundle, data, tmp_path, what):
  shard = bundle.path / bundle.manifest["shards"]["0+1"]["folder"]
  if what == "removed":
    (shard / "stages/1.safetensors").unlink()
    message = "it is missing"
  elif what == "added":
    (bundle.path / "shards/0+1-backup").mkdir()
    message = "no part of the manifest"
  elif what == "image":
    bundle.manifest["forgotten"] = [bundle.images("0+1")[0][0]]
    bundle.save()
    message = "not the .* it was trained on|forgotten image"
  elif what == "stage":
    bundle.manifest["shards"]["0+1"]["stages"][1]["before"] = "0" * 64
    bundle.save()
    message = "goes on from the one before"
  else:
    forget(bundle, tmp_path, shards="2+3")
    after = Bundle(bundle.path)
    after.manifest["deletions"][0]["left"] = {"0+1": "0" * 64}
    after.save()
    message = "its parameters are others"
  with pytest.raises(RunError, match=message):
    verify(Bundle(bundle.path), tmp_path)
  checks = json.loads((tmp_path / "verify/checks.json").read_text())
  assert any(one["fault"] for one in checks)


def test_replay_finds_a_shard_that_was_trained_otherwise(bundle, tmp_path):
  """A manifest that was sealed over parameters which training does not give."""
  shard = bundle.manifest["shards"]["0+1"]
  shard["parameters"] = "0" * 64
  bundle.save()
  assert verify(bundle, tmp_path, "hashes alone")["faults"] == 0
  with pytest.raises(RunError, match="replay of 0.1: its parameters: other bits"):
    verify(bundle, tmp_path, replay="0+1")


@pytest.mark.parametrize(
  "section, message",
  [
    ({}, "nothing to forget"),
    ({"shards": "9"}, "there is no shard '9'; there are 0.1, 2.3"),
    ({"positions": "1,x"}, "numbers separated by commas"),
    ({"positions": "200"}, "there are 200 images, none at 200"),
    ({"positions": "1", "origin": 3}, "data sets 0 .. 0"),
    ({"file": "nowhere.txt"}, "no such file"),
  ],
)
def test_forgetting_refuses_in_one_line(bundle, tmp_path, section, message):
  before = (bundle.path / "manifest.json").read_text()
  with pytest.raises(InputError, match=message):
    forget(bundle, tmp_path, **section)
  assert (bundle.path / "manifest.json").read_text() == before and not (tmp_path / "forget").exists()


def test_an_image_that_left_the_data_set_can_be_forgotten_and_no_other_with_it(bundle, data, tmp_path):
  split = bundle.data(0)
  rows = np.flatnonzero((split.shard == 0) & (split.slice == 2))[:2]
  contents = [split.contents[row] for row in rows]
  moved = shutil.copy(data, tmp_path / "train.npz")
  bundle.manifest["origins"][0]["data"]["path"] = str(
    without(moved, [rows[0]], tmp_path / "fewer_train.npz").rename(tmp_path / "train.npz")
  )
  bundle.save()
  (tmp_path / "second.txt").write_text(contents[1].hex())
  with pytest.raises(
    InputError, match="1 images that shard 0.1 was trained on are no longer in its data set"
  ):
    forget(Bundle(bundle.path), tmp_path, file=str(tmp_path / "second.txt"))
  (tmp_path / "both.txt").write_text("\n".join(one.hex() for one in contents))
  assert forget(Bundle(bundle.path), tmp_path, "both", file=str(tmp_path / "both.txt"))["images"] == 2
  (tmp_path / "foreign.txt").write_text("ab" * 32)
  with pytest.raises(InputError, match="in no shard and no data set"):
    forget(Bundle(bundle.path), tmp_path, "foreign", file=str(tmp_path / "foreign.txt"))


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"shards.groups": "0,1;2"}, "leaves out class 3"),
    ({"shards.groups": "0,1;1,2,3"}, "at most once"),
    ({"shards.groups": "a"}, "has classes as in"),
    ({"shards.by": "colour"}, "unknown shards.by"),
    ({"shards.by": "owner"}, "a text file with an owner"),
    ({"cdm.only": "9"}, "there is no shard '9'"),
    ({"shards.num_slices": 9}, "take more epochs"),
    ({"adapter.name": "lora"}, "needs init_from"),
    ({"train.log_every": 0}, "train.log_every must be at least 1"),
    ({"optimizer.name": "sgdd"}, "unknown name 'sgdd'"),
  ],
)
def test_training_refuses_in_one_line(data, tmp_path, overrides, message):
  with pytest.raises(InputError, match=message):
    complete(cdm_train, tmp_path / "bundle", train_config(data, **overrides))
  assert not (tmp_path / "bundle").exists()


def test_other_folders_are_no_bundles(tmp_path):
  for task in (cdm_forget, cdm_verify):
    config = config_lib.load(f"configs/{task.__name__.rpartition('.')[2]}.py", {"cdm.path": str(tmp_path)})
    with pytest.raises(InputError, match="holds no manifest.json"):
      complete(task, tmp_path / "run", config)
  assert list(pathlib.Path(tmp_path).iterdir()) == []


# ---- mixtures of a bundle ----


@pytest.fixture(scope="module")
def classified(trained, tmp_path_factory):
  """(a copy of the bundle with a classifier of shards, its metrics)"""
  path = tmp_path_factory.mktemp("classified") / "bundle"
  shutil.copytree(trained[0], path)
  overrides = {
    "cdm.path": str(path),
    "model.channel_mult": (1,),
    "train.num_images": 640,
    "train.num_validation": 32,
  }
  config = config_lib.load("configs/cdm_classifier.py:smoke", overrides)
  return path, complete(cdm_classifier, path.with_name("run"), config)


def compose_config(path, **overrides):
  small = {"cdm.path": str(path), "generate.num_images": 32, "sampler.num_steps": 3}
  return config_lib.load("configs/cdm_compose.py:smoke", small | overrides)


def images_of(run):
  return sources.image_store(str(run / "images"))


def test_the_classifier_knows_shards_with_classes(classified):
  path, metrics = classified
  about = Bundle(path).manifest["artefacts"]["classifier"]
  assert np.array(about["counts"]).shape == (2, 4) and about["depends_on"] == ["0+1", "2+3"]
  counts = np.array(about["counts"])
  assert not counts[0, 2:].any() and not counts[1, :2].any() and counts.sum() == 200 - 32
  assert metrics["loss"] < metrics["first/loss"]
  chosen = cdm_classifier.load(Bundle(path), ["2+3", "0+1"])
  one, other = (np.asarray(chosen.log_training_prior), np.log(np.maximum(counts, 1e-30) / counts.sum()))
  np.testing.assert_allclose(one[0, 2:], other[1, 2:], rtol=1e-5)


def test_centroids_of_each_shard_weigh_it_and_go_with_it(bundle, tmp_path):
  path = bundle.path
  nearest = {"mixture.weights": "nearest"}
  with pytest.raises(InputError, match=r"no centroids of shard '0\+1' as it is"):
    complete(cdm_compose, tmp_path / "none", compose_config(path, **nearest))
  config = config_lib.load("configs/cdm_centroids.py:smoke", {"cdm.path": str(path)})
  metrics = complete(cdm_centroids, tmp_path / "run", config)
  assert metrics["num_centroids"] == 4 and min(metrics["own/0+1"], metrics["own/2+3"]) > 0.75
  found = cdm_centroids.load(Bundle(path), ["2+3", "0+1"], {"temperature": 0.1})
  data = Bundle(path).data(0)
  for slot, name in enumerate(("2+3", "0+1")):  # a centroid is a mean of directions of the shard's own images
    pixels = data.source.take(data.of(name))["image"].reshape(len(data.of(name)), -1) / 255
    mean = (pixels / np.linalg.norm(pixels, axis=1, keepdims=True)).mean(0)
    weights = np.linalg.lstsq(np.asarray(found.centroids[slot]).T, mean, rcond=None)[0]
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-3)
    np.testing.assert_allclose(np.asarray(found.centroids[slot]).T @ weights, mean, atol=1e-4)
  assert complete(cdm_compose, tmp_path / "images", compose_config(path, **nearest))["num_images"] == 32
  assert verify(Bundle(path), tmp_path)["faults"] == 0
  forget(Bundle(path), tmp_path, positions=str(int(data.of("2+3")[-1])))
  left = Bundle(path)
  assert sorted(left.active_artefacts()) == ["centroids/0+1"] and not left.strays()
  with pytest.raises(InputError, match=r"no centroids of shard '2\+3' as it is"):
    complete(cdm_compose, tmp_path / "stale", compose_config(path, **nearest))
  complete(cdm_centroids, tmp_path / "run", config)  # the command of before: it makes them again
  assert sorted(Bundle(path).active_artefacts()) == ["centroids/0+1", "centroids/2+3"]
  with pytest.raises(InputError, match="holds other images|another"):  # and images of before are not taken for new ones
    complete(cdm_compose, tmp_path / "images", compose_config(path, **nearest))
  with pytest.raises(InputError, match=r"centroids.per_shard=1000: shard 0\+1 has"):
    config = config_lib.load("configs/cdm_centroids.py:smoke", {"cdm.path": str(path), "centroids.per_shard": 1000})
    complete(cdm_centroids, tmp_path / "many", config)


def test_images_of_a_product_and_how_far_they_are_from_each_shard(trained, data, tmp_path):
  config = config_lib.load("configs/cdm_protect.py:smoke", {"cdm.path": str(trained[0])})
  with pytest.raises(InputError, match="for shards without classes"):
    complete(cdm_protect, tmp_path / "none", config)
  unconditional = {"diffusion.conditional": False, "shards.num_slices": 1, "train.num_epochs": 1}
  complete(cdm_train, tmp_path / "bundle", train_config(data, **unconditional))
  small = {"cdm.path": str(tmp_path / "bundle")}
  for wrong, message in (
    ({"guidance.scale": 2.0}, "guidance.scale must be 1"),
    ({"mixture.top_k": 1}, "leaves shards out"),
    ({"mixture.weights": "prior"}, "samples a product"),
    ({"mixture.shards": "0+1"}, "one of several shards"),
    ({"protect.num_images": 33}, "lies outside 2 .. generate.num_images=32"),
    ({"own_sampler.churn": 1, "own_sampler.name": "ancestral"}, "unknown config key 'own_sampler.churn'"),
  ):
    with pytest.raises(InputError, match=message):
      config = config_lib.load("configs/cdm_protect.py:smoke", small | wrong)
      complete(cdm_protect, tmp_path / "wrong", config)
  assert not (tmp_path / "wrong").exists()
  metrics = complete(cdm_protect, tmp_path / "run", config_lib.load("configs/cdm_protect.py:smoke", small))
  assert metrics["num_images"] == 32 and metrics["nfe"] == 4 + 3  # a step and, but at sigma 0, a move
  found = np.load(tmp_path / "run/protect.npz")
  of_first, of_product = found["log_densities_of_first"], found["log_densities_of_product"]
  assert found["names"].tolist() == ["0+1", "2+3"] and of_first.shape == of_product.shape == (2, 8)
  assert np.abs(of_first[0] - of_first[1]).max() > 1e-3
  k = -2 * np.log(np.mean(np.sqrt(np.exp(of_first[1].astype(float) - of_first[0]))))  # of two: Bhattacharyya
  assert metrics["estimated_k"] == pytest.approx(k, abs=1e-3)
  assert metrics["estimated_k_high"] == pytest.approx((of_first[0] - of_first[1]).mean(), abs=1e-3)
  assert metrics["estimated_k_low"] == pytest.approx(abs((of_product[0] - of_product[1]).mean()), abs=1e-3)
  assert 1 <= metrics["effective_samples"] <= 8
  log_product = of_product.astype(float).mean(0) + k / 2
  for name, of_shard in zip(("0+1", "2+3"), of_product, strict=True):
    assert metrics[f"estimated_kl/{name}"] == pytest.approx((log_product - of_shard).mean(), abs=2e-2)
  assert (tmp_path / "run/report/divergences.png").is_file()


def test_a_head_on_the_backbone_weighs_its_adapters(trained, data, tmp_path):
  other = Bundle(trained[0])
  start = {
    "init_from": str(other.path / other.manifest["shards"]["0+1"]["folder"] / "export"),
    "adapter.name": "lora",
    "shards.num_slices": 1,
    "train.num_epochs": 1,
  }
  path = tmp_path / "bundle"
  complete(cdm_train, path, train_config(data, **start))
  small = {
    "cdm.path": str(path),
    "train.num_images": 640,
    "train.num_validation": 32,
    "model.embed_dim": 16,
  }
  config = config_lib.load("configs/cdm_classifier.py:head,smoke", small)
  metrics = complete(cdm_classifier, tmp_path / "run", config)
  assert metrics["loss"] < metrics["first/loss"]
  d, k = 16, 2 * 4  # tokens of the backbone and of the head are of 16 channels; shards with classes
  block = 4 * d + 3 * d * d + d * d + d + 8 * d * d + 5 * d
  assert metrics["num_params"] == d * d + d + block + 2 * d + d * k + k
  found = cdm_classifier.load(Bundle(path), ["0+1", "2+3"]).classifier.classifier
  backbone = Bundle(path).plain_backbone()
  for one, same in zip(jax.tree.leaves(found.variables["backbone"]), jax.tree.leaves(backbone), strict=True):
    np.testing.assert_array_equal(one, same)
  run = compose_config(path, **{"mixture.weights": "classifier", "mixture.impl": "vmap"})
  assert complete(cdm_compose, tmp_path / "images", run)["num_images"] == 32
  of_images = {"cdm.path": str(path), "images.name": "npz", "images.path": str(data), "attribute.method": "classifier"}
  config = config_lib.load("configs/cdm_attribute.py:smoke", of_images | {"attribute.num_traced": 0})
  credit = complete(cdm_attribute, tmp_path / "credit", config)
  assert credit["posterior/0+1"] + credit["posterior/2+3"] == pytest.approx(1, abs=1e-4)
  last = int(Bundle(path).data(0).of("2+3")[-1])
  forget(Bundle(path), tmp_path, positions=str(last))
  assert verify(Bundle(path), tmp_path, replay="2+3")["faults"] == 0
  config = config_lib.load("configs/cdm_classifier.py:head,smoke", small | {"cdm.path": str(other.path)})
  with pytest.raises(InputError, match="has none: model.name=noise_classifier"):
    complete(cdm_classifier, tmp_path / "none", config)
  other_noise = {"diffusion.preconditioning.sigma_data": 0.25}
  config = config_lib.load("configs/cdm_classifier.py:head,smoke", small | other_noise)
  with pytest.raises(InputError, match="the backbone was trained with"):
    complete(cdm_classifier, tmp_path / "other", config)


def test_prompts_on_a_backbone_that_was_trained_without(trained, data, tmp_path):
  """Prompts are all that a shard holds on disk; the backbone is there once, and forgetting is exact with them too."""
  other = Bundle(trained[0])
  start = {
    "init_from": str(other.path / other.manifest["shards"]["0+1"]["folder"] / "export"),
    "adapter.name": "partial",
    "adapter.trained": "^prompts$",
    "model.prompt_length": 3,
    "shards.num_slices": 2,
    "train.num_epochs": 3,
  }
  path = tmp_path / "bundle"
  complete(cdm_train, path, train_config(data, **start))
  bundle = Bundle(path)
  for name in bundle.names:
    own = bundle.variables(name)
    assert [list(own), list(own["params"])] == [["params"], ["prompts"]]
    assert own["params"]["prompts"].shape == (1, 3, 3, 16)  # one set, for each of depth + 1 blocks
    assert not (path / bundle.manifest["shards"][name]["folder"] / "export").exists()
  one, two = (bundle.variables(name)["params"]["prompts"] for name in bundle.names)
  assert np.abs(np.asarray(one) - np.asarray(two)).max() > 1e-4
  complete(cdm_compose, tmp_path / "images", compose_config(path, **{"mixture.impl": "vmap"}))
  position = int(bundle.data(0).of("2+3")[-1])
  forget(bundle, tmp_path, positions=str(position))
  assert verify(Bundle(path), tmp_path, replay="all")["faults"] == 0


@pytest.mark.slow
@pytest.mark.computes
def test_forgetting_is_exact_in_optimised_programs(data, tmp_path):
  """As users run it: other tests compile for less."""
  small = {"shards.num_slices": 2, "train.num_epochs": 3, "cdm.only": "0+1"}
  for where in ("bundle", "scratch"):
    rows = [2, 5] if where == "scratch" else []
    shorter = without(data, rows, tmp_path / f"{where}.npz")
    folder = shorter.with_suffix("")
    folder.mkdir()
    complete(cdm_train, tmp_path / where / "run", train_config(shorter.rename(folder / "train.npz"), **small))
  bundle = Bundle(tmp_path / "bundle/run")
  assert set(bundle.data(0).shard[[2, 5]]) <= {0, 1} and 0 in bundle.data(0).shard[[2, 5]]
  forget(bundle, tmp_path, positions="2,5")
  assert parameters(Bundle(bundle.path)) == parameters(Bundle(tmp_path / "scratch/run")) != parameters(bundle)


@pytest.mark.parametrize(
  "overrides, evaluations",
  [
    ({"mixture.weights": "along_path"}, 2),
    ({"mixture.weights": "classifier", "sampler.eta": 0.0}, 2),
    ({"mixture.weights": "equal", "guidance.scale": 2.0}, 4),
    ({"mixture.weights": "prior", "guidance.scale": 2.0, "guidance.order": "guidance_first"}, 4),
    (
      {"mixture.weights": "fixed", "mixture.proportions": (1.0, 3.0), "mixture.top_k": 1, "mixture.impl": "vmap"},
      2,
    ),
    ({"mixture.weights": "random"}, 1),
  ],
)
def test_images_of_a_mixture(classified, tmp_path, overrides, evaluations):
  path, _ = classified
  metrics = complete(cdm_compose, tmp_path / "run", compose_config(path, **overrides))
  assert metrics["num_images"] == 32 and metrics["network_evaluations"] == 3 * evaluations
  found = images_of(tmp_path / "run")
  assert (
    np.bincount(found.labels).tolist() == [8] * 4
    and len(np.unique(found.take(range(32))["image"], axis=0)) > 16
  )


@pytest.mark.slow
def test_shards_are_shared_out_over_devices(trained, tmp_path):
  """Two shards on eight devices: two on the axis of shards, each with one, and the images of one device."""
  found = answer(start("cdm_compose_worker.py", 8, trained[0], tmp_path))
  assert found["devices"] == 8
  assert found["split"] == {"map": [1, 2, 2], "shard_map": [2, 2, 1]}
  assert found["difference"] <= 1 and found["kinds"] > 32


def test_a_mixture_of_one_shard_is_the_shard(classified, tmp_path):
  """Its images are those that generate makes of the shard's export, and its classes those it has images of."""
  path, _ = classified
  alone = {"mixture.shards": "2+3", "mixture.weights": "prior", "sampler.eta": 0.0}
  complete(cdm_compose, tmp_path / "mixture", compose_config(path, **alone))
  found = images_of(tmp_path / "mixture")
  assert sorted(set(found.labels.tolist())) == [2, 3]
  labels = tmp_path / "labels.npy"
  np.save(labels, found.labels)
  folder = path / Bundle(path).manifest["shards"]["2+3"]["folder"]
  same = {
    "init_from": str(folder / "export"),
    "sampler.name": "ancestral",
    "sampler.num_steps": 3,
    "sampler.eta": 0.0,
    "generate.labels": str(labels),
    "generate.num_images": 32,
    "generate.micro_batch": 32,
  }
  complete(generate, tmp_path / "generate", config_lib.load("configs/generate_cifar.py:smoke", same))
  one, other = (
    images_of(tmp_path / name).take(range(32))["image"].astype(int) for name in ("mixture", "generate")
  )
  assert np.abs(one - other).max() <= 1 and (one != other).mean() < 0.01


def test_attribution_of_training_images(classified, tmp_path):
  path, _ = classified
  data = Bundle(path).data(0)
  overrides = {
    "cdm.path": str(path),
    "images.name": "npz",
    "images.path": str(data_path(path)),
    "attribute.num_images": 64,
  }
  for method in ("denoising", "path"):
    config = config_lib.load(
      "configs/cdm_attribute.py:smoke", overrides | {"attribute.method": method, "attribute.batch_size": 32}
    )
    metrics = complete(cdm_attribute, tmp_path / method, config)
    assert metrics["posterior/0+1"] + metrics["posterior/2+3"] == pytest.approx(1, abs=1e-5)
    stored = np.load(tmp_path / method / "credit.npz")
    assert stored["names"].tolist() == ["0+1", "2+3"] and stored["posterior"].shape == (64, 2)
    mean, column = metrics["posterior/2+3"], stored["posterior"][:, 1]
    assert mean == pytest.approx(column.mean(), abs=1e-5)
    assert metrics["posterior/2+3/error"] == pytest.approx(column.std(ddof=1) / 8, abs=1e-5)
    # shards are told their classes, and have none of the other's: the label alone says whose an image is
    np.testing.assert_array_equal(stored["posterior"].argmax(1), data.shard[:64])
    if method == "path":
      np.testing.assert_allclose(stored["paper"].sum(1), 1, atol=1e-4)
      of_set = stored["parts"].astype(float).sum(0) / stored["parts"].astype(float).sum()
      assert metrics["paper/0+1"] == pytest.approx(of_set[0], abs=1e-3) and metrics["paper/0+1/error"] > 0
    trace = np.load(tmp_path / method / "trace.npz")
    assert trace["weights"].shape == (4, 2, 8) and (np.diff(trace["sigma"]) < 0).all()
    # eight images of classes 0, 1, 2, 3, 0, ..: a class is in one shard, which has all the weight
    np.testing.assert_allclose(trace["weights"][:, 1], np.tile([0, 0, 1, 1], (4, 2)), atol=1e-6)
    assert (tmp_path / method / "report/weights.png").is_file()


def test_credit_does_not_draw_the_noise_that_images_were_made_of(trained, data, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(cdm_attribute, "image_keys", lambda *a: asked.append(a[2:]) or sampling.image_keys(*a))
  of_images = {"cdm.path": str(trained[0]), "images.name": "npz", "images.path": str(data)}
  complete(cdm_attribute, tmp_path / "run", config_lib.load("configs/cdm_attribute.py:smoke", of_images))
  assert asked == [("credit",), ()]  # of the credit, and of the traced images, which are samples
  ids = jax.numpy.arange(64)
  one, other = (jax.random.key_data(sampling.image_keys(0, ids, *more)) for more in ((), ("credit",)))
  assert not (one == other).all(1).any()


def test_an_image_of_a_class_that_no_shard_has_owes_itself_to_none(trained):
  """Shards have classes 0 and 1, and 2 and 3; the file's classes are as many."""
  bundle = Bundle(trained[0])
  for about in bundle.manifest["shards"].values():
    about["class_counts"] += [0]
  posterior = np.array([[0.9, 0.1]] * 3)
  found = cdm_attribute._agreement(bundle, ["0+1", "2+3"], posterior, np.array([0, 4, 2]))
  assert found["agreement"] == pytest.approx(1 / 3)
  with pytest.raises(InputError, match="the judge sees class 5"):
    cdm_attribute._agreement(bundle, ["0+1", "2+3"], posterior, np.array([0, 5, 2]))


@pytest.fixture
def files(data, tmp_path):
  """Of the images of `data`, a file of owners, one of scores and one of slices."""
  count = len(np.load(data)["label"])
  (tmp_path / "owners.txt").write_text("".join(f"{('ann', 'bob b', 'cid')[i % 3]}\n" for i in range(count)))
  np.save(tmp_path / "scores.npy", np.linspace(0, 10, count))
  np.save(tmp_path / "slices.npy", np.arange(count) % 2)
  return tmp_path


@pytest.mark.parametrize("by", ["owner", "score", "hash"])
def test_shards_by_what_a_file_or_the_content_says(data, files, by):
  more = {
    "owner": {"file": str(files / "owners.txt"), "slice_file": str(files / "slices.npy"), "num_slices": 2},
    "score": {"file": str(files / "scores.npy"), "thresholds": (2.5, 5.0)},
    "hash": {"num_shards": 3},
  }[by]
  config = train_config(data, **{f"shards.{k}": v for k, v in ({"by": by} | more).items()})
  found = compartments.split(config.data, config.shards, 0)
  number = np.arange(200)
  if by == "owner":
    assert found.names == ("ann", "bob_b", "cid")
    np.testing.assert_array_equal(found.shard, number % 3)
    np.testing.assert_array_equal(found.slice, number % 2)
  elif by == "score":
    assert found.names == ("below_2.5", "from_2.5", "from_5")
    scores = number * 10 / 199
    np.testing.assert_array_equal(found.shard, (scores >= 2.5).astype(int) + (scores >= 5))
  else:
    assert found.names == ("part0", "part1", "part2") and min(np.bincount(found.shard)) > 40
    half = found.source.select(number[::2])
    again = slices.shard_of(slices.content_ids(half.images[np.arange(100)], half.labels), 3, 0)
    np.testing.assert_array_equal(again, found.shard[::2])  # whatever else is there


def test_a_bundle_by_owners_whose_file_was_changed(data, files, tmp_path):
  owners = files / "owners.txt"
  by_owner = {"shards.by": "owner", "shards.file": str(owners), "shards.num_slices": 1, "train.num_epochs": 1}
  complete(cdm_train, tmp_path / "bundle", train_config(data, **by_owner))
  bundle = Bundle(tmp_path / "bundle")
  assert bundle.names == ["ann", "bob_b", "cid"]
  assert verify(bundle, tmp_path)["faults"] == 0
  owners.write_text(owners.read_text().replace("ann", "bob b", 1))
  with pytest.raises(InputError, match="owners.txt, which divides the images .* was changed"):
    forget(Bundle(bundle.path), tmp_path, positions="0")


def data_path(path):
  return Bundle(path).manifest["origins"][0]["data"]["path"]


def test_a_new_shard_leaves_the_others_as_they_were(classified, data, tmp_path):
  path, _ = classified
  arrays = dict(np.load(data))
  np.savez(tmp_path / "train.npz", image=255 - arrays["image"][:64], label=arrays["label"][:64])
  overrides = {
    "cdm.path": str(path),
    "cdm.copy": True,
    "data.name": "npz",
    "data.path": str(tmp_path / "train.npz"),
  }
  overrides |= {"data.num_classes": 4, "shards.name": "negatives", "shards.num_slices": 1}
  metrics = complete(cdm_add, tmp_path / "add", config_lib.load("configs/cdm_add.py", overrides))
  before, after = Bundle(path), Bundle(tmp_path / "add/bundle")
  assert (
    metrics["added_shards"] == 1
    and after.names == ["0+1", "2+3", "negatives"]
    and before.names == ["0+1", "2+3"]
  )
  assert {name: parameters(after)[name] for name in before.names} == parameters(before)
  assert verify(after, tmp_path)["faults"] == 0
  complete(
    cdm_compose,
    tmp_path / "two",
    compose_config(after.path, **{"mixture.weights": "classifier", "mixture.shards": "0+1,2+3"}),
  )
  with pytest.raises(InputError, match="does not know 'negatives'"):
    complete(cdm_compose, tmp_path / "three", compose_config(after.path, **{"mixture.weights": "classifier"}))
  forget(after, tmp_path, shards="negatives")
  with pytest.raises(InputError, match="was dropped: give the new one another name"):
    complete(
      cdm_add,
      tmp_path / "again",
      config_lib.load("configs/cdm_add.py", overrides | {"cdm.path": str(after.path), "cdm.copy": False}),
    )


def test_a_classifier_that_saw_forbidden_shards_weighs_nothing_for_a_user(classified, tmp_path):
  rights = tmp_path / "rights.json"
  rights.write_text(json.dumps({"ann": ["2+3"], "bob": ["0+1", "2+3"]}))
  section = {"mixture.weights": "classifier", "mixture.access": str(rights)}
  complete(cdm_compose, tmp_path / "bob", compose_config(classified[0], **section, **{"mixture.user": "bob"}))
  with pytest.raises(InputError, match=r"trained on shard '0\+1' too, of which 'ann' may have no part"):
    complete(cdm_compose, tmp_path / "ann", compose_config(classified[0], **section, **{"mixture.user": "ann"}))


def test_the_command_of_a_deletion_given_again_means_the_same_image(bundle, data, tmp_path, image_of_last_slice):
  """Also when the image has left the data set since, and its position is another's."""
  first = forget(bundle, tmp_path, positions=str(image_of_last_slice))
  (tmp_path / "less").mkdir()
  left = without(data, [image_of_last_slice], tmp_path / "less/train.npz")
  after = Bundle(bundle.path)
  after.manifest["origins"][0]["data"]["path"] = str(left)
  after.save()
  forgotten = after.manifest["forgotten"]
  assert len(forgotten) == 1 and forget(Bundle(bundle.path), tmp_path, positions=str(image_of_last_slice)) == first
  assert Bundle(bundle.path).manifest["forgotten"] == forgotten
  assert verify(Bundle(bundle.path), tmp_path)["faults"] == 0


def test_a_bundle_that_was_brought_back_forgets_again(bundle, tmp_path):
  """The same command in the same folder, which had its result."""
  shutil.copytree(bundle.path, tmp_path / "backup")
  first = forget(bundle, tmp_path, shards="2+3")
  before = (bundle.path / "manifest.json").read_text()
  assert forget(Bundle(bundle.path), tmp_path, shards="2+3") == first
  assert (bundle.path / "manifest.json").read_text() == before
  shutil.rmtree(bundle.path)
  (tmp_path / "backup").rename(bundle.path)
  assert Bundle(bundle.path).names == ["0+1", "2+3"]
  forget(Bundle(bundle.path), tmp_path, shards="2+3")
  assert Bundle(bundle.path).names == ["0+1"]
  forget(Bundle(bundle.path), tmp_path, "rest", shards="0+1")
  assert forget(Bundle(bundle.path), tmp_path, "plan", shards="0+1", plan=True)["steps_share"] == 0


def test_a_classifier_that_had_seen_what_is_forgotten_is_not_used(classified, tmp_path):
  path, _ = classified
  overrides = {"cdm.path": str(path), "cdm.copy": True, "forget.shards": "2+3"}
  complete(cdm_forget, tmp_path / "forget", config_lib.load("configs/cdm_forget.py", overrides))
  left = tmp_path / "forget/bundle"
  with pytest.raises(InputError, match="had seen what was forgotten"):
    complete(cdm_compose, tmp_path / "run", compose_config(left, **{"mixture.weights": "classifier"}))
  complete(cdm_compose, tmp_path / "run", compose_config(left))
  assert Bundle(path).names == ["0+1", "2+3"]


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"mixture.weights": "best"}, "unknown mixture.weights='best'"),
    ({"mixture.shards": "9"}, "there is no shard '9'"),
    ({"mixture.weights": "classifier"}, "has none: train a classifier"),
    ({"sampler.eta": 0.5}, "a sampler of the reverse SDE"),
    ({"sampler.name": "edm"}, "a sampler of the reverse SDE"),
    ({"guidance.scale": 2.0}, "weights without a state"),
    ({"guidance.order": "none"}, "unknown guidance.order"),
    ({"mixture.weights": "fixed"}, "a positive number for each of"),
    ({"mixture.weights": "random", "guidance.scale": 2.0}, "guided on its own"),
    ({"mixture.shards": "0+1", "generate.labels": "2"}, "the model's classes are 0..1"),
    ({"mixture.shards": "2+3", "generate.labels": "0"}, "the model's classes are 2, 3"),
  ],
)
def test_composition_refuses_in_one_line(trained, tmp_path, overrides, message):
  with pytest.raises(InputError, match=message):
    complete(cdm_compose, tmp_path / "run", compose_config(trained[0], **overrides))
