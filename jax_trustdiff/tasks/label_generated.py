"""Labels generated images with a classifier, and chooses those of which it is surest."""

import functools
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.data.pseudo_labels import PseudoLabels, fingerprint, surest
from jax_trustdiff.evaluation import report
from jax_trustdiff.models.registry import bind
from jax_trustdiff.tasks import classifiers, reports
from jax_trustdiff.tasks.journal import FolderJournal
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, to_unit

LABELS, JOURNAL = "labels.npz", "journal"
WHOSE = ("given", "predicted")


def run(config, workdir: Workdir) -> dict[str, Any]:
  """Writes workdir/labels.npz, which `mixing.labels` takes, and returns what is in it.

  num_images and num_chosen; agreement, the part of all images that the classifier sees as their given label, if they have any;
  mean_confidence of all and of the chosen; chosen/<class> and agreement/<class>. The classifier computes in float32 with the highest
  precision. Work that was cut off goes on at the chunk where it was.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  section = config.label
  if section.whose not in WHOSE:
    raise InputError(f"label.whose={section.whose!r}; there are {' and '.join(WHOSE)}")
  if section.chunk_size < 1:
    raise InputError(f"label.chunk_size must be at least 1, found {section.chunk_size}")
  surest(np.zeros(1, np.int32), np.ones(1, np.float32), section.top_fraction)
  source = config_lib.build(sources.SOURCES, config.generated, split=config.eval.split)
  if config.eval.num_images:
    source = records.limit(source, config.eval.num_images)
  if section.whose == "given":
    records.check_labelled(source, "label.whose=predicted gives them those that the classifier sees")
  network, variables, _ = classifiers.load_classifier(config, source, labelled=False)
  if not source.labelled:
    source = records.of_classes(source, network.num_classes)
  parallel.check_batch(config.eval.batch_size, mesh)
  reports.check(config)

  workdir.open()
  logits_fn = bind(classifiers.in_float32(network), variables)
  journal = FolderJournal(workdir / JOURNAL)
  probabilities = _probabilities(config, journal, logits_fn, source, mesh)
  predicted = probabilities.argmax(1).astype(np.int32)
  label = source.labels if section.whose == "given" else predicted
  confidence = probabilities[np.arange(len(label)), label].astype(np.float32)
  chosen = surest(label, confidence, section.top_fraction)
  soft = probabilities[chosen].astype(np.float16) if section.soft else None
  found = PseudoLabels(
    chosen, label[chosen], confidence[chosen], soft, len(source), source.num_classes, fingerprint(source)
  )
  metrics = {"num_images": len(source), "num_chosen": len(found)}
  metrics |= {"mean_confidence": float(confidence.mean())}
  metrics |= {"chosen/mean_confidence": float(found.confidence.mean())}
  for number, name in enumerate(source.class_names):
    metrics[f"chosen/{name}"] = int((found.label == number).sum())
  if source.labelled:
    right = predicted == source.labels
    metrics["agreement"] = float(right.mean())
    for number, name in enumerate(source.class_names):
      if (source.labels == number).any():
        metrics[f"agreement/{name}"] = float(right[source.labels == number].mean())
  if parallel.is_main_process():
    found.save(workdir / LABELS)
    _report(config, workdir, source, label, confidence, found, metrics)
  return metrics


def _probabilities(
  config, journal: FolderJournal, logits_fn, source: records.ImageSource, mesh
) -> np.ndarray:
  """softmax of the logits [n num_classes] float32, chunk by chunk, each kept in the journal."""

  @jax.jit
  def predict(logits_fn, batch):
    with jax.default_matmul_precision("highest"):
      return jax.nn.softmax(logits_fn(to_unit(batch["image"])))

  logits_fn = parallel.replicate_to_devices(mesh, logits_fn)
  size, found = config.label.chunk_size, []
  with ProgressReport("image", len(source)) as progress:
    for start in range(0, len(source), size):
      part = source.select(np.arange(start, min(start + size, len(source))))
      known = journal.get(f"{start // size:06d}")
      if known is None:
        rows = pipeline.map_images(
          functools.partial(predict, logits_fn),
          part,
          config.eval.batch_size,
          mesh,
          progress=lambda done, start=start: progress.update(start + done),
        )
        known = {"probabilities": rows.astype(np.float32)}
        journal.put(f"{start // size:06d}", known)
      found.append(known["probabilities"])
      progress.update(start + len(part))
  return np.concatenate(found)


def _report(config, workdir: Workdir, source, label, confidence, found: PseudoLabels, metrics) -> None:
  """report/: how sure the classifier is, and the images of each class of which it is most and least."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  kept = np.zeros(len(source), bool)
  kept[found.position] = True
  report.histogram(
    {"chosen": confidence[kept], "left out": confidence[~kept]},
    folder / "confidence.png",
    xlabel="probability of the label",
    ylabel="images",
    limits=(0.0, 1.0),
  )
  columns = config.report.num_images
  rows = []
  for number in range(source.num_classes):
    of_class = np.flatnonzero(label == number)
    if len(of_class) >= 2 * columns:
      order = of_class[np.argsort(-confidence[of_class], kind="stable")]
      rows.append(np.concatenate([order[:columns], order[-columns:]]))
  figures = [(folder / "confidence.png", "How sure the classifier is of the labels")]
  if rows:
    shown = source.take(np.concatenate(rows))["image"]
    report.image_grid(shown, folder / "surest_and_least_sure.png", columns=2 * columns)
    caption = f"A row for each class: the {columns} images of which the classifier is surest, and the {columns} of which it is least"
    figures.append((folder / "surest_and_least_sure.png", caption))
  summary = f"{metrics['num_chosen']:,} of {metrics['num_images']:,} images are chosen"
  if source.labelled:
    summary += f"; the classifier agrees with the given label of {metrics['agreement']:.1%} of all"
  report.html_report(
    folder / "report.html",
    title="Labels of generated images",
    summary=f"{summary}.",
    metrics=metrics,
    figures=figures,
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
