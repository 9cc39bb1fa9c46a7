"""Do these images, or the samples of this model, carry the mark?

The last step of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137), with what it leaves out: an exact p-value, a
threshold for a stated rate of false positives, one string out of all images together, and the user among as many as 10^6.

    python -m jax_trustdiff.main --config=configs/wm_detect.py --config.codec=<run of wm_codec.py>/export \\
      --config.key.file=<run of wm_embed.py> --config.data.path=<folder of PNG and JPEG files>

Or of a model: --config.init_from=<run of edm_cifar.py>/export, whose first detect.num_images samples are looked at. Other images:
--config.data.name=image_store, npz and so on. Images that carry no mark (--config.null.name=npz --config.null.path=...) are a cross-check
of the rate of false positives.

Many users, each with a string drawn from one secret: key.secret_file and key.num_users instead of key.file; the verdict says who, and the
p-value is corrected for their number (Sidak 1967).

Writes verdict.json and report/.

Variants: smoke (seconds; the bundled digits and a freshly initialised codec: it tries the machinery).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "detect_watermark"
  config.seed = 0  # of samples
  config.seeds = ""
  config.codec = ""  # the export of a codec, or 'untrained': that of untrained_codec
  config.key = dict(
    file="",  # a key file, or a run that wrote one
    demo=False,  # the published string of the codec's number of bits
    secret_file="",  # the secret that the strings of users 0 to num_users - 1 are drawn from
    num_users=1,
  )
  config.data = dict(name="pictures", path="", size=0, channels=3)  # not used with init_from
  config.null = dict(name="none", path="")  # images without a mark
  config.init_from = ""  # a diffusion model whose samples are looked at: an export, or an EDM snapshot (.pkl)
  config.continuous_times = False
  config.sampler = dict(name="edm", num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0)
  config.detect = dict(
    split="train",
    num_images=0,  # the first so many; 0: all that there are. With init_from: how many samples
    batch_size=256,
    any_size=False,  # also read images of another size than the marked ones, resized
    false_positive_rate=1e-6,
    control_keys=20,  # random strings that nothing was marked with, as a control; 0: none
  )
  config.untrained_codec = dict(  # what codec='untrained' means, for trying the machinery; otherwise not used
    model=dict(name="residual_codec", num_bits=32, width=8, num_blocks=1, strength=0.2, dtype="float32"),
    image_shape=(8, 8, 1),
  )
  # what init_from='untrained' means, likewise
  config.untrained = config_lib.to_plain(config_lib.load("configs/generate_cifar.py").untrained)
  config.report = dict(num_images=36)
  if "smoke" in names:
    _smoke(config)
  return config_lib.finish(config, overrides)


def _smoke(config):
  config.codec = "untrained"
  config.data = dict(name="digits")
  config.key.demo = True
  config.detect.update(num_images=64, batch_size=32)
