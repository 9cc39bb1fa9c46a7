"""Copy protection: images of the product of the shards of a compartmentalized diffusion model: see tasks/cdm_protect.py.

    python -m jax_trustdiff.main --config=configs/cdm_protect.py --config.cdm.path=<bundle>

CP-Delta with Delta = KL (Vyas et al. 2023, arXiv:2302.10870). Averaged scores alone (sampler.mcmc=none) are another distribution; Langevin
('ula') or Hamiltonian ('hmc') moves at every noise level lead to the product. Shards have no classes (diffusion.conditional=False).

Cost: 694 evaluations of every shard for an image, 64 levels of 10 moves, and with each shard the log-densities of twice protect.num_images
images, of about 120 evaluations with backward passes each. ':digits' on the five shards of cdm_journey.py took 4 minutes on two CPU cores: k
lies between 29 and 199 nats, and by one effective sample its estimate says nothing.

Variants:
  digits  256 digits
  smoke   a few steps
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'digits' for the digits, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  like = ":" + ",".join(names) if names else ""
  config = config_lib.load(f"configs/cdm_compose.py{like}").unlock()
  config.task = "cdm_protect"
  config.mixture.weights = "equal"
  config.generate.update(num_images=1000, labels="none")
  levels = config_lib.to_plain(config.sampler)
  config.sampler = dict(
    name="product",
    **{
      name: levels[name]
      for name in ("num_steps", "sigma_min", "sigma_max", "rho", "discretization", "round_to")
    },
    mcmc="ula",  # 'none', 'ula', 'hmc'
    mcmc_steps=10,
    step_size=0.1,  # of sigma^2
    mcmc_min=0.0,  # no moves below this noise level
    leapfrogs=3,
    damping=0.7,
  )
  config.own_sampler = dict(
    name="edm", num_steps=32, sigma_min=0.002, sigma_max=80.0, rho=7.0, discretization="edm", round_to=""
  )
  likelihood = config_lib.load("configs/evaluate_likelihood.py")
  config.likelihood = config_lib.to_plain(likelihood.likelihood)
  config.solver = config_lib.to_plain(likelihood.solver)
  config.protect = dict(num_images=256, batch_size=64)  # by which k and the divergences are estimated
  if not names:
    config.sampler.num_steps = 64
  if "digits" in names:
    config.generate.update(num_images=256, images_per_shard=128, batch_size=128, micro_batch=64)
    config.likelihood.data_std = 0.8
  if "smoke" in names:
    config.sampler.mcmc_steps = 1
    config.own_sampler.num_steps = 3
    config.solver.update(rtol=1e-2, atol=1e-2, sigma_min=0.1)
    config.generate.num_images = 32
    config.protect.update(num_images=8, batch_size=8)
  return config_lib.finish(config, overrides)
