"""A compartmentalized diffusion model from its sources to a verified bundle: train, compose, attribute, forget, add, verify.

"Training Data Protection with Compositional Diffusion Models" (Golatkar et al. 2024, arXiv:2308.01937) in small, on scikit-learn's digits
with a planted picture among the eights: five shards of two digits each, without labels.

    python -m jax_trustdiff.main --config=configs/cdm_journey.py:cpu

Stages, each a run of its own in a folder of the workdir: shards and monolithic (cdm_train.py), classifier (cdm_classifier.py), judge
(at_cifar.py: a classifier that has no part in it), images and attributed (cdm_attribute.py), without_canary and without_source
(cdm_forget.py), added (cdm_add.py), verified (cdm_verify.py, the shards of the forgotten picture and of what was added trained again and
compared). Rows: images of every composition (cdm_compose.py), with KID and FID of their pixels against what all shards were trained on,
the planted picture with its copies too, and KID against the digits without it; then the planted picture's rate, and the share of copies.

Variants:
  cpu    1000 images of each composition
  smoke  seconds: it tries the machinery
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib

VARIANTS = ("cpu", "smoke")
SOURCES = ("0+1", "2+3", "4+5", "6+7", "8+9")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe; 'cpu' for two cores, 'smoke' is a test."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  smoke = "smoke" in names
  kind = "smoke" if smoke else "digits"
  data = "data.name=planted,data.copies=100,data.label=8"
  replay = "again" if smoke else "(8+9,again)"
  planted = 1437 + 99  # the last copy stands for all: they are one content
  train = f"configs/cdm_train.py:{kind},{data},diffusion.conditional=False,shards.num_slices=2"
  classifier = f"configs/cdm_classifier.py:{kind},cdm.path={{shards}}"
  judge = (
    f"configs/at_cifar.py:digits,{data},objective.name=standard,objective.label_smoothing=0.0,train.num_epochs=30"
  )
  compose = f"configs/cdm_compose.py:{kind},generate.labels=none,cdm.path="
  attribute = f"configs/cdm_attribute.py:{kind},cdm.path={{shards}},images.path={{images}}/images,judge={{judge}}/export"
  quality = "configs/evaluate_generation.py:smoke,generated.name=image_store,generated.path={row}/images,eval.num_reference=0,"
  quality += "eval.generated_split=train,"
  memory = "configs/evaluate_memorisation.py:smoke,generated.name=image_store,generated.path={row}/images,"
  if smoke:
    train += ",model.channel_mult=(1,),shards.groups=(0,1,2,3,4,5;6,7;8,9)"
    classifier += ",model.channel_mult=(1,)"
    judge = "configs/at_cifar.py:smoke,objective.name=standard,objective.label_smoothing=0.0"
    quality += "metrics.kid_subsets=2,metrics.kid_subset_size=16"
    unplanted = quality
    memory += "memorisation.neighbours=10"
  else:
    kid = "metrics.kid_subsets=100,metrics.kid_subset_size=500"
    unplanted = f"{quality}data.name=digits,{kid}"
    quality += f"{data},{kid}"
    memory += f"{data},memorisation.num_generated=0"
  stages = dict(
    shards=train,
    monolithic=f"{train},shards.by=one",
    classifier=classifier,
    judge=judge,
    images=f"{compose}{{shards}}",
    attributed=attribute,
    without_canary=f"configs/cdm_forget.py:cdm.path={{shards}},cdm.copy=True,forget.positions='{planted}'",
    without_source="configs/cdm_forget.py:cdm.path={without_canary}/bundle,cdm.copy=True,forget.shards=6+7",
    added="configs/cdm_add.py:cdm.path={without_source}/bundle,cdm.copy=True,data.name=digits,shards.classes=(6,7),shards.name=again",
    verified=f"configs/cdm_verify.py:cdm.path={{added}}/bundle,verify.replay={replay}",
  )
  rows = dict(
    along_path=f"{compose}{{shards}}",
    by_classifier=f"{compose}{{shards}},mixture.weights=classifier",
    averaged=f"{compose}{{shards}},mixture.weights=equal",
    random=f"{compose}{{shards}},mixture.weights=random",
    monolithic_model=f"{compose}{{monolithic}},mixture.weights=prior",
    **{
      f"only_{name}": f"{compose}{{shards}},mixture.weights=prior,mixture.shards={name}" for name in SOURCES
    },
    canary_forgotten=f"{compose}{{without_canary}}/bundle",
    source_forgotten=f"{compose}{{without_source}}/bundle",
    source_added=f"{compose}{{added}}/bundle",
  )
  if smoke:
    rows = {name: rows[name] for name in ("along_path", "by_classifier", "source_added")}
  columns = {
    "KID of pixels": "quality:pixel_kid",
    "FID of pixels": "quality:pixel_fid",
    "KID to the digits alone": "unplanted:pixel_kid",
    "planted picture": "memory:extracted",
    "copies": "memory:copies",
  }
  pictures = {
    "what each shard was trained on": "{shards}/report/shards.png",
    "samples": "{row}/report/samples.png",
    "credit of every shard": "{attributed}/report/credit.png",
    "images that owe most to each shard": "{attributed}/report/most_of_each.png",
    "weights over the time of sampling": "{attributed}/report/weights.png",
  }
  config = ConfigDict()
  config.task = "sweep"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = "" if smoke else "0,1,2"
  config.title = "A compartmentalized diffusion model"
  config.baseline = "" if smoke else "averaged"
  config.curve = ""
  config.bars = ("FID of pixels",)
  config.update(config_lib.in_order(stages=stages, rows=rows, columns=columns, pictures=pictures))
  config.update(evaluations=dict(quality=quality, unplanted=unplanted, memory=memory), published={})
  return config_lib.finish(config, overrides)
