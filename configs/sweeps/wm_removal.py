"""The removal curve: how long a marked diffusion model is to be trained on clean images until its mark is gone.

Of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137) the attack on a model that it leaves out: somebody who has the
weights and images without a mark goes on training.

    python -m jax_trustdiff.main --config=configs/sweeps/wm_removal.py --config.generator=<run of wm_edm.py>/export \\
      --config.codec=<run of wm_codec.py>/export --config.key=<run of wm_embed.py> --config.data_path=<CIFAR-10 npz folder>

Each row starts from the marked model anew and sees so many clean images; wm_detect.py then looks at its samples. The average has a half-life of a
twentieth of these, so that it has forgotten the marked parameters: with a longer one their lag would be taken for the mark.

Variants: cpu (a model of wm_edm.py:cpu, Fashion-MNIST), smoke (one step of a model that carries nothing: it tries the machinery).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The sweep; 'cpu' for two cores, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  edm, data, images = (
    "configs/wm_edm.py:short,train.num_validation=512",
    "data.name=npz,data.path={data}",
    (50_000, 200_000, 1_000_000, 5_000_000),
  )
  start = "init_from={generator}"
  detect = "configs/wm_detect.py:codec={codec},key.file={key},detect.num_images=1024"
  if "cpu" in names:
    edm, data, images = "configs/wm_edm.py:cpu", "data.name=idx,data.path={data}", (6_400, 12_800, 25_600)
    detect = "configs/wm_detect.py:codec={codec},key.file={key},detect.num_images=256,sampler.num_steps=12"
  if "smoke" in names:
    edm, data, images, start = (
      "configs/wm_edm.py:smoke,model.channel_mult=(1,)",
      "data.name=digits",
      (32,),
      "seed=0",
    )
    detect = "configs/wm_detect.py:smoke,detect.num_images=32,sampler.num_steps=2"
  train = f"{edm},{data},{start},watermark.required=False,eval.num_samples=0,schedule.rampup_images=0"
  rows = {
    # an average that forgets the marked parameters: whoever removes a mark takes no others
    f"{count}_clean_images": f"{train},train.num_images={count},ema.half_life={max(1, count // 20)}"
    for count in images
  }
  columns = {
    "bit accuracy": "detect:bit_accuracy",
    "bits of all together": "detect:matches",
    "log10 p": "detect:log10_p",
    "held-out loss": "train:loss",
  }
  config = ConfigDict()
  config.task = "sweep"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = ""
  config.data_path = "data/fashion_mnist" if "cpu" in names else "data/cifar10"
  config.generator = ""
  config.codec = ""
  config.key = ""
  config.title = "A mark under further training on clean images"
  config.baseline = ""
  config.curve = ""
  config.bars = ("bit accuracy",)
  pictures = {
    "bits that agree with the key": "{row}-detect/report/matches.png",
    "samples": "{row}-detect/report/images.png",
  }
  config.update(config_lib.in_order(stages={}, rows=rows, columns=columns, pictures=pictures))
  config.update(evaluations=dict(detect=f"{detect},init_from={{row}}/export"), published={})
  return config_lib.finish(config, overrides)
