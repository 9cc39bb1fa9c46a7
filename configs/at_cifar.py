"""Adversarial training of a WideResNet-28-10 on CIFAR-10, Linf 8/255, with TRADES.

Reproduces the row "no generated data" of "Better Diffusion Models Further Improve Adversarial Training"
(Wang et al., ICML 2023, arXiv:2302.04638): TRADES with beta 5, 10 steps of 2/255, SiLU, label smoothing 0.1,
weight averaging 0.995, SGD-Nesterov with a one-cycle schedule to 0.2, batch 512, 400 epochs, the best checkpoint by
PGD-40 on 1024 validation images.

    python -m jax_trustdiff.main --config=configs/at_cifar.py --config.data.path=<CIFAR-10 npz folder>

Published: 84.41 % clean, 54.57 % under AutoAttack (best), robust overfitting after about a quarter of the epochs.
Cost: 27 forward passes for each image, 5.7e18 FLOPs in all.

Other objectives: --config.objective.name=standard, pgd_at, mart, score, consistency or ikl (whose first epoch has a
uniform table). Adversarial weight perturbation goes with any of them: --config.train.awp_gamma=0.005 (Wu et al. 2020).
Other augmentations: --config.augment.name=cutout, auto_augment, rand_augment or idbh; CutMix is train.cutmix=4 with
train.batch_size=128, whose steps see 512 images.
Generated data: --config.mixing.generated=<image store> (README). Soft labels of label_generated.py are meant for
objective.mixed_target=False: with True, which is for CutMix, the attack moves images away from their labels. Beside soft labels
nothing is smoothed: objective.label_smoothing is of classes, and real images are then certain of theirs.

Variants: l2 (128/255), cifar100, svhn, tinyimagenet, wrn70_16, preact18; cpu (a WRN-10-1 with PGD-2 for two epochs,
about ten minutes on two cores: 52 % clean, 28 % under PGD-40 of 1000 test images); digits (a WRN-10-1 on the bundled
digits, Linf 0.15, half a minute); smoke (seconds; the bundled digits
unless data.path is given).
The folder holds train*.npz and test*.npz with `image` uint8 [n, h, w, 3] and `label`; every other source of
jax_trustdiff/data/sources.py is a matter of --config.data.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("l2", "cifar100", "svhn", "tinyimagenet", "wrn70_16", "preact18", "cpu", "digits", "smoke")

# Mean and standard deviation that the original's networks subtract and divide by.
NORMALISATION = {
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
  "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
  "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "tinyimagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with its variants, e.g. 'l2,wrn70_16' or 'cpu,train.num_epochs=8'."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  mean, std = NORMALISATION["cifar10"]
  config = ConfigDict()
  config.task = "train_classifier"
  config.seed = 0
  config.seeds = ""  # '0,1,2' runs three seeds and reports mean and interval
  config.init_from = ""  # an export, or a torch checkpoint, to start from
  config.mesh = dict(data=-1, model=1, shard=1, rules=((".*", "replicate"),))
  config.model = dict(
    name="wide_resnet",
    depth=28,
    width=10,
    activation="swish",
    mean=mean,
    std=std,
    patch=1,  # pixels a side that are the channels of one position, for small machines
    dtype="bfloat16",  # of convolutions and activations; everything else is float32
    remat=False,
    bn_groups=1,
  )
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.mixing = dict(
    generated="",  # image stores, .npz files or folders of them, by commas or patterns (1m_part*.npz); '': none
    ratio=0.3,  # of real images in a batch
    walk="with_replacement",  # as the original draws; 'permutation': all images of a part before any comes again
    num_generated=0,  # the first so many; 0: all
    labels="",  # labels.npz of label_generated.py: other labels, and those images alone of which it is surest
    soft_labels=False,  # its probabilities in place of its labels
  )
  config.augment = dict(name="pad_crop_flip", pad=4, flip=True)
  config.objective = dict(
    name="trades",
    beta=5.0,
    label_smoothing=0.1,
    norm="linf",
    radius=8 / 255,
    step_size=2 / 255,
    num_steps=10,
    mixed_target=True,
  )
  config.optimizer = dict(name="sgd", weight_decay=5e-4, nesterov=True, no_decay="norm", clip_norm=0.0)
  config.schedule = dict(name="one_cycle_epochs", learning_rate=0.2, warmup_fraction=0.025)
  config.train = dict(
    batch_size=512,
    num_epochs=400,
    num_train=0,  # cut the training split to so many images; 0: all
    num_validation=1024,
    validation_split="first",  # which images are held out: 'first' of the training split, or 'random'
    resident="auto",  # images on the devices: 'auto', 'yes', 'no'
    accumulate=1,  # micro-batches a step
    steps_per_dispatch=1,
    bn_momentum=0.01,
    ema_decay=0.995,
    ema_warmup_fraction=0.025,
    awp_gamma=0.0,  # adversarial weight perturbation of that size relative to each weight; 0: off
    awp_warmup_epochs=0,
    cutmix=0,  # every batch is mixed so many times by CutMix, and trained on all; the original: 4 of 128 images. 0: not at all
    log_every=50,
    checkpoint_every=1000,
    validate_every_epochs=1,
    profile="",  # 'first:last' steps to trace into workdir/profile
  )
  config.eval = dict(
    attack=dict(
      name="pgd", norm="linf", radius=8 / 255, step_size=2 / 255, num_steps=40, loss="margin", restarts=1
    ),
    validation_attack=dict(
      name="pgd", norm="linf", radius=8 / 255, step_size=2 / 255, num_steps=40, loss="margin", restarts=1
    ),
    batch_size=512,
    num_test=0,
  )
  config.report = dict(num_images=10)

  for name in VARIANTS:  # in this order, whatever the order in which they were given
    if name in names:
      _VARIANTS[name](config)
  return config_lib.finish(config, overrides)


def _l2(config):
  radius = 128 / 255
  config.objective.update(norm="l2", radius=radius, step_size=radius / 5)
  for attack in (config.eval.attack, config.eval.validation_attack):
    attack.update(norm="l2", radius=radius, step_size=15 / 255)


def _cifar100(config):
  _data(config, "cifar100", 100)
  config.augment = dict(name="pad_crop_flip_rotate", pad=4, flip=True, degrees=15.0)


def _svhn(config):
  _data(config, "svhn", 10)
  config.augment = dict(name="none")
  config.objective.beta = 6.0


def _tinyimagenet(config):
  _data(config, "tinyimagenet", 200)
  config.objective.beta = 8.0
  config.model.remat = True


def _data(config, name, num_classes):
  config.data.update(path=f"data/{name}", num_classes=num_classes)
  config.model.mean, config.model.std = NORMALISATION[name]


def _wrn70_16(config):
  config.model.update(depth=70, width=16, remat=True)


def _preact18(config):
  config.model = dict(
    name="preact_resnet",
    depth=18,
    width=64,
    activation="swish",
    mean=config.model.mean,
    std=config.model.std,
    dtype="bfloat16",
    remat=False,
    bn_groups=1,
  )


def _cpu(config):
  """WRN-10-1 with PGD-2: a useful result in minutes on two cores.

  Two epochs are few, so images are flipped and not shifted, the rate is high, and two steps of 5/255 replace ten.
  """
  if config.model.name == "wide_resnet":
    config.model.update(depth=10, width=1)
  else:
    config.model.width = 8
  config.model.dtype = "float32"
  radius = config.objective.radius
  config.objective = dict(
    name="pgd_at",
    norm=config.objective.norm,
    radius=radius,
    step_size=radius * 5 / 8,
    num_steps=2,
    keep_clean=False,
    label_smoothing=0.0,
  )
  config.schedule = dict(name="one_cycle", learning_rate=0.2, warmup_fraction=0.25)
  config.augment = dict(name="flip")
  config.train.update(batch_size=64, num_epochs=2, num_validation=256, log_every=25, checkpoint_every=200)
  config.eval.validation_attack.num_steps = 10
  config.eval.update(num_test=1000, batch_size=250)


def _digits(config):
  """TRADES with Linf 0.15 on scikit-learn's bundled digits, 8x8 pixels."""
  _cpu(config)
  radius = 0.15
  config.data = dict(name="digits")
  config.model.update(mean=(0.3,), std=(0.4,))
  config.augment = dict(name="none")
  config.objective = dict(
    name="trades",
    beta=6.0,
    label_smoothing=0.1,
    norm="linf",
    radius=radius,
    step_size=0.04,
    num_steps=6,
    mixed_target=True,
  )
  config.schedule = dict(name="one_cycle", learning_rate=0.1, warmup_fraction=0.25)
  config.train.update(
    num_epochs=12,
    num_validation=128,
    bn_momentum=0.1,
    ema_decay=0.98,
    log_every=10,
    checkpoint_every=100,
    validate_every_epochs=4,
  )
  for attack in (config.eval.attack, config.eval.validation_attack):
    attack.update(radius=radius, step_size=0.02)
  config.eval.update(num_test=0, batch_size=120)


def _smoke(config):
  _cpu(config)
  config.data = dict(name="npz_or_digits", path="", num_classes=10)
  config.model.update(mean=(0.5,), std=(0.25,))
  config.augment = dict(name="none")
  config.objective.num_steps = 2
  config.train.update(
    batch_size=64, num_epochs=2, num_train=512, num_validation=64, log_every=2, checkpoint_every=4
  )
  config.eval.validation_attack.num_steps = 2
  config.eval.attack.num_steps = 5
  config.eval.update(num_test=64, batch_size=64)
  config.report.num_images = 4


_VARIANTS = {name: globals()[f"_{name}"] for name in VARIANTS}
