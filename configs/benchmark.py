"""Benchmarks: our code beside a peer on the same work, interleaved in one run; ratios are what counts.

    python -m jax_trustdiff.main --config=configs/benchmark.py:at_step
    python -m jax_trustdiff.main --config=configs/benchmark.py:sampler,benchmark.peer_python=python3.11

The peer is a PyTorch implementation of the same (channels_last), where torch is installed, in this Python or in
`peer_python`. Rounds are short, so noise shows as the spread of the ratios; rates are medians of the rounds.

at_step: the PGD-10 and TRADES-10 training steps of a WRN-16-4 (batch 32), images/s and MFU; and the cliff of gradient
convolutions inside loops on XLA:CPU. Minutes on two cores.
wrn28_10: the same step at the size of the paper, bfloat16, batch 512: for an accelerator.
sampler: 18 steps of EDM's Heun sampler (35 evaluations) on a DDPM++ U-Net of 1.75 million parameters, 16 images of 32x32,
beside a lax.scan written by hand for it (sampler_beside_scan/ratio is to be at most 1.05) and beside torch. Minutes.
sampler_gpu: the same with the DDPM++ of the paper (55.7 million), bfloat16, batch 256: for an accelerator.
edm_train: a training step of that U-Net, with augmentation and without: EDM loss, Adam, parameter average. Minutes.
edm_train_gpu: the same with the DDPM++ of the paper, bfloat16, batch 256: for an accelerator.
augment: the augmentations (benchmark.names) on batches of 512 images of 32x32, and AutoAugment beside Pillow. Half a
minute; any device.
autoattack: standard AutoAttack (benchmark.graph: a classifier as an .npz graph; benchmark.data_path: CIFAR-10 as .npz files) on
512 images, Linf 2/255, beside the package pyautoattack if the peer has it. Minutes.
autoattack_gpu: a WRN-28-10 with fresh weights of which nothing breaks, 64 random images, attacked in bfloat16 with verdicts of
float32, beside torch's in TF32: for an accelerator. Its robust accuracy means nothing, its time is that of the worst case.
mixture: D of a mixture of eight U-ViT shards through vmap, two or all at once, beside eight calls of one (the better ratio is to be at
most 1.1), and of a shard drawn at random beside one call. Two minutes.
smoke: seconds, with each of them: at_step, 'augment,smoke', 'autoattack,smoke', 'sampler,smoke', 'edm_train,smoke', 'mixture,smoke'.

On a GPU both programs share its memory, of which jax takes three quarters when it starts unless told otherwise:
XLA_PYTHON_CLIENT_PREALLOCATE=false python -m jax_trustdiff.main --config=configs/benchmark.py:wrn28_10
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib
from jax_trustdiff.types import InputError

VARIANTS = (
  *("at_step", "wrn28_10", "augment", "autoattack", "autoattack_gpu", "sampler", "sampler_gpu", "edm_train"),
  *("edm_train_gpu", "mixture", "smoke"),
)


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; without a variant it is at_step."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "benchmark"
  config.seed = 0
  config.seeds = ""
  chosen = [name for name in names if name != "smoke"] or ["at_step"]
  if len(chosen) > 1:
    raise InputError(f"a benchmark runs alone: choose one of {', '.join(chosen)}")
  name = chosen[0].removesuffix("_gpu")
  config.benchmark = {
    "at_step": _at_step,
    "wrn28_10": _at_step,
    "augment": _augment,
    "autoattack": _autoattack,
    "sampler": _sampler,
    "edm_train": _edm_train,
    "mixture": _mixture,
  }[name]()
  if name == "wrn28_10":
    config.benchmark.update(depth=28, width=10, batch_size=512, dtype="bfloat16", steps_per_round=5, cliff=0)
  if chosen[0] == "autoattack_gpu":
    config.benchmark.update(
      depth=28, width=10, attack_dtype="bfloat16", num_images=64, batch_size=64, rounds=1
    )
  elif chosen[0].endswith("_gpu"):
    config.benchmark.update(
      model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, dtype="bfloat16", batch_size=256
    )
  if chosen[0] == "sampler_gpu":  # two torch programs that train do not fit into 80 GB beside ours
    config.benchmark.peer_dtypes = ("float32", "bfloat16")
  if "smoke" in names and config.benchmark.name == "at_step":
    config.benchmark.update(depth=10, width=1, batch_size=8, num_steps=2, rounds=2, cliff=2)
  elif "smoke" in names and name == "augment":
    config.benchmark.update(batch_size=16, rounds=2, batches_per_round=1)
  elif "smoke" in names and name == "autoattack":
    config.benchmark.update(
      depth=10, width=1, num_images=4, radius=0.5, batch_size=4, rounds=1, version="rapid"
    )
  elif "smoke" in names and name == "mixture":
    config.benchmark.update(image_size=8, size="tiny", num_shards=3, batch_size=2, rounds=2, calls_per_round=1)
  elif "smoke" in names:
    config.benchmark.update(
      image_size=8,
      model_channels=16,
      channel_mult=(1,),
      num_blocks=1,
      attention_resolutions=(),
      batch_size=4,
      rounds=2,
    )
  return config_lib.finish(config, overrides)


def _at_step():
  return dict(
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
    cliff=16,  # images whose gradient convolutions are measured inside and outside a loop; 0: none
  )


def _augment():
  return dict(
    name="augment",
    names=(
      "pad_crop_flip",
      "pad_crop_flip_rotate",
      "cutout",
      "cutmix",
      "auto_augment",
      "rand_augment",
      "idbh",
    ),
    image_size=32,
    batch_size=512,
    rounds=5,
    batches_per_round=4,
  )


def _autoattack():
  return dict(
    name="autoattack",
    graph="",  # '': a WideResNet of this depth and width
    depth=16,
    width=1,
    data_path="",
    num_images=512,
    norm="linf",
    radius=2 / 255,
    version="standard",
    attack_dtype="float32",  # of the network that is attacked; verdicts are of float32
    batch_size=128,
    rounds=2,
    peer_python="",
  )


def _network():
  return dict(
    image_size=32,
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_blocks=2,
    attention_resolutions=(16,),
    dtype="float32",
    batch_size=16,
    peer_python="",
    peer_dtypes=("float32",),  # of torch, each a peer of its own; on a GPU float32 means TF32
  )


def _sampler():
  return dict(name="sampler", num_steps=18, rounds=9, **_network())


def _edm_train():
  return dict(name="edm_train", augment=(0.0, 0.12), rounds=9, steps_per_round=4, **_network())


def _mixture():
  return dict(
    name="mixture",
    size="S",
    image_size=32,
    patch_size=2,
    dtype="float32",
    num_shards=8,
    at_once=2,  # of them, through vmap, beside all
    batch_size=4,
    rounds=9,
    calls_per_round=1,
  )
