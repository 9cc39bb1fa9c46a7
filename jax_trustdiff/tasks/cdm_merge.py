"""Puts the shards of several bundles of one training in one: what machines that trained some of them each (`cdm.only`) have made."""

import contextlib
import shutil

from jax_trustdiff import config as config_lib
from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.tasks import cdm_train
from jax_trustdiff.tasks.bundles import Bundle, file_digests, names_of, to_change
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, locked
from jax_trustdiff.types import InputError

SAME = ("training", "origins", "salt_sha256")  # of the manifest


def reads(config) -> str:
  """The bundles that are merged into another, as they are."""
  seals = [Bundle(one).manifest[manifest_lib.SEAL] for one in names_of(config.merge.others)]
  return manifest_lib.digest(seals)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Copies the shards of config.merge.others (bundles by commas) that config.cdm.path, or with cdm.copy a copy of it, does not have.

  Returns the numbers of the bundle (`cdm_train.summary`) and how many shards are new. InputError, before anything is copied, for bundles
  of other settings, data, backbone or salt (train them with one cdm.salt_file), for a shard that two of them trained to other bits, for
  one that was dropped or holds what was forgotten, for a bundle with deletions that the first does not have, and for files that are not
  as their manifest has them. Killed, it goes on.
  """
  path = to_change(config, workdir)
  with contextlib.ExitStack() as locks:
    locks.enter_context(locked(path))
    bundle = Bundle(path)
    others = [Bundle(one) for one in names_of(config.merge.others)]
    if not others:
      raise InputError("nothing to merge: give merge.others, bundles by commas")
    if any(other.path.resolve() == path.resolve() for other in others):
      raise InputError(f"{path} cannot be merged into itself")
    for other in others:
      locks.enter_context(locked(other.path))
    others = [Bundle(other.path) for other in others]  # now nobody changes them
    found: dict[str, Bundle] = {}
    for other in others:
      _check(bundle, other, found)
      found |= {name: other for name in other.names if name not in bundle.manifest["shards"] | found}
    workdir.open()
    for name, other in found.items():
      about = other.manifest["shards"][name]
      shutil.rmtree(path / about["folder"], ignore_errors=True)  # of a training that was cut off here
      shutil.copytree(other.path / about["folder"], path / about["folder"])
      bundle.manifest["shards"][name] = about
      bundle.remove_report()
      bundle.save()
      say(f"{name} from {other.path}")
  return cdm_train.summary(bundle) | {"merged_shards": len(found)}


def _check(bundle: Bundle, other: Bundle, found: dict[str, Bundle]) -> None:
  """InputError where `other` cannot be merged into `bundle` with the shards of others that were `found` before."""
  parts = [{key: one.manifest[key] for key in SAME} for one in (bundle, other)]
  parts = [part | {"backbone": one.backbone_digest} for part, one in zip(parts, (bundle, other), strict=True)]
  if parts[0]["salt_sha256"] != parts[1]["salt_sha256"]:
    raise InputError(f"{other.path} has a salt of its own: train both with one cdm.salt_file")
  if changed := config_lib.difference(*parts)[:3]:
    raise InputError(f"{other.path} is no part of {bundle.path}: {'; '.join(changed)}")
  for key in ("forgotten", "dropped"):
    if more := set(other.manifest[key]) - set(bundle.manifest[key]):
      raise InputError(f"{other.path} has {key} what {bundle.path} has not ({len(more)}): do it there first")
  gone = set(bundle.manifest["forgotten"])
  for name, about in other.manifest["shards"].items():
    ours = bundle.manifest["shards"].get(name) or (name in found and found[name].manifest["shards"][name])
    if ours and ours["parameters"] != about["parameters"]:
      raise InputError(f"two of these bundles have a shard {name!r}, of other bits; one is {other.path}")
    if name in bundle.manifest["dropped"]:
      raise InputError(f"{bundle.path} dropped shard {name!r}, which {other.path} has")
    if not ours and gone & {image for of_slice in other.images(name) for image in of_slice}:
      raise InputError(f"shard {name!r} of {other.path} holds images that {bundle.path} forgot: forget them there first")
    if not ours and file_digests(other.path / about["folder"]) != about["files"]:
      raise InputError(f"{other.path / about['folder']} was changed: verify {other.path}")
