"""Which shards an image, or a set of them, owes itself to: credit of every shard, and the weights over the time of sampling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.cdm import credit
from jax_trustdiff.cdm.mixture import Mixture, Record, Recorded
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.diffusion.adaptive import AdaptiveODESampler
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.interop import export
from jax_trustdiff.tasks import cdm_compose, denoisers
from jax_trustdiff.tasks.bundles import Bundle, reading
from jax_trustdiff.tasks.sampling import image_keys
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, to_signed, to_unit

METHODS = ("denoising", "classifier", "path")
KINDS, PARTS = ("paper", "posterior", "integrated"), "parts"  # of `credit.Credit`
CREDIT = "credit"  # the draws of this task


def reads(config) -> str:
  """What the credit is computed from, for `Workdir.complete`."""
  return cdm_compose.made_of(Bundle(config.cdm.path), _composed(config).mixture)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Credit of the shards of the bundle config.cdm.path for the images of config.images; the mean credit of each shard.

  attribute.method: 'denoising', the posterior by denoising errors at attribute.num_sigmas noise levels (no classifier, no ODE);
  'classifier', the posterior by the bundle's classifier at attribute.sigma_min; 'path', beside that the paper's eq. 6 and the mean over
  time along the ODE from attribute.sigma_min to sigma_max. The metric <kind>/<shard> is the credit for the whole set, with its standard
  error <kind>/<shard>/error: the mean over images, or for eq. 6, which a small sum may blow up for single images, the ratio of sums over
  images. config.judge: the export of a classifier of clean images that had no part in it; an image whose class it sees is, for it, of the
  shard with most images of that class (of a class that no shard has, of none), and `agreement` is the share of images for which the
  largest credit says the same. attribute.num_traced images, of the shards' classes in turn, are sampled by config.mixture, with the
  weights that the method wants and without guidance, and config.sampler, and the mean weight of their final shard over the steps is
  drawn. Writes credit.npz: names, ids, and for each kind of credit an array [n s]; and trace.npz: names, sigma [steps], weights [steps s
  n].
  """
  with reading(config, workdir) as bundle:
    mixture, names, classes = _mixture(bundle, config)
  source = config_lib.build(sources.SOURCES, config.images, split="train")
  source = records.first(source, config.attribute.num_images)
  judge = export.load_classifier(config.judge) if config.judge else None
  _check(config, mixture, source)
  workdir.open()
  mesh = parallel.make_local_mesh()
  found = _credit(config, mixture, source, mesh)
  metrics = _of_set(found, names)
  if judge is not None:
    metrics |= _agreement(
      bundle, names, found["posterior"], _seen(judge, source, config.attribute.batch_size, mesh)
    )
  if parallel.is_main_process():
    np.savez(workdir / "credit.npz", names=np.array(names), ids=source.ids, **found)
    record = _trace(config, mixture, classes)
    if record is not None:
      np.savez(workdir / "trace.npz", names=np.array(names), sigma=record.sigma, weights=record.weights)
    _report(config, workdir, names, found, source, metrics, record)
  return metrics


def _mixture(bundle: Bundle, config: Any) -> tuple[Mixture, list[str], tuple[int, ...]]:
  """(the mixture without labels, its shards, the classes that they have images of)"""
  composed = _composed(config)
  model = cdm_compose.load_mixture(bundle, composed)
  if not isinstance(model.unlabelled, Mixture):
    raise InputError(
      f"mixture.weights={composed.mixture.weights!r} is no mixture whose shards could be given credit"
    )
  return model.unlabelled, model.provenance["shards"], model.classes


def _composed(config: Any) -> Any:
  """`config` with the weights of the mixture that the method wants, and without guidance."""
  plain = config_lib.to_plain(config) | {"guidance": cdm_compose.NO_GUIDANCE}
  if config.attribute.method != "denoising":
    plain["mixture"]["weights"] = "classifier"
  return config_lib.from_plain(plain)


def _check(config: Any, mixture: Mixture, source: records.ImageSource) -> None:
  section, network = config.attribute, mixture.shards.common.network
  if section.method not in METHODS:
    raise InputError(f"unknown attribute.method={section.method!r}; there are {', '.join(METHODS)}")
  if source.image_shape != tuple(network.image_shape):
    raise InputError(
      f"the images are {list(source.image_shape)} and those of the shards {list(network.image_shape)}"
    )
  if mixture.impl == "shard_map":
    raise InputError("credit is computed with all shards on every device: mixture.impl is 'map' or 'vmap'")
  if len(source) < 2:
    raise InputError(f"credit of a set of images has an error: give at least 2 images, found {len(source)}")
  if section.num_sigmas < 2 or not 0 < section.sigma_min < section.sigma_max:
    raise InputError("attribute: at least 2 sigmas, and 0 < sigma_min < sigma_max")
  if network.num_classes and not source.labelled:
    raise InputError(
      "the shards have classes: give images with labels, or shards without (diffusion.conditional=False)"
    )


def _credit(config: Any, mixture: Mixture, source: records.ImageSource, mesh: Any) -> dict[str, np.ndarray]:
  """{kind of credit: [n s]}"""
  section = config.attribute
  sigmas = jnp.geomspace(section.sigma_min, section.sigma_max, section.num_sigmas)
  conditional = mixture.shards.common.network.num_classes > 0

  def judge(mixture, batch):
    # not the keys that images of these ids were sampled with: their noise is in the images
    x, keys = to_signed(batch["image"]), image_keys(config.seed, batch["id"], CREDIT)
    mixture = mixture.with_labels(batch["label"]) if conditional else mixture
    if section.method == "denoising":
      return {"posterior": credit.denoising_posterior(mixture, x, keys, sigmas).T}
    if section.method == "classifier":
      level = jnp.full(len(x), section.sigma_min)
      return {"posterior": mixture.weigh(x, level, None).T}
    solver = AdaptiveODESampler(section.sigma_min, section.sigma_max, rtol=1e-5, atol=1e-5)
    found = credit.PathCredit(solver, num_probes=section.num_probes)(mixture, x, keys)
    return {name: getattr(found, name).T for name in (*KINDS, PARTS)}

  compiled = jax.jit(judge)
  with ProgressReport("credit of image", len(source)) as bar:
    return pipeline.map_images(
      lambda batch: compiled(mixture, batch), source, section.batch_size, mesh, bar.update
    )


def _of_set(found: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
  """The credit of every shard for all images together, and its standard error."""
  metrics = {}
  for kind in (kind for kind in KINDS if kind in found):
    if kind == "paper":
      means, errors = credit.path_credit_of_set(jnp.asarray(found[PARTS].T))
    else:
      means, errors = credit.over_data_set(jnp.asarray(found[kind].T))
    for name, mean, error in zip(names, means, errors, strict=True):
      metrics |= {f"{kind}/{name}": float(mean), f"{kind}/{name}/error": float(error)}
  metrics |= {
    f"largest/{name}": float((found["posterior"].argmax(1) == i).mean()) for i, name in enumerate(names)
  }
  return metrics


def _seen(judge: Any, source: records.ImageSource, batch_size: int, mesh: Any) -> np.ndarray:
  """The class that the judge sees in each image."""
  look = jax.jit(lambda judge, batch: judge(to_unit(batch["image"])).argmax(1))
  return pipeline.map_images(lambda batch: look(judge, batch), source, batch_size, mesh)


def _agreement(bundle: Bundle, names: list[str], posterior: np.ndarray, seen: np.ndarray) -> dict[str, float]:
  counts = np.array([bundle.manifest["shards"][name]["class_counts"] for name in names])
  if seen.max(initial=0) >= counts.shape[1]:
    raise InputError(f"the judge sees class {seen.max()} and the shards have {counts.shape[1]} classes")
  source = np.where(counts.any(0), counts.argmax(0), -1)
  agrees = source[seen] == posterior.argmax(1)
  low, high = statistics.binomial_interval(int(agrees.sum()), len(agrees))
  return {"agreement": float(agrees.mean()), "agreement/low": low, "agreement/high": high}


def _trace(config: Any, mixture: Mixture, classes: tuple[int, ...]) -> Record | None:
  """The weights of sampled images at every step; None where none are to be sampled."""
  count = config.attribute.num_traced
  if not count:
    return None
  sampler = denoisers.build_sampler(config.sampler, mixture.shards.common.preconditioning)
  if mixture.shards.common.network.num_classes:
    mixture = mixture.with_labels(jnp.asarray(classes)[jnp.arange(count) % len(classes)])
  recorded = Recorded(mixture)
  keys = image_keys(config.seed, jnp.arange(count))

  def run(recorded, keys):
    noise = initial_noise(keys, mixture.shards.common.network.image_shape)
    return sampler(recorded, noise, keys, state=recorded.start(count, sampler.num_steps))[1]

  return jax.tree.map(np.asarray, jax.jit(run)(recorded, keys))


def _report(
  config: Any,
  workdir: Workdir,
  names: list[str],
  found: dict[str, np.ndarray],
  source: records.ImageSource,
  metrics: dict[str, float],
  record: Record | None,
) -> None:
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  groups = {name: {kind: metrics[f"{kind}/{name}"] for kind in KINDS if kind in found} for name in names}
  report.bars(groups, folder / "credit.png", ylabel="mean credit")
  order = [np.argsort(-column)[: config.report.num_images] for column in found["posterior"].T]
  report.image_grid(
    np.concatenate([source.take(np.sort(rows))["image"] for rows in order]),
    folder / "most_of_each.png",
    columns=len(order[0]),
  )
  figures = [
    (folder / "credit.png", "Mean credit of each shard"),
    (folder / "most_of_each.png", "Images that owe most to each shard, a row for each: " + ", ".join(names)),
  ]
  if record is not None:
    last = record.weights[-1].argmax(0)  # the shard that an image ends with
    sigma, weight = record.sigma, record.weights[:, last, np.arange(len(last))].mean(1)
    report.accuracy_curves(
      {"weight of the shard an image ends with": (sigma.tolist(), weight.tolist())},
      folder / "weights.png",
      xlabel="noise level",
      ylabel="mean weight",
      log=True,
      chance=1 / len(names),
    )
    figures.append((folder / "weights.png", "Weights over the time of sampling, from right to left"))
  report.html_report(
    folder / "report.html",
    title="Credit of the shards",
    summary=f"{len(source):,} images, method {config.attribute.method}.",
    metrics=metrics,
    figures=figures,
    tables=[],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
