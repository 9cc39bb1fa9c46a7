"""Centroids of the shards of a compartmentalized diffusion model, for weights by the nearest: see tasks/cdm_centroids.py.

    python -m jax_trustdiff.main --config=configs/cdm_centroids.py --config.cdm.path=<bundle>
    python -m jax_trustdiff.main --config=configs/cdm_compose.py --config.cdm.path=<bundle> --config.mixture.weights=nearest

The paper takes CLIP's features; here they are Inception's, or the pixels. Centroids of a shard know that shard alone.

Variants:
  digits  the pixels, for 8x8 digits
  smoke   the same, two centroids
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'digits' for the digits, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "cdm_centroids"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(path="", only="")  # a bundle: the workdir of cdm_train.py; shards by commas, '': all
  config.centroids = dict(per_shard=5, normalise=True)  # of features of unit length
  config.metrics = dict(features=dict(name="inception", weights=""), batch_size=64)
  if names:
    config.metrics.features = dict(name="pixels")
  if "smoke" in names:
    config.centroids.per_shard = 2
  return config_lib.finish(config, overrides)
