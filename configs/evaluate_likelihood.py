"""Bits per dimension of test images under a trained diffusion model.

    python -m jax_trustdiff.main --config=configs/evaluate_likelihood.py --config.init_from=<run of edm_cifar.py>/export \\
      --config.data.path=<CIFAR-10 npz folder>

The probability-flow ODE of "Score-Based Generative Modeling through Stochastic Differential Equations" (Song et al., ICLR
2021, arXiv:2011.13456, section 4.3) with uniform dequantisation and Hutchinson's estimate of the trace, by steps of its own
for every image. Published for CIFAR-10: 2.99 bits/dim (their deep sub-VP network). A model trained for its samples, as EDM
is, does not reach that.
Cost: one to two hundred evaluations an image, each with a backward pass.

Variants: digits (360 test digits for a run of edm_cifar.py:digits); smoke (seconds; a freshly initialised network, whose
numbers mean nothing).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'digits' and 'smoke' take the bundled digits."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "evaluate_likelihood"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export, an EDM snapshot (.pkl), or 'untrained': the network of the section below
  # a network that knows whole times only (iDDPM, DDPM) is also told times in between, which are new to it
  config.continuous_times = False
  config.mesh = dict(data=-1, model=1, shard=1)
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.likelihood = dict(
    name="ode", trace="hutchinson", num_probes=1, probe="rademacher", data_std=0.5, basis_chunk=16
  )
  config.solver = dict(
    name="adaptive_ode",
    sigma_min=0.002,
    sigma_max=80.0,
    # right to about 0.001 bits/dim; the library's 1e-6 is finer and costs a half more, with a network in bfloat16 far more
    rtol=1e-5,
    atol=1e-5,
    coupled=False,
    max_steps=10_000,
    solver="tsit5",
  )
  config.eval = dict(split="test", num_images=0, batch_size=64, repeats=1)
  config.untrained = dict(
    model=dict(
      name="uvit",
      size="tiny",
      patch_size=4,
      embed_dim=16,
      depth=2,
      num_heads=2,
      mlp_ratio=2,
      label_dropout=0.0,
      dtype="float32",
      remat=False,
    ),
    preconditioning=dict(name="edm", sigma_data=0.5),
    image_shape=(8, 8, 1),
    num_classes=10,
  )
  config.report = dict(num_images=25)
  if "digits" in names or "smoke" in names:
    config.data = dict(name="digits")
    config.likelihood.data_std = 0.85  # root mean square of the digits in [-1, 1]
    config.eval.batch_size = 60
  if "smoke" in names:
    config.init_from = "untrained"
    config.solver.update(rtol=1e-2, atol=1e-2)
    config.eval.update(num_images=16, batch_size=16)
  return config_lib.finish(config, overrides)
