"""Marks the images of a data set with one string of bits, for a diffusion model that is to carry it.

The second step of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137, section 3.2). init_from is the
export of a codec (wm_codec.py); images of any source go in, and an image store with their labels and ids comes out, which
edm_cifar.py reads with data.name=image_store.

    python -m jax_trustdiff.main --config=configs/wm_embed.py --config.init_from=<run of wm_codec.py>/export \\
      --config.data.path=<CIFAR-10 npz folder>

Writes images/ (the store), key.json (keep it: whoever has it can prove, and forge, the mark) and report/. Every image is read back from
the disk; the store is complete only if embed.least_bit_accuracy of the bits are read right. A run that was stopped or killed goes on
with the same command and ends in the same store.

The string is random if nothing is said of it. key.demo=True takes the one published with the paper, which proves nothing;
key.secret_file and key.user take a user's string out of as many as there are users.

key.payload=1234 makes the string a code word of that number (BCH, masked by the secret; needs pip install 'jax_trustdiff[ecc]'), which
wm_detect.py reads with the key file.

Variants: smoke (seconds; the bundled digits and a freshly initialised codec, which nobody reads: it tries the machinery).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "embed_watermark"
  config.seed = 0  # of the codec of init_from='untrained' alone
  config.seeds = ""
  config.init_from = ""  # the export of a codec, or 'untrained': that of untrained_codec
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.key = dict(
    file="",  # a key file, or a run that wrote one
    demo=False,  # the published string of 4, 8, 16, 32, 64 or 128 bits
    secret_file="",  # a text file with a long random secret, from which every user's string is drawn
    user=0,
    payload=-1,  # a number that the string says, even where some of its bits are read wrong; -1: it says nothing
    num_errors=3,  # how many may be, with a payload
  )
  config.embed = dict(
    split="train",
    num_images=0,  # the first so many; 0: all
    images_per_shard=5000,
    batch_size=1024,
    any_size=False,  # also mark images of another size than the codec's, by resizing the mark
    least_bit_accuracy=0.999,
    store="",  # the folder of the image store; '': images/ in the workdir
    worker=0,
    num_workers=1,
    verify=False,  # compare the hashes of what is there, not only its sizes
  )
  config.untrained_codec = (
    dict(  # what init_from='untrained' means, for trying the machinery; otherwise not used
      model=dict(name="residual_codec", num_bits=8, width=8, num_blocks=1, strength=0.2, dtype="float32"),
      image_shape=(8, 8, 1),
    )
  )
  config.report = dict(num_images=8)
  if "smoke" in names:
    config.init_from = "untrained"
    config.data = dict(name="digits")
    config.embed.update(num_images=96, images_per_shard=32, batch_size=32, least_bit_accuracy=0.0)
  return config_lib.finish(config, overrides)
