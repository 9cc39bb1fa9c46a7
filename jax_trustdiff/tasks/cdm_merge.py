"""Puts the shards of several bundles of one training in one: what machines that trained some of them each (`cdm.only`) have made."""

import shutil

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.tasks import cdm_train
from jax_trustdiff.tasks.bundles import Bundle, file_digests, names_of, to_change
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked
from jax_trustdiff.types import InputError

OF_ALL = ("training", "origins", "salt_sha256", "backbone")  # of the manifest: what must be the same


def reads(config) -> str:
  """The bundles that are merged into another, as they are."""
  seals = [Bundle(one).manifest[manifest_lib.SEAL] for one in names_of(config.merge.others)]
  return manifest_lib.digest(seals)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Copies the shards of config.merge.others (bundles by commas) that config.cdm.path, or with cdm.copy a copy of it, does not have.

  Returns the numbers of the bundle (`cdm_train.summary`) and how many shards are new. InputError, before anything is copied, for bundles
  of other settings, data, backbone or salt (train them with one cdm.salt_file), for a shard that both trained to other bits, that was
  dropped or holds what was forgotten, and for files that are not as their manifest has them. Killed, it goes on.
  """
  path = to_change(config, workdir)
  with locked(path):
    bundle = Bundle(path)
    others = [Bundle(one) for one in names_of(config.merge.others)]
    if not others:
      raise InputError("nothing to merge: give merge.others, bundles by commas")
    found: dict[str, Bundle] = {}
    for other in others:
      _check(bundle, other)
      found |= {name: other for name in other.names if name not in bundle.manifest["shards"] | found}
    workdir.open()
    for name, other in found.items():
      about = other.manifest["shards"][name]
      shutil.copytree(other.path / about["folder"], path / about["folder"], dirs_exist_ok=True)
      if file_digests(path / about["folder"]) != about["files"]:
        raise InputError(f"{other.path / about['folder']} was changed: verify {other.path}")
      bundle.manifest["shards"][name] = about
      bundle.remove_report()
      bundle.save()
      say(f"{name} from {other.path}")
  return cdm_train.summary(bundle) | {"merged_shards": len(found)}


def _check(bundle: Bundle, other: Bundle) -> None:
  for key in OF_ALL:
    one, two = bundle.manifest[key], other.manifest[key]
    if one == two:
      continue
    if key == "salt_sha256":
      raise InputError(f"{other.path} has a salt of its own: train both with one cdm.salt_file")
    changed = config_lib.difference({key: one}, {key: two})[:3]
    raise InputError(f"{other.path} is no part of {bundle.path}: {'; '.join(changed)}")
  gone = set(bundle.manifest["forgotten"])
  for name, about in other.manifest["shards"].items():
    ours = bundle.manifest["shards"].get(name)
    if ours and ours["parameters"] != about["parameters"]:
      raise InputError(f"{bundle.path} and {other.path} both have a shard {name!r}, of other bits")
    if name in bundle.manifest["dropped"]:
      raise InputError(f"{bundle.path} dropped shard {name!r}, which {other.path} has")
    if not ours and gone & {image for of_slice in other.images(name) for image in of_slice}:
      raise InputError(f"shard {name!r} of {other.path} holds images that {bundle.path} forgot: forget them there first")
    there = file_digests(other.path / about["folder"])
    if there != about["files"]:
      raise InputError(f"{other.path / about['folder']} was changed: verify {other.path}")
