"""Trains the shards of a compartmentalized diffusion model, each on images of its own and in a program of its own.

Golatkar et al. 2024 (arXiv:2308.01937). Shards never see each other's data: any of them can be trained elsewhere, again, or not at all
(`cdm.only`), and what is made of several is listed in the manifest as such.
"""

import pathlib
import re
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import slices
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks import compartments, denoisers, shard_training
from jax_trustdiff.tasks.bundles import (
  CONFIG,
  MANIFEST,
  REPORT,
  TRAINING,
  Bundle,
  file_digest,
  file_digests,
  names_of,
)
from jax_trustdiff.tasks.compartments import Compartments
from jax_trustdiff.tasks.shard_training import Training
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

SLICES = (1, 2, 4, 8, 16)  # of the planner
OF_PARTS = True  # for `Workdir`: shards are parts that refuse another training each, and so does the bundle


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains the shards that are not in the manifest yet, and returns their numbers: images, steps, expected cost of a deletion.

  config.cdm.only: names by commas, the others are left to other runs ('': all); a later run in the same folder may name others. Shards
  that were dropped are not trained again. The workdir is the bundle (`bundles.Bundle`). InputError if it holds one that was trained with
  other settings or of other data.
  """
  data = compartments.split(config.data, config.shards, config.seed)
  only = names_of(config.cdm.only) or list(data.names)
  if unknown := [name for name in only if name not in data.names]:
    raise InputError(f"cdm.only: there is no shard {unknown[0]!r}; there are {', '.join(data.names)}")
  slices.epochs_of_stages(config.train.num_epochs, config.shards.num_slices)
  backbone = _backbone(config)
  source = data.source
  shard_training.check(config, source.image_shape, source.num_classes, backbone and backbone[0])

  training, origin = {name: config_lib.to_plain(config[name]) for name in TRAINING}, origin_of(config, data)
  salt = _salt(config.cdm.salt_file)
  _check_same(workdir.path, training, origin, salt, backbone)
  workdir.open()
  bundle = Bundle.create(workdir.path, training, origin, backbone, salt)
  if (config_digest := file_digest(workdir / CONFIG)) != bundle.manifest["config"]:  # other shards than before
    bundle.remove_report()
    bundle.manifest["config"] = config_digest
    bundle.save()
  for name in only:
    if name in bundle.manifest["shards"]:
      continue
    if name in bundle.manifest["dropped"]:
      say(f"shard {name} was dropped: it is not trained again")
      continue
    rows = bundle.rows(0, name)
    bundle.manifest["shards"][name] = Training(bundle, name, 0, rows).run()
    bundle.save()
  metrics = summary(bundle)
  _report(config, workdir, bundle, metrics)
  bundle.manifest["report"] = file_digests(workdir / REPORT)
  bundle.save()
  return metrics


def _salt(path: str) -> str:
  """The salt of a file, '' for none; InputError unless it has a line of 64 hexadecimal digits."""
  if not path:
    return ""
  file = pathlib.Path(path).expanduser()
  text = file.read_text(errors="replace").strip() if file.is_file() else ""
  if not re.fullmatch("[0-9a-f]{64}", text):
    raise InputError(f"cdm.salt_file: {file} is to hold a line of 64 hexadecimal digits")
  return text


def _check_same(path: pathlib.Path, training: dict[str, Any], origin: dict[str, Any], salt: str, backbone: Any) -> None:
  """InputError if there is a bundle of another training or other data: of the config, only what is no part of these may change."""
  if not (path / MANIFEST).is_file():
    return
  bundle = Bundle(path)
  manifest = bundle.manifest
  if salt and bytes.fromhex(salt) != bundle.salt:
    raise InputError(f"{path} holds a bundle of another salt than cdm.salt_file")
  if changed := config_lib.difference(
    {"training": manifest["training"], "data": manifest["origins"][0], "backbone": bundle.backbone_digest},
    {"training": training, "data": origin, "backbone": backbone and manifest_lib.tree_digest(backbone[0])},
  ):
    raise InputError(f"{path} holds a bundle of another training ({'; '.join(changed[:4])}): take another --workdir")


def origin_of(config: Any, data: Compartments) -> dict[str, Any]:
  """What the manifest says of a data set."""
  source = data.source
  return {
    "data": config_lib.to_plain(config.data),
    "shards": config_lib.to_plain(config.shards),
    "files": compartments.files_of(config.shards),
    "image_shape": list(source.image_shape),
    "num_classes": source.num_classes,
    "class_names": list(source.class_names),
  }


def _backbone(config) -> tuple[Any, str] | None:
  """(variables, where they are from) of the network that every shard starts from, or adapts."""
  if not config.init_from:
    if config.adapter.name != "none":
      raise InputError(
        f"adapter {config.adapter.name!r} needs init_from, the export of a network trained on data that are safe"
      )
    return None
  found = denoisers.load_denoiser(config.init_from)
  theirs, ours = (
    found.preconditioning,
    denoisers.build_preconditioning(config.diffusion.preconditioning),
  )
  if theirs != ours:
    raise InputError(f"{config.init_from} was trained with {theirs}, and diffusion.preconditioning is {ours}")
  return found.variables, str(config.init_from)


def summary(bundle: Bundle) -> dict[str, float]:
  """Numbers of a bundle: shards, images, steps, and the share of all training that an average deletion costs."""
  shards = bundle.manifest["shards"]
  if not shards:
    return {"num_shards": 0}
  found = {"num_shards": len(shards), "num_images": sum(one["num_images"] for one in shards.values())}
  found["num_steps"] = sum(one["stages"][-1]["last_step"] for one in shards.values())
  found["expected_deletion_share"] = slices.expected_share_of(
    [[part["num_images"] for part in one["slices"]] for one in shards.values()],
    [[stage["epochs"] for stage in one["stages"]] for one in shards.values()],
  )
  return found | {f"images/{name}": one["num_images"] for name, one in sorted(shards.items())}


def _report(config, workdir: Workdir, bundle: Bundle, metrics) -> None:
  folder = workdir / REPORT
  folder.mkdir(exist_ok=True)
  figures = []
  if metrics["num_shards"]:
    say(
      f"an average deletion of one image trains {metrics['expected_deletion_share']:.1%} of all steps again"
    )
    report.image_grid(
      _pictures(bundle, config.report.num_images), folder / "shards.png", columns=config.report.num_images
    )
    figures = [(folder / "shards.png", "Images of each shard, a row for each: " + ", ".join(bundle.names))]
  report.html_report(
    folder / "report.html",
    title="A compartmentalized diffusion model",
    summary=f"{metrics['num_shards']} shards, trained apart from each other.",
    metrics=metrics,
    figures=figures,
    tables=[("Shards", *_table(bundle))] + _planner(metrics),
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def _planner(metrics) -> list[tuple[str, list[str], list[list[str]]]]:
  """What a deletion would cost with other numbers of slices."""
  if not metrics["num_shards"]:
    return []
  rows = [[str(r), f"{slices.expected_share(metrics['num_shards'], r):.1%}"] for r in SLICES]
  return [("All training that an average deletion costs, of equal shards", ["slices of a shard", "share"], rows)]


def _pictures(bundle: Bundle, each: int) -> np.ndarray:
  """A row of images for every shard, filled up with white ones."""
  rows = []
  for name in bundle.names:
    source = bundle.source(name)
    images = source.take(np.arange(min(each, len(source))))["image"]
    blank = np.full((each - len(images), *source.image_shape), 255, np.uint8)
    rows.append(np.concatenate([images, blank]))
  return np.concatenate(rows)


def _table(bundle: Bundle) -> tuple[list[str], list[list[str]]]:
  lines = [
    [
      name,
      f"{one['num_images']:,}",
      " + ".join(str(part["num_images"]) for part in one["slices"]),
      f"{one['stages'][-1]['last_step']:,}",
      one["parameters"][:16],
    ]
    for name, one in sorted(bundle.manifest["shards"].items())
  ]
  return ["shard", "images", "in slices", "steps", "SHA-256 of its parameters"], lines
