"""Merges bundles whose shards were trained apart, such as by several machines: see tasks/cdm_merge.py.

    python -m jax_trustdiff.main --config=configs/cdm_train.py --config.cdm.only=cats --config.cdm.salt_file=salt.txt --workdir=one
    python -m jax_trustdiff.main --config=configs/cdm_train.py --config.cdm.only=dogs --config.cdm.salt_file=salt.txt --workdir=two
    python -m jax_trustdiff.main --config=configs/cdm_merge.py --config.cdm.path=one --config.merge.others=two

All have the same settings and name their data by the same paths. salt.txt is one line of 64 hexadecimal digits that nobody else has, such as `openssl rand -hex 32` prints.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is the recipe as it is."""
  _, overrides = config_lib.parse_variant(variant, ("smoke",))
  config = ConfigDict()
  config.task = "cdm_merge"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(
    path="",  # a bundle: the workdir of cdm_train.py
    copy=False,  # change a copy of it, <workdir>/bundle, instead
  )
  config.merge = dict(others="")  # bundles by commas
  return config_lib.finish(config, overrides)
