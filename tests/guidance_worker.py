"""Prints as JSON which collectives a sampler with guidance needs on a mesh, and how far its images are from those of one device."""

import json
import re

import jax
import jax.numpy as jnp

from jax_trustdiff import parallel
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.guidance import LabelGuidance
from jax_trustdiff.diffusion.samplers import EDMSampler


class Network:
  """A `types.DiffusionNetwork` of one layer."""

  image_shape, num_classes, num_augment_labels = (2, 2, 1), 3, 0

  def init(self, key):
    return {"params": {"x": jax.random.normal(key, (4, 4)), "class": jax.random.normal(key, (3, 4))}}

  def apply(self, variables, x, noise_labels, class_labels, augment_labels, dropout_key):
    told = class_labels @ variables["params"]["class"] + noise_labels[:, None]
    return jnp.tanh(x.reshape(-1, 4) @ variables["params"]["x"] + told).reshape(x.shape)


def collectives(compiled):
  names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  return sorted(set(re.findall(names, compiled.as_text())))


network = Network()
labels = jax.nn.one_hot(jnp.arange(8) % 3, 3)
denoiser = Denoiser(network, EDMPreconditioning(), network.init(jax.random.key(0)), labels)
noise = jax.random.normal(jax.random.key(1), (8, 2, 2, 1))
sampler = EDMSampler(num_steps=4)


def sample(variables, labels, noise):
  denoiser = Denoiser(network, EDMPreconditioning(), variables, labels)
  return sampler(LabelGuidance(denoiser, 3.0), noise)


def concatenated(x):
  return jnp.tanh(jnp.concatenate([x, 2 * x])).reshape(2, *x.shape).sum(0)


mesh = parallel.make_mesh()
rows, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)
run = jax.jit(sample, in_shardings=(everywhere, rows, rows), out_shardings=rows)
compiled = run.lower(denoiser.variables, labels, noise).compile()
naive = jax.jit(concatenated, in_shardings=rows, out_shardings=rows).lower(noise).compile()
difference = run(denoiser.variables, labels, noise) - jax.jit(sample)(denoiser.variables, labels, noise)
print(
  json.dumps(
    {
      "devices": jax.device_count(),
      "collectives": collectives(compiled),
      "collectives_of_concatenation": collectives(naive),
      "largest_difference": float(jnp.abs(difference).max()),
    }
  )
)
