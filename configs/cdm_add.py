"""Adds shards of another data set to a compartmentalized diffusion model: see tasks/cdm_add.py.

    python -m jax_trustdiff.main --config=configs/cdm_add.py --config.cdm.path=<bundle> --config.data.path=<npz> --config.shards.name=dogs

New shards are trained as those of the bundle were; what is there is not touched.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is the recipe as it is: how long it takes is up to the bundle."""
  _, overrides = config_lib.parse_variant(variant, ("smoke",))
  like = config_lib.load("configs/cdm_train.py")
  config = ConfigDict()
  config.task = "cdm_add"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(
    path="",  # a bundle: the workdir of cdm_train.py
    copy=False,  # change a copy of it, <workdir>/bundle, instead
  )
  config.data = config_lib.to_plain(like.data)
  config.shards = config_lib.to_plain(like.shards)
  config.shards.update(by="one", name="new")
  return config_lib.finish(config, overrides)
