"""Centroids of each shard's images in a space of features, by which a mixture weighs its shards without a network that saw them all.

Golatkar et al. 2024 (arXiv:2308.01937, section 3: the distance to each shard by CLIP features). The centroids of a shard are made of that
shard alone; when some of it is forgotten they are deleted, and those of the others stay.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import weights
from jax_trustdiff.evaluation import report
from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.tasks import generation_metrics, store_writing
from jax_trustdiff.tasks.bundles import Bundle, file_digests, folder_of, names_of
from jax_trustdiff.tasks.sampling import quantise
from jax_trustdiff.training.workdir import Workdir, locked
from jax_trustdiff.types import InputError, Signed

FILE = "centroids.safetensors"


def leaves(config) -> str | None:
  """The centroids that are there of the shards that are asked for, and these as they are; None where some are missing."""
  bundle = Bundle(config.cdm.path)
  there = bundle.active_artefacts()
  names = names_of(config.cdm.only) or bundle.names
  if any(key_of(name) not in there for name in names):
    return None
  return manifest_lib.digest([[there[key_of(name)], bundle.parameters.get(name)] for name in names])


def run(config, workdir: Workdir) -> dict[str, float]:
  """Finds config.centroids.per_shard centroids by k-means for the shards config.cdm.only ('': all) of the bundle config.cdm.path.

  They become artefacts of the bundle, one for each shard. Features are those of config.metrics (`generation_metrics`). Returns for
  every shard, where there are several, the share of its images whose nearest centroid is one of its own.
  """
  path = folder_of(config, workdir)
  with locked(path):
    bundle = Bundle(path)
    names = names_of(config.cdm.only) or bundle.names
    bundle.check_names(names)
    network, feature_fn = config_lib.build(generation_metrics.FEATURES, config.metrics.features)
    mesh = parallel.make_local_mesh()
    extractor = generation_metrics.FeatureExtractor(network, feature_fn, config.metrics.batch_size, mesh)
    of_features = store_writing.fingerprint(network, feature_fn)
    per_shard = config.centroids.per_shard
    for name in names:
      if not 1 <= per_shard <= bundle.manifest["shards"][name]["num_images"]:
        raise InputError(
          f"centroids.per_shard={per_shard}: shard {name} has {bundle.manifest['shards'][name]['num_images']} images"
        )
    workdir.open()
    sources = {name: bundle.source(name) for name in names}
    features = {name: extractor(source, f"image of {name}").features for name, source in sources.items()}
    for name, one in features.items():
      if not one.any(1).all():
        raise InputError(
          f"an image of shard {name} has features that are all 0, and so no direction: take other features"
        )
    found = {name: _centroids(one, per_shard, config) for name, one in features.items()}
    for name, centroids in found.items():
      _store(bundle, name, centroids, config, of_features)
    bundle.save()
  metrics = {"num_centroids": sum(map(len, found.values()))}
  if len(names) > 1:
    directions = {name: _unit(one) for name, one in found.items()}
    metrics |= {f"own/{name}": _own(_unit(features[name]), name, directions) for name in names}
  _report(config, workdir, sources, features, found, metrics)
  return metrics


def load(bundle: Bundle, names: list[str], section: Any) -> weights.Nearest:
  """The weights by the centroids of these shards in this order; InputError if some have none, or they do not go together.

  section: what `weights.Nearest` takes but for features, centroids and normalise, which are as the centroids were made.
  """
  abouts = [bundle.manifest["artefacts"].get(key_of(name)) for name in names]
  for name, about in zip(names, abouts, strict=True):
    now = bundle.manifest["shards"][name]["parameters"]
    if about is None or about["status"] != manifest_lib.ACTIVE or about["made_of"][name] != now:
      raise InputError(
        f"{bundle.path} has no centroids of shard {name!r} as it is: find them with configs/cdm_centroids.py"
      )
  found = [safetensors_io.load(bundle.path / about["folder"] / FILE)["centroids"] for about in abouts]
  first = abouts[0]
  if any(one.shape != found[0].shape for one in found) or any(
    (about["fingerprint"], about["normalise"]) != (first["fingerprint"], first["normalise"]) for about in abouts
  ):
    raise InputError(
      f"{bundle.path}: the centroids of {', '.join(names)} are of different features or numbers: find all with one run"
    )
  network, feature_fn = config_lib.build(generation_metrics.FEATURES, first["features"])
  if store_writing.fingerprint(network, feature_fn) != first["fingerprint"]:
    raise InputError(f"the weights of the features {network!r} are others than those of the centroids of {bundle.path}")
  centroids = jnp.asarray(np.stack(found))
  return weights.Nearest(FeaturesOfSigned(feature_fn), centroids, normalise=first["normalise"], **section)


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesOfSigned:
  """Features of images in about [-1, 1], which are made bytes of as generated images are."""

  of_bytes: Any  # uint8 [b h w c] -> [b f]; a pytree

  def __call__(self, x: Signed) -> Float[Array, "b f"]:
    return self.of_bytes(quantise(x))


def key_of(name: str) -> str:
  """The artefact with the centroids of a shard."""
  return f"centroids/{name}"


def _centroids(features: np.ndarray, count: int, config: Any) -> Float[np.ndarray, "k f"]:
  from sklearn.cluster import KMeans

  if config.centroids.normalise:
    features = _unit(features)
  return KMeans(count, random_state=config.seed, n_init=4).fit(features).cluster_centers_.astype(np.float32)


def _unit(features: np.ndarray) -> np.ndarray:
  return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _own(features: np.ndarray, name: str, found: dict[str, np.ndarray]) -> float:
  """The share of images whose nearest centroid is one of the shard's own; both as directions."""
  nearest = {one: (features @ centroids.T).max(1) for one, centroids in found.items()}
  others = np.max([values for one, values in nearest.items() if one != name], axis=0)
  return float((nearest[name] > others).mean())


def _store(bundle: Bundle, name: str, centroids: np.ndarray, config: Any, of_features: str) -> None:
  parameters = bundle.manifest["shards"][name]["parameters"]
  version = manifest_lib.digest([parameters, of_features, config_lib.to_plain(config)])[:12]
  folder = f"artefacts/centroids-{name}-{len(bundle.manifest['deletions'])}-{version}"
  (bundle.path / folder).mkdir(parents=True, exist_ok=True)
  safetensors_io.save(bundle.path / folder / FILE, {"centroids": centroids})
  bundle.manifest["artefacts"][key_of(name)] = {
    "status": manifest_lib.ACTIVE,
    "folder": folder,
    "depends_on": [name],
    "made_of": {name: parameters},
    "features": config_lib.to_plain(config.metrics.features),
    "fingerprint": of_features,
    "normalise": config.centroids.normalise,
    "files": file_digests(bundle.path / folder),
  }


def _report(config, workdir: Workdir, sources, features, found, metrics) -> None:
  if not parallel.is_main_process():
    return
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  pictures = []
  for name, source in sources.items():
    likeness = _unit(features[name]) @ _unit(found[name]).T
    pictures.append(source.take(likeness.argmax(0))["image"])
  report.image_grid(np.concatenate(pictures), folder / "nearest.png", columns=len(pictures[0]))
  rows = [
    [name, str(len(source)), f"{metrics.get(f'own/{name}', 1):.1%}"] for name, source in sources.items()
  ]
  report.html_report(
    folder / "report.html",
    title="Centroids of the shards",
    summary=f"{config.centroids.per_shard} for each shard, in the features {config.metrics.features.name}.",
    metrics=metrics,
    figures=[
      (
        folder / "nearest.png",
        "The image nearest to each centroid, a row for each shard: " + ", ".join(sources),
      )
    ],
    tables=[("Shards", ["shard", "images", "nearest to one of its own"], rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
