"""Trains a classifier, standard or adversarially, evaluates it, reports and exports it.

"Better Diffusion Models Further Improve Adversarial Training" (Wang et al., ICML 2023, arXiv:2302.04638): TRADES or another
objective, with generated images in every batch or without, weight averaging, one-cycle schedule, the best checkpoint by
validation PGD accuracy, or by clean accuracy where training is not adversarial.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import augment, mixing, pipeline, policies
from jax_trustdiff.data.records import ImageSource
from jax_trustdiff.interop import export
from jax_trustdiff.models.registry import forward_flops, num_params
from jax_trustdiff.robustness import objectives, weight_perturbation
from jax_trustdiff.tasks import classifiers, reports
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import Classifier, InputError, Variables, to_unit


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains to the end, or goes on from the workdir's checkpoint, and returns the metrics of the test images.

  clean_accuracy and <attack>_accuracy are those of the best checkpoint, which workdir/export holds; last/... those of the
  final one, in workdir/export_last. All use averaged parameters and the running statistics of the raw ones. Also best_step and
  steps_per_epoch.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  data = classifiers.load_data(config)
  network = classifiers.build_network(config.model, data.train)
  trainer = build_trainer(config, network, data, mesh)
  test, validation = (
    classifiers.Evaluator(network, source, attack, config.eval.batch_size, mesh, config.seed)
    for source, attack in ((data.test, config.eval.attack), (data.validation, config.eval.validation_attack))
  )
  variables = classifiers.initial_variables(config, network)
  reports.check(config)
  shapes = state.shapes(trainer.init, trainer.optimizer, mesh, config.mesh.rules)
  _check_batch(config, network, shapes)

  workdir.open()
  fresh = state.create_sharded(
    trainer.init, trainer.optimizer, jax.random.key(config.seed), mesh, config.mesh.rules
  )
  if variables is not None:
    fresh = state.with_variables(fresh, variables)
  _say_size(network, fresh, data, trainer)
  name = classifiers.attack_name(config.eval.validation_attack)
  score = f"{name}_accuracy" if trainer.adversarial else "clean_accuracy"

  def validate(train_state):
    found = validation(train_state.ema_variables)
    return {"clean_accuracy": float(found.clean.mean()), f"{name}_accuracy": float(found.robust.mean())}

  with Checkpoints(workdir / "checkpoints") as checkpoints, contextlib.closing(trainer.feed):
    last = loop.fit(
      fresh,
      trainer.step,
      trainer.feed,
      trainer.plan,
      workdir,
      checkpoints,
      config.train.batch_size,
      validate=validate if trainer.plan.validate_every else None,
      score=score,
    )
    best, best_meta = checkpoints.restore_best(last) or (last, {"step": trainer.plan.num_steps})

  verdicts = test(best.ema_variables, f"test image ({classifiers.attack_name(config.eval.attack)})")
  metrics = _accuracies(verdicts, config) | {"best_step": best_meta["step"]}
  metrics |= {"steps_per_epoch": trainer.steps_per_epoch}
  if best_meta["step"] != trainer.plan.num_steps:
    final = test(last.ema_variables, "test image, last checkpoint")
  else:
    final = verdicts
  metrics |= {f"last/{key}": value for key, value in _accuracies(final, config).items()}
  section = classifiers.model_section(config, network)
  for name, chosen in (("export", best), ("export_last", last)):
    exported = parallel.gather_to_host(chosen.ema_variables)
    if parallel.is_main_process():
      export.save_export(workdir / name, section, exported, {"metrics": metrics})
  if parallel.is_main_process():
    chosen_by = score if trainer.plan.validate_every else ""
    reports.classifier_report(config, workdir, data.test.class_names, verdicts, metrics, chosen_by)
  return metrics


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a run that `loop.fit` needs."""

  init: Callable[[jax.Array], Variables]  # fresh variables of the network, with the state of the objective
  step: state.StepFn
  optimizer: object  # optax.GradientTransformation
  feed: pipeline.ResidentFeed | pipeline.StreamingFeed
  plan: loop.Plan
  steps_per_epoch: int
  adversarial: bool  # whether the objective attacks the images


def steps_per_epoch(num_images: int, batch_size: int) -> int:
  """ceil(num_images / batch_size), where num_images are the real images before validation was cut off.

  So counts the code released with Wang et al. 2023, however many images were generated.
  """
  return math.ceil(num_images / batch_size)


def build_trainer(config, network: Classifier, data: classifiers.ClassifierData, mesh) -> Trainer:
  """The training step of `config.objective` on `data`; InputError for anything that does not fit."""
  batch_size, accumulate = config.train.batch_size, config.train.accumulate
  parallel.check_batch(batch_size, mesh)
  if accumulate < 1 or batch_size % accumulate:
    raise InputError(f"train.accumulate={accumulate} does not divide train.batch_size={batch_size}")
  parallel.check_batch(batch_size // accumulate, mesh)
  if config.train.num_epochs < 1:
    raise InputError(f"train.num_epochs must be at least 1, found {config.train.num_epochs}")
  epoch_steps = steps_per_epoch(data.epoch_images, batch_size)
  source, sampler = _mixed(config, data, epoch_steps)
  num_epochs = config.train.num_epochs
  schedule = config_lib.build(
    optimizers.SCHEDULES, config.schedule, num_epochs=num_epochs, steps_per_epoch=epoch_steps
  )
  optimizer = config_lib.build(optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
  objective = config_lib.build(objectives.OBJECTIVES, config.objective)
  transform = config_lib.build(augment.AUGMENTATIONS, config.augment)
  perturbed_from = config.train.awp_warmup_epochs * epoch_steps  # the first step that perturbs weights
  for name in ("awp_gamma", "awp_warmup_epochs", "cutmix"):
    if config.train[name] < 0:
      raise InputError(f"train.{name} must be at least 0, found {config.train[name]}")
  if (config.train.cutmix or config.mixing.soft_labels) and isinstance(objective, objectives.MART):
    raise InputError(
      "the objective 'mart' takes classes as labels, and train.cutmix and mixing.soft_labels make soft ones"
    )
  if config.train.cutmix and objective.num_views > 1:
    raise InputError(
      f"train.cutmix does not go with {config.objective.name!r}, which compares two augmentations"
    )
  warmup_steps = (
    config.train.ema_warmup_fraction * num_epochs * (data.epoch_images // batch_size + 1)
  )  # floor + 1: the original's count

  def loss_fn(params, collections, batch, key, step):
    augment_key, attack_key = jax.random.split(key)
    x, y = _views(
      objective.num_views, transform, config.train.cutmix, network.num_classes, batch, augment_key
    )
    x_adv = objective.attack(
      network, jax.lax.stop_gradient({"params": params, **collections}), x, y, attack_key
    )
    x_adv = jax.lax.stop_gradient(x_adv)

    def loss_at(params):
      variables = {"params": params, **collections}
      return objectives.loss_and_collections(objective, network, variables, x, x_adv, y, step // epoch_steps)

    if config.train.awp_gamma:
      v = jax.lax.cond(
        step >= perturbed_from,
        lambda w: weight_perturbation.ascent(lambda w: loss_at(w)[0].mean(), w, config.train.awp_gamma),
        lambda w: jax.tree.map(jnp.zeros_like, w),
        jax.lax.stop_gradient(params),
      )
      params = jax.tree.map(jnp.add, params, v)
    loss, moments, metrics, remembered = loss_at(params)
    # The first batch replaces initial statistics, but not those that came with trained parameters.
    first = config.train.bn_momentum if config.init_from else 1.0
    momentum = jnp.where(step == 0, first, config.train.bn_momentum)
    moved = objectives.move_statistics(collections["batch_stats"], jax.lax.stop_gradient(moments), momentum)
    metrics = {name: value.mean() for name, value in metrics.items()}
    rate = {"learning_rate": schedule.learning_rate(step), "momentum": schedule.momentum(step)}
    return loss.mean(), (collections | {"batch_stats": moved} | remembered, metrics | rate)

  def decay(t):
    return optimizers.ema_decay(t, config.train.ema_decay, warmup_steps)

  every = config.train.validate_every_epochs
  return Trainer(
    init=lambda key: network.init(key) | objectives.initial_collections(objective, network.num_classes),
    step=state.make_train_step(loss_fn, optimizer, decay, accumulate),
    optimizer=optimizer,
    feed=pipeline.make_feed(source, sampler, mesh, config.train.resident),
    plan=loop.Plan(
      num_steps=num_epochs * epoch_steps,
      log_every=config.train.log_every,
      checkpoint_every=config.train.checkpoint_every,
      validate_every=every * epoch_steps if len(data.validation) else 0,
      steps_per_dispatch=config.train.steps_per_dispatch,
      profile=loop.parse_profile(config.train.profile),
    ),
    steps_per_epoch=epoch_steps,
    adversarial=not isinstance(objective, objectives.Standard),
  )


def _mixed(
  config, data: classifiers.ClassifierData, epoch_steps: int
) -> tuple[ImageSource, pipeline.Sampler]:
  """What is trained on and in which order: the real images alone, or with generated ones in every batch."""
  real, batch_size = data.train, config.train.batch_size
  if data.generated is None:
    return real, pipeline.EpochSampler(len(real), batch_size, config.seed)
  section, sizes = config.mixing, (len(real), len(data.generated))
  sampler = mixing.MixedSampler(*sizes, batch_size, section.ratio, epoch_steps, section.walk, config.seed)
  return mixing.together(real, data.generated), sampler


def _views(num_views: int, transform, cutmix: int, num_classes: int, batch, key: jax.Array):
  """(Unit images, labels) of what a batch is trained on.

  `num_views` augmentations of it one after the other; or, with cutmix > 0, so many mixtures of one augmentation, whose labels are
  soft.
  """
  y = batch.get("soft_label", batch["label"])
  if cutmix:
    view_key, mix_key = jax.random.split(key)
    certain = y if y.ndim == 2 else jax.nn.one_hot(y, num_classes)
    images, y = policies.cutmix(transform(batch["image"], view_key), certain, mix_key, cutmix)
    return to_unit(images), y
  keys = jax.random.split(key, num_views) if num_views > 1 else [key]
  images = jnp.concatenate([transform(batch["image"], view_key) for view_key in keys])
  return to_unit(images), jnp.concatenate([y] * num_views)


def _check_batch(config, network: Classifier, shapes: state.TrainState) -> None:
  """Traces augmentation and one forward pass of a micro-batch: what does not fit raises before anything is written."""
  batch_size = config.train.batch_size // config.train.accumulate
  transform = config_lib.build(augment.AUGMENTATIONS, config.augment)
  images = jax.ShapeDtypeStruct((batch_size, *network.image_shape), jnp.uint8)
  batch = {"image": images, "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

  def views(batch, key):
    return _views(1, transform, config.train.cutmix, network.num_classes, batch, key)[0]

  x = jax.eval_shape(views, batch, jax.random.key(0))
  variables = {"params": shapes.params, **shapes.collections}
  jax.eval_shape(network.train_logits, variables, x)


def _accuracies(verdicts: classifiers.Verdicts, config) -> dict[str, float]:
  robust = f"{classifiers.attack_name(config.eval.attack)}_accuracy"
  return {"clean_accuracy": float(verdicts.clean.mean()), robust: float(verdicts.robust.mean())}


def _say_size(
  network: Classifier, fresh: state.TrainState, data: classifiers.ClassifierData, trainer: Trainer
) -> None:
  count = num_params({"params": fresh.params})
  generated = f" and {len(data.generated):,} generated" if data.generated is not None else ""
  say(
    f"{count:,} parameters, {forward_flops(network) / 2e9:.3g} GMAC an image; {len(data.train):,} training{generated}, "
    f"{len(data.validation):,} validation, {len(data.test):,} test images; {trainer.plan.num_steps:,} steps on "
    f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
  )
