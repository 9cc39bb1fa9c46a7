"""Checks a compartmentalized diffusion model against its manifest: see tasks/cdm_verify.py.

    python -m jax_trustdiff.main --config=configs/cdm_verify.py --config.cdm.path=<bundle>
    python -m jax_trustdiff.main --config=configs/cdm_verify.py --config.cdm.path=<bundle> --config.verify.replay=all

The second also trains every shard again and compares it bit by bit. Ends with exit code 1 and a line if anything is not as it should be.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is the recipe as it is: how long it takes is up to the bundle."""
  _, overrides = config_lib.parse_variant(variant, ("smoke",))
  config = ConfigDict()
  config.task = "cdm_verify"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  config.verify = dict(
    replay="",  # shards to train again, by commas, or 'all'
    data=True,  # compare with the data sets, which must be at hand
  )
  return config_lib.finish(config, overrides)
