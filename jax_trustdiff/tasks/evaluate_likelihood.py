"""Bits per dimension of images under a diffusion model, by the probability-flow ODE, with the hardest and easiest images.

Song et al. 2021 (arXiv:2011.13456, section 4.3): uint8 images are dequantised uniformly, so the mean is an upper bound of
the code length.
"""

import functools
import zlib
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.diffusion.likelihood import LIKELIHOODS, ODELikelihood, dequantise
from jax_trustdiff.diffusion.samplers import SAMPLERS
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.tasks import denoisers, reports
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

SOLVERS = ("adaptive_ode", "edm")


def run(config, workdir: Workdir) -> dict[str, float]:
  """bits_per_dim, its 95 % interval over the images, nats (log_prob of the dequantised image) and nfe, all means.

  workdir/likelihoods.npz has the numbers of every image: id, bits_per_dim, log_prob and nfe. The noise of an image depends
  on the seed and its id alone; eval.repeats draws are averaged.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  denoise, _ = denoisers.load_or_make(config)
  source = config_lib.build(sources.SOURCES, config.data, split=config.eval.split)
  if config.eval.num_images:
    source = records.limit(source, config.eval.num_images)
  likelihood = build_likelihood(config, denoise)
  _check(config, denoise, source, mesh)
  reports.check(config)

  workdir.open()
  found = evaluate(denoise, source, likelihood, mesh, config.seed, config.eval.batch_size, config.eval.repeats)
  bits = found["bits_per_dim"].mean(0)
  mean, half_width = statistics.mean_interval(bits.tolist())
  metrics = {
    "bits_per_dim": mean,
    "bits_per_dim/interval": half_width,
    "log_prob": float(found["log_prob"].mean()),
  }
  metrics |= {"nfe": float(found["nfe"].mean()), "num_images": len(source), "repeats": config.eval.repeats}
  if parallel.is_main_process():
    np.savez(workdir / "likelihoods.npz", id=source.ids, **found)
    _report(config, workdir, source, bits, metrics)
  return metrics


def build_likelihood(config, denoise) -> ODELikelihood:
  """The likelihood of its section, with the solver of config.solver within the denoiser's range of sigma."""
  if config.solver.name not in SOLVERS:
    raise InputError(f"solver.name must be one of {', '.join(SOLVERS)}, found {config.solver.name!r}")
  config_lib.build(SAMPLERS, config.solver)  # raises for what it does not take, before the range is cut
  solver = denoisers.build_sampler(config.solver, denoise.preconditioning)
  return config_lib.build(LIKELIHOODS, config.likelihood, solver=solver)


def _check(config, denoise, source: sources.ImageSource, mesh) -> None:
  network = denoise.network
  if source.image_shape != network.image_shape:
    raise InputError(f"the images are {source.image_shape} and those of the model {network.image_shape}")
  if network.num_classes:
    records.check_labelled(source)
  if network.num_classes and source.num_classes != network.num_classes:
    raise InputError(f"the images have {source.num_classes} classes and the model {network.num_classes}")
  if len(source) < 2 or config.eval.repeats < 1:
    raise InputError(f"needs at least 2 images and 1 repeat, found {len(source)} and {config.eval.repeats}")
  parallel.check_batch(config.eval.batch_size, mesh)


def evaluate(
  denoise: Any,
  source: sources.ImageSource,
  likelihood: ODELikelihood,
  mesh: Any,
  seed: int,
  batch_size: int,
  repeats: int = 1,
  what: str = "image",
) -> dict[str, np.ndarray]:
  """log_prob, bits_per_dim and nfe of every image, dequantised anew in every repeat: [repeats n].

  denoise: a denoiser whose `with_labels` takes the classes of the source.
  """
  root = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"likelihood"))

  denoise = parallel.replicate_to_devices(mesh, denoise)
  of_repeats = []
  with ProgressReport(what, repeats * len(source)) as progress:
    for repeat in range(repeats):
      parts = []
      for batch in pipeline.eval_batches(source, batch_size, mesh):
        key = jax.random.fold_in(root, repeat)
        found, mask = parallel.gather_to_host((_judge(likelihood, denoise, batch, key), batch["mask"]))
        parts.append({name: values[mask] for name, values in found.items()})
        progress.update(repeat * len(source) + sum(len(part["nfe"]) for part in parts))
      of_repeats.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
  return {name: np.stack([part[name] for part in of_repeats]) for name in of_repeats[0]}


@functools.partial(jax.jit, static_argnums=0)  # of the module: compiled once for all models of one structure
def _judge(likelihood, denoise, batch, key):
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["id"])
  found = likelihood(denoise.with_labels(batch["label"]), dequantise(batch["image"], keys), keys)
  return {name: getattr(found, name) for name in ("log_prob", "bits_per_dim", "nfe")}


def _report(config, workdir: Workdir, source, bits: np.ndarray, metrics) -> None:
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  order = np.argsort(bits)
  count = min(config.report.num_images, len(order))
  figures = []
  for name, chosen in (("most_likely", order[:count]), ("least_likely", order[::-1][:count])):
    report.image_grid(source.take(chosen)["image"], folder / f"{name}.png")
    low, high = bits[chosen].min(), bits[chosen].max()
    figures.append((folder / f"{name}.png", f"{name.replace('_', ' ')}: {low:.2f} to {high:.2f} bits/dim"))
  report.html_report(
    folder / "report.html",
    title="Likelihood by the probability-flow ODE",
    summary=(
      f"{metrics['bits_per_dim']:.3f} bits/dim on {len(bits):,} images (an upper bound: uniform dequantisation), "
      f"{metrics['nfe']:.0f} evaluations an image."
    ),
    metrics=metrics,
    figures=figures,
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
