"""Prints what test_sampler_mesh.py compares between numbers of devices, as JSON.

Images sharded over all devices: their bytes, and the operations of the compiled program that talk to the host or to other devices.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from worlds import far_apart, small

from jax_trustdiff import parallel
from jax_trustdiff.diffusion.inpainting import Known
from jax_trustdiff.diffusion.samplers import AncestralSampler, EDMSampler
from jax_trustdiff.diffusion.sde_samplers import PredictorCorrectorSampler

TALK = (
  "all-reduce",
  "all-gather",
  "all-to-all",
  "collective",
  "reduce-scatter",
  "callback",
  "infeed",
  "outfeed",
  "send",
)
SAMPLERS = {
  "churn": EDMSampler(12, churn=5.0),
  "ancestral": AncestralSampler(12),
  "predictor_corrector": PredictorCorrectorSampler(6),
  "coupled": PredictorCorrectorSampler(6, step_norms="batch"),
}


def report(sampler, known: bool) -> dict:
  """For 64 images, on every device of the mesh."""
  mesh = parallel.make_mesh()
  split = NamedSharding(mesh, PartitionSpec("data"))
  keys, noise = small(64)
  mask = (jnp.arange(64) % 2).reshape(64, 1, 1, 1) * jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
  extra = Known(jnp.full_like(noise, 0.3), mask) if known else None
  arguments = jax.device_put((noise, keys, extra), split)
  run = jax.jit(lambda w, x, k, e: sampler(w, x, k, known=e), out_shardings=split)
  program = run.lower(far_apart(), *arguments).compile()
  found = program(far_apart(), *arguments)
  assert len(found.sharding.device_set) == jax.device_count()
  text = program.as_text()
  x = np.asarray(found)
  quantized = (np.clip(x * 127.5 + 128, 0, 255)).astype(np.uint8)
  return {
    "talk": [word for word in TALK if word in text],
    "images": [hashlib.sha256(image.tobytes()).hexdigest() for image in x],
    "bytes": [image.tobytes().hex() for image in quantized],
    "loops": text.count('"known_trip_count"'),
    "different": len({image.tobytes() for image in x}),
  }


if __name__ == "__main__":
  found = {name: report(sampler, False) for name, sampler in SAMPLERS.items()}
  found["inpainting"] = report(SAMPLERS["churn"], True)
  print(json.dumps({"devices": jax.device_count()} | found))
