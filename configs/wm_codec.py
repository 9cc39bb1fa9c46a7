"""A watermark codec: networks that write a string of bits into an image and read it back.

The codec of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137) and of "Artificial
Fingerprinting for Generative Models" (Yu et al. 2021, arXiv:2007.08457) is the variant 'stamp'. The one here adds a
bounded residual to the image, sees images as the bytes they will be, and is trained through JPEG, crops, blur and the
like (Tancik et al. 2020, arXiv:1904.05343).

    python -m jax_trustdiff.main --config=configs/wm_codec.py --config.data.path=<CIFAR-10 npz folder>

Writes export/ (the codec), report/ and, for every attempt that did not learn to be read, a folder not-learned-<n>.

Variants:
  stamp    the original architecture and schedule: 64 bits, batches of 64, 100 epochs, no distortions
  cpu      16 bits, for two cores
  smoke    seconds; the bundled digits
'stamp,cpu' is the original architecture and schedule, cut to the time of 'cpu'.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("stamp", "cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' is for two cores, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "train_codec"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export of this recipe to start from
  config.mesh = dict(data=-1, model=1, shard=1, rules=((".*", "replicate"),))
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.model = dict(
    name="residual_codec",
    num_bits=64,
    width=64,
    num_blocks=2,
    strength=0.2,  # of a pixel in [0, 1], the largest change
    dtype="float32",
  )
  config.gate = dict(
    opens_above=0.9,  # bit accuracy of a batch
    wait=200,  # steps from there until the image begins to count
    ramp=1800,  # steps until it counts in full
    largest=40.0,
  )
  config.distortions = dict(  # of each batch one, or none, of a strength between the two; (): never
    jpeg=(50.0, 95.0),  # quality
    crop=(0.0, 0.2),  # the part of each side that is cut off
    resize=(0.6, 1.0),  # factor, and back
    rotate=(0.0, 10.0),  # degrees, either way
    blur=(0.0, 1.0),  # standard deviation in pixels
    noise=(0.0, 0.08),  # standard deviation
    brightness=(0.7, 1.3),  # factor
    contrast=(0.7, 1.3),  # factor
    saturation=(),  # factor
    hue=(0.0, 0.1),  # turns, either way
    erase=(0.0, 0.15),  # the part of the image
    flip=(),  # the probability
  )
  config.optimizer = dict(
    name="adamw", weight_decay=0.0, b1=0.9, b2=0.999, no_decay="", clip_norm=1.0, eps=1e-8
  )
  config.schedule = dict(name="rampup", learning_rate=1e-3, rampup_images=12_800, decay_images=640_000)
  config.ema = dict(
    half_life=64_000,  # images
    rampup_ratio=0.05,  # 0: none; not used with init_from
  )
  config.train = dict(
    batch_size=128,
    num_images=5_000_000,
    num_train=0,  # cut the training split to so many images; 0: all
    num_validation=1000,  # held out
    validation_split="random",
    quantised=True,  # the decoder sees bytes
    learned_by=3000,  # steps (0: never) after which, or at whose end, an attempt whose bit accuracy is below
    learned_above=0.75,  # this begins anew with another seed,
    max_restarts=4,  # so many times
    resident="auto",
    accumulate=1,
    steps_per_dispatch=50,
    log_every=100,
    checkpoint_every=2000,
    validate_every=1000,  # steps
    profile="",
  )
  config.eval = dict(
    batch_size=512,
    attacks=dict(  # by Pillow, on files of the held-out images
      jpeg=(75.0, 50.0),  # quality
      noise=(0.05, 0.1),  # standard deviation
      crop=(0.1, 0.2),  # the part of each side that is cut off
      resize=(0.7,),  # factor, and back
      rotate=(5.0,),  # degrees
      blur=(1.0,),  # radius
      brightness=(1.3,),  # factor
      contrast=(1.3,),  # factor
      erase=(0.1,),  # the part of the area
      flip=(),  # 1
    ),
  )
  config.report = dict(num_images=8)
  for name in VARIANTS:  # in this order, whatever the order in which they were given
    if name in names:
      globals()[f"_{name}"](config)
  return config_lib.finish(config, overrides)


def _stamp(config):
  """Zhao et al. 2023, released code: Adam at 1e-4, the last parameters and no average."""
  config.model = dict(name="stamp_codec", num_bits=64, dtype="float32")
  config.gate = dict(opens_above=0.9, wait=1000, ramp=3000, largest=10.0)
  for kind in config.distortions:
    config.distortions[kind] = ()
  config.optimizer.clip_norm = 0.0
  config.schedule = dict(name="rampup", learning_rate=1e-4, rampup_images=0, decay_images=0)
  config.ema = dict(half_life=1, rampup_ratio=0.0)
  config.train.update(batch_size=64, num_images=5_000_000, quantised=False)


def _cpu(config):
  """Few steps of a small codec."""
  config.model.num_bits = 16
  config.train.update(steps_per_dispatch=1, validate_every=500, checkpoint_every=500, batch_size=64)
  if config.model.name == "stamp_codec":
    config.train.num_images = 128_000
    return
  config.model.width = 32
  config.train.num_images = 320_000


def _smoke(config):
  config.data = dict(name="digits")
  config.model.num_bits = 8
  if config.model.name == "residual_codec":  # the original one does not take digits
    config.model.update(width=8, num_blocks=1)
  config.gate.update(wait=2, ramp=4)
  config.train.update(
    batch_size=32,
    num_images=320,
    num_train=256,
    num_validation=32,
    learned_by=0,
    steps_per_dispatch=1,
    log_every=2,
    checkpoint_every=5,
    validate_every=5,
  )
  config.eval.batch_size = 16
