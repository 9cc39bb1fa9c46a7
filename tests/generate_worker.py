"""Prints the hashes of 64 images by id, for many batch sizes and orders: run by test_generate.py on 1 and 8 devices.

Usage: generate_worker.py. Every line of the answer is {'devices', 'images': {case: SHA-256}, 'naive': different pixels}.
"""

import dataclasses
import hashlib
import json

import jax
import numpy as np
from worlds import far_apart

from jax_trustdiff import parallel
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.tasks.sampling import ImageSampler

MODEL = dict(name="ddpmpp", model_channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=(8,))
IDS = np.arange(100, 164)


def unet():
  """A tiny DDPM++ whose random weights all count."""
  network = denoisers.build_network(MODEL, (8, 8, 3), 10)
  variables = network.init(jax.random.key(0))
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
  return Denoiser(network, EDMPreconditioning(), jax.tree.unflatten(tree, noisy))


def within_the_range():
  """The mixture `far_apart`, small enough that no pixel is clipped."""
  world = far_apart()
  return dataclasses.replace(world, mean=world.mean / 5, variance=world.variance / 25)


mesh = parallel.make_mesh()
sampler = EDMSampler(num_steps=5, churn=2.0)
found = {}
for name, model, shape, labels in (
  ("unet", unet(), (8, 8, 3), IDS % 10),
  ("mixture", within_the_range(), (2, 2, 1), None),
):
  model = parallel.replicate_to_devices(mesh, model)
  for batch_size in (1, 24, 64):
    images = ImageSampler(sampler, shape, mesh, batch_size, seed=3, micro_batch=8)
    found[f"{name}, batch {batch_size}"] = images(model, IDS, labels)
  order = np.random.RandomState(0).permutation(64)
  shuffled = images(model, IDS[order], None if labels is None else labels[order])
  found[f"{name}, shuffled"] = shuffled[np.argsort(order)]
  parts = [
    images(model, IDS[a:b], None if labels is None else labels[a:b]) for a, b in ((0, 5), (5, 37), (37, 64))
  ]
  found[f"{name}, in three parts"] = np.concatenate(parts)
  assert len(np.unique(found[f"{name}, shuffled"].reshape(64, -1), axis=0)) == 64
hashes = {name: hashlib.sha256(images.tobytes()).hexdigest() for name, images in found.items()}
print(json.dumps({"devices": jax.device_count(), "images": hashes}))
