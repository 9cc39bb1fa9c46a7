"""Images of a mixture of the shards of a compartmentalized diffusion model.

"Training Data Protection with Compositional Diffusion Models" (Golatkar et al. 2024, arXiv:2308.01937): the score of all data is the mean
of the shards' scores, weighted by how likely the noisy image is from each (eq. 5).

    python -m jax_trustdiff.main --config=configs/cdm_compose.py --config.cdm.path=<bundle> --config.generate.num_images=10000

mixture.weights: 'along_path' follows every shard's log-density along the reverse SDE, needs no other network and knows no other data;
'classifier' is the paper's (cdm_classifier.py first); 'nearest' is the paper's for text-to-image, by centroids of each shard's features
(cdm_centroids.py first); 'equal' and 'prior' are naive averaging; 'random' evaluates one shard at a step; 'fixed' is
your own choice. mixture.shards composes some of the shards only.
The store is that of generate_cifar.py, and is evaluated and resumed as there.

Variants:
  digits  1000 digits by 64 steps
  smoke   a few steps
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'digits' for the digits, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  like = config_lib.load("configs/generate_cifar.py")
  config = ConfigDict()
  config.task = "cdm_compose"
  config.seed = 0
  config.seeds = ""
  config.cdm = dict(path="")  # a bundle: the workdir of cdm_train.py
  config.mixture = dict(
    shards="",  # names by commas; '': all
    access="",  # a JSON file {user: [shards]}
    user="",  # one of them: only shards that this user may have parts of
    weights="along_path",
    proportions=(),  # of 'fixed', one for each shard
    nearest=dict(  # of 'nearest'
      temperature=0.05,
      schedule="noise",  # 'constant' is the paper's; at large noise everything is nearest to some shard
      spread=1.0,
      warm_up=1e9,  # the prior above this noise level
      distance="min",
      with_prior=False,
      every=1,
    ),
    top_k=0,  # the k largest weights of every image alone; 0: all
    at_once=0,  # shards at once with 'vmap'; 0: all
    impl="map",  # 'map' for convolutional networks, 'vmap' for attention and adapters, 'shard_map' for several devices
  )
  config.guidance = dict(scale=1.0, sigma_min=0.0, sigma_max=1e9, order="mixture_first")
  config.sampler = dict(
    name="ancestral",
    num_steps=256,
    sigma_min=0.002,
    sigma_max=80.0,
    rho=7.0,
    discretization="edm",
    round_to="",
    eta=1.0,
  )
  config.generate = config_lib.to_plain(like.generate)
  config.report = dict(num_images=100)
  if "digits" in names:
    config.sampler.num_steps = 64
    config.generate.update(num_images=1000, images_per_shard=250, batch_size=250, micro_batch=125)
  if "smoke" in names:
    config.sampler.num_steps = 4
    config.generate.update(num_images=64, images_per_shard=32, batch_size=32, micro_batch=32)
    config.report.num_images = 16
  return config_lib.finish(config, overrides)
