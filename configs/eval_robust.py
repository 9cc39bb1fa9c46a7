"""Robust accuracy of a classifier: clean, PGD-40 and AutoAttack, for any trained or published network.

    python -m jax_trustdiff.main --config=configs/eval_robust.py --config.init_from=<run>/export \
      --config.data.path=<CIFAR-10 npz folder>

AutoAttack is that of Croce and Hein 2020 (arXiv:2003.01690): APGD-CE, APGD-T, FAB-T and Square, each on the images that the
ones before left; attack.version also knows 'plus', 'rand', 'rapid' (the first two: 'rapid' may not be called AutoAttack) and
'custom' with attack.attacks=('apgd_ce', 'square'). Linf, L2 and L1. A run that was cut off goes on where it was.

init_from is the export folder of a classifier; a torch checkpoint (.pt, .pth, .safetensors) of the network that the section
`model` describes, under the names of DM-Improves-AT and RobustBench; or an .npz file with a graph of ONNX operators.
result.json holds the accuracies with intervals, and a record of every image; adversarial.npz the images found.

Cost: for an image that withstands, 11,630 evaluations of the classifier (a gradient counted as two more).

Variants: l2 (128/255); l1 (12); robustbench (the WRN-28-10 of Wang et al. 2023 on all of CIFAR-10 beside its entry:
robustbench.leaderboard is a JSON file of entries, init_from the published checkpoint; published: 92.44 % clean, 67.31 %);
cpu (1000 images); digits (the bundled digits, Linf 0.15); smoke (seconds: a freshly initialised network on the bundled digits).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("l2", "l1", "robustbench", "cpu", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with its variants, e.g. 'l2,cpu'."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "evaluate_robustness"
  config.seed = 0
  config.seeds = ""
  config.init_from = (
    ""  # an export, a torch checkpoint, an .npz graph, or 'untrained': a fresh network of `model`
  )
  config.mesh = dict(data=-1, model=1, shard=1)
  config.model = dict(  # of a torch checkpoint; an export says it itself
    name="wide_resnet",
    depth=28,
    width=10,
    activation="swish",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
    patch=1,
    dtype="float32",
    remat=False,
    bn_groups=1,
  )
  config.data = dict(name="npz", path="data/cifar10", num_classes=10)
  config.attack = dict(
    norm="linf",
    radius=8 / 255,
    version="standard",
    attacks=(),  # of version 'custom', by name: apgd_ce, apgd_dlr, fab, square, apgd_t, fab_t
    num_steps=0,  # of APGD and FAB; 0: 100. Another number is no standard version
    num_queries=0,  # of Square; 0: 5000
  )
  config.eval = dict(
    split="test",
    num_test=0,  # images; 0: all
    batch_size=128,  # images computed at once
    attack=dict(
      name="pgd", norm="linf", radius=8 / 255, step_size=2 / 255, num_steps=40, loss="margin", restarts=1
    ),
    radii=(
      0.25,
      0.5,
      0.75,
      1.5,
      2.0,
      3.0,
    ),  # times that of `attack`, for the curve of accuracy against radius
    fast_attack=False,  # attack in the network's own dtype; every verdict is of float32 all the same
  )
  config.robustbench = dict(leaderboard="", dataset="cifar10", threat="Linf", entry="")
  config.report = dict(num_images=10)
  for name in VARIANTS:
    if name in names:
      globals()[f"_{name}"](config)
  return config_lib.finish(config, overrides)


def _l2(config):
  radius = 128 / 255
  config.attack.update(norm="l2", radius=radius)
  config.eval.attack.update(norm="l2", radius=radius, step_size=15 / 255)
  config.robustbench.threat = "L2"


def _l1(config):
  config.attack.update(norm="l1", radius=12.0)
  config.eval.attack.update(norm="l1", radius=12.0, step_size=1.0)


def _robustbench(config):
  config.robustbench.entry = "Wang2023Better_WRN-28-10"


def _cpu(config):
  config.eval.update(num_test=1000, batch_size=100)


def _digits(config):
  radius = 0.15
  config.data = dict(name="digits")
  config.attack.radius = radius
  config.eval.attack.update(radius=radius, step_size=0.02)
  config.eval.update(batch_size=120, radii=(0.5, 1.5, 2.0))


def _smoke(config):
  config.init_from = "untrained"
  config.data = dict(name="digits")
  config.model.update(depth=10, width=1, mean=(0.5,), std=(0.5,))
  config.attack.update(num_steps=4, num_queries=20)
  config.eval.update(num_test=32, batch_size=16, radii=(0.5,))
  config.eval.attack.num_steps = 3
  config.report.num_images = 4
