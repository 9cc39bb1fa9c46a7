"""Takes images, or whole shards, out of a compartmentalized model as if they had never been there.

A shard that is dropped is deleted. Of a shard that loses images, the stages that saw them are trained again from the state before; that
is, bit for bit, the shard that would have been trained without them (`cdm.slices`). What was made of affected shards, a classifier
for instance, is deleted too, and the mixture does without it until it is made anew.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks.bundles import Bundle, environment, folder_of, names_of, seal_of, to_change
from jax_trustdiff.tasks.shard_training import Training
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked, write_atomically
from jax_trustdiff.types import InputError

RECORD = "deletion.json"
RISKS = (
  "copies of the bundle, of its exports and of the data set elsewhere, backups among them",
  "the same picture under another label, cropped or nearly the same: an image is known by its bytes and its label",
  "the backbone, if there is one, and what it was trained on",
  "images that were sampled before, and models trained on those",
  "pictures in reports of other runs, such as those of attribution and of centroids",
  "the names of shards that were dropped, which stay in the manifest",
  "settings that were chosen by looking at results with the forgotten data",
)


def reads(config) -> str | None:
  """A plan is one for the bundle as it is. A deletion is looked for in the bundle each time, unless it was one of a copy."""
  if config.forget.plan:
    return seal_of(config)
  return "" if config.cdm.copy else None


def run(config, workdir: Workdir) -> dict[str, float]:
  """Forgets what config.forget names, in the bundle config.cdm.path (or, with cdm.copy, a copy of it), and returns what that took.

  forget.shards: names by commas, dropped as a whole. forget.positions: images by their place in the training split of data set
  forget.origin, by commas. forget.file: a text file of contents' SHA-256 (`slices.content_ids`) in hexadecimal, a line each; such an image
  may have left the data set already. forget.plan: changes nothing, and returns what it would take (`plan.json`). The manifest names the
  deletion once all is done; a run that was killed goes on with the same command.
  """
  path = folder_of(config, workdir) if config.forget.plan else to_change(config, workdir)
  with locked(path):
    bundle = Bundle(path)
    dropped = sorted(set(names_of(config.forget.shards)))
    wanted = _wanted(bundle, config, workdir)
    if not dropped and not wanted:
      raise InputError("nothing to forget: give forget.shards, forget.positions or forget.file")
    request = manifest_lib.digest({"images": wanted, "shards": dropped})
    done = [one for one in bundle.manifest["deletions"] if one["request"] == request]
    if not done:
      bundle.check_names(dropped)
      _check_new(bundle, wanted)
      again, emptied = _affected(bundle, wanted, dropped)
    workdir.open()
    if config.forget.plan:
      return _planned(workdir, bundle, {} if done else again, () if done else (*dropped, *emptied))
    if done:
      record = done[0]
    else:
      record = _forget(bundle, request, wanted, dropped, again, emptied)
      bundle.remove_report()
    bundle.save()
  metrics = {
    "images": len(record["images"]),
    "dropped_shards": len(record["dropped"]),
    "retrained_shards": len(record["retrained"]),
    "steps_share": _share(record["steps"], record["steps_of_all"]),
    "stale_artefacts": len(record["stale"]),
    "seconds": record["seconds"],
  }
  _report(config, workdir, bundle, record, metrics)
  return metrics


def _wanted(bundle: Bundle, config: Any, workdir: Workdir) -> list[str]:
  """The images, salted; those that this run has forgotten before if it was done, since a position may be another image's by now."""
  if not config.forget.plan and (workdir / RECORD).is_file():
    return json.loads((workdir / RECORD).read_text())["images"]
  return bundle.named(config.forget)


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
  steps, total = _steps(bundle, again)
  gone = [*dropped, *emptied]
  _say(again, gone, _share(steps, total))
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


def _planned(
  workdir: Workdir, bundle: Bundle, again: dict[str, Training], gone: Sequence[str]
) -> dict[str, float]:
  """What a deletion would take, also written to plan.json and said."""
  share = _share(*_steps(bundle, again))
  plan = {
    "dropped": sorted(gone),
    "retrained": {
      name: {"from_stage": one.first_stage, "steps": one.steps, "images": len(one.rows)} for name, one in again.items()
    },
    "stale": manifest_lib.stale_after(bundle.active_artefacts(), [*gone, *again]),
  }
  write_atomically(workdir / "plan.json", json.dumps(plan, indent=2, sort_keys=True) + "\n")
  _say(again, gone, share)
  say(f"to be made anew: {', '.join(plan['stale']) or 'nothing'}; nothing was changed")
  return {
    "dropped_shards": len(gone),
    "retrained_shards": len(again),
    "steps_share": share,
    "stale_artefacts": len(plan["stale"]),
  }


def _steps(bundle: Bundle, again: dict[str, Training]) -> tuple[int, int]:
  """(steps that these trainings take, steps of the whole bundle)"""
  of_all = sum(one["stages"][-1]["last_step"] for one in bundle.manifest["shards"].values())
  return sum(one.steps for one in again.values()), of_all


def _share(steps: int, of_all: int) -> float:
  return steps / max(1, of_all)  # a bundle without shards has none


def _say(again: dict[str, Training], gone: Sequence[str], share: float) -> None:
  stages = (f"{name} from stage {one.first_stage + 1}" for name, one in again.items())
  say(f"dropped: {', '.join(gone) or 'no shard'}; trained again: {', '.join(stages) or 'no shard'}; {share:.1%} of all steps")


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
    rows = bundle.trained_rows(name, wanted)
    first = touched[0]
    if first and about["environment"] != here:
      changed = [key for key, value in here.items() if about["environment"].get(key) != value]
      say(
        f"shard {name} was trained elsewhere ({', '.join(changed)} differ): it is trained again from nothing"
      )
      first = 0
    again[name] = Training(bundle, name, about["origin"], rows, first)
  return again, emptied


def _report(config, workdir: Workdir, bundle: Bundle, record: dict[str, Any], metrics) -> None:
  write_atomically(workdir / RECORD, json.dumps(record, indent=2, sort_keys=True) + "\n")
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
