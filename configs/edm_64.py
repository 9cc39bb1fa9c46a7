"""EDM at 64x64: FFHQ, AFHQv2, ImageNet and Tiny-ImageNet with the settings of Karras et al. 2022, table 7.

    python -m jax_trustdiff.main --config=configs/edm_64.py:ffhq --config.data.path=<folder of class folders of images>
    python -m jax_trustdiff.main --config=configs/edm_64.py:imagenet --config.data.path=<folder with train/class/*.JPEG>

"Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., NeurIPS 2022, arXiv:2206.00364):

  ffhq          DDPM++, 200 million images, unconditional; published FID 2.39 with 40 steps of Heun (79 evaluations)
  afhqv2        the same with dropout 0.25; published FID 1.96
  imagenet      ADM, class-conditional, 2.5 billion images; published FID 1.36 with 256 stochastic steps (511 evaluations)
  tinyimagenet  ADM, class-conditional with augmentation: the generator of the Tiny-ImageNet rows of "Better Diffusion Models
                Further Improve Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638)
  ncsnpp        the other network, for ffhq and afhqv2

Without a variant it is ffhq. Images of other sizes are resized to 64 on the shorter side and cut to the centre. Cost: 84 GFLOP
a forward evaluation for DDPM++, 219 for ADM. smoke: seconds, the bundled digits and a small network.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("ffhq", "afhqv2", "imagenet", "tinyimagenet", "ncsnpp", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with its variants."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  # `smoke` is what it is for CIFAR-10, with the settings below where they do not set the cost.
  config = config_lib.load(
    "configs/edm_cifar.py:smoke" if "smoke" in names else "configs/edm_cifar.py"
  ).unlock()
  _ffhq(config)
  for name in VARIANTS[1:-1]:
    if name in names:
      globals()[f"_{name}"](config)
  if "smoke" in names:
    _shrink(config)
  return config_lib.finish(config, overrides)


def _images(config, path):
  config.data = dict(name="image_folder", path=path, size=64, num_classes=0)


def _ffhq(config):
  _images(config, "data/ffhq64")
  config.diffusion.conditional = False
  config.model.update(channel_mult=(1, 2, 2, 2), dropout=0.05)
  config.augment_pipe = dict(name="edm", probability=0.15)
  config.schedule.learning_rate = 2e-4
  config.sampler.num_steps = 40
  config.train.batch_size = 256


def _afhqv2(config):
  config.data.path = "data/afhqv2"
  config.model.dropout = 0.25


def _adm(config, dropout):
  config.diffusion.conditional = True
  config.model.update(
    name="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attention_resolutions=(32, 16, 8)
  )
  config.model.update(dropout=dropout, remat=True)


def _imagenet(config):
  _images(config, "data/imagenet")
  _adm(config, dropout=0.1)
  config.augment_pipe = dict(name="none")
  config.schedule.learning_rate = 1e-4
  config.ema.half_life = 50_000_000
  config.sampler.update(num_steps=256, churn=40.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003)
  config.train.update(batch_size=4096, num_images=2_500_000_000)
  config.metrics.fid_only = True  # the features of all training images would take 10 GiB


def _tinyimagenet(config):
  _images(config, "data/tinyimagenet")
  _adm(config, dropout=0.1)
  config.schedule.learning_rate = 1e-4


def _ncsnpp(config):
  config.model.name = "ncsnpp"


def _shrink(config):
  """Back to the digits and the small network of edm_cifar.py:smoke; what a variant chose beside them stays."""
  small = config_lib.load("configs/edm_cifar.py:smoke")
  config.data = config_lib.to_plain(small.data)
  config.model.update(
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attention_resolutions=(8,),
    remat=False,
    dtype="float32",
  )
  config.sampler.num_steps = 4
  config.train = config_lib.to_plain(small.train)
