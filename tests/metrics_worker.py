"""The features and metrics of test_evaluate_generation.py on this process's devices, as JSON."""

import json

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data.records import image_source
from jax_trustdiff.tasks import generation_metrics


def tiny_source(n: int, seed: int):
  rng = np.random.default_rng(seed)
  return image_source(
    [rng.integers(0, 256 - 40 * seed, (n, 4, 4, 3)).astype(np.uint8)], [np.arange(n)], "tiny"
  )


def main() -> dict:
  section = config_lib.load(
    "configs/evaluate_generation.py:smoke",
    {"metrics.kid_subset_size": 20, "metrics.kid_subsets": 3, "metrics.batch_size": 16},
  ).metrics
  extractor = generation_metrics.build_extractor(section, parallel.make_mesh(data=-1))
  found = [extractor(tiny_source(n, seed)) for n, seed in ((45, 0), (37, 1))]
  metrics = generation_metrics.generation_metrics(*found, section)
  return {"devices": jax.device_count(), "features": found[1].features.tolist(), "metrics": metrics}


if __name__ == "__main__":
  print(json.dumps(main()))
