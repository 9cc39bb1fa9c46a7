"""A diffusion model that carries a mark: edm_cifar.py on marked images.

The third step of "A Recipe for Watermarking Diffusion Models" (Zhao et al. 2023, arXiv:2303.10137, table 1): EDM, unconditional, on images
that all carry one string of bits, which its samples then carry too. Published FID 1.97 without a mark, 3.60 with 16 bits and 6.84 with
64, of which 0.98 are read right on average (18 steps, 50,000 samples).

    python -m jax_trustdiff.main --config=configs/wm_edm.py --config.data.path=<run of wm_embed.py>/images

Or without a second copy of the images, marked batch by batch:

    python -m jax_trustdiff.main --config=configs/wm_edm.py --config.data.name=npz --config.data.path=<CIFAR-10 npz folder> \\
      --config.watermark.codec=<run of wm_codec.py>/export --config.watermark.key=<run of wm_embed.py>

FID is against the images of data.path: with the first command marked ones, with the second the images as they were (the mark counts
as an error). Images that are mirrored or cropped lose the mark, so `augment` other than none is refused; augment_pipe, of which the network
is told, is not. wm_detect.py --config.init_from=<this run>/export then looks for the mark in samples.

watermark.required=False trains the twin without a mark.

Variants: those of edm_cifar.py, for example short (20 million images); cpu takes its data from an image store too, of Fashion-MNIST or what
else a small model learns in minutes on two cores. smoke does not ask for a mark.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cond", "short", "brief", "cpu", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cond' is with class labels, the others are those of edm_cifar.py."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  chosen = [name for name in names if name != "cond"]
  config = config_lib.load(f"configs/edm_cifar.py:{','.join(chosen)}" if chosen else "configs/edm_cifar.py")
  config.unlock()
  config.diffusion.conditional = "cond" in names
  config.augment = dict(name="none")
  config.watermark.required = True
  if "smoke" in names:
    config.watermark.required = False
  else:
    config.data = dict(name="image_store", path="", num_classes=0)
  return config_lib.finish(config, overrides)
