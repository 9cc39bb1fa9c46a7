"""Diffusion models from configs and from files: networks, preconditionings, denoisers, and the exports that hold them."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm.product import ProductSampler
from jax_trustdiff.diffusion import samplers
from jax_trustdiff.diffusion.denoisers import PRECONDITIONINGS, Denoiser, Preconditioning
from jax_trustdiff.interop import edm_names, edm_snapshot, export, network_weights
from jax_trustdiff.models.registry import DIFFUSION_NETWORKS
from jax_trustdiff.types import DiffusionNetwork, InputError, Variables, WatermarkCodec

# a part of a config, or a dict: 'name' and the keyword arguments of what it builds
Section = Mapping[str, Any] | config_lib.ConfigDict
SNAPSHOT = ".pkl"
UNTRAINED = "untrained"  # init_from of a fresh network, for trying the machinery


def build_network(
  section: Section, image_shape: tuple[int, int, int], num_classes: int, num_augment_labels: int = 0
) -> DiffusionNetwork:
  """The network F of a section of DIFFUSION_NETWORKS, for images [h w c] and labels of these widths (0: none).

  InputError for an unknown name or argument, and for a network that cannot have such labels.
  """
  wired = dict(image_shape=tuple(image_shape), num_classes=num_classes)
  if section["name"] != "uvit":
    return config_lib.build(DIFFUSION_NETWORKS, section, **wired, num_augment_labels=num_augment_labels)
  if num_augment_labels:
    raise InputError("model 'uvit' takes no augmentation labels: switch the augmentation off")
  return config_lib.build(DIFFUSION_NETWORKS, section, **wired)


def build_preconditioning(section: Section) -> Preconditioning:
  """The preconditioning of a section of PRECONDITIONINGS."""
  return config_lib.build(PRECONDITIONINGS, section)


SAMPLERS = samplers.SAMPLERS | {"product": ProductSampler}


def build_sampler(section: Section, preconditioning: Preconditioning) -> Any:
  """The sampler of a section of SAMPLERS, at noise levels that a denoiser with this preconditioning knows.

  Its range of sigma is cut to that of the preconditioning, and where that knows whole times only, noise levels are
  rounded to them (Karras et al. 2022, released code). InputError for a sampler of a process that leaves the range, that
  cannot round, or that would round to other levels.
  """
  whole_times = getattr(preconditioning, "whole_times", False)
  if whole_times and section.get("discretization") == "table" and not section.get("round_to"):
    section = config_lib.to_plain(section) | {"round_to": preconditioning.process}
  sampler = config_lib.build(SAMPLERS, section)
  fields, changes = {field.name for field in dataclasses.fields(sampler)}, {}
  if {"sigma_min", "sigma_max"} <= fields:
    changes["sigma_min"] = max(sampler.sigma_min, float(preconditioning.sigma_min))
    changes["sigma_max"] = min(sampler.sigma_max, float(preconditioning.sigma_max))
  if whole_times:
    if "round_to" not in fields:
      raise InputError(
        f"the model knows whole times only, to which sampler {section['name']!r} cannot round; continuous_times=True, "
        "or whole_times=False of the preconditioning, tells it times in between"
      )
    if sampler.round_to and sampler.round_to != preconditioning.process:
      raise InputError(
        f"sampler.round_to is {sampler.round_to}, and the model knows {preconditioning.process}"
      )
    changes["round_to"] = preconditioning.process
  if "process" in fields:
    check_levels(sampler, preconditioning, "the model", "choose sampler.process to fit")
  return dataclasses.replace(sampler, **changes)


def check_levels(sampler: Any, preconditioning: Preconditioning, whose: str, advice: str) -> None:
  """InputError if `sampler` visits noise levels outside the range of `preconditioning`; the words are for its message."""
  visited = getattr(sampler, "process", sampler)
  low, high = preconditioning.sigma_min, preconditioning.sigma_max
  if visited.sigma_min < low * (1 - 1e-3) or visited.sigma_max > high * (1 + 1e-3):
    raise InputError(
      f"the sampler visits sigma {visited.sigma_min:.4g} to {visited.sigma_max:.4g}, and {whose} "
      f"knows {low:.4g} to {high:.4g}: {advice}"
    )


def model_section(section: Section, network: DiffusionNetwork) -> dict[str, Any]:
  """A section of DIFFUSION_NETWORKS completed with what the data decided: what an export stores and is built from."""
  wired = ("image_shape", "num_classes", "num_augment_labels")[: 2 if section["name"] == "uvit" else 3]
  return config_lib.to_plain(section) | {name: getattr(network, name) for name in wired}


def save_denoiser(
  directory: str | os.PathLike,
  model: Section,
  denoiser: Section,
  variables: Variables,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes the export of a diffusion model: model.safetensors and model.json, each whole or not at all.

  model: complete (`model_section`). denoiser: a section of PRECONDITIONINGS; its infinite values are left out, since JSON
  has none. extra: JSON kept beside it, such as 'class_names', 'sampler' and 'metrics'.
  """
  about = {"denoiser": storable(denoiser)} | (extra or {})
  export.save_export(directory, config_lib.to_plain(model), variables, about)


def storable(preconditioning: Section) -> dict[str, Any]:
  """A section of PRECONDITIONINGS without its infinite values, which JSON has not; InputError if they are no defaults."""
  section = config_lib.to_plain(preconditioning)
  stored = {key: value for key, value in section.items() if value != float("inf")}
  if build_preconditioning(stored) != build_preconditioning(section):
    raise InputError(f"the preconditioning {section} cannot be stored: it holds infinite values")
  return stored


def load_denoiser(path: str | os.PathLike) -> Denoiser:
  """The denoiser D(x; sigma) of an export folder or of an EDM snapshot (.pkl), its variables on the default device.

  Without labels: `dataclasses.replace(denoiser, class_labels=...)` makes a conditional one. It computes in the dtype of
  the export, or in float32 for a snapshot. Nothing in a snapshot is executed. InputError, in one line, if there is
  nothing to read or it is no diffusion model.
  """
  path = pathlib.Path(path)
  if path.suffix == SNAPSHOT and not path.is_dir():
    snapshot = edm_snapshot.read_snapshot(path)
    with network_weights.about(path):
      preconditioning = build_preconditioning(snapshot.denoiser_section)
      _check_levels(preconditioning, snapshot.state_dict)
      network, variables = snapshot.network, snapshot.variables
  else:
    network, variables, meta = export.load_export(path)
    with network_weights.about(path):
      preconditioning = build_preconditioning(_denoiser_section(network, meta))
  return Denoiser(network, preconditioning, jax.tree.map(jax.numpy.asarray, variables))


def load_or_make(config) -> tuple[Denoiser, dict[str, Any]]:
  """(denoiser, what is known of it) of config.init_from, or with 'untrained' a fresh network of config.untrained.

  The second has 'model', 'denoiser' and 'class_names' (() where there are none). With config.continuous_times a network
  that knows whole times only is told times in between as well. InputError without init_from.
  """
  denoiser, known = _load_or_make(config)
  if config.continuous_times and getattr(denoiser.preconditioning, "whole_times", False):
    known = known | {"denoiser": dict(known["denoiser"], whole_times=False)}
    denoiser = dataclasses.replace(denoiser, preconditioning=build_preconditioning(known["denoiser"]))
  return denoiser, known


def _load_or_make(config) -> tuple[Denoiser, dict[str, Any]]:
  if not config.init_from:
    raise InputError(
      "init_from is empty: give the export folder or EDM snapshot (.pkl) of a diffusion model, "
      "--config.init_from=<run>/export"
    )
  if config.init_from != UNTRAINED:
    about = describe(config.init_from)
    known = {name: about[name] for name in ("model", "denoiser")}
    return load_denoiser(config.init_from), known | {"class_names": tuple(about["class_names"] or ())}
  new = config_lib.to_plain(config.untrained)
  network = build_network(new["model"], tuple(new["image_shape"]), new["num_classes"])
  preconditioning = build_preconditioning(new["preconditioning"])
  variables = jax.jit(network.init)(jax.random.key(config.seed))
  known = {"model": model_section(new["model"], network), "denoiser": new["preconditioning"]}
  return Denoiser(network, preconditioning, variables), known | {"class_names": ()}


def describe(path: str | os.PathLike) -> dict[str, Any]:
  """What an export folder or an EDM snapshot says about its diffusion model, arrays left out.

  Always there: 'model' and 'denoiser' (sections), 'image_shape', 'num_classes', 'class_names' and 'sampler' (None where
  they are not stored). Beside them everything else in model.json, or 'dataset' with the arguments of the training set.
  """
  path = pathlib.Path(path)
  if path.suffix == SNAPSHOT and not path.is_dir():
    snapshot = edm_snapshot.read_snapshot(path)
    with network_weights.about(path):
      network, meta = snapshot.network, {"dataset": snapshot.dataset_kwargs}
      meta |= {"model": snapshot.model_section, "denoiser": snapshot.denoiser_section}
  else:
    network, meta = export.load_network(path)
    with network_weights.about(path):
      _denoiser_section(network, meta)
  names = meta.get("class_names")
  found = {"sampler": None} | meta
  found |= {"image_shape": network.image_shape, "num_classes": network.num_classes}
  return found | {"class_names": None if names is None else tuple(names)}


def _denoiser_section(network: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
  """meta['denoiser'] of a diffusion model; InputError without one."""
  if not isinstance(network, DiffusionNetwork):
    kind = "a watermark codec" if isinstance(network, WatermarkCodec) else "a classifier"
    raise InputError(f"holds {kind} ({meta['model']['name']}), no diffusion model")
  section = meta.get("denoiser")
  if not isinstance(section, dict) or not isinstance(section.get("name"), str):
    known = ", ".join(PRECONDITIONINGS)
    raise InputError(f"{export.DESCRIPTION} needs 'denoiser': {{'name': one of {known}, ...}}")
  return section


def _check_levels(preconditioning: Preconditioning, state_dict: Mapping[str, np.ndarray]) -> None:
  """InputError unless the noise levels stored with an iDDPM denoiser are those of its preconditioning."""
  levels = state_dict.get(edm_names.IDDPM_TABLE)
  if levels is None or not getattr(preconditioning, "whole_times", False):
    return
  wanted = np.append(preconditioning.process.sigmas[::-1], 0)
  if levels.shape != wanted.shape or not np.allclose(levels, wanted, rtol=1e-3, atol=0):
    raise InputError("its noise levels 'u' are not those of its preconditioning")
