"""Prints samples of a mixture of four shards by every `impl`, on a mesh with a shard axis where there are devices for it, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_trustdiff import parallel
from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.cdm import weights
from jax_trustdiff.cdm.mixture import Mixture
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.samplers import AncestralSampler
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.models.uvit import uvit

COUNT = 8


def main():
  mesh = parallel.make_mesh(shard=4 if jax.device_count() == 8 else 1)
  network = uvit("tiny", image_shape=(8, 8, 1), patch_size=2)
  own = [jax.jit(network.init)(jax.random.key(i)) for i in range(4)]
  stacked = cdm_shards.stack(Denoiser(network, EDMPreconditioning(), {}), own, [1.0, 2.0, 3.0, 4.0])
  of_shards = NamedSharding(mesh, PartitionSpec("shard"))
  placed = jax.device_put(stacked, parallel.replicated(mesh))
  split = jax.device_put(stacked.own, of_shards)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(COUNT))
  keys = jax.device_put(keys, parallel.batch_sharding(mesh))
  sampler = AncestralSampler(8)
  found = {"devices": jax.device_count(), "split": mesh.shape["shard"]}
  for impl in ("map", "vmap", "shard_map"):
    stack = (
      placed
      if impl != "shard_map"
      else cdm_shards.Shards(placed.common, split, placed.active, placed.proportions)
    )
    mixture = Mixture(stack, weights.AlongPath(), impl=impl)

    def run(mixture, keys):
      noise = initial_noise(keys, (8, 8, 1))
      return sampler(mixture, noise, keys, state=mixture.start(COUNT))[0]

    with jax.set_mesh(mesh):
      found[impl] = np.asarray(jax.jit(run)(mixture, keys), np.float64).tolist()
  print(json.dumps(found))


if __name__ == "__main__":
  main()
