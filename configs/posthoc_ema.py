"""The average of any length from the snapshots of a training run, without training again.

    python -m jax_trustdiff.main --config=configs/posthoc_ema.py --config.init_from=runs/edm --config.ema.std=0.08

init_from: the workdir of a finished run that stored power-function averages (its ema/ and export/). Writes export/ with
the average whose weights have the relative standard deviation ema.std (0 .. 0.2887; 0.1 is a tenth of the training), as if
it had been tracked all along (Karras et al. 2024, arXiv:2312.02696, section 3.2). Try a few, and keep that of the best FID.
Seconds.
smoke: no training run is needed. A tiny network's parameters take a random walk of 400 steps, whose snapshots are written
to workdir/random_walk; walk_error is how far the result is from the average tracked along the walk, relative to its norm.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("smoke",)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; it needs config.init_from, the variant 'smoke' does not."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "posthoc_ema"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""
  config.ema = dict(
    std=0.08,  # of the average to make
    step=0,  # after which optimizer step, one that has a snapshot; 0: the last
  )
  config.random_walk = dict(num_steps=0, snapshot_every=25)  # steps of a walk in place of a training run
  if "smoke" in names:
    config.random_walk.num_steps = 400
  return config_lib.finish(config, overrides)
