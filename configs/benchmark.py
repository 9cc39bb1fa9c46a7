"""Benchmarks: our code beside a peer on the same work, interleaved in one run; ratios are what counts.

    python -m jax_trustdiff.main --config=configs/benchmark.py:at_step
    python -m jax_trustdiff.main --config=configs/benchmark.py:at_step,benchmark.peer_python=python3.11

at_step: the PGD-10 and TRADES-10 training steps of a WRN-16-4 (batch 32), images/s and MFU, beside a PyTorch
implementation of the same step (channels_last) where torch is installed, in this Python or in `peer_python`; and the
cliff of gradient convolutions inside loops on XLA:CPU. Minutes on two cores; rounds are short, so noise shows as the
spread of the ratios.
wrn28_10: the same step at the size of the paper, bfloat16, batch 512: for an accelerator. On a GPU both programs
share its memory, of which jax takes three quarters when it starts unless told otherwise:
XLA_PYTHON_CLIENT_PREALLOCATE=false python -m jax_trustdiff.main --config=configs/benchmark.py:wrn28_10
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("at_step", "wrn28_10", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; without a variant it is at_step."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "benchmark"
  config.seed = 0
  config.seeds = ""
  config.benchmark = dict(
    name="at_step",
    depth=16,
    width=4,
    batch_size=32,
    num_steps=10,
    dtype="float32",
    objectives=("pgd_at", "trades"),
    rounds=5,
    steps_per_round=1,
    peer_python="",  # an interpreter with torch; '': this one, if it has torch
    cliff=True,  # also measure gradient convolutions inside and outside a loop
  )
  if "wrn28_10" in names:
    config.benchmark.update(
      depth=28, width=10, batch_size=512, dtype="bfloat16", steps_per_round=5, cliff=False
    )
  if "smoke" in names:
    config.benchmark.update(depth=10, width=1, batch_size=8, num_steps=2, rounds=2)
  return config_lib.finish(config, overrides)
