"""Composes images of a bundle by mixture.impl=map and shard_map, and prints where the parameters of shards were and what differs, as JSON.

Arguments: bundle, folder for the runs.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import sources
from jax_trustdiff.tasks import cdm_compose, seeds
from jax_trustdiff.training.workdir import Workdir


def main(bundle, folder):
  found = {"devices": jax.device_count(), "split": {}}
  place, images = parallel.replicate_to_devices, {}
  for impl in ("map", "shard_map"):

    def placed(mesh, tree, split, impl=impl):
      there = place(mesh, tree, split)
      leaf = jax.tree.leaves(there.shards.own)[0]
      found["split"][impl] = [mesh.shape["shard"], leaf.shape[0], leaf.addressable_shards[0].data.shape[0]]
      return there

    parallel.replicate_to_devices = placed
    small = {"cdm.path": bundle, "mixture.impl": impl, "generate.micro_batch": 8, "sampler.num_steps": 3}
    config = config_lib.load("configs/cdm_compose.py:smoke", small)
    run = pathlib.Path(folder) / impl
    seeds.complete(cdm_compose, config, Workdir(run, config))
    images[impl] = sources.image_store(str(run / "images")).take(range(64))["image"].astype(int)
  found["difference"] = int(np.abs(images["map"] - images["shard_map"]).max())
  found["kinds"] = len(np.unique(images["map"], axis=0))
  print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
