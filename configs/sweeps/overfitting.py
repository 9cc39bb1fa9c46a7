"""Robust overfitting with and without generated data: best and last checkpoint, and the gap between them.

The table and the plot of "Better Diffusion Models Further Improve Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638)
about robust overfitting: a WRN-28-10 on CIFAR-10, with TRADES and 400 epochs, with none and with growing amounts of generated data.

    python -m jax_trustdiff.main --config=configs/sweeps/overfitting.py --config.data_path=<CIFAR-10 npz folder> \
      --config.generated=<image store or .npz files of 1 million images>

One command that goes on where it was cut off; a row of the table is as many runs as there are seeds. The published column has the
paper's differences of AutoAttack accuracy between the best checkpoint and the last. Cost: 5.7e18 FLOP for a run.

Variants:
  cpu     Fashion-MNIST (data_path: a folder with its four idx files): a U-Net is trained on 2000 images, makes 10,000, and small
          classifiers are trained on the 2000 with and without them
  smoke   a minute or so; the bundled digits
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")
AMOUNTS = {"50K": 50_000, "100K": 100_000, "200K": 200_000, "500K": 500_000, "1M": 1_000_000}


def get_config(variant: str = "") -> ConfigDict:
  """The sweep; 'cpu' for a small one on Fashion-MNIST."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "sweep"
  config.title = "Robust overfitting"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = "0,1,2"
  config.data_path = "data/cifar10"
  config.generated = "data/generated"
  recipe = "configs/at_cifar.py:data.path={data}"
  rows = {"none": recipe}
  for name, count in AMOUNTS.items():
    rows[name] = f"{recipe},mixing.generated={{generated}},mixing.num_generated={count}"
  config.stages = dict()
  config.rows = rows
  config.evaluations = dict(autoattack="configs/eval_robust.py:init_from={row}/export,data.path={data}")
  config.columns = {
    "best": "train:pgd40_accuracy",
    "last": "train:last/pgd40_accuracy",
    "gap": "train:pgd40_accuracy - train:last/pgd40_accuracy",
    "clean": "train:clean_accuracy",
    "AutoAttack": "autoattack:autoattack_accuracy",
  }
  config.published = {
    "none": "gap 9.1",
    "50K": "gap 6.9",
    "100K": "gap 5.4",
    "200K": "gap 0.8",
    "500K": "about 0",
    "1M": "about 0, AutoAttack 63.35",
  }
  config.curve = "validation/pgd40_accuracy"
  config.epoch_steps = 98
  for name in names:
    globals()[f"_{name}"](config)
  return config_lib.finish(config, overrides)


def _cpu(config):
  data = "data.name=idx,data.path={data},train.num_train=2000"
  config.data_path = "data/fashion_mnist"
  config.stages = dict(
    generator=f"configs/edm_cifar.py:cpu,{data},train.num_validation=0",
    images="configs/generate_cifar.py:cpu,init_from={generator}/export,generate.num_images=10000",
  )
  recipe = (
    f"configs/at_cifar.py:cpu,{data},model.mean=(0.286,),model.std=(0.353,),train.num_validation=500,train.num_epochs=60,"
    "eval.num_test=2000"
  )
  config.rows = dict(none=recipe, generated=f"{recipe},mixing.generated={{images}}/images")
  config.evaluations = dict(
    autoattack="configs/eval_robust.py:cpu,init_from={row}/export,data.name=idx,data.path={data},eval.num_test=2000"
  )
  config.published = dict()
  config.curve = "validation/pgd10_accuracy"
  config.epoch_steps = 32


def _smoke(config):
  config.sweep_seeds = "0,1"
  config.stages = dict(images="configs/generate_cifar.py:smoke")
  recipe = "configs/at_cifar.py:smoke"
  config.rows = dict(none=recipe, generated=f"{recipe},mixing.generated={{images}}/images,mixing.ratio=0.5")
  config.evaluations = dict(autoattack="configs/eval_robust.py:smoke,init_from={row}/export")
  config.columns = {"best": "train:pgd5_accuracy", "last": "train:last/pgd5_accuracy"} | {
    "gap": "train:pgd5_accuracy - train:last/pgd5_accuracy",
    "AutoAttack": "autoattack:autoattack_accuracy",
  }
  config.published = dict(none="nothing")
  config.curve = "validation/pgd2_accuracy"
  config.epoch_steps = 8
