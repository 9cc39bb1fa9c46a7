"""Trains a diffusion model, watches it by held-out loss, samples and FID, reports and exports it.

Karras et al. 2022 (arXiv:2206.00364): preconditioning, loss, augmentation, rising learning rate and half-life averaging
are sections of the config, so that the steps from their baseline to their final configuration are switches.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import augment, pipeline, records, sources
from jax_trustdiff.diffusion.augment import AUGMENT_PIPES
from jax_trustdiff.diffusion.denoisers import Denoiser, Preconditioning
from jax_trustdiff.diffusion.losses import LOSSES, DenoisingLoss
from jax_trustdiff.interop import pretrained
from jax_trustdiff.models.registry import forward_flops, num_params
from jax_trustdiff.tasks import denoisers, generation_metrics, posthoc_ema, reports
from jax_trustdiff.tasks.sampling import ImageSampler, balanced_labels
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.ema import half_life_decay
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import DiffusionNetwork, InputError, PerExample, Variables, to_signed


@dataclasses.dataclass(frozen=True)
class DiffusionData:
  """Training images and those held out for the loss."""

  train: sources.ImageSource
  validation: sources.ImageSource


@dataclasses.dataclass(frozen=True)
class Model:
  """What a config says of a diffusion model, without its variables."""

  network: DiffusionNetwork
  preconditioning: Preconditioning
  loss: DenoisingLoss

  def denoiser(self, variables: Variables, labels: jax.Array, **arguments) -> Denoiser:
    """The denoiser for integer labels [b], which an unconditional network does not see."""
    one_hot = jax.nn.one_hot(labels, self.network.num_classes) if self.network.num_classes else None
    return Denoiser(self.network, self.preconditioning, variables, one_hot, **arguments)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains to the end, or goes on from the workdir's checkpoint, and returns the metrics of the averaged parameters.

  loss (held out), fid, kid, precision and recall where `config.eval` asks for them, at the end and, as first/..., at the
  first validation. The averaged parameters of the last step are exported.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  data = load_data(config)
  model = build_model(config, data.train)
  trainer = build_trainer(config, model, data, mesh)
  watch = Watch(config, model, data, mesh, workdir)
  variables = pretrained.load_variables(config.init_from, model.network)[0] if config.init_from else None
  num_powers = len(config.ema.power_stds)
  shapes = state.shapes(model.network.init, trainer.optimizer, mesh, config.mesh.rules, num_powers)
  _check_batch(trainer, shapes, data, config.train.batch_size)

  workdir.open()
  key = jax.random.key(config.seed)
  fresh = state.create_sharded(
    model.network.init, trainer.optimizer, key, mesh, config.mesh.rules, num_powers
  )
  if variables is not None:
    fresh = state.with_variables(fresh, variables)
  _say_size(config, model, fresh, data, trainer)
  with Checkpoints(workdir / "checkpoints") as checkpoints, contextlib.closing(trainer.feed):
    last = loop.fit(
      fresh,
      trainer.step,
      trainer.feed,
      trainer.plan,
      workdir,
      checkpoints,
      config.train.batch_size,
      validate=watch if trainer.plan.validate_every else None,
    )

  seen = watch.history()
  if not seen or seen[-1]["step"] != trainer.plan.num_steps:
    seen.append({"step": trainer.plan.num_steps, **watch(last)})
  metrics = {"num_steps": trainer.plan.num_steps, "num_params": num_params({"params": last.params})}
  metrics |= {name: value for name, value in seen[-1].items() if name != "step"}
  if len(seen) > 1:
    metrics |= {f"first/{name}": value for name, value in seen[0].items()}
  exported = parallel.gather_to_host(last.ema_variables)
  if parallel.is_main_process():
    described = {"class_names": data.train.class_names, "sampler": config_lib.to_plain(config.sampler)}
    denoisers.save_denoiser(
      workdir / "export",
      denoisers.model_section(config.model, model.network),
      config.diffusion.preconditioning,
      exported,
      described | {"metrics": metrics},
    )
    reports.diffusion_report(config, workdir, watch.pictures(), data.train, metrics)
  return metrics


def load_data(config) -> DiffusionData:
  """The training split of config.data, cut to train.num_train images (0: all), less train.num_validation of them."""
  full = config_lib.build(sources.SOURCES, config.data, split="train")
  if config.train.num_train:
    full = records.limit(full, config.train.num_train)
  train, validation = records.split_validation(
    full, config.train.num_validation, config.train.validation_split
  )
  return DiffusionData(train, validation)


def build_model(config, source: sources.ImageSource) -> Model:
  """The model of the sections `model` and `diffusion` for the images of `source`."""
  pipe = config_lib.build(AUGMENT_PIPES, config.augment_pipe)
  num_classes = source.num_classes if config.diffusion.conditional else 0
  return Model(
    denoisers.build_network(config.model, source.image_shape, num_classes, pipe.num_labels),
    denoisers.build_preconditioning(config.diffusion.preconditioning),
    config_lib.build(LOSSES, config.diffusion.loss),
  )


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The parts of a run that `loop.fit` needs."""

  step: state.StepFn
  optimizer: object  # optax.GradientTransformation
  feed: pipeline.ResidentFeed | pipeline.StreamingFeed
  plan: loop.Plan


def build_trainer(config, model: Model, data: DiffusionData, mesh) -> Trainer:
  """The training step of `model` on `data`; InputError for anything that does not fit."""
  batch_size, accumulate = config.train.batch_size, config.train.accumulate
  parallel.check_batch(batch_size, mesh)
  if accumulate < 1 or batch_size % accumulate:
    raise InputError(f"train.accumulate={accumulate} does not divide train.batch_size={batch_size}")
  parallel.check_batch(batch_size // accumulate, mesh)
  if config.train.num_images < batch_size:
    raise InputError(
      f"train.num_images={config.train.num_images} is less than one batch of {batch_size} images"
    )
  schedule = config_lib.build(optimizers.IMAGE_SCHEDULES, config.schedule, batch_size=batch_size)
  optimizer = config_lib.build(optimizers.OPTIMIZERS, config.optimizer, schedule=schedule)
  denoising_loss = make_loss(config, model)
  decay = functools.partial(
    half_life_decay,
    batch_size=batch_size,
    half_life=config.ema.half_life,
    # an average that came with the parameters is not forgotten (Karras et al. 2022, released code)
    rampup_ratio=None if config.init_from else config.ema.rampup_ratio or None,
  )
  decay(jnp.array(1))  # raises for numbers that are no average

  def loss_fn(params, collections, batch, key, step):
    loss = denoising_loss({"params": params, **collections}, batch, key)
    return loss.mean(), (collections, {"learning_rate": schedule.learning_rate(step)})

  return Trainer(
    step=state.make_train_step(loss_fn, optimizer, decay, accumulate, tuple(config.ema.power_stds)),
    optimizer=optimizer,
    feed=pipeline.make_feed(
      data.train,
      pipeline.EpochSampler(len(data.train), batch_size, config.seed),
      mesh,
      config.train.resident,
    ),
    plan=loop.Plan(
      num_steps=num_steps_of(config),
      log_every=config.train.log_every,
      checkpoint_every=config.train.checkpoint_every,
      validate_every=config.train.validate_every,
      steps_per_dispatch=config.train.steps_per_dispatch,
      profile=loop.parse_profile(config.train.profile),
    ),
  )


def num_steps_of(config) -> int:
  """Optimizer steps that see train.num_images images, rounded up."""
  return -(-config.train.num_images // config.train.batch_size)


def make_loss(config, model: Model) -> Callable[[Variables, pipeline.Batch, jax.Array], PerExample]:
  """The loss (variables, batch, key) -> [b] of training: augmented images, with dropout."""
  flips = config_lib.build(augment.AUGMENTATIONS, config.augment)
  pipe = config_lib.build(AUGMENT_PIPES, config.augment_pipe)

  def loss(variables, batch, key):
    flip_key, pipe_key, noise_key, dropout_key = jax.random.split(key, 4)
    x0, augment_labels = pipe(to_signed(flips(batch["image"], flip_key)), pipe_key)
    labels = augment_labels if pipe.num_labels else None
    denoiser = model.denoiser(variables, batch["label"], augment_labels=labels, dropout_key=dropout_key)
    return model.loss(denoiser, x0, noise_key)

  return loss


class Watch:
  """What is looked at during training: callable as `loop.fit`'s validate(state) -> metrics of the averaged parameters.

  The loss on the held-out images at noise of its own, the same at every step; and the first eval.num_pictures samples, as
  workdir/samples/<step>.png. With eval.num_samples > 0 also FID, KID, precision and recall of so many samples against the
  first eval.num_reference training images (0: all), at the first validation, the last, and those at multiples of
  eval.metrics_every steps (0: no others). Also writes the power-function averages to workdir/ema.
  """

  def __init__(self, config, model: Model, data: DiffusionData, mesh, workdir: Workdir):
    _check_eval(config, data)
    self._config, self._model, self._data, self._mesh, self._workdir = config, model, data, mesh, workdir
    sampler = denoisers.build_sampler(config.sampler, model.preconditioning)
    self._sampler = ImageSampler(
      sampler, model.network.image_shape, mesh, config.eval.batch_size, config.seed
    )
    self._loss = jax.jit(self._losses)
    # The loss in training draws from key(seed), and so do the samples.
    self._key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"held-out loss"))
    if config.eval.num_samples:
      self._extract = generation_metrics.build_extractor(config.metrics, mesh)
    self._reference = None

  def __call__(self, train_state: state.TrainState) -> dict[str, float]:
    config, variables = self._config, train_state.ema_variables
    found = {}
    if len(self._data.validation):
      found["loss"] = self.held_out_loss(variables)
    step = int(train_state.step)
    if config.eval.num_samples and self._measures_at(step):
      found |= self._metrics(variables)
    self._sample_pictures(variables, step)
    if config.ema.power_stds:
      folder = self._workdir / posthoc_ema.FOLDER
      posthoc_ema.save_snapshot(folder, step, tuple(config.ema.power_stds), train_state.power_averages)
    return found

  def _measures_at(self, step: int) -> bool:
    every, num_steps = self._config.eval.metrics_every, num_steps_of(self._config)
    return step in (self._config.train.validate_every, num_steps) or bool(every and step % every == 0)

  def history(self) -> list[dict[str, float]]:
    """What was found at each validation so far: 'step' and the metrics."""
    prefix = "validation/"
    rows = [
      {"step": row["step"]} | {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
      for row in self._workdir.read_metrics()
    ]
    return [row for row in rows if len(row) > 1]

  def pictures(self) -> list:
    """The PNG files of samples, by step."""
    return sorted((self._workdir / "samples").glob("*.png"))

  def held_out_loss(self, variables: Variables) -> float:
    """Mean loss of the held-out images."""
    batch_size, total = self._config.eval.batch_size, 0.0
    for batch in pipeline.eval_batches(self._data.validation, batch_size, self._mesh):
      losses = parallel.gather_to_host(self._loss(variables, batch))
      total += float(np.sum(losses, dtype=np.float64))
    return total / len(self._data.validation)

  def _losses(self, variables, batch):
    keys = jax.vmap(lambda i: jax.random.fold_in(self._key, i))(batch["id"])
    denoiser = self._model.denoiser(variables, batch["label"])
    return jnp.where(batch["mask"], self._model.loss(denoiser, to_signed(batch["image"]), keys), 0)

  def _sample(self, variables, ids: np.ndarray, what: str = "") -> np.ndarray:
    labels = balanced_labels(ids, self._data.train.num_classes)
    denoise = Denoiser(self._model.network, self._model.preconditioning, variables)
    return self._sampler(denoise, ids, labels if self._model.network.num_classes else None, what)

  def _metrics(self, variables) -> dict[str, float]:
    config, train = self._config, self._data.train
    if self._reference is None:
      chosen = records.limit(train, config.eval.num_reference) if config.eval.num_reference else train
      self._reference = self._extract(chosen, "reference image")
    ids = np.arange(config.eval.num_samples)
    images = self._sample(variables, ids, "sample")
    generated = records.image_source([images], [np.zeros(len(ids), np.int32)], "samples")
    features = self._extract(generated, "feature of a sample")
    return generation_metrics.generation_metrics(features, self._reference, config.metrics, config.seed)

  def _sample_pictures(self, variables, step: int) -> None:
    images = self._sample(variables, np.arange(self._config.eval.num_pictures))
    if parallel.is_main_process():
      reports.sample_grid(images, self._workdir / "samples" / f"{step:08d}.png")


def _check_eval(config, data: DiffusionData) -> None:
  if config.eval.num_pictures < 1:
    raise InputError(f"eval.num_pictures must be at least 1, found {config.eval.num_pictures}")
  if not 0 <= config.eval.num_reference <= len(data.train):
    raise InputError(
      f"eval.num_reference={config.eval.num_reference}: there are {len(data.train)} training images; 0 takes all"
    )
  every, validate_every = config.eval.metrics_every, config.train.validate_every
  if every < 0 or (every and validate_every and every % validate_every):
    raise InputError(
      f"eval.metrics_every must be 0 or a multiple of train.validate_every={validate_every}, found {every}"
    )
  if config.eval.num_samples:
    reference = config.eval.num_reference or len(data.train)
    generation_metrics.check(config.metrics, config.eval.num_samples, reference)


def _check_batch(trainer: Trainer, shapes: state.TrainState, data: DiffusionData, batch_size: int) -> None:
  """Traces one step: what does not fit raises before anything is written."""
  batch = {
    "image": jax.ShapeDtypeStruct((batch_size, *data.train.image_shape), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "id": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  jax.eval_shape(trainer.step, shapes, batch)


def _say_size(config, model: Model, fresh: state.TrainState, data: DiffusionData, trainer: Trainer) -> None:
  count, num_steps = num_params({"params": fresh.params}), trainer.plan.num_steps
  say(
    f"{count:,} parameters, {forward_flops(model.network) / 2e9:.3g} GMAC an evaluation; "
    f"{len(data.train):,} training, {len(data.validation):,} held-out images; {num_steps:,} steps of "
    f"{config.train.batch_size} images on {jax.device_count()} {jax.devices()[0].platform} device(s)"
  )
