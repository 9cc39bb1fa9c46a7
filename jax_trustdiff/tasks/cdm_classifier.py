"""The classifier of shards of a compartmentalized model: which shard has an image with noise come from.

Golatkar et al. 2024 (arXiv:2308.01937, section 3). It is trained on the images of all shards, so it belongs to none: the manifest says what
it was made of, and when one of these is forgotten it is deleted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import weights
from jax_trustdiff.data import records
from jax_trustdiff.models.uvit import UViT
from jax_trustdiff.tasks import denoisers, image_training, noise_classifiers, train_noise_classifier
from jax_trustdiff.tasks.bundles import Bundle, file_digests, folder_of
from jax_trustdiff.training.workdir import Workdir, locked
from jax_trustdiff.types import InputError, Variables

NAME = "classifier"


def leaves(config) -> str | None:
  """The classifier that is there and the shards as they are; None without one."""
  bundle = Bundle(config.cdm.path)
  about = bundle.active_artefacts().get(NAME)
  return about and manifest_lib.digest([about, bundle.parameters])


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains the classifier of the bundle config.cdm.path in the bundle, and returns the metrics of `train_noise_classifier.fit`.

  Its classes are the shards or, where their networks are conditional, shards with classes: from these w_t(x, i | c) follows. Of
  model.name=uvit_head it is a head on the middle features of the bundle's backbone.
  """
  path = folder_of(config, workdir)
  with locked(path):
    bundle = Bundle(path)
    names = bundle.names
    source = _images(bundle, names)
    train, validation = records.split_validation(
      source, config.train.num_validation, config.train.validation_split
    )
    data = image_training.Data(train, validation)
    backbone = _backbone(bundle, config) if config.model.name == "uvit_head" else None
    made_of = bundle.parameters
    version = len(bundle.manifest["deletions"])
    folder = f"artefacts/{NAME}-{version}-{manifest_lib.digest([made_of, config_lib.to_plain(config)])[:12]}"
    workdir.open()
    inner = Workdir(path / folder, config)
    metrics = inner.complete(lambda: train_noise_classifier.fit(config, inner, data, backbone))
    inner.close()
    counts = np.bincount(train.labels, minlength=source.num_classes).reshape(len(names), -1)
    bundle.manifest["artefacts"][NAME] = {
      "status": manifest_lib.ACTIVE,
      "folder": folder,
      "depends_on": names,
      "made_of": made_of,
      "counts": counts.tolist(),
      "files": file_digests(path / folder),
    }
    bundle.save()
  return metrics


def load(bundle: Bundle, names: list[str]) -> weights.ByClassifier:
  """The weights by the bundle's classifier, of these shards in this order; InputError if there is none that knows them."""
  about = bundle.manifest["artefacts"].get(NAME)
  if about is None or about["status"] != manifest_lib.ACTIVE:
    state = "has none" if about is None else "has one that had seen what was forgotten"
    raise InputError(
      f"{bundle.path} {state}: train a classifier of shards with configs/cdm_classifier.py, or take mixture.weights=along_path"
    )
  for name in names:
    if about["made_of"].get(name) != bundle.manifest["shards"][name]["parameters"]:
      raise InputError(
        f"the classifier of shards does not know {name!r} as it is: train it anew with configs/cdm_classifier.py"
      )
  counts = np.array(about["counts"], float)
  slots = [about["depends_on"].index(name) for name in names]
  with np.errstate(divide="ignore"):
    prior = np.log(counts / counts.sum())[slots]
  columns = np.arange(counts.size).reshape(counts.shape)[slots].ravel()
  classifier = noise_classifiers.load_noise_classifier(bundle.path / about["folder"] / "export")
  prior = prior if counts.shape[1] > 1 else prior[:, 0]
  return weights.ByClassifier(
    weights.Columns(classifier, jnp.asarray(columns)), jnp.asarray(prior, jnp.float32)
  )


def _backbone(bundle: Bundle, config) -> tuple[UViT, Variables]:
  """The network that all shards start from or adapt, without prompts; InputError where its features are not to be had."""
  training, origin = bundle.training, bundle.manifest["origins"][0]
  if bundle.backbone is None or training.model.name != "uvit":
    raise InputError(
      f"model.name=uvit_head stands on the U-ViT that shards start from or adapt, and {bundle.path} has none: "
      "model.name=noise_classifier is a network of its own"
    )
  theirs, ours = (
    denoisers.build_preconditioning(one.diffusion.preconditioning) for one in (training, config)
  )
  if theirs != ours:
    raise InputError(f"the backbone was trained with {theirs}, and diffusion.preconditioning is {ours}")
  classes = origin["num_classes"] if training.diffusion.conditional else 0
  network = denoisers.build_network(training.model, tuple(origin["image_shape"]), classes)
  plain = dataclasses.replace(network, prompt_length=0, prompts_per_class=False, label_dropout=0.0)
  found = bundle.plain_backbone()["params"]
  wanted = jax.eval_shape(plain.init, jax.random.key(0))["params"]
  if missing := sorted(wanted.keys() - found.keys()):
    raise InputError(
      f"the backbone of {bundle.path} has no {missing[0]!r}, which shards have each of their own: it has no features without them"
    )
  return plain, {"params": {name: found[name] for name in wanted}}


def _images(bundle: Bundle, names: list[str]) -> records.ImageSource:
  """The images of all shards, labelled by shard or by shard and class."""
  if len(names) < 2:
    raise InputError(f"{bundle.path} has {len(names)} shards: there is nothing to tell apart")
  conditional = bundle.training.diffusion.conditional
  num_classes = bundle.manifest["origins"][0]["num_classes"] if conditional else 1
  images, labels = [], []
  for slot, name in enumerate(names):
    source = bundle.source(name)
    batch = source.take(np.arange(len(source)))
    images.append(batch["image"])
    labels.append(
      slot * num_classes + (batch["label"] if conditional else np.zeros(len(batch["label"]), np.int32))
    )
  of_classes = bundle.manifest["origins"][0]["class_names"]
  class_names = [f"{name}/{label}" for name in names for label in of_classes] if conditional else names
  return records.image_source(images, labels, str(bundle.path), len(names) * num_classes, class_names)
