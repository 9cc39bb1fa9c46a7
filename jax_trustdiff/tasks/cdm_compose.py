"""Images of a mixture of shards, into an image store: `generate` with a compartmentalized model in place of one network."""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.mixture import GuidedMixture, Mixture, RandomShard
from jax_trustdiff.diffusion.guidance import Guided
from jax_trustdiff.diffusion.samplers import AncestralSampler
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler
from jax_trustdiff.tasks import cdm_centroids, cdm_classifier, denoisers, generate
from jax_trustdiff.tasks.bundles import Bundle, names_of, reading
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

WEIGHTS = ("along_path", "classifier", "nearest", "prior", "equal", "fixed")
RANDOM = ("random", "random_equal")
ORDERS = ("mixture_first", "guidance_first")
OWN = r"(^|/)shards/own/"  # the path of what shards have each, in a mixture
NO_GUIDANCE = dict(scale=1.0, sigma_min=0.0, sigma_max=1e9, order="mixture_first")


def reads(config) -> str:
  """What the images are made of, for `Workdir.complete`."""
  return made_of(Bundle(config.cdm.path), config.mixture)


def run(config, workdir: Workdir) -> dict[str, float]:
  """`generate.fill_store` with the mixture of the shards config.mixture.shards of the bundle config.cdm.path."""
  with reading(config, workdir) as bundle:
    model = load_mixture(bundle, config)
  return generate.fill_store(config, workdir, model)


def made_of(bundle: Bundle, section: Any) -> str:
  """SHA-256 of the parameters of the shards that a section `mixture` names, and of the artefacts that its weights look at."""
  names = shards_of(bundle, section)
  artefacts = bundle.active_artefacts()
  looked_at = {
    "classifier": [cdm_classifier.NAME],
    "nearest": [cdm_centroids.key_of(name) for name in names],
  }.get(section.weights, [])
  parameters = {name: bundle.manifest["shards"][name]["parameters"] for name in names}
  return manifest_lib.digest(
    [parameters, {name: artefacts[name]["files"] for name in looked_at if name in artefacts}]
  )


def shards_of(bundle: Bundle, section: Any) -> list[str]:
  """The names of the shards of a section `mixture`; with section.access those of them that section.user may have parts of.

  access: a JSON file {user: [names of shards]}. Other shards are not read, so weights know nothing of them either; a classifier that was
  trained on them is refused. InputError for users and shards that are not there, for a shard by name that the user may not have, and
  where none is left.
  """
  names = names_of(section.shards) or bundle.names
  bundle.check_names(names)
  if not section.access and not section.user:
    return names
  allowed = _rights(bundle, section)
  if section.shards and (forbidden := [name for name in names if name not in allowed]):
    raise InputError(f"{section.user!r} may not have parts of shard {forbidden[0]!r}; of {', '.join(allowed) or 'none'}")
  if not (left := [name for name in names if name in allowed]):
    raise InputError(f"{section.user!r} may have parts of no shard of {bundle.path}")
  return left


def _rights(bundle: Bundle, section: Any) -> list[str]:
  file = pathlib.Path(section.access).expanduser()
  if not section.access or not file.is_file():
    raise InputError(f"mixture.access: a JSON file {{user: [shards]}} is needed for a user, found {section.access!r}")
  try:
    rights = json.loads(file.read_text())
  except ValueError:
    raise InputError(f"{file} is not JSON") from None
  lists = list(rights.values()) if isinstance(rights, dict) else [None]
  if not all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in lists):
    raise InputError(f"{file} is to hold {{user: [names of shards]}}")
  if section.user not in rights:
    raise InputError(f"mixture.user={section.user!r} has no rights in {file}; there are those of {', '.join(sorted(rights))}")
  bundle.check_names(rights[section.user])
  return rights[section.user]


def load_mixture(bundle: Bundle, config: Any) -> generate.Model:
  """The mixture that config.mixture and config.guidance describe.

  mixture.shards, access, user: see `shards_of`. weights: of WEIGHTS, where 'classifier' is the bundle's (cdm_classifier.py), 'nearest'
  goes by its centroids (cdm_centroids.py) and mixture.nearest, the fields of `weights.Nearest`, and 'fixed' takes mixture.proportions,
  one for each shard; or of RANDOM, one shard drawn for every step. top_k: only the k largest weights of an image (0: all). impl, at_once:
  see `Mixture`; with 'shard_map' shards are shared out over as many devices as divide both their number and that of the devices.
  guidance.scale with order 'mixture_first' guides the mixture, with 'guidance_first' every shard.
  """
  section = config.mixture
  stack, names = bundle.stack(shards_of(bundle, section))
  network, preconditioning = stack.common.network, stack.common.preconditioning
  counts = np.array([bundle.manifest["shards"][name]["class_counts"] for name in names], float)
  conditional = network.num_classes > 0
  class_log_prior = None
  if conditional:
    with np.errstate(divide="ignore"):
      class_log_prior = jnp.asarray(np.log(counts / counts.sum(1, keepdims=True)), jnp.float32)
  is_split = section.impl == "shard_map" and section.weights not in RANDOM
  labelled, unlabelled, evaluations = _assemble(bundle, config, stack, names, class_log_prior)
  return generate.Model(
    labelled=labelled,
    unlabelled=unlabelled,
    network=network,
    preconditioning=preconditioning,
    num_classes=network.num_classes,
    class_names=tuple(bundle.manifest["origins"][0]["class_names"]) if conditional else (),
    provenance={
      "bundle": made_of(bundle, section),
      "shards": names,
      "mixture": config_lib.to_plain(section),
      "guidance": config_lib.to_plain(config.guidance),
    },
    network_evaluations=evaluations,
    needs_labels=f"guidance.scale={config.guidance.scale}" if config.guidance.scale != 1 else "",
    classes=tuple(np.flatnonzero(counts.sum(0)).tolist()) if conditional else (),
    shard_devices=math.gcd(len(names), jax.local_device_count()) if is_split else 1,
    split=OWN if is_split else "",
  )


def _assemble(
  bundle: Bundle, config: Any, stack: cdm_shards.Shards, names: list[str], class_log_prior: Any
) -> tuple[Any, Any, int]:
  """(what is sampled with labels, without, evaluations of networks for one of the mixture)."""
  section, guidance = config.mixture, config_lib.to_plain(config.guidance)
  order, scale = guidance.pop("order"), guidance["scale"]
  if order not in ORDERS:
    raise InputError(f"unknown guidance.order={order!r}; there are {', '.join(ORDERS)}")
  guided_shards = scale != 1 and order == "guidance_first"
  common = Guided(stack.common, True, **guidance) if guided_shards else stack.common
  of_labelled = cdm_shards.Shards(common, stack.own, stack.active, stack.proportions)
  if section.weights in RANDOM:
    if section.top_k:
      raise InputError("mixture.top_k is for weights; a random shard is one already")
    if scale != 1 and not guided_shards:
      raise InputError("a random shard is guided on its own: guidance.order='guidance_first'")
    uniform, key = section.weights == "random_equal", jax.random.key(config.seed)
    made = [RandomShard(one, key, uniform=uniform) for one in (of_labelled, stack)]
    return *made, 2 if guided_shards else 1
  chosen = _weights(bundle, section, names)
  if isinstance(chosen, weights.AlongPath):
    _check_adds_noise(denoisers.build_sampler(config.sampler, stack.common.preconditioning))
  if section.top_k:
    chosen = weights.Largest(chosen, section.top_k)
  labelled, unlabelled = (
    Mixture(one, chosen, class_log_prior=class_log_prior, impl=section.impl, at_once=section.at_once) for one in (of_labelled, stack)
  )
  if scale != 1 and not guided_shards:
    labelled = GuidedMixture(labelled, **guidance)
  return labelled, unlabelled, len(names) * (2 if scale != 1 else 1)


def _weights(bundle: Bundle, section: Any, names: list[str]) -> weights.Weights:
  match section.weights:
    case "along_path":
      return weights.AlongPath()
    case "prior":
      return weights.Prior()
    case "equal":
      return weights.Equal()
    case "fixed":
      if len(section.proportions) != len(names) or min(section.proportions) <= 0:
        raise InputError(
          f"mixture.proportions needs a positive number for each of {', '.join(names)}, found {section.proportions}"
        )
      return weights.Fixed(jnp.asarray(section.proportions, jnp.float32))
    case "classifier":
      found = cdm_classifier.load(bundle, names)
      seen = bundle.manifest["artefacts"][cdm_classifier.NAME]["depends_on"]
      allowed = _rights(bundle, section) if section.user else seen
      if forbidden := [name for name in seen if name not in allowed]:
        raise InputError(
          f"the classifier was trained on shard {forbidden[0]!r} too, of which {section.user!r} may have no part: take other weights"
        )
      return found
    case "nearest":
      return cdm_centroids.load(bundle, names, config_lib.to_plain(section.nearest))
  raise InputError(f"unknown mixture.weights={section.weights!r}; there are {', '.join((*WEIGHTS, *RANDOM))}")


def _check_adds_noise(sampler: Any) -> None:
  """InputError unless a step of the sampler adds noise of about the variance that it takes away (`weights.AlongPath`)."""
  if isinstance(sampler, AncestralSampler) and sampler.eta == 1:
    return
  if isinstance(sampler, PredictorCorrectorSampler) and sampler.corrector == "none":
    return
  raise InputError(
    "weights along a path need a sampler of the reverse SDE: sampler.name=ancestral with eta=1, euler_maruyama or "
    "reverse_diffusion"
  )
