"""Generates images by id from a diffusion model into an image store, as fast as the devices allow and as often as it dies.

Image i is a function of the model, the sampler, the seed and i alone (`sampling.ImageSampler`), and a shard of the store is
there whole or not at all (`data.image_store`). So work is shared out without talking: worker w of n makes the shards s with
s mod n = w, the processes of a multi-host run are workers of their own, and whoever finds all shards complete writes the
manifest.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data.image_store import ImageStore, StorePlan, check_place
from jax_trustdiff.data.readers import read_npy
from jax_trustdiff.data.records import UNLABELLED
from jax_trustdiff.diffusion.denoisers import Preconditioning
from jax_trustdiff.diffusion.guidance import Guided, NoisyClassifier
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks import denoisers, noise_classifiers, reports, store_writing
from jax_trustdiff.tasks.sampling import ImageSampler, balanced_labels, random_labels
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import DenoiseFn, DiffusionNetwork, InputError

MOST_CLASSES_SHOWN = 20  # as metrics of their own

LabelsOf = Callable[[np.ndarray], np.ndarray]  # ids [n] -> labels [n]


@dataclasses.dataclass(frozen=True)
class Model:
  """What is sampled, and what its files say of it."""

  labelled: Any  # a pytree whose `with_labels` gives the DenoiseFn of a batch
  unlabelled: DenoiseFn  # what is sampled without labels
  network: DiffusionNetwork
  preconditioning: Preconditioning
  num_classes: int  # of the model, or else of the classifier that guides it
  class_names: tuple[str, ...]  # () where there are none
  provenance: dict[str, Any]  # SHA-256 of its description and its arrays, guidance: what makes images others
  network_evaluations: int = 1  # for one of the denoiser
  needs_labels: str = ""  # why it cannot do without labels of the network's classes
  classifier: NoisyClassifier | None = None  # which guides, and has noise levels of its own
  classes: tuple[int, ...] = ()  # those that it has images of; (): all
  shard_devices: int = 1  # devices that the leaves of path `split` are shared out over, the axis 'shard' of the mesh
  split: str = ""


def run(config, workdir: Workdir) -> dict[str, float]:
  """`fill_store` with the model of config.init_from and its guidance."""
  return fill_store(config, workdir, load_model(config))


def fill_store(config, workdir: Workdir, model: Model) -> dict[str, float]:
  """Makes the shards of this worker that are missing and returns what the store, or this worker's part of it, holds.

  num_images and count/<class> (counted in the labels), nfe, and of this session generated, seconds and images_per_second.
  nfe counts evaluations of the guided denoiser for an image, network_evaluations those of the model's network in them;
  a classifier is evaluated once for each of the former, with a backward pass.
  """
  worker, num_workers = store_writing.worker(config.generate, "generate")
  mesh = parallel.make_local_mesh(model.shard_devices)
  labels_of, labels_origin = _labels(config, model)
  sampler = _sampler(config, model, mesh)
  plan = _plan(config, model, labels_origin, sampler.micro_batch)
  path = pathlib.Path(config.generate.store).expanduser() if config.generate.store else workdir / "images"
  check_place(path, plan)
  reports.check(config)

  workdir.open()
  parallel.barrier("workdir")
  store = ImageStore(path, plan, store_writing.maker())
  denoise = model.labelled if labels_of else model.unlabelled
  made, seconds = _generate(
    config, store, sampler, denoise, model.split, labels_of, range(worker, plan.num_shards, num_workers)
  )
  parallel.barrier("shards")
  sha256 = store.finish(config.generate.verify)
  missing = store.missing()
  if sha256:
    say(f"complete: {plan.num_images:,} images in {path}, SHA-256 of the manifest {sha256}")
  else:
    say(
      f"{plan.num_shards - len(missing)} of {plan.num_shards} shards are there; the last worker writes the manifest"
    )
  shards = [s for s in range(plan.num_shards) if s not in missing]
  labels = np.concatenate(
    [np.zeros(0, np.int32), *(np.array(store.read(shard)["labels"]) for shard in shards)]
  )
  counts = np.bincount(labels, minlength=plan.num_classes)
  metrics = {"num_images": len(labels), "generated": made, "seconds": seconds}
  metrics |= {"images_per_second": made / seconds if made else 0.0, "nfe": sampler.nfe}
  metrics["network_evaluations"] = sampler.nfe * model.network_evaluations
  names = plan.class_names or tuple(map(str, range(plan.num_classes)))
  if len(names) <= MOST_CLASSES_SHOWN:
    metrics |= {f"count/{name}": int(count) for name, count in zip(names, counts, strict=True)}
  if parallel.is_main_process() and shards:
    about = {"store": str(path), "manifest_sha256": sha256, "missing_shards": len(missing)}
    write_atomically(workdir / "store.json", json.dumps(about, indent=2) + "\n")
    _report(config, workdir, store, shards, np.unique(labels), metrics, sha256)
  return metrics


def load_model(config) -> Model:
  """The model of config.init_from, or with 'untrained' a freshly initialised one of config.untrained."""
  denoiser, known = denoisers.load_or_make(config)
  if config.generate.dtype:
    network = dataclasses.replace(denoiser.network, dtype=config.generate.dtype)
    denoiser = dataclasses.replace(denoiser, network=network)
  described = {name: known[name] for name in ("model", "denoiser")}
  provenance, names = (
    {"model": store_writing.fingerprint(described, denoiser.variables)},
    known["class_names"],
  )
  num_classes, guidance = denoiser.network.num_classes, config_lib.to_plain(config.guidance)
  path, scale = guidance.pop("classifier"), guidance.pop("classifier_scale")
  guided = Guided(denoiser, guidance["scale"] != 1, **guidance)
  if path:
    classifier, about = noise_classifiers.load_to_guide(path, denoiser.network, names)
    if config.generate.dtype:
      if not hasattr(classifier.network, "dtype"):
        raise InputError(f"generate.dtype: the classifier {path} computes in the type of its backbone")
      network = dataclasses.replace(classifier.network, dtype=config.generate.dtype)
      classifier = dataclasses.replace(classifier, network=network)
    guided = dataclasses.replace(guided, classifier=classifier, classifier_scale=scale)
    num_classes, names = classifier.network.num_classes, about["class_names"]
    described = {name: about[name] for name in ("model", noise_classifiers.KEY)}
    guidance |= {
      "classifier": store_writing.fingerprint(described, classifier.variables),
      "classifier_scale": scale,
    }
  elif scale != 1:
    raise InputError(f"guidance.classifier_scale={scale} needs guidance.classifier, the export of one")
  return Model(
    labelled=guided,
    unlabelled=denoiser,
    network=denoiser.network,
    preconditioning=denoiser.preconditioning,
    num_classes=num_classes,
    class_names=names,
    provenance=provenance | {"guidance": guidance},
    network_evaluations=guided.network_evaluations,
    needs_labels=f"guidance.scale={guided.scale}" if guided.by_labels else "",
    classifier=guided.classifier,
  )


def _labels(config, model: Model) -> tuple[LabelsOf | None, Any]:
  """(labels of ids, what the provenance says of them); None for no labels. InputError for what the model does not have."""
  section, num_classes = config.generate, model.num_classes
  asked, classes = section.labels, np.array(model.classes or range(num_classes), np.int32)
  if asked == "none":
    return None, asked
  if not num_classes:
    raise InputError(
      f"the model has no classes: generate.labels={asked!r} is not possible without guidance.classifier; set it to 'none'"
    )
  if asked == "balanced":
    return lambda ids: classes[balanced_labels(ids, len(classes))], asked
  if asked == "random":
    return lambda ids: classes[random_labels(ids, len(classes), config.seed)], asked
  if asked.isdecimal():
    if int(asked) not in classes:
      raise InputError(f"generate.labels={asked}: {_known(classes)}")
    return lambda ids: np.full(len(ids), int(asked), np.int32), int(asked)
  if not asked.endswith(".npy"):
    raise InputError(
      f"unknown generate.labels={asked!r}; there are 'balanced', 'random', 'none', the number of a class, "
      "and a .npy file of labels"
    )
  return _labels_from_file(pathlib.Path(asked).expanduser(), section, classes)


def _labels_from_file(file: pathlib.Path, section, classes: np.ndarray) -> tuple[LabelsOf, Any]:
  if not file.is_file():
    raise InputError(f"generate.labels: no such file {file}")
  labels = np.asarray(read_npy(file))
  if labels.shape != (section.num_images,) or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f"{file} holds {labels.dtype} {list(labels.shape)}; expected an integer for each of the "
      f"{section.num_images} images, [{section.num_images}]"
    )
  if len(wrong := np.setdiff1d(labels, classes)):
    raise InputError(f"{file}: label {wrong[0]}; {_known(classes)}")
  labels = labels.astype(np.int32)
  return lambda ids: labels[ids - section.first_id], hashlib.sha256(labels.tobytes()).hexdigest()


def _known(classes: np.ndarray) -> str:
  whole = np.array_equal(classes, np.arange(len(classes)))
  return f"the model's classes are {f'0..{len(classes) - 1}' if whole else ', '.join(map(str, classes))}"


def _sampler(config, model: Model, mesh) -> ImageSampler:
  section = config.generate
  if model.needs_labels and (section.labels == "none" or not model.network.num_classes):
    raise InputError(f"{model.needs_labels} needs a model with classes, and labels")
  sampler = denoisers.build_sampler(config_lib.to_plain(config.sampler), model.preconditioning)
  if model.classifier is not None:
    if section.labels == "none":
      raise InputError("guidance.classifier needs labels to guide to: generate.labels is 'none'")
    known = model.classifier.preconditioning
    denoisers.check_levels(sampler, known, "the classifier of the guidance", "choose the sampler's to fit")
  if section.micro_batch < 1:
    raise InputError(f"generate.micro_batch must be at least 1, found {section.micro_batch}")
  return ImageSampler(
    sampler,
    model.network.image_shape,
    mesh,
    section.batch_size,
    config.seed,
    section.micro_batch,
  )


def _plan(config, model: Model, labels_origin: Any, micro_batch: int) -> StorePlan:
  section, network = config.generate, model.network
  for name, low in (("num_images", 1), ("images_per_shard", 1), ("first_id", 0)):
    if section[name] < low:
      raise InputError(f"generate.{name} must be at least {low}, found {section[name]}")
  if section.first_id + section.num_images > 2**31:
    raise InputError(f"image ids lie below 2^31; found {section.first_id + section.num_images - 1}")
  labelled = section.labels != "none"
  return StorePlan(
    num_images=section.num_images,
    images_per_shard=section.images_per_shard,
    image_shape=tuple(network.image_shape),
    num_classes=model.num_classes if labelled else 1,
    class_names=model.class_names if labelled else (UNLABELLED,),
    provenance=model.provenance
    | {
      "dtype": network.dtype,
      "sampler": config_lib.to_plain(config.sampler),
      "seed": config.seed,
      "first_id": section.first_id,
      "labels": labels_origin,
      "micro_batch": micro_batch,
    },
  )


def _generate(
  config,
  store: ImageStore,
  sampler: ImageSampler,
  denoise: Any,
  split: str,
  labels_of: LabelsOf | None,
  shards: range,
) -> tuple[int, float]:
  """Makes those of `shards` that are missing: (images made, seconds it took). Stopped after SIGTERM."""
  denoise = parallel.replicate_to_devices(sampler.mesh, denoise, split)

  def make(rows, progress):
    ids = config.generate.first_id + np.asarray(rows, np.int64)
    labels = None if labels_of is None else labels_of(ids)
    images = sampler(denoise, ids, labels, progress=progress)
    return images, np.zeros(len(ids), np.int32) if labels is None else labels, ids

  return store_writing.fill(store, shards, make, config.generate.verify, "to generate")


def _report(
  config, workdir: Workdir, store: ImageStore, shards: list[int], there: np.ndarray, metrics, sha256
) -> None:
  """A grid of the first images of each class and report.html, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  images, columns, caption = _shown(store, shards, there, config.report.num_images)
  report.image_grid(images, folder / "samples.png", columns=columns)
  plan = store.plan
  report.html_report(
    folder / "report.html",
    title=f"{metrics['num_images']:,} generated images",
    summary=(
      f"{metrics['num_images']:,} of {plan.num_images:,} images of {list(plan.image_shape)} in {store.path}, "
      f"{metrics['nfe']:g} evaluations of the denoiser for an image. "
      + (f"SHA-256 of the manifest: {sha256}." if sha256 else "Other workers are not done yet.")
    ),
    metrics=metrics,
    figures=[(folder / "samples.png", caption)],
    tables=[
      ("Origin of the images", ["", "value"], [[k, str(v)] for k, v in plan.provenance.items()]),
      ("Makers", ["", "images"], [[k, f"{v:,}"] for k, v in store.makers(shards).items()]),
    ],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def _shown(
  store: ImageStore, shards: list[int], there: np.ndarray, number: int
) -> tuple[np.ndarray, int, str]:
  """(images in the order of the classes that are `there`, columns of their grid, its caption)."""
  classes = there[np.linspace(0, len(there) - 1, min(len(there), number)).round().astype(int)]
  each = max(1, number // len(classes))
  found = {label: [] for label in classes}
  for shard in shards:
    part = store.read(shard)
    for label in classes:
      rows = np.flatnonzero(part["labels"] == label)[: each - len(found[label])]
      found[label].extend(np.asarray(part["images"][rows]))
    if all(len(images) == each for images in found.values()):
      break
  if len(classes) == 1:
    images = np.stack(found[classes[0]])
    return images, int(np.ceil(np.sqrt(len(images)))), f"The first {len(images)} images"
  each = max(map(len, found.values()))
  blank = np.full(store.plan.image_shape, 255, np.uint8)
  rows = [images + [blank] * (each - len(images)) for images in found.values()]
  caption = f"The first images of each of {len(classes)} classes, a row for each class, up to {each}"
  return np.stack(sum(rows, [])), each, caption
