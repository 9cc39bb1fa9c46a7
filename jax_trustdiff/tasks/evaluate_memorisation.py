"""Whether generated images are copies of training images, and how often a planted one comes out."""

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import records, sources
from jax_trustdiff.evaluation import memorisation, report, statistics
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def run(config, workdir: Workdir) -> dict[str, float]:
  """Numbers of the images of config.generated against the training images of config.data (Carlini et al. 2023).

  copies: the share whose nearest training image is nearer than is usual around there; nearest_distance: its median over images. With a planted
  picture (memorisation.canary_seed >= 0; `sources.canary`) extracted, the share of images within memorisation.distance of it, with its interval
  extracted/low and extracted/high, and canary_distance, the smallest.
  """
  section = config.memorisation
  training = config_lib.build(sources.SOURCES, config.data, split="train")
  generated = records.first(
    config_lib.build(sources.SOURCES, config.generated, split="train"), section.num_generated
  )
  if training.image_shape != generated.image_shape:
    raise InputError(
      f"the generated images are {list(generated.image_shape)} and the training images {list(training.image_shape)}"
    )
  if section.neighbours < 1 or section.alpha <= 0 or section.distance <= 0:
    raise InputError("memorisation: neighbours must be at least 1, alpha and distance positive")
  workdir.open()
  images, others = (one.take(np.arange(len(one)))["image"] for one in (generated, training))
  found = memorisation.copies(images, others, section.neighbours, section.alpha)
  metrics = {
    "num_generated": len(images),
    "copies": float((found.ratio < 1).mean()),
    "nearest_distance": float(np.median(found.distance)),
  }
  order = np.argsort(found.ratio)
  if section.canary_seed >= 0:
    canary = sources.canary(generated.image_shape, section.canary_seed)
    distances = memorisation.distances_to(images, canary)
    hits = int((distances <= section.distance).sum())
    low, high = statistics.binomial_interval(hits, len(images))
    metrics |= {"extracted": hits / len(images), "extracted/low": low, "extracted/high": high}
    metrics["canary_distance"] = float(distances.min())
  if parallel.is_main_process():
    shown = order[: config.report.num_images]
    folder = workdir / "report"
    folder.mkdir(exist_ok=True)
    rows = np.concatenate([images[shown], others[found.index[shown]]])
    report.image_grid(rows, folder / "nearest.png", columns=len(shown))
    report.html_report(
      folder / "report.html",
      title="Memorisation",
      summary=f"{metrics['copies']:.2%} of {len(images):,} images are copies of one of {len(others):,} training images.",
      metrics=metrics,
      figures=[(folder / "nearest.png", "Images most like a training image, and below each that one")],
      config_text=config_lib.to_json(config),
      info=workdir.information(),
    )
  return metrics
