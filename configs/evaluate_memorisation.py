"""Whether generated images are copies of training images: see tasks/evaluate_memorisation.py.

    python -m jax_trustdiff.main --config=configs/evaluate_memorisation.py \\
      --config.data.path=<CIFAR-10 npz folder> --config.generated.path=<image store of generated images>

"Extracting Training Data from Diffusion Models" (Carlini et al. 2023, arXiv:2301.13188, section 5.1), with its numbers for CIFAR-10: an image is a copy
if it is nearer to its nearest training image than half the mean distance to its 50 nearest.

Variants: smoke (seconds; the test split of the digits against the training split).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' takes digits."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "evaluate_memorisation"
  config.seed = 0
  config.seeds = ""
  config.data = dict(name="npz", path="data/cifar10", num_classes=0)
  config.generated = dict(name="image_store", path="data/generated", num_classes=0)
  config.memorisation = dict(
    num_generated=0,  # the first so many; 0: all
    neighbours=50,
    alpha=0.5,
    canary_seed=-1,  # of a planted picture (data.name=planted); -1: none
    distance=0.1,  # root mean square over values in [0, 1] within which an image is the planted one
  )
  config.report = dict(num_images=10)
  if "smoke" in names:
    config.data = dict(name="digits")
    config.generated = dict(name="digits")
    config.memorisation.update(num_generated=100, canary_seed=0)
  return config_lib.finish(config, overrides)
