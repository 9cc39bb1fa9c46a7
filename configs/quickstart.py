"""Small networks on scikit-learn's bundled digits: a classifier trained as usual, one trained adversarially, a generator.

    python -m jax_trustdiff.main --config=configs/quickstart.py

Trains a WRN-10-1 on 8x8 digits twice, attacks both with PGD-40 (Linf 0.15) on the held-out digits, trains an EDM diffusion
model (the recipe edm_cifar.py:digits) and samples it, and writes report/report.html. Minutes on two CPU cores; nothing is
downloaded.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' trains a few steps only."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  radius = 0.15
  attack = dict(
    name="pgd", norm="linf", radius=radius, step_size=0.02, num_steps=40, loss="margin", restarts=1
  )
  config = ConfigDict()
  config.task = "quickstart"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""
  config.mesh = dict(data=-1, model=1, shard=1, rules=((".*", "replicate"),))
  config.model = dict(
    name="wide_resnet",
    depth=10,
    width=1,
    activation="swish",
    mean=(0.3,),
    std=(0.4,),
    dtype="float32",
    remat=False,
    bn_groups=1,
  )
  config.data = dict(name="digits")
  config.mixing = dict(
    generated="", ratio=0.3, walk="with_replacement", num_generated=0, labels="", soft_labels=False
  )
  config.augment = dict(name="none")
  config.objectives = dict(
    standard=dict(name="standard", label_smoothing=0.0),
    trades=dict(
      name="trades",
      beta=6.0,
      label_smoothing=0.1,
      norm="linf",
      radius=radius,
      step_size=0.04,
      num_steps=6,
      mixed_target=True,
    ),
  )
  config.optimizer = dict(name="sgd", weight_decay=5e-4, nesterov=True, no_decay="norm", clip_norm=0.0)
  config.schedule = dict(name="one_cycle", learning_rate=0.1, warmup_fraction=0.25)
  config.train = dict(
    batch_size=64,
    num_epochs=12,
    num_train=0,
    num_validation=128,
    validation_split="first",
    resident="auto",
    accumulate=1,
    steps_per_dispatch=1,
    bn_momentum=0.1,
    ema_decay=0.98,
    ema_warmup_fraction=0.025,
    awp_gamma=0.0,  # adversarial weight perturbation of that size relative to each weight; 0: off
    awp_warmup_epochs=0,
    cutmix=0,
    log_every=10,
    checkpoint_every=100,
    validate_every_epochs=4,
    profile="",
  )
  config.eval = dict(attack=attack, validation_attack=attack | dict(num_steps=10), batch_size=120, num_test=0)
  config.report = dict(num_images=10)
  config.diffusion = config_lib.load("configs/edm_cifar.py:digits").copy_and_resolve_references()
  if "smoke" in names:
    config.train.update(num_epochs=2, num_train=256, num_validation=64, validate_every_epochs=1)
    config.eval.update(num_test=120)
    config.eval.attack.num_steps = 5
    config.diffusion = config_lib.load("configs/edm_cifar.py:smoke").copy_and_resolve_references()
  return config_lib.finish(config, overrides)
