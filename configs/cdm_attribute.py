"""Which shards of a compartmentalized diffusion model images owe themselves to: see tasks/cdm_attribute.py.

    python -m jax_trustdiff.main --config=configs/cdm_attribute.py --config.cdm.path=<bundle> --config.images.path=<image store>

Golatkar et al. 2024 (arXiv:2308.01937, eq. 6 and figure 3). The paper's credit is no probability and may name another shard than the
posterior does; both are given (attribute.method=path, which needs the bundle's classifier).

Variants:
  digits  the digits, with a trace of 100 samples
  smoke   a few images
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'digits' for the digits, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  compose = config_lib.load(f"configs/cdm_compose.py{':' if names else ''}{','.join(names)}")
  config = ConfigDict()
  config.task = "cdm_attribute"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  config.images = dict(name="image_store", path="", num_classes=0)
  config.judge = (
    ""  # the export of a classifier of clean images, which says whether the largest credit is right
  )
  config.mixture = config_lib.to_plain(compose.mixture)
  config.sampler = config_lib.to_plain(compose.sampler)  # of the images that are traced
  config.attribute = dict(
    method="denoising",  # 'denoising', 'classifier' or 'path'
    num_images=1000,  # the first so many; 0: all
    batch_size=100,
    num_sigmas=32,  # of 'denoising'
    sigma_min=0.05,  # the noise levels that are looked at; 'classifier' looks at the first alone
    sigma_max=20.0,
    num_probes=1,  # of 'path'
    num_traced=0,  # images that are sampled to follow their weights; 0: none
  )
  config.report = dict(num_images=10)
  if "digits" in names:
    config.attribute.num_traced = 100
  if "smoke" in names:
    config.attribute.update(num_images=16, batch_size=16, num_sigmas=4, num_traced=8)
    config.report.num_images = 4
  return config_lib.finish(config, overrides)
