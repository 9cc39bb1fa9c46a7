"""A mark from the codec to the verdict: train the codec, mark a data set, train a diffusion model on it, find the mark in its samples, attack it.

"A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137) on CIFAR-10, with its unmarked twin beside it: the same
diffusion model on the same images as they are, in whose samples nothing must be found.

    python -m jax_trustdiff.main --config=configs/wm_journey.py --config.data_path=<CIFAR-10 npz folder>

Stages, each a run of its own in a folder of the workdir: codec (wm_codec.py), marked (wm_embed.py), model and twin (wm_edm.py), attacks
(wm_attack.py). Then wm_detect.py looks at the marked images, at samples of the model and of its twin, and at the images as they were:
the table has the bits that agree with the key, log10 of the exact p-value, and the smallest p-value over 20 keys that were never used.
report/report.html shows it all. A run that was stopped goes on with the same command.

Cost: two trainings of edm_cifar.py:short, 20 million images each, on an accelerator.

Variants:
  cpu      Fashion-MNIST (data_path: the folder with its four idx files), a key of 32 bits and small models: 33 to 37 minutes of two cores
  smoke    seconds; the bundled digits and a few steps of everything: it tries the machinery
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' for two cores, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  data = "data.name=npz,data.path={data}"
  codec, embed, edm = "configs/wm_codec.py:", "configs/wm_embed.py:", "configs/wm_edm.py:short"
  detect, attack, few = "detect.num_images=1024", "configs/wm_attack.py:", ""
  if "cpu" in names:
    data = "data.name=idx,data.path={data}"
    codec = "configs/wm_codec.py:cpu,model.num_bits=32,train.num_images=256000,"
    edm = "configs/wm_edm.py:cpu,eval.num_samples=0,train.validate_every=500"
    detect = "detect.num_images=256,sampler.num_steps=12"
    attack = "configs/wm_attack.py:cpu,"
  if "smoke" in names:
    data = "data.name=digits"
    codec = "configs/wm_codec.py:smoke,"
    embed = "configs/wm_embed.py:smoke,embed.num_images=256,embed.images_per_shard=256,"
    edm = "configs/wm_edm.py:smoke,eval.num_samples=0,model.channel_mult=(1,),train.num_images=64"
    edm += ",eval.batch_size=32,eval.num_pictures=32,sampler.num_steps=2"  # the program that makes the images of `detect`
    detect, few = (
      "detect.num_images=32,detect.batch_size=32,sampler.num_steps=2",
      ",detect.false_positive_rate=0.01",
    )
    attack = "configs/wm_attack.py:smoke,"
  looks = f"codec={{codec}}/export,key.file={{marked}},key.demo=False{few}"
  stages = dict(
    codec=f"{codec}{data}",
    marked=f"{embed}{data},init_from={{codec}}/export",
    model=f"{edm},data.name=image_store,data.path={{marked}}/images",
    twin=f"{edm},{data},watermark.required=False",
    attacks=f"{attack}init_from={{model}}/export,{looks}",
  )
  look = f"configs/wm_detect.py:{looks},{detect}"
  rows = dict(
    marked_images=f"{look},data.name=image_store,data.path={{marked}}/images",
    samples_of_the_model=f"{look},init_from={{model}}/export",
    samples_of_its_twin=f"{look},init_from={{twin}}/export",
    images_as_they_were=f"{look},{data}",
  )
  columns = {
    "bit accuracy": "train:bit_accuracy",
    "bits of all together": "train:matches",
    "log10 p": "train:log10_p",
    "smallest p of 20 other keys": "train:control/smallest_p",
  }
  pictures = {
    "images, marked, the difference amplified": "{marked}/report/marked_images.png",
    "the images that were looked at": "{row}/report/images.png",
    "the codec after attacks on its images": "{codec}/report/attacks.png",
    "attacks on the model and its samples": "{attacks}/report/attacks.png",
    "bits that agree with the key": "{row}/report/matches.png",
  }
  config = ConfigDict()
  config.task = "sweep"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = ""
  config.data_path = "data/fashion_mnist" if "cpu" in names else "data/cifar10"
  config.title = "A mark from the codec to the verdict"
  config.baseline = ""
  config.curve = ""
  config.bars = ("bit accuracy",)
  config.update(config_lib.in_order(stages=stages, rows=rows, columns=columns, pictures=pictures))
  config.update(evaluations={}, published={})
  return config_lib.finish(config, overrides)
