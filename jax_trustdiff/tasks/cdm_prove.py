"""Proofs that images are in a compartmentalized model, for those who have only its manifest.

An image stands in the manifest by a salted hash below the Merkle root of its shard. Its proof is the path of hashes up to that root:
whoever has the image, what the salt makes of its hash and the manifest can check it (`cdm.manifest.is_in`), and learns nothing of other
images.
"""

import json
from typing import Any

from jax_trustdiff.cdm import manifest as manifest_lib
from jax_trustdiff.tasks.bundles import Bundle, made_of_all, reading
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import InputError

reads = made_of_all


def run(config, workdir: Workdir) -> dict[str, float]:
  """Writes proofs.json for the images that config.prove names, and returns how many are in a shard, forgotten, or in none.

  prove.positions, origin, file: as those of `cdm_forget`. proofs.json has for every image, and for each of several shards that hold it:
  image (salted), shard, root, proof [['left' or 'right', hash]], the last three null for an image in no shard; forgotten: whether a
  deletion was of it. Every proof is checked against the manifest's root before it is written.
  """
  with reading(config, workdir) as bundle:
    wanted = bundle.named(config.prove)
    if not wanted:
      raise InputError("nothing to prove: give prove.positions or prove.file")
    leaves = {name: sum(bundle.images(name), []) for name in bundle.names}
    proofs = [proof for image in wanted for proof in _proofs(bundle, leaves, image)]
  workdir.open()
  write_atomically(workdir / "proofs.json", json.dumps(proofs, indent=2) + "\n")
  there = [one["shard"] for one in proofs if one["shard"]]
  for name in sorted(set(there)):
    say(f"{there.count(name)} in shard {name}")
  in_none = sum(one["shard"] is None for one in proofs)
  return {
    "images": len(wanted),
    "in_shards": len(wanted) - in_none,
    "forgotten": len({one["image"] for one in proofs if one["forgotten"]}),
    "in_none": in_none,
  }


def _proofs(bundle: Bundle, leaves: dict[str, list[str]], image: str) -> list[dict[str, Any]]:
  common, found = {"image": image, "forgotten": image in bundle.manifest["forgotten"]}, []
  for name, of_shard in leaves.items():
    if image in of_shard:
      root, proof = bundle.manifest["shards"][name]["root"], manifest_lib.merkle_proof(of_shard, image)
      if not manifest_lib.is_in(root, image, proof):
        raise InputError(f"the images of shard {name} are not below its root: verify {bundle.path}")
      found.append(common | {"shard": name, "root": root, "proof": proof})
  return found or [common | {"shard": None, "root": None, "proof": None}]
