"""The classifier of shards of a compartmentalized diffusion model, which gives the weights of its mixture: see tasks/cdm_classifier.py.

    python -m jax_trustdiff.main --config=configs/cdm_classifier.py --config.cdm.path=<bundle>

It is made of all shards and goes when one of them is forgotten; mixture.weights=along_path of cdm_compose.py needs none.

Variants: those of noise_classifier.py: cpu, digits, smoke. Before one of them or alone:
  head   a linear layer and an attention block on the middle features of the U-ViT that the shards start from or adapt
         (models/uvit_head.py)
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "digits", "smoke", "head")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with the variants of noise_classifier.py, and 'head'."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  network = [name for name in names if name != "head"]
  config = config_lib.load(f"configs/noise_classifier.py{':' if network else ''}{','.join(network)}").unlock()
  config.task = "cdm_classifier"
  del config["data"]
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  if "head" in names:
    config.model = dict(name="uvit_head", embed_dim=128, num_heads=4)
  return config_lib.finish(config, overrides)
