"""Shards of a compartmentalized diffusion model: one diffusion model for each source of data, trained apart.

"Training Data Protection with Compositional Diffusion Models" (Golatkar et al. 2024, arXiv:2308.01937).

    python -m jax_trustdiff.main --config=configs/cdm_train.py --config.data.path=<CIFAR-10 npz folder> --workdir=bundle

The workdir is a bundle: cdm_compose.py samples the mixture, cdm_forget.py takes images or whole sources out of it, cdm_add.py puts new
ones in, cdm_verify.py checks its manifest, cdm_prove.py proves what is in it. Shards share no data, no random numbers and no program:
several machines can train them into folders of their own with cdm.only (cdm_merge.py makes them one), and any of them can be trained
again to the same bits.

shards.by: 'class' (or groups of classes, shards.groups='0,1;2,3'), 'owner' (shards.file: a text file with a line for each image), 'score'
(an .npy of numbers and shards.thresholds), 'hash' (shards.num_shards by content). shards.num_slices: data are seen slice by slice, and
forgetting an image trains only from its slice on (SISA, Bourtoule et al. 2021). adapter.name: 'none' trains whole networks, from
init_from if it is given; 'lora' and 'partial' (deep prompts: trained='^prompts$' with model.prompt_length) train adapters of init_from,
which must never have seen private data.

Variants:
  prompts  the paper's: deep prompts of 256 tokens on a frozen U-ViT (init_from), Adam at 0.1, batches of 256, 800 epochs
  digits   two digits a shard on the bundled digits: minutes on two cores
  smoke    seconds; the bundled digits
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("prompts", "digits", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe with its variants."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  like = "configs/edm_cifar.py:" + (
    "digits" if "digits" in names else "smoke" if "smoke" in names else "config_e"
  )
  edm = config_lib.load(like)
  config = ConfigDict()
  config.task = "cdm_train"
  config.seed = 0
  config.seeds = ""
  config.init_from = ""  # the export of a network that shards start from, or adapt
  for section in ("mesh", "data", "model", "diffusion", "augment", "optimizer", "schedule"):
    config[section] = config_lib.to_plain(edm[section])
  config.augment_pipe = dict(name="none")
  config.adapter = dict(name="none")
  config.ema = dict(half_life=edm.ema.half_life, rampup_ratio=edm.ema.rampup_ratio)
  config.shards = dict(
    by="class",  # 'class', 'owner', 'score', 'hash' or 'one'
    classes=(),  # only images of these; (): all
    groups="",  # of classes, such as '0,1;2,3'; '': every class is a shard
    file="",  # of owners or scores
    thresholds=(),  # of scores
    num_shards=8,  # by 'hash'
    name="all",  # of the only shard of 'one'
    num_slices=1,
    slice_file="",  # an .npy of each image's slice; '': drawn by content
  )
  config.cdm = dict(
    only="",  # shards by commas, the others are left to other runs; '': all
    salt_file="",  # for bundles that are to be merged (cdm_merge.py): a line of 64 hexadecimal digits; '': drawn
  )
  config.train = dict(
    batch_size=edm.train.batch_size,
    num_epochs=400,  # on all data of a shard; with slices as many image visits in all
    steps_per_dispatch=1,
    log_every=100,
    checkpoint_every=2000,
  )
  config.report = dict(num_images=12)
  if "prompts" in names:
    _prompts(config)
  if "digits" in names:
    config.shards.groups = "0,1;2,3;4,5;6,7;8,9"
    config.train.update(batch_size=64, num_epochs=120, log_every=50, checkpoint_every=500)
    config.schedule.rampup_images = 5_000
    config.ema.half_life = 10_000
  if "smoke" in names:
    config.shards.groups = "0,1,2,3,4;5,6,7,8,9"
    config.shards.num_slices = 2
    config.train.update(batch_size=256, num_epochs=2, log_every=2, checkpoint_every=4)
    if "prompts" not in names:
      config.model.update(channel_mult=(1,), attention_resolutions=())
  return config_lib.finish(config, overrides)


def _prompts(config):
  config.model = dict(
    name="uvit", size="S", patch_size=2, prompt_length=256, prompts_per_class=False, dtype="bfloat16"
  )
  config.adapter = dict(name="partial", trained="^prompts$")
  config.diffusion.conditional = False
  config.schedule = dict(name="rampup", learning_rate=0.1, rampup_images=0, decay_images=0)
  config.train.update(batch_size=256, num_epochs=800)
