"""What is left of a mark after attacks on a model, on how it is sampled, and on its images.

    python -m jax_trustdiff.main --config=configs/wm_attack.py --config.codec=<run of wm_codec.py>/export \\
      --config.key.file=<run of wm_embed.py> --config.init_from=<run of wm_edm.py>/export

Every attack has its strengths in `attacks`; () leaves it out. Attacks on the weights and on the sampler need init_from; without it the images
are those of `data`. After each: the bit accuracy of single images, the string that all of them carry together with its exact p-value, and,
with reference.name=npz and reference.path=<clean images>, FID. Attacks that are done are kept, so a run that was cut off goes on.

Variants, each with its attacks alone:
  weights   tables 2 of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137): normal noise on all weights. Published
            bit accuracy with 64 bits on AFHQv2: 0.999 up to a standard deviation of 0.007, 0.970 at 0.015. Also rounding and pruning
  images    its table 3: normal noise on images, from 0.01 to 0.3 of [0, 1]. Published with 64 bits on FFHQ: 0.999 up to 0.09, 0.967 at 0.3
  steps     its figure 5: 4 to 40 steps of Heun's method; Euler's, and churn beside it
  waves     the distortions of WAVES (An et al. 2024, arXiv:2401.08573), regeneration by the model itself, and PGD on the decoder
  cpu       two or three strengths of each, 256 images
  smoke     seconds; a freshly initialised codec and model, which carry nothing: it tries the machinery
Without a variant all of them.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

SUITES = ("weights", "images", "steps", "waves")
VARIANTS = (*SUITES, "cpu", "smoke")

WEIGHTS = dict(
  weight_noise=(0.001, 0.003, 0.005, 0.007, 0.009, 0.015),  # standard deviation
  relative_weight_noise=(0.01, 0.03, 0.1),  # of each tensor's root mean square
  bfloat16=(1.0,),
  weight_bits=(8.0, 6.0, 4.0),  # integers of so many
  prune=(0.1, 0.3, 0.5),  # the share of the smallest weights
)
IMAGES = dict(noise=(0.01, 0.05, 0.07, 0.09, 0.15, 0.3))  # standard deviation
STEPS = dict(
  steps=(4.0, 6.0, 8.0, 10.0, 14.0, 18.0, 25.0, 40.0),  # of Heun's method
  euler_steps=(8.0, 18.0, 40.0),
  churn=(40.0,),
)
WAVES = dict(
  rotate=(9.0, 18.0, 27.0, 36.0, 45.0),  # degrees
  crop=(0.05, 0.11, 0.16, 0.23, 0.29),  # of each side: 0.9 to 0.5 of the area are left
  erase=(0.05, 0.1, 0.15, 0.2, 0.25),  # of the area
  brightness=(1.2, 1.4, 1.6, 1.8, 2.0),
  contrast=(1.2, 1.4, 1.6, 1.8, 2.0),
  blur=(0.5, 1.0, 2.0, 4.0),  # radius; WAVES has up to 20 at 512x512
  noise=(0.02, 0.04, 0.06, 0.08, 0.1),
  jpeg=(90.0, 70.0, 50.0, 30.0, 10.0),  # quality
  resize=(0.8, 0.6),  # factor, and back; not in WAVES
  flip=(1.0,),  # not in WAVES
  regenerate=(0.1, 0.3, 0.6),  # sigma, of images in [-1, 1]
  flip_bits=(1 / 255, 2 / 255, 4 / 255, 8 / 255),  # radius of PGD through the decoder
)
CPU = dict(
  weight_noise=(0.001, 0.005, 0.015),
  weight_bits=(8.0, 4.0),
  prune=(0.1, 0.3),
  steps=(4.0, 8.0, 18.0),
  noise=(0.05, 0.1),
  jpeg=(75.0, 50.0),
  crop=(0.05, 0.1),
  rotate=(9.0,),
  blur=(0.5, 1.0),
  brightness=(1.4,),
  regenerate=(0.1, 0.3),
  flip_bits=(2 / 255, 8 / 255),
)
SMOKE = dict(
  weight_noise=(0.015,), weight_bits=(8.0,), prune=(0.1,), steps=(4.0,), noise=(0.1,), jpeg=(75.0,), regenerate=(0.3,),
  flip_bits=(8 / 255,),
)  # fmt: skip


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = config_lib.load(
    "configs/wm_detect.py:smoke" if "smoke" in names else "configs/wm_detect.py"
  ).unlock()
  del config["null"], config.detect["control_keys"]
  config.task = "attack_watermark"
  config.regenerator = ""  # the diffusion model that regenerates; '': that of init_from
  config.regenerate = dict(num_steps=18)  # from the noise level down
  config.flip_bits = dict(num_steps=40)
  config.reference = dict(name="none", path="")  # clean images, for FID
  config.detect.num_images = 1024
  config.detect.num_reference = 0  # the first so many; 0: all
  config.metrics = config_lib.to_plain(config_lib.load("configs/evaluate_generation.py").metrics) | dict(
    fid_only=True
  )
  chosen = [
    dict(weights=WEIGHTS, images=IMAGES, steps=STEPS, waves=WAVES)[name] for name in names if name in SUITES
  ]
  if "cpu" in names or "smoke" in names:
    chosen = chosen or [SMOKE if "smoke" in names else CPU]
  known = {**WEIGHTS, **STEPS, **WAVES, **IMAGES}
  config.attacks = {kind: () for kind in known}
  for suite in chosen or [WEIGHTS, STEPS, IMAGES, WAVES]:
    for kind, strengths in suite.items():
      config.attacks[kind] = tuple(sorted({*config.attacks[kind], *strengths}))
  config.report.num_images = 8
  if "cpu" in names or "smoke" in names:
    config.detect.num_images = 256
    config.sampler.num_steps = 12
    config.regenerate.num_steps = 6
    config.flip_bits.num_steps = 10
    config.metrics.batch_size = 8
  if "smoke" in names:
    config.init_from = "untrained"
    config.reference = dict(name="digits")
    config.metrics.features = dict(name="pixels")
    config.detect.update(num_images=32, num_reference=64)
    config.sampler.num_steps = 2
    config.regenerate.num_steps = 2
  return config_lib.finish(config, overrides)
