"""Classifiers of noisy images from configs and from files, and the guidance of a diffusion model by one."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from jax_trustdiff import config as config_lib
from jax_trustdiff.data import sources
from jax_trustdiff.data.records import agreed_names
from jax_trustdiff.diffusion.denoisers import PRECONDITIONINGS
from jax_trustdiff.diffusion.guidance import NoisyClassifier
from jax_trustdiff.interop import export
from jax_trustdiff.interop.network_weights import about as naming
from jax_trustdiff.models.registry import NETWORKS, NOISE_CLASSIFIERS
from jax_trustdiff.models.uvit import UViT
from jax_trustdiff.models.uvit_head import UViTHead
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.types import DiffusionNetwork, InputError, NoiseConditionalClassifier, Variables

KEY = "preconditioning"  # in model.json: what the network sees and is told


def build_network(
  section: denoisers.Section, source: sources.ImageSource, backbone: UViT | None = None
) -> NoiseConditionalClassifier:
  """The network of a section of NOISE_CLASSIFIERS for the images and classes of `source`, on a backbone if one is given."""
  wired: dict[str, Any] = dict(num_classes=source.num_classes, image_shape=source.image_shape)
  if backbone is not None:
    wired["backbone"] = backbone
  return config_lib.build(NOISE_CLASSIFIERS, section, **wired)


def model_section(section: denoisers.Section, network: NoiseConditionalClassifier) -> dict[str, Any]:
  """A section of NOISE_CLASSIFIERS completed with what the data decided: what an export stores and is built from."""
  wired = {"num_classes": network.num_classes, "image_shape": network.image_shape}
  if isinstance(network, UViTHead):
    wired["backbone"] = dataclasses.asdict(network.backbone)
  return config_lib.to_plain(section) | wired


def accuracy_at(sigma: float) -> str:
  """The name of the metric: the accuracy on images with noise of this standard deviation."""
  return f"sigma_{sigma:g}_accuracy"


def save_noise_classifier(
  directory: str | os.PathLike,
  model: denoisers.Section,
  preconditioning: denoisers.Section,
  variables: Variables,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes the export of a classifier of noisy images: model.safetensors and model.json, each whole or not at all.

  model: complete (`model_section`). preconditioning: a section of PRECONDITIONINGS; its infinite values are left
  out. extra: JSON kept beside it, such as 'class_names' and 'metrics'.
  """
  stored = denoisers.storable(preconditioning)
  export.save_export(directory, config_lib.to_plain(model), variables, {KEY: stored} | dict(extra or {}))


def load_noise_classifier(directory: str | os.PathLike) -> NoisyClassifier:
  """The classifier (x, sigma) -> logits of an export, its variables on the default device; a callable pytree.

  InputError, in one line, if there is nothing to read or it is another kind of network.
  """
  return load_described(directory)[0]


def load_described(directory: str | os.PathLike) -> tuple[NoisyClassifier, dict[str, Any]]:
  """`load_noise_classifier` and everything in model.json; 'class_names' is always there, () where there are none."""
  model = export.read_description(directory)["model"]
  if model.get("name") in NETWORKS and model["name"] not in NOISE_CLASSIFIERS:
    raise InputError(
      f"{directory} holds another network ({model['name']}), no classifier of noisy images: train one with "
      "configs/noise_classifier.py"
    )
  network, variables, meta = export.load_export(directory)
  section = meta.get(KEY)
  if not isinstance(section, dict) or not isinstance(section.get("name"), str):
    known = ", ".join(PRECONDITIONINGS)
    raise InputError(f"{directory}: {export.DESCRIPTION} needs '{KEY}': {{'name': one of {known}, ...}}")
  with naming(directory):
    preconditioning = denoisers.build_preconditioning(section)
  variables = jax.tree.map(jax.numpy.asarray, variables)
  return NoisyClassifier(network, variables, preconditioning), {"class_names": ()} | meta


def load_to_guide(
  directory: str | os.PathLike, network: DiffusionNetwork, class_names: tuple[str, ...]
) -> tuple[NoisyClassifier, dict[str, Any]]:
  """`load_described` of a classifier that is to guide a model; InputError if their images or classes differ.

  Not looked at: whether it was trained at all the noise levels at which it is to guide.
  class_names: of the model, () where they are not known. 'class_names' are then those of the model, where it has classes and
  they are known, or else those of the classifier.
  """
  classifier, about = load_described(directory)
  its, names = classifier.network, tuple(about["class_names"] or ())
  if its.image_shape != network.image_shape:
    raise InputError(
      f"{directory} classifies images of {its.image_shape}, and those of the model are {network.image_shape}"
    )
  if not network.num_classes:
    return classifier, about | {"class_names": names}
  if its.num_classes != network.num_classes:
    raise InputError(f"{directory} knows {its.num_classes} classes, and the model has {network.num_classes}")
  return classifier, about | {"class_names": agreed_names(names, class_names, str(directory), "the model")}
