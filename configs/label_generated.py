"""Labels generated images with a classifier and chooses the surest: what mixing.labels of at_cifar.py takes.

The generated set of one million images of "Better Diffusion Models Further Improve Adversarial Training" (Wang et al., ICML 2023,
arXiv:2302.04638) is the fifth of five million, 500,000 of each class, of which a standard WRN-28-10 was surest, class by class:

    python -m jax_trustdiff.main --config=configs/label_generated.py --config.init_from=<classifier run>/export \
      --config.generated.path=<image store> --config.label.top_fraction=0.2
    python -m jax_trustdiff.main --config=configs/at_cifar.py --config.mixing.generated=<image store> \
      --config.mixing.labels=<this run>/labels.npz

generated.path lists image stores, .npz files and folders of them by commas, or by a pattern. label.whose='given' keeps the labels
with which images were generated and orders them by the probability of that label, as above; 'predicted' gives every image the label
that the classifier sees, for a model without classes. label.soft also stores all probabilities, for mixing.soft_labels.

Cost: one evaluation of the classifier for each image; 4 bytes of memory for each class and image.

Variants: smoke (seconds: a fresh network on the bundled digits).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' to try it."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "label_generated"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export, a torch checkpoint of the network below, an .npz graph, or 'untrained'
  config.mesh = dict(data=-1, model=1, shard=1)
  config.model = dict(  # of a torch checkpoint; an export says it itself
    name="wide_resnet",
    depth=28,
    width=10,
    activation="swish",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    patch=1,
    dtype="float32",
    remat=False,
    bn_groups=1,
  )
  config.generated = dict(name="parts", path="data/generated", num_classes=0)
  config.label = dict(
    whose="given",  # or 'predicted'
    top_fraction=1.0,  # of each class, by the probability of the label; 1: all
    soft=False,
    chunk_size=50_000,  # images after which what is done is kept
  )
  config.eval = dict(split="train", num_images=0, batch_size=500)  # num_images 0: all
  config.report = dict(num_images=5)
  if "smoke" in names:
    config.init_from = "untrained"
    config.generated = dict(name="digits")
    config.model.update(depth=10, width=1, mean=(0.5,), std=(0.5,))
    config.label.update(top_fraction=0.2, soft=True, chunk_size=200)
    config.eval.update(num_images=500, batch_size=100)
    config.report.num_images = 3
  return config_lib.finish(config, overrides)
