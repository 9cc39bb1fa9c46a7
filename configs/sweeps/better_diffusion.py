"""The tables of "Better Diffusion Models Further Improve Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638).

    python -m jax_trustdiff.main --config=configs/sweeps/better_diffusion.py:overfitting --workdir=tables/overfitting \
      --config.data_path=<CIFAR-10 npz folder> --config.generated=<image store or .npz files>

One command for each table, which goes on where it was cut off; a row is trained once for every seed of sweep_seeds. report/ has the
table in markdown beside the published numbers, and validation accuracy against the epoch.

  overfitting      none, and 50K to 1M generated images, for 400 epochs: best checkpoint, last checkpoint, and the gap (the default)
  epochs           400 to 2400 epochs with 20M generated images
  sampling_steps   generated here, with and without classes, by 5 to 40 steps (generator, unconditional: exports or EDM snapshots):
                   FID against robust accuracy; the published sets are the surest fifth of five times as many images
  augmentations    common, Cutout, CutMix, AutoAugment, RandAugment and IDBH with 1M generated images
  datasets         CIFAR-100, SVHN and Tiny ImageNet in data_path/<name>, with 1M images in generated/<name>
  cpu              overfitting in small, on Fashion-MNIST (data_path: a folder with its four idx files): a U-Net is trained on 1000
                   images and makes 5000, and small classifiers are trained on the 1000 with and without these
  gpu              the same with a PreActResNet-18 on 10,000 images of CIFAR-10 and 20,000 generated: about 25 minutes of an H100 (estimated)
  smoke            a minute; the bundled digits

Cost on CIFAR-10: 5.7e18 FLOP for a run of 400 epochs with a WRN-28-10. The published numbers are of AutoAttack, in percent.
"""

from ml_collections import ConfigDict

from jax_trustdiff import config as config_lib
from jax_trustdiff.types import InputError

TABLES = ("overfitting", "epochs", "sampling_steps", "augmentations", "datasets")
VARIANTS = (*TABLES, "cpu", "gpu", "smoke")
RECIPE = "configs/at_cifar.py:data.path={data}"
GENERATED = "mixing.generated={generated}"
EVALUATION = "configs/eval_robust.py:init_from={row}/export,data.path={data}"
LAST = EVALUATION.replace("/export", "/export_last")
ACCURACIES = dict(clean="autoattack:clean", pgd40="train:pgd40_accuracy", autoattack="autoattack:robust")
OVERFITTING = dict(  # all but `clean` under AutoAttack
  clean="autoattack:clean",
  best="autoattack:robust",
  last="last:robust",
  gap="autoattack:robust - last:robust",
)


def get_config(variant: str = "") -> ConfigDict:
  """The sweep of one table, 'overfitting' without a variant; 'cpu' for a small one on Fashion-MNIST, 'gpu' on CIFAR-10."""
  names, overrides = config_lib.parse_variant(variant, VARIANTS)
  if len(names) > 1:
    raise InputError(f"a sweep is of one table: choose one of {', '.join(names)}")
  config = ConfigDict()
  config.task = "sweep"
  config.seed = 0
  config.seeds = ""
  config.sweep_seeds = "0,1,2"
  config.data_path = "data/cifar10"
  config.generated = "data/generated"
  config.generator = "data/edm-cifar10-32x32-cond-vp.pkl"  # of sampling_steps
  config.unconditional = "data/edm-cifar10-32x32-uncond-vp.pkl"
  table = dict(stages={}, evaluations=dict(autoattack=EVALUATION), columns=ACCURACIES, published={})
  table |= dict(baseline="", curve="validation/pgd40_accuracy", bars=(), pictures={})
  table |= globals()[f"_{names[0] if names else 'overfitting'}"]()
  ordered = ("stages", "rows", "columns", "pictures")
  config.update(table | config_lib.in_order(**{name: table[name] for name in ordered}))
  return config_lib.finish(config, overrides)


def _overfitting():
  rows, published = {"none": RECIPE}, {"none": "54.57, gap 9.1"}
  for name, count, text in (
    ("50K", 50, "gap 6.9"),
    ("100K", 100, "gap 5.4"),
    ("200K", 200, "gap 0.8"),
    ("500K", 500, "gap about 0"),
    ("1M", 1000, "63.35, gap about 0"),
  ):
    rows[name] = f"{RECIPE},{GENERATED},mixing.num_generated={1000 * count}"
    published[name] = text
  title = "Robust overfitting and the amount of generated data"
  evaluations = dict(autoattack=EVALUATION, last=LAST)
  return dict(
    title=title,
    rows=rows,
    evaluations=evaluations,
    columns=OVERFITTING,
    published=published,
    baseline="none",
    bars=("best", "last"),
  )


def _epochs():
  shared = f"{RECIPE},{GENERATED},mixing.ratio=0.2,train.batch_size=2048"
  published = {400: "63.7", 800: "65.7", 1200: "66.3", 1600: "67.1", 2000: "67.2", 2400: "67.3"}
  return dict(
    title="Epochs with 20 million generated images",
    rows={f"{epochs}_epochs": f"{shared},train.num_epochs={epochs}" for epochs in published},
    published={f"{epochs}_epochs": text for epochs, text in published.items()},
  )


def _sampling_steps():
  """With classes, and without: then a classifier trained as usual labels the images."""
  published = {5: "FID 35.54, 57.78", 10: "FID 2.477, 62.81", 15: "FID 1.848, 63.24", 20: "FID 1.824, 63.35"}
  published |= {
    25: "FID 1.843, 63.31",
    30: "FID 1.861, 63.25",
    35: "FID 1.874, 63.13",
    40: "FID 1.883, 63.03",
  }
  make = "configs/generate_cifar.py:generate.num_images=1000000"
  stages, conditional, unconditional = {"classifier": f"{RECIPE},objective.name=standard"}, {}, {}
  for n in published:
    images, others = f"images_conditional_{n}", f"images_unconditional_{n}"
    stages[images] = f"{make},init_from={{generator}},sampler.num_steps={n}"
    stages[others] = f"{make},init_from={{unconditional}},sampler.num_steps={n},generate.labels=none"
    stages[f"labels_{n}"] = (
      f"configs/label_generated.py:init_from={{classifier}}/export,label.whose=predicted,generated.path={{{others}}}/images"
    )
    conditional[f"conditional_{n}"] = f"{RECIPE},mixing.generated={{{images}}}/images"
    labels = f"mixing.labels={{labels_{n}}}/labels.npz"
    unconditional[f"unconditional_{n}"] = f"{RECIPE},mixing.generated={{{others}}}/images,{labels}"
  fid = "configs/evaluate_generation.py:generated.path={workdir}/images_{name}/images,eval.num_generated=50000,data.path={data}"
  return dict(
    title="Sampling steps: FID and robust accuracy",
    stages=stages,
    rows=conditional | unconditional,
    evaluations=dict(autoattack=EVALUATION, fid=fid),
    columns=dict(fid="fid:fid") | ACCURACIES,
    published={f"conditional_{n}": text for n, text in published.items()},
  )


def _augmentations():
  shared = f"{RECIPE},{GENERATED}"
  return dict(
    title="Augmentations",
    rows=dict(
      common=shared,
      cutout=f"{shared},augment.name=cutout",
      cutmix=f"{shared},train.cutmix=4,train.batch_size=128",
      auto_augment=f"{shared},augment.name=auto_augment",
      rand_augment=f"{shared},augment.name=rand_augment",
      idbh=f"{shared},augment.name=idbh",
    ),
    published=dict(
      common="63.35", cutout="63.30", cutmix="62.81", auto_augment="62.86", rand_augment="63.12", idbh="63.24"
    ),
  )


def _datasets():
  changes = dict(
    cifar100="mixing.ratio=0.3",
    svhn="mixing.ratio=0.2,train.batch_size=1024,train.num_epochs=800",
    tinyimagenet="mixing.ratio=0.4",
  )
  places = "data.path={{data}}/{0},mixing.generated={{generated}}/{0}"
  return dict(
    title="Data sets, with 1 million generated images",
    rows={
      name: f"configs/at_cifar.py:{name},{places.format(name)},{change}" for name, change in changes.items()
    },
    evaluations=dict(
      autoattack="configs/eval_robust.py:init_from={row}/export,data.path={data}/{name},data.num_classes=0"
    ),
    published=dict(
      cifar100="68.06 clean, 35.65", svhn="95.19 clean, 61.85", tinyimagenet="53.62 clean, 23.40"
    ),
  )


def _cpu():
  """A thousand images in 3840 batches of 64, without weight decay and flips: much to overfit, in little time."""
  data = "data.name=idx,data.path={data},train.num_train=1500,train.num_validation=500,train.validation_split=first"
  training = (
    f"configs/at_cifar.py:cpu,{data},eval.num_test=2000,eval.batch_size=250,"
    "model.width=2,model.patch=7,model.mean=(0.286,),model.std=(0.353,),"
    "objective.radius=0.1,objective.step_size=0.03,objective.num_steps=5,"
    "eval.attack.radius=0.1,eval.attack.step_size=0.02,eval.validation_attack.radius=0.1,eval.validation_attack.step_size=0.02,"
    "augment.name=none,optimizer.weight_decay=0.0,train.num_epochs=160,train.validate_every_epochs=4"
  )
  evaluation = (
    "configs/eval_robust.py:cpu,data.name=idx,data.path={data},eval.num_test=2000,eval.batch_size=250,eval.radii=(),"
    "attack.radius=0.1,eval.attack.radius=0.1,eval.attack.step_size=0.02,init_from={row}/"
  )
  return dict(
    title="Robust overfitting on 1000 images of Fashion-MNIST",
    stages=dict(
      generator=f"configs/edm_cifar.py:cpu,{data},eval.num_samples=0,train.validate_every=500",
      images="configs/generate_cifar.py:cpu,init_from={generator}/export,generate.num_images=5000,sampler.num_steps=8",
    ),
    curve="validation/pgd10_accuracy",
    pictures={"generated images": "{images}/report/samples.png"},
    **_with_and_without(training, evaluation),
  )


def _gpu():
  """Ten thousand images in 1290 batches of 256 without augmentation, one seed: about 25 minutes of a GPU, by estimate."""
  data = "data.path={data},train.num_train=11000,train.num_validation=1000,train.validation_split=first"
  training = (
    f"configs/at_cifar.py:preact18,{data},eval.num_test=500,augment.name=none,"
    "train.batch_size=256,train.num_epochs=30,schedule.learning_rate=0.1,schedule.warmup_fraction=0.1,"
    "train.validate_every_epochs=3,eval.validation_attack.num_steps=10"
  )
  evaluation = (
    "configs/eval_robust.py:data.path={data},eval.num_test=2000,eval.batch_size=500,eval.radii=(),"
    "eval.fast_attack=True,init_from={row}/"
  )
  return dict(
    title="Robust overfitting on 10,000 images of CIFAR-10",
    sweep_seeds="0",
    stages=dict(
      generator=(
        f"configs/edm_cifar.py:brief,{data},train.num_images=1_500_000,train.validate_every=2000,eval.num_samples=0"
      ),
      images=(
        "configs/generate_cifar.py:init_from={generator}/export,sampler.num_steps=12,"
        "generate.num_images=20000,generate.batch_size=1000,generate.micro_batch=500"
      ),
    ),
    curve="validation/pgd10_accuracy",
    pictures={"generated images": "{images}/report/samples.png"},
    **_with_and_without(training, evaluation),
  )


def _smoke():
  training = "configs/at_cifar.py:smoke"
  evaluation = (
    "configs/eval_robust.py:smoke,attack.version=custom,attack.attacks=('apgd_ce',),init_from={row}/"
  )
  return dict(
    title="Robust overfitting, a smoke test",
    sweep_seeds="0",
    stages=dict(images="configs/generate_cifar.py:smoke"),
    published=dict(none="nothing"),
    curve="validation/pgd2_accuracy",
    pictures={"attacked": "{row}/report/adversarial_images.png"},
    **_with_and_without(training, evaluation, ",mixing.ratio=0.5"),
  )


def _with_and_without(training, evaluation, mixing=""):
  """Best and last checkpoint of two rows: `training` alone, and with the images of the stage `images`, mixed as `mixing` says."""
  return dict(
    rows=dict(none=training, generated=f"{training},mixing.generated={{images}}/images{mixing}"),
    evaluations=dict(autoattack=f"{evaluation}export", last=f"{evaluation}export_last"),
    columns=OVERFITTING,
    baseline="none",
    bars=("best", "last"),
  )
