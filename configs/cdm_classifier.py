"""The classifier of shards of a compartmentalized diffusion model, which gives the weights of its mixture: see tasks/cdm_classifier.py.

    python -m jax_trustdiff.main --config=configs/cdm_classifier.py --config.cdm.path=<bundle>

It is made of all shards and goes when one of them is forgotten; mixture.weights=along_path of cdm_compose.py needs none.

Variants: those of noise_classifier.py: cpu, digits, smoke.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with the variants of noise_classifier.py."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = config_lib.load(f"configs/noise_classifier.py{':' if names else ''}{','.join(names)}").unlock()
  config.task = "cdm_classifier"
  del config["data"]
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  return config_lib.finish(config, overrides)
