"""Adds shards of another data set to a compartmentalized model: continual learning that touches nothing that is there."""

from jax_trustdiff.cdm import slices
from jax_trustdiff.tasks import cdm_train, compartments
from jax_trustdiff.tasks.bundles import Bundle, to_change
from jax_trustdiff.tasks.shard_training import Training
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked
from jax_trustdiff.types import InputError


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains the shards of config.data, divided as config.shards says, with the settings of the bundle config.cdm.path, and puts them in it.

  Returns the numbers of the bundle (`cdm_train.summary`) and how many shards are new. A classifier of shards stays for those it knows; a
  new one is wanted for the new. InputError for names that are taken and for images or classes other than the bundle's. Killed, it goes
  on.
  """
  path = to_change(config, workdir)
  data = compartments.split(config.data, config.shards, Bundle(path).training.seed)
  with locked(path):
    bundle = Bundle(path)
    origin = cdm_train.origin_of(config, data)
    known = bundle.manifest["origins"]
    _check(bundle, data, origin)
    slices.epochs_of_stages(bundle.training.train.num_epochs, config.shards.num_slices)
    workdir.open()
    if origin not in known:
      known.append(origin)
    number = known.index(origin)
    added = [name for name in data.names if name not in bundle.manifest["shards"]]
    for name in added:
      rows = bundle.rows(number, name)
      bundle.manifest["shards"][name] = Training(bundle, name, number, rows).run()
      bundle.remove_report()
      bundle.save()
  if "classifier" in bundle.active_artefacts():
    say("the classifier of shards does not know the new ones: train another, or take weights without it")
  metrics = cdm_train.summary(bundle) | {"added_shards": len(data.names)}
  return metrics


def _check(bundle: Bundle, data: compartments.Compartments, origin) -> None:
  first = bundle.manifest["origins"][0]
  for name in ("image_shape", "num_classes"):
    if origin[name] != first[name]:
      raise InputError(f"the {name} of the new data is {origin[name]} and that of the bundle {first[name]}")
  for name in data.names:
    about = bundle.manifest["shards"].get(name)
    if about and bundle.manifest["origins"][about["origin"]] != origin:
      raise InputError(f"there is a shard {name!r} already: give the new one another name (shards.name)")
    if name in bundle.manifest["dropped"]:
      raise InputError(f"a shard {name!r} was dropped: give the new one another name (shards.name)")
