"""The whole story on scikit-learn's bundled digits: a diffusion model makes images, and classifiers are trained with them.

    python -m jax_trustdiff.main --config=configs/quickstart.py

Trains an EDM diffusion model on 200 digits of 8x8 pixels (edm_cifar.py:digits) and lets it make 2000 more; trains a WRN-10-1 on the
200 as usual, with TRADES (Linf 0.15), and with TRADES on real and generated digits (at_cifar.py:digits); attacks all three with
PGD-40 on 360 held-out digits and with AutoAttack on the first 60 of these (eval_robust.py:digits); and writes report/report.html. A
sweep of one seed: `sweep_seeds=0,1,2` repeats the classifiers. Four minutes on two CPU cores; nothing is downloaded.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)
FEW = "train.num_train=328,train.num_validation=128,train.validation_split=first"  # 200 digits to train on, for all


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' trains a few steps only."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  stages = dict(
    diffusion=f"configs/edm_cifar.py:digits,{FEW},train.num_images=51200,metrics.kid_subset_size=100",
    images="configs/generate_cifar.py:cpu,init_from={diffusion}/export,generate.num_images=2000",
  )
  training = f"configs/at_cifar.py:digits,{FEW},train.num_epochs=80,train.validate_every_epochs=8"
  evaluation = (
    "configs/eval_robust.py:digits,init_from={row}/export,eval.num_test=60,eval.batch_size=60,eval.radii=()"
  )
  pgd = "pgd40"
  if "smoke" in names:
    stages = dict(
      diffusion="configs/edm_cifar.py:smoke,model.channel_mult=(1,)",
      images="configs/generate_cifar.py:smoke,init_from={diffusion}/export",
    )
    training += (
      ",train.num_epochs=2,train.num_train=256,train.num_validation=64,train.validate_every_epochs=1"
    )
    training += ",eval.num_test=120,eval.attack.num_steps=5"
    evaluation += ",eval.num_test=30,eval.batch_size=30,eval.radii=(0.5,),eval.attack.num_steps=5"
    evaluation += ",attack.version=rapid,attack.num_steps=4"
    pgd = "pgd5"
  rows = dict(
    standard=f"{training},objective.name=standard,objective.label_smoothing=0.0",
    trades=training,
    trades_and_generated=f"{training},mixing.generated={{images}}/images",
  )
  columns = {"clean": "train:clean_accuracy", pgd: f"train:{pgd}_accuracy", "autoattack": "autoattack:robust"}
  config = ConfigDict()
  config.task = "sweep"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = ""  # '0,1,2': three seeds of the classifiers
  config.title = "Standard and adversarial training, with and without generated digits"
  config.baseline = "trades"
  config.curve = "validation/pgd10_accuracy"
  config.bars = tuple(columns)
  pictures = {
    "generated digits, one of each class in turn": "{images}/report/samples.png",
    "the digits they were learned from": "{diffusion}/report/training_images.png",
    "clean, adversarial, amplified difference": "{row}/report/adversarial_images.png",
    "training and validation": "{row}/report/training_curves.png",
  }
  config.update(config_lib.in_order(stages=stages, rows=rows, columns=columns, pictures=pictures))
  config.update(evaluations=dict(autoattack=evaluation), published={})
  return config_lib.finish(config, overrides)
