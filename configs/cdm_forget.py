"""Takes images or whole shards out of a compartmentalized diffusion model, exactly: see tasks/cdm_forget.py.

    python -m jax_trustdiff.main --config=configs/cdm_forget.py --config.cdm.path=<bundle> --config.forget.shards=cats
    python -m jax_trustdiff.main --config=configs/cdm_forget.py --config.cdm.path=<bundle> --config.forget.positions=3,17

    python -m jax_trustdiff.main --config=configs/cdm_forget.py --config.cdm.path=<bundle> --config.forget.positions=3 --config.forget.plan

The last only says what it would take. The bundle is changed in place, once everything is done; what is deleted is gone from it. cdm.copy=True changes a copy instead.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is the recipe as it is: how long it takes is up to the bundle."""
  _, overrides = config_lib.parse_variant(variant, ("smoke",))
  config = ConfigDict()
  config.task = "cdm_forget"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(
    path="",  # a bundle: the workdir of cdm_train.py
    copy=False,  # change a copy of it, <workdir>/bundle, instead
  )
  config.forget = dict(
    shards="",  # names by commas: dropped as a whole
    positions="",  # of images in the training split of the data set, by commas
    origin=0,  # which data set of the bundle these are of
    file="",  # a text file of images' SHA-256, a line each
    plan=False,  # only say what it would take
  )
  return config_lib.finish(config, overrides)
