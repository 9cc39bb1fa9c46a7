"""FID, KID, precision and recall of one set of images against another, with a page that shows them."""

from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import records, sources
from jax_trustdiff.evaluation import fid, report
from jax_trustdiff.interop.fid_statistics import FeatureStatistics, load_statistics, save_statistics
from jax_trustdiff.tasks import generation_metrics, reports
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def run(config, workdir: Workdir) -> dict[str, Any]:
  """The metrics of `generation_metrics` for the images of config.generated against those of config.data.

  eval.reference_statistics: a .npz file that stands for config.data, which is then not read.
  eval.save_statistics: both sets' statistics are written to workdir/statistics/, to be such files.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  generated = _source(config.generated, config.eval.generated_split, config.eval.num_generated)
  reference = None
  if config.eval.reference_statistics:
    statistics = load_statistics(config.eval.reference_statistics)
    number = statistics.num_images
  else:
    reference = _source(config.data, config.eval.reference_split, config.eval.num_reference)
    _check_shapes(generated, reference)
    number = len(reference)
  reports.check(config)
  if config.report.num_neighbours < 1:
    raise InputError(f"report.num_neighbours must be at least 1, found {config.report.num_neighbours}")
  generation_metrics.check(config.metrics, len(generated), number)
  extractor = generation_metrics.build_extractor(config.metrics, mesh)

  workdir.open()
  if number not in (None, len(generated)):
    say(
      f"{len(generated):,} generated images against {number:,}: compare with a FID of the same numbers only"
    )
  if reference is not None:
    statistics = extractor(reference, "reference image")
  found = extractor(generated, "generated image")
  metrics = generation_metrics.generation_metrics(found, statistics, config.metrics, config.seed)
  if parallel.is_main_process():
    if config.eval.save_statistics:
      save_statistics(workdir / "statistics" / "reference.npz", statistics)
      save_statistics(workdir / "statistics" / "generated.npz", found)
    _report(config, workdir, metrics, (generated, found), (reference, statistics))
  return metrics


def _source(section, split: str, number: int) -> records.ImageSource:
  """The split of a section of SOURCES, cut to its first `number` images (0: all)."""
  source = config_lib.build(sources.SOURCES, section, split=split)
  return records.limit(source, number) if number else source


def _check_shapes(generated: records.ImageSource, reference: records.ImageSource) -> None:
  if generated.image_shape != reference.image_shape:
    raise InputError(
      f"the generated images are {list(generated.image_shape)} and the reference images"
      f" {list(reference.image_shape)}; expected one shape"
    )


def _report(
  config,
  workdir: Workdir,
  metrics: dict[str, Any],
  generated: tuple[records.ImageSource, FeatureStatistics],
  reference: tuple[records.ImageSource | None, FeatureStatistics],
) -> None:
  """report/: generated images, above their nearest reference images where the images and features are at hand."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  number = min(config.report.num_images, len(generated[0]))
  shown = generated[0].take(np.arange(number))["image"]
  columns, caption = None, f"The first {number} generated images"
  if reference[0] is not None and generated[1].features is not None:
    k = min(config.report.num_neighbours, len(reference[0]))
    nearest = fid.nearest(reference[1].features, generated[1].features[:number], k)
    rows = [shown, *(reference[0].take(nearest[:, i])["image"] for i in range(k))]
    shown, columns = np.concatenate(rows), number
    caption = f"Top row: generated images. Below each: the {k} nearest reference images by features"
  report.image_grid(shown, folder / "generated_images.png", columns=columns)
  pre = generation_metrics.prefix(generated[1].network)
  what = "raw pixels, which compare with nothing published" if pre else f"{generated[1].network}"
  of = f"{metrics['num_reference']:,}" if "num_reference" in metrics else "an unknown number of"
  report.html_report(
    folder / "report.html",
    title="Generated images against reference images",
    summary=(
      f"FID {metrics[f'{pre}fid']:.4g} of {metrics['num_generated']:,} generated against {of} reference images; "
      f"features: {what}. FID falls with the number of images: it compares only with values of the same numbers."
    ),
    metrics=metrics,
    figures=[(folder / "generated_images.png", caption)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
