"""Copy protection: images of the product of the shards, and estimates of how far its distribution is from that of each.

Vyas et al. 2023 (arXiv:2302.10870, algorithm 3): a work that is in the data of one shard alone is no likelier under the product
prod_i q_i^(1/S) / Z than the k of `cdm.product` allows, against the shards that never saw it. For networks, k and the divergences are
estimates, by log-densities of samples along the probability-flow ODE; they bound nothing.

Shards have no classes here: those of images would want a product, and a k, for each class.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.cdm import product
from jax_trustdiff.data import records, sources
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks import cdm_compose, denoisers, evaluate_likelihood, generate
from jax_trustdiff.tasks.bundles import Bundle, reading
from jax_trustdiff.tasks.sampling import ImageSampler
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

FEW = 10  # effective samples

reads = cdm_compose.reads


def run(config, workdir: Workdir) -> dict[str, float]:
  """`cdm_compose` with weights 'equal' and sampler 'product', and what protect.num_images of its images say.

  As many are sampled from the first shard by config.own_sampler. Beside the metrics of `generate.fill_store`, in nats: estimated_k and
  its standard error k_error, which count for something if effective_samples, of the images of the first shard, are not few;
  estimated_k_low and estimated_k_high, which then are all that is known (`product.kl_limits`); estimated_kl/<shard> of the product from
  each shard, by estimated_k. protect.npz: log_densities_of_product and log_densities_of_first, [s n].
  """
  with reading(config, workdir) as bundle:
    model = cdm_compose.load_mixture(bundle, config)
  shards, names = model.unlabelled.shards, model.provenance["shards"]
  _check(config, bundle, names)
  own_sampler = denoisers.build_sampler(config.own_sampler, model.preconditioning)
  mesh = parallel.make_local_mesh()
  own = ImageSampler(own_sampler, model.network.image_shape, mesh, config.protect.batch_size, config.seed)
  members = [shards.member(slot) for slot in range(len(names))]
  likelihood = evaluate_likelihood.build_likelihood(config, members[0])

  metrics = generate.fill_store(config, workdir, model)
  found = {}
  for what, images in (
    ("product", _of_product(config, workdir)),
    ("first", _of_first(config, own, members[0])),
  ):
    found[f"log_densities_of_{what}"] = np.stack(
      [
        evaluate_likelihood.evaluate(
          member,
          images,
          likelihood,
          mesh,
          config.seed,
          config.protect.batch_size,
          what=f"image of the {what} under {name}",
        )["log_prob"][0]
        for name, member in zip(names, members, strict=True)
      ]
    )
  of_first, of_product = (jnp.asarray(found[f"log_densities_of_{what}"]) for what in ("first", "product"))
  k, error = map(float, product.kl_bound(of_first))
  low, high = map(float, product.kl_limits(of_first, of_product))
  effective = float(product.effective_samples(of_first))
  if effective < FEW:
    say(
      f"k is not estimated by {effective:.1f} effective samples: it lies between {low:.1f} and {high:.1f} nats"
    )
  divergences = np.asarray(product.divergences(of_product.mean(0) + k / len(names), of_product))
  metrics |= {"estimated_k": k, "k_error": error, "effective_samples": effective}
  metrics |= {"estimated_k_low": low, "estimated_k_high": high}
  metrics |= {f"estimated_kl/{name}": float(kl) for name, kl in zip(names, divergences, strict=True)}
  if parallel.is_main_process():
    np.savez(workdir / "protect.npz", names=np.array(names), **found)
    _report(config, workdir, names, metrics)
  return metrics


def _check(config: Any, bundle: Bundle, names: list[str]) -> None:
  if config.mixture.weights != "equal" or config.sampler.name != "product":
    raise InputError("cdm_protect samples a product: mixture.weights='equal' and sampler.name='product'")
  if len(names) < 2:
    raise InputError(f"a product is one of several shards, and there is {names}")
  if config.mixture.top_k:
    raise InputError("mixture.top_k leaves shards out: the product is one of all")
  if bundle.training.diffusion.conditional:
    raise InputError(
      "cdm_protect is for shards without classes (diffusion.conditional=False): with them every class has a product of its own"
    )
  if config.guidance.scale != 1:
    raise InputError("guidance.scale must be 1: a guided model has no density to compare with")
  section = config.protect
  if not 2 <= section.num_images <= config.generate.num_images:
    raise InputError(
      f"protect.num_images={section.num_images} lies outside 2 .. generate.num_images={config.generate.num_images}"
    )
  if config.generate.num_workers > 1 or config.generate.first_id:
    raise InputError("cdm_protect makes its images alone: generate.num_workers=1, first_id=0")


def _of_product(config: Any, workdir: Workdir) -> sources.ImageSource:
  store = sources.image_store(config.generate.store or str(workdir / "images"))
  return records.first(store, config.protect.num_images)


def _of_first(config: Any, sample: ImageSampler, member: Any) -> sources.ImageSource:
  """Images of the first shard alone."""
  ids = np.arange(config.protect.num_images)
  images = sample(member, ids, what="image of the first shard")
  return records.image_source([images], [np.zeros(len(ids), np.int32)], "samples of the first shard", 1)


def _report(config: Any, workdir: Workdir, names: list[str], metrics: dict[str, float]) -> None:
  folder = workdir / "report"
  groups = {name: {"KL of the product from it": metrics[f"estimated_kl/{name}"]} for name in names}
  groups["bound k"] = {"KL of the product from it": metrics["estimated_k"]}
  report.bars(groups, folder / "divergences.png", ylabel="nats (estimates)", percent=False)
  report.html_report(
    folder / "protection.html",
    title="The product of the shards",
    summary=(
      f"Estimated k between {metrics['estimated_k_low']:.1f} and {metrics['estimated_k_high']:.1f} nats; by "
      f"{metrics['effective_samples']:.1f} effective samples {metrics['estimated_k']:.1f} ± {metrics['k_error']:.1f}"
      f"{', which are too few' if metrics['effective_samples'] < FEW else ''}. Estimates: no bound is proved by them."
    ),
    metrics=metrics,
    figures=[(folder / "divergences.png", "How far the product is from each shard")],
    tables=[],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
