"""Checks a compartmentalized model against its manifest: every file, every image, every dependency, and training itself."""

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.evaluation import report
from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.tasks.bundles import (
  BACKBONE_FILE,
  CONFIG,
  MANIFEST,
  PASSING,
  REPORT,
  RESULT,
  SALT,
  Bundle,
  environment,
  file_digest,
  file_digests,
  folder_of,
  names_of,
  text_of,
)
from jax_trustdiff.tasks.cdm_forget import RISKS
from jax_trustdiff.tasks.shard_training import Training
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked, result_fault, write_atomically
from jax_trustdiff.types import InputError, RunError

Found = list[tuple[str, str]]  # (what was checked, '' or what is wrong)


def reads(config) -> None:
  """Never finished: files may have changed since, whatever the manifest says."""


def run(config, workdir: Workdir) -> dict[str, float]:
  """Checks the bundle config.cdm.path and returns the number of checks; RunError, after all were made, if one failed.

  The seal and the text of the manifest; the hash of every file of every shard and artefact, of the salt, of the backbone, and of config
  and report of the run that made it, whose result has a seal of its own; the state after every stage; that nothing else lies there; that
  every shard's list of images is the one below its roots; that the images each shard was trained on are those of its data set less the
  forgotten ones (config.verify.data=False leaves this out where the data are not at hand); that every deletion left other shards as they
  were; that no artefact depends on a shard that is gone or another now. config.verify.replay: shards by commas, or 'all', that are
  trained again from nothing and compared bit by bit.
  """
  path = folder_of(config, workdir)
  with locked(path):
    try:
      bundle = Bundle(path)
    except InputError as error:
      raise RunError(f"1 of 1 checks failed: {error}") from None
    replayed = bundle.names if config.verify.replay == "all" else names_of(config.verify.replay)
    bundle.check_names(replayed)
    workdir.open()
    for left in workdir.path.glob("replay-*"):  # of a verification that was cut off
      shutil.rmtree(left)
    found = _files(bundle) + _strays(bundle) + _deletions(bundle) + _artefacts(bundle)
    if config.verify.data:
      for name in bundle.names:
        found += _found(f"images of {name}", lambda name=name: _images(bundle, name))
    for name in replayed:
      found += _found(f"replay of {name}", lambda name=name: _replay(bundle, name, workdir))
  faults = [(what, fault) for what, fault in found if fault]
  for what, fault in faults:
    say(f"FAULT {what}: {fault}")
  metrics = {"checks": len(found), "faults": len(faults), "replayed": len(replayed)}
  _report(config, workdir, bundle, found, metrics)
  if faults:
    what, fault = faults[0]
    raise RunError(f"{len(faults)} of {len(found)} checks failed, the first: {what}: {fault}")
  say(f"{len(found)} checks hold; out of reach: {'; '.join(RISKS)}")
  return metrics


def _found(what: str, check: Callable[[], Found]) -> Found:
  """What a check finds; what it cannot do without, such as a file that was changed, is a fault."""
  try:
    return check()
  except InputError as error:
    return [(what, str(error))]


def _files(bundle: Bundle) -> Found:
  path, manifest = bundle.path, bundle.manifest
  same = (path / MANIFEST).read_bytes() == text_of(manifest).encode()
  found = [("text of the manifest", "" if same else "it is not written as manifests are")]
  found.append((SALT, _fault(manifest["salt_sha256"], _digest(path / SALT))))
  if manifest["backbone"] is not None:
    found.append((BACKBONE_FILE, _fault(manifest["backbone"]["sha256"], _digest(path / BACKBONE_FILE))))
  found.append((CONFIG, _fault(manifest["config"], _digest(path / CONFIG))))
  if manifest["report"] or (path / RESULT).is_file():  # a deletion removes both
    found.append((RESULT, result_fault(path / RESULT) if (path / RESULT).is_file() else "it is missing"))
  folders = {about["folder"]: about["files"] for about in (*manifest["shards"].values(), *bundle.active_artefacts().values())}
  for folder, files in (folders | {REPORT: manifest["report"]}).items():
    there = file_digests(path / folder) if (path / folder).is_dir() else {}
    for name in sorted(there.keys() | files.keys()):
      found.append((f"{folder}/{name}", _fault(files.get(name), there.get(name))))
  for name, about in manifest["shards"].items():
    found.append((f"images of {name} are below its roots", _roots_fault(bundle, name)))
    before = None
    for number, stage in enumerate(about["stages"]):
      file = path / about["folder"] / "stages" / f"{number}.safetensors"
      found.append((f"state of {name} after stage {number}", _state_fault(file, stage["after"])))
      chained = before in (None, stage["before"])
      found.append(
        (f"stage {number} of {name} goes on from the one before", "" if chained else "from another")
      )
      before = stage["after"]
  return found


def _digest(file: pathlib.Path) -> str | None:
  return file_digest(file) if file.is_file() else None


def _fault(wanted: str | None, seen: str | None) -> str:
  if seen is None:
    return "it is missing"
  if wanted is None:
    return "the manifest does not know it"
  return "" if wanted == seen else "it was changed"


def _state_fault(file: pathlib.Path, wanted: str) -> str:
  try:
    return _fault(wanted, manifest_lib.tree_digest(safetensors_io.load_flat(file)))
  except InputError as error:
    return str(error)


def _roots_fault(bundle: Bundle, name: str) -> str:
  about = bundle.manifest["shards"][name]
  try:
    images = bundle.images(name)
  except InputError as error:
    return str(error)
  roots = [manifest_lib.merkle_root(one) for one in (*images, sum(images, []))]
  return "" if roots == [*(part["root"] for part in about["slices"]), about["root"]] else "they are others"


def _strays(bundle: Bundle) -> Found:
  known = {MANIFEST, SALT, CONFIG, RESULT, REPORT, "shards", "artefacts", *PASSING}
  if bundle.manifest["backbone"] is not None:
    known.add(BACKBONE_FILE)
  strays = bundle.strays() + [one for one in bundle.path.iterdir() if one.name not in known]
  found = [(str(one.relative_to(bundle.path)), "it is no part of the manifest") for one in strays]
  return found or [("nothing lies beside what the manifest names", "")]


def _images(bundle: Bundle, name: str) -> Found:
  found, about = [], bundle.manifest["shards"][name]
  data, rows = bundle.data(about["origin"]), bundle.rows(about["origin"], name)
  for number, part in enumerate(about["slices"]):
    leaves = [bundle.salted(data.contents[i]) for i in rows[data.slice[rows] == number]]
    same = manifest_lib.merkle_root(leaves) == part["root"]
    fault = f"the {len(leaves)} of the data set are not the {part['num_images']} it was trained on"
    found.append((f"images of {name}, slice {number}", "" if same else fault))
  return found


def _deletions(bundle: Bundle) -> Found:
  """Parameters before and after every deletion, followed from what is there now back through all of them."""
  found, now = [], {name: about["parameters"] for name, about in bundle.manifest["shards"].items()}
  for number, record in reversed(list(enumerate(bundle.manifest["deletions"]))):
    for name, digest in record["left"].items():
      found.append((f"deletion {number} left {name} as it was", _change(digest, now.get(name))))
    for name, one in record["retrained"].items():
      found.append((f"deletion {number} trained {name} again", _change(one["after"], now.get(name))))
      changed = one["before"] != one["after"]
      found.append(
        (f"deletion {number} changed {name}", "" if changed else "its parameters are those of before")
      )
      now[name] = one["before"]
    for name, digest in record["dropped"].items():
      found.append((f"deletion {number} dropped {name}", "it is there" if name in now else ""))
      now[name] = digest
    wrong = set(record["images"]) - set(bundle.manifest["forgotten"])
    found.append((f"images of deletion {number} are forgotten", f"{len(wrong)} are not" if wrong else ""))
  gone = set(bundle.manifest["forgotten"])
  for name in bundle.names:
    try:
      kept = {image for of_slice in bundle.images(name) for image in of_slice}
    except InputError:
      continue  # its files are at fault already
    found.append((f"{name} has no forgotten image", f"it has {len(kept & gone)}" if kept & gone else ""))
  return found


def _change(wanted: str, now: str | None) -> str:
  return (
    "it is gone without a record" if now is None else "" if wanted == now else "its parameters are others"
  )


def _artefacts(bundle: Bundle) -> Found:
  found, shards, active = [], bundle.manifest["shards"], bundle.active_artefacts()
  for name, about in active.items():
    for other in about["depends_on"]:
      if other in active:
        continue
      now = shards.get(other, {}).get("parameters")
      found.append((f"artefact {name} depends on {other}", _change(about["made_of"].get(other, ""), now)))
  return found


def _replay(bundle: Bundle, name: str, workdir: Workdir) -> Found:
  """Trains a shard from nothing in a folder that is thrown away, and compares the state after every stage."""
  about, here = bundle.manifest["shards"][name], environment()
  changed = [key for key, value in here.items() if about["environment"].get(key) != value]
  if changed:
    say(f"replaying {name} elsewhere than it was trained ({', '.join(changed)} differ): bits may too")
  scratch = pathlib.Path(tempfile.mkdtemp(dir=workdir.path, prefix="replay-"))
  try:
    for file in (SALT, BACKBONE_FILE):
      if (bundle.path / file).is_file():
        shutil.copy(bundle.path / file, scratch / file)
    (scratch / MANIFEST).write_text(text_of(bundle.manifest | {"shards": {}, "artefacts": {}}))
    again = Training(Bundle(scratch), name, about["origin"], bundle.trained_rows(name)).run()
  finally:
    shutil.rmtree(scratch)
  pairs = [
    (f"stage {i}", one["after"], other["after"])
    for i, (one, other) in enumerate(zip(about["stages"], again["stages"], strict=True))
  ]
  pairs.append(("its parameters", about["parameters"], again["parameters"]))
  return [(f"replay of {name}: {what}", "" if one == other else "other bits") for what, one, other in pairs]


def _report(config, workdir: Workdir, bundle: Bundle, found: Found, metrics: Any) -> None:
  rows = [{"check": what, "fault": fault} for what, fault in found]
  write_atomically(workdir / "checks.json", json.dumps(rows, indent=2) + "\n")
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  report.html_report(
    folder / "report.html",
    title="Verification of a compartmentalized model",
    summary=f"{metrics['checks']} checks, {metrics['faults']} faults. Out of reach: {'; '.join(RISKS)}.",
    metrics=metrics,
    figures=[],
    tables=[("Checks", ["what", "result"], [[what, fault or "holds"] for what, fault in found])],
    config_text=config_lib.to_json(config),
    info=workdir.information() | {"manifest": bundle.manifest[manifest_lib.SEAL]},
  )
