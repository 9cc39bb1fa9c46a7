"""Takes images, or whole shards, out of a compartmentalized model as if they had never been there.

A shard that is dropped is deleted. Of a shard that loses images, the stages that saw them are trained again from the state before; that
is, bit for bit, the shard that would have been trained without them (`cdm.slices`). What was made of affected shards, a classifier
for instance, is deleted too, and the mixture does without it until it is made anew.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks.bundles import Bundle, environment, names_of, to_change
from jax_trustdiff.tasks.shard_training import Training
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked, write_atomically
from jax_trustdiff.types import InputError

RISKS = (
  "copies of the bundle, of its exports and of the data set elsewhere, backups among them",
  "the same picture under another label, cropped or nearly the same: an image is known by its bytes and its label",
  "the backbone, if there is one, and what it was trained on",
  "images that were sampled before, and models trained on those",
  "pictures in reports of other runs, such as those of attribution and of centroids",
  "settings that were chosen by looking at results with the forgotten data",
)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Forgets what config.forget names, in the bundle config.cdm.path (or, with cdm.copy, a copy of it), and returns what that took.

  forget.shards: names by commas, dropped as a whole. forget.positions: images by their place in the training split of data set
  forget.origin, by commas. forget.file: a text file of contents' SHA-256 (`slices.content_ids`) in hexadecimal, a line each; such an image
  may have left the data set already. The manifest names the deletion once all is done; a run that was killed goes on with the same command.
  """
  path = to_change(config, workdir)
  with locked(path):
    bundle = Bundle(path)
    dropped = sorted(set(names_of(config.forget.shards)))
    wanted = _named(bundle, config.forget)
    if not dropped and not wanted:
      raise InputError("nothing to forget: give forget.shards, forget.positions or forget.file")
    request = manifest_lib.digest({"images": wanted, "shards": dropped})
    done = [one for one in bundle.manifest["deletions"][-1:] if one["request"] == request]
    if not done:
      bundle.check_names(dropped)
      _check_new(bundle, wanted)
      again, emptied = _affected(bundle, wanted, dropped)
    workdir.open()
    record = done[0] if done else _forget(bundle, request, wanted, dropped, again, emptied)
    _remove_reports(path)
    bundle.save()
  metrics = {
    "images": len(record["images"]),
    "dropped_shards": len(record["dropped"]),
    "retrained_shards": len(record["retrained"]),
    "steps_share": record["steps"] / record["steps_of_all"],
    "stale_artefacts": len(record["stale"]),
    "seconds": record["seconds"],
  }
  _report(config, workdir, bundle, record, metrics)
  return metrics


def _forget(
  bundle: Bundle,
  request: str,
  wanted: Sequence[str],
  dropped: Sequence[str],
  again: dict[str, Training],
  emptied: Sequence[str],
) -> dict[str, Any]:
  """Trains again what must be, changes the manifest, which is not written yet, and returns the record of the deletion."""
  began, shards, artefacts = time.monotonic(), bundle.manifest["shards"], bundle.manifest["artefacts"]
  steps = sum(one.steps for one in again.values())
  total = sum(one["stages"][-1]["last_step"] for one in shards.values())
  gone = [*dropped, *emptied]
  stages = (f"{name} from stage {one.first_stage + 1}" for name, one in again.items())
  say(
    f"dropped: {', '.join(gone) or 'no shard'}; trained again: {', '.join(stages) or 'no shard'}; {steps / total:.1%} of all steps"
  )
  entries = {name: one.run() for name, one in again.items()}
  active = bundle.active_artefacts()
  stale = manifest_lib.stale_after(active, [*gone, *entries])
  record = {
    "request": request,
    "images": list(wanted),
    "dropped": {name: shards[name]["parameters"] for name in gone},
    "retrained": {
      name: {
        "before": shards[name]["parameters"],
        "after": entry["parameters"],
        "from_stage": again[name].first_stage,
      }
      for name, entry in entries.items()
    },
    "left": {n: one["parameters"] for n, one in shards.items() if n not in gone and n not in entries},
    "stale": stale,
    "steps": steps,
    "steps_of_all": total,
    "seconds": round(time.monotonic() - began, 1),
  }
  bundle.manifest["forgotten"] = sorted({*bundle.manifest["forgotten"], *wanted})
  bundle.manifest["dropped"] = sorted({*bundle.manifest["dropped"], *gone})
  bundle.manifest["shards"] = {n: one for n, one in shards.items() if n not in gone} | entries
  for name in stale:
    artefacts[name] = artefacts[name] | {"status": manifest_lib.STALE}
    say(f"artefact {name!r} had seen what is forgotten: deleted; make it anew, or take weights without it")
  bundle.manifest["deletions"].append(record)
  return record


def _named(bundle: Bundle, section: Any) -> list[str]:
  """What stands in the manifest for the images that are named; InputError for what cannot be read."""
  contents: set[bytes] = set()
  if section.positions:
    if not 0 <= section.origin < len(bundle.manifest["origins"]):
      raise InputError(
        f"forget.origin={section.origin}: there are data sets 0 .. {len(bundle.manifest['origins']) - 1}"
      )
    data = bundle.data(section.origin)
    try:
      rows = [int(text) for text in section.positions.strip("()").split(",")]
    except ValueError:
      raise InputError(
        f"forget.positions has numbers separated by commas, found {section.positions!r}"
      ) from None
    if wrong := [row for row in rows if not 0 <= row < len(data.contents)]:
      raise InputError(f"forget.positions: there are {len(data.contents)} images, none at {wrong[0]}")
    contents |= {data.contents[row] for row in rows}
  if section.file:
    file = pathlib.Path(section.file).expanduser()
    if not file.is_file():
      raise InputError(f"forget.file: no such file {file}")
    try:
      contents |= {bytes.fromhex(line.strip()) for line in file.read_text().splitlines() if line.strip()}
    except ValueError:
      raise InputError(f"{file} has a line that is no SHA-256 in hexadecimal digits") from None
  return sorted(bundle.salted(one) for one in contents)


def _check_new(bundle: Bundle, wanted: Sequence[str]) -> None:
  """InputError for images that are forgotten already, or that no shard and no data set of the bundle has."""
  if again := set(wanted) & set(bundle.manifest["forgotten"]):
    raise InputError(
      f"{len(again)} of these images are forgotten already, {sorted(again)[0][:12]}... among them"
    )
  there = {image for name in bundle.names for of_slice in bundle.images(name) for image in of_slice}
  missing = set(wanted) - there
  if missing:  # of shards that are not trained yet
    for origin in range(len(bundle.manifest["origins"])):
      missing -= {bundle.salted(one) for one in bundle.data(origin).contents}
  if missing:
    raise InputError(
      f"{len(missing)} of {len(wanted)} images are in no shard and no data set of {bundle.path}"
    )


def _affected(
  bundle: Bundle, wanted: Sequence[str], dropped: Sequence[str]
) -> tuple[dict[str, Training], list[str]]:
  """(the trainings of shards that lose some of their images, the names of those that lose all).

  InputError where the data set no longer has an image that such a shard was trained on and is to keep.
  """
  again, emptied, here = {}, [], environment()
  for name in bundle.names:
    about, of_slices = bundle.manifest["shards"][name], bundle.images(name)
    touched = [r for r, images in enumerate(of_slices) if set(images) & set(wanted)]
    if name in dropped or not touched:
      continue
    kept = {image for images in of_slices for image in images} - set(wanted)
    if not kept:
      emptied.append(name)
      continue
    data = bundle.data(about["origin"])
    rows = data.of(name)
    rows = rows[np.array([bundle.salted(data.contents[i]) in kept for i in rows], bool)]
    if len(rows) < len(kept):
      raise InputError(
        f"{len(kept) - len(rows)} images that shard {name} was trained on are no longer in its data set: forget them as well "
        "(forget.file), or bring them back"
      )
    first = touched[0]
    if first and about["environment"] != here:
      changed = [key for key, value in here.items() if about["environment"].get(key) != value]
      say(
        f"shard {name} was trained elsewhere ({', '.join(changed)} differ): it is trained again from nothing"
      )
      first = 0
    again[name] = Training(bundle, name, about["origin"], rows, first)
  return again, emptied


def _remove_reports(path: pathlib.Path) -> None:
  """Pictures and numbers of the bundle's own run, which show what is forgotten; its command writes them anew."""
  shutil.rmtree(path / "report", ignore_errors=True)
  (path / "result.json").unlink(missing_ok=True)


def _report(config, workdir: Workdir, bundle: Bundle, record: dict[str, Any], metrics) -> None:
  write_atomically(workdir / "deletion.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  lines = [[name, "deleted", digest[:16], ""] for name, digest in sorted(record["dropped"].items())]
  lines += [
    [name, "trained again", one["before"][:16], one["after"][:16]]
    for name, one in sorted(record["retrained"].items())
  ]
  lines += [[name, "as it was", digest[:16], digest[:16]] for name, digest in sorted(record["left"].items())]
  report.html_report(
    folder / "report.html",
    title="What was forgotten",
    summary=(
      f"{len(record['images'])} images and {len(record['dropped'])} shards, in {record['seconds']} s. "
      f"Out of reach: {'; '.join(RISKS)}."
    ),
    metrics=metrics,
    figures=[],
    tables=[("Shards and the SHA-256 of their parameters", ["shard", "", "before", "after"], lines)],
    config_text=config_lib.to_json(config),
    info=workdir.information() | {"manifest": bundle.manifest[manifest_lib.SEAL]},
  )
