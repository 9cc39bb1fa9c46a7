"""Proves which images are in a compartmentalized diffusion model, to those who have only its manifest: see tasks/cdm_prove.py.

    python -m jax_trustdiff.main --config=configs/cdm_prove.py --config.cdm.path=<bundle> --config.prove.positions=3,17

`jax_trustdiff.cdm.manifest.is_in(root, image, proof)` checks a line of the proofs.json that it writes.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is the recipe as it is."""
  _, overrides = config_lib.parse_variant(variant, ("smoke",))
  config = ConfigDict()
  config.task = "cdm_prove"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  config.prove = dict(
    positions="",  # of images in the training split of the data set, by commas
    origin=0,  # which data set of the bundle these are of
    file="",  # a text file of images' SHA-256, a line each
  )
  return config_lib.finish(config, overrides)
