"""A classifier of noisy CIFAR-10 images, to guide a diffusion model to classes.

The method of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, NeurIPS 2021, arXiv:2105.05233, section 4): the
encoder half of ADM's U-Net is trained by cross-entropy on images with the noise of the diffusion model and is told its
level; the gradient of log p(y | x; sigma) by x then guides the sampler (their algorithm 2). They publish no classifier of
CIFAR-10: sizes and numbers here are ours, and positions are averaged where they pool them by attention.

    python -m jax_trustdiff.main --config=configs/noise_classifier.py --config.data.path=<CIFAR-10 npz folder>

    python -m jax_trustdiff.main --config=configs/generate_cifar.py --config.init_from=<run of edm_cifar.py>/export \\
      --config.guidance.classifier=<this run>/export --config.guidance.classifier_scale=2.0

The model may be one without classes (edm_cifar.py:uncond): the classifier then brings them.

Cost: 2.2 GFLOP an image and step, 4.5e16 in all, which has not been run to its end here.

Variants:
  cpu      Fashion-MNIST (data.path: a folder with its four idx files), 9 minutes on a busy core, 5.4 of them its own. Seen on
           2000 held-out images: 82 % right at sigma 0.1, 78 % at 1, 48 % at 5
  digits   the bundled digits, 35 seconds of one core. Seen on 297 held-out images: 98.7 % right at sigma 0.1, 76 % at 1, 19 % at 5
  smoke    seconds; the bundled digits
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' and 'digits' are for two cores, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "train_noise_classifier"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export of this recipe to start from
  config.mesh = dict(data=-1, model=1, shard=1, rules=((".*", "replicate"),))
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.model = dict(
    name="noise_classifier",
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_blocks=2,
    attention_resolutions=(8,),
    channels_per_head=64,
    dropout=0.1,
    dtype="bfloat16",  # of convolutions and attention; everything else is float32
    remat=False,
  )
  config.diffusion = dict(
    preconditioning=dict(name="edm", sigma_data=0.5),  # what the network sees and is told
    loss=dict(name="vp", beta_d=19.9, beta_min=0.1, t_min=1e-5),  # the noise levels of training: DDPM's
  )
  config.augment = dict(name="pad_crop_flip", pad=4, flip=True)
  config.optimizer = dict(
    name="adamw", weight_decay=0.05, b1=0.9, b2=0.999, no_decay="norm|bias", clip_norm=0.0, eps=1e-8
  )
  config.schedule = dict(name="rampup", learning_rate=3e-4, rampup_images=100_000, decay_images=0)
  config.ema = dict(
    half_life=250_000,  # images
    rampup_ratio=0.05,  # 0: none; not used with init_from
  )
  config.train = dict(
    batch_size=256,
    num_images=20_000_000,
    num_train=0,  # cut the training split to so many images; 0: all
    num_validation=2000,  # held out
    validation_split="random",
    resident="auto",
    accumulate=1,
    steps_per_dispatch=1,
    log_every=100,
    checkpoint_every=2000,
    validate_every=4000,  # steps
    profile="",
  )
  config.eval = dict(batch_size=512, sigmas=(0.1, 0.5, 1.0, 2.0, 5.0, 10.0))  # an accuracy at each sigma
  if "cpu" in names:
    _cpu(config)
  if "digits" in names:
    _digits(config)
  if "smoke" in names:
    _smoke(config)
  return config_lib.finish(config, overrides)


def _cpu(config):
  """28x28 greyscale images."""
  config.data = dict(name="idx", path="data/fashion_mnist", num_classes=10)
  config.model.update(
    model_channels=16,
    channel_mult=(1, 2, 4),
    num_blocks=1,
    attention_resolutions=(),
    dropout=0.0,
    dtype="float32",
  )
  config.augment = dict(name="none")
  config.schedule.update(learning_rate=2e-3, rampup_images=10_000)
  config.ema.half_life = 20_000
  config.train.update(
    batch_size=64,
    num_images=128_000,
    log_every=50,
    checkpoint_every=500,
    validate_every=500,
  )


def _digits(config):
  """8x8 digits."""
  _cpu(config)
  config.data = dict(name="digits")
  config.model.update(channel_mult=(2, 2))
  config.train.update(num_validation=297, validate_every=250)
  config.eval.batch_size = 100


def _smoke(config):
  _digits(config)
  config.model.update(model_channels=8, channel_mult=(1, 1))
  config.train.update(
    batch_size=32,
    num_images=320,
    num_train=256,
    num_validation=32,
    log_every=2,
    checkpoint_every=5,
    validate_every=5,
  )
  config.eval.update(batch_size=16, sigmas=(0.1, 1.0))
