"""Generates CIFAR-10 images by the million from a trained diffusion model, into an image store.

    python -m jax_trustdiff.main --config=configs/generate_cifar.py --config.init_from=<run of edm_cifar.py>/export

init_from also takes an EDM snapshot (.pkl). Each image has an id, and its bytes are a function of the model, the sampler,
the seed and that id: the same for any batch size, number of devices and order of work, and after any number of deaths.
One million labelled images of 18 Heun steps is the generated set of "Better Diffusion Models Further Improve
Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638): generate.num_images=1000000.

The store, <workdir>/images or generate.store, is read back by `data.name=image_store`: images, labels, ids in shards,
manifest.json with the SHA-256 of every file. A run that was stopped or killed goes on at its last shard with the same command.
To mend a store that was damaged later, or to see that it is whole, run the same command with another --workdir,
generate.store=<the store> and generate.verify=True, which compares hashes too: what is not as it was is made again.

Several machines: on a TPU pod or under SLURM the processes of one run share the shards out; independent machines run the same
command with generate.store=<a shared folder>, generate.num_workers=4 and generate.worker=0, 1, 2, 3, each with its own --workdir.

A DDPM (edm_cifar.py:ddpm) is sampled by all of its levels with sampler.name=ancestral, sampler.discretization=table,
sampler.num_steps=1000 and sampler.sigma_max=1000.0.

Cost: 35 evaluations of 42 GFLOP an image with the full DDPM++, 1.5 TFLOP; 3 KiB of disk an image.

Variants: cpu (2000 images of a small model, for minutes on two cores: init_from is an export of edm_cifar.py:cpu);
smoke (seconds; 96 images of a freshly initialised tiny network, which are noise: it tries the machinery).
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' for a small model, 'smoke' for none."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  config = ConfigDict()
  config.task = "generate"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # an export, an EDM snapshot (.pkl), or 'untrained': the network of the section below
  # a network that knows whole times only (iDDPM, DDPM) is also told times in between, which are new to it
  config.continuous_times = False
  config.sampler = dict(
    name="edm",
    num_steps=18,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    discretization="edm",
    schedule="linear",
    scaling="none",
    solver="heun",
    alpha=1.0,
    churn=0.0,
    churn_min=0.0,
    churn_max=1e9,
    churn_noise=1.0,
  )
  # classifier-free guidance: D_u + scale (D_c - D_u) at noise levels in (sigma_min, sigma_max]; scale 1: none
  config.guidance = dict(
    scale=1.0,
    sigma_min=0.0,
    sigma_max=1e9,
    classifier="",  # an export of noise_classifier.py: guidance by it, on top of the above; also for a model without classes
    classifier_scale=1.0,
  )
  config.generate = dict(
    num_images=50_000,
    first_id=0,
    labels="balanced",  # id mod classes; or 'random', 'none', the number of a class, or a .npy file with a label for each image
    images_per_shard=1000,
    batch_size=1024,  # images on the way in all devices
    micro_batch=256,  # images of one program on one device; rounding, and so a pixel in ten thousand, depends on it
    dtype="",  # of convolutions and activations: 'bfloat16', 'float32'; '': as the model was trained
    store="",  # the folder of the image store; '': images/ in the workdir
    worker=0,
    num_workers=1,
    verify=False,  # compare the hashes of what is there, not only its sizes
  )
  config.untrained = dict(  # what init_from='untrained' means, for trying the machinery; otherwise not used
    model=dict(
      name="ddpmpp",
      model_channels=8,
      channel_mult=(1,),
      num_blocks=1,
      attention_resolutions=(),
      dropout=0.0,
      label_dropout=0.0,
      dtype="float32",
      remat=False,
    ),
    preconditioning=dict(name="edm", sigma_data=0.5),
    image_shape=(8, 8, 1),
    num_classes=10,
  )
  config.report = dict(num_images=100)
  if "cpu" in names:
    config.sampler.num_steps = 12
    config.generate.update(num_images=2000, images_per_shard=250, batch_size=50, micro_batch=25)
  if "smoke" in names:
    config.init_from = "untrained"
    config.sampler.num_steps = 3
    config.generate.update(num_images=96, images_per_shard=32, batch_size=32, micro_batch=16)
    config.report.num_images = 40
  return config_lib.finish(config, overrides)
