"""Trains a diffusion model, watches it by held-out loss, samples and FID, reports and exports it.

Karras et al. 2022 (arXiv:2206.00364): preconditioning, loss, augmentation, rising learning rate and half-life averaging
are sections of the config, so that the steps from their baseline to their final configuration are switches.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import augment, records, sources
from jax_trustdiff.diffusion.augment import AUGMENT_PIPES
from jax_trustdiff.diffusion.denoisers import Denoiser, Preconditioning
from jax_trustdiff.diffusion.losses import LOSSES, DenoisingLoss
from jax_trustdiff.tasks import codecs, denoisers, generation_metrics, image_training, posthoc_ema, reports
from jax_trustdiff.tasks.sampling import ImageSampler, balanced_labels
from jax_trustdiff.training import state
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import OBJECTIVE, DiffusionNetwork, InputError, Variables, to_signed


@dataclasses.dataclass(frozen=True)
class Model:
  """What a config says of a diffusion model, without its variables."""

  network: DiffusionNetwork
  preconditioning: Preconditioning
  loss: DenoisingLoss

  def denoiser(self, variables: Variables, labels: jax.Array, **arguments) -> Denoiser:
    """The denoiser for integer labels [b], which an unconditional network does not see."""
    return Denoiser(self.network, self.preconditioning, variables, **arguments).with_labels(labels)


def run(config, workdir: Workdir) -> dict[str, float]:
  """Trains to the end, or goes on from the workdir's checkpoint, and returns the metrics of the averaged parameters.

  loss (held out), fid, kid, precision and recall where `config.eval` asks for them, at the end and, as first/..., at the
  first validation. The averaged parameters of the last step are exported.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  data = image_training.load_data(config)
  model = build_model(config, data.train)
  power_stds = tuple(config.ema.power_stds)
  marker = codecs.load_marker(config, data.train)
  loss = image_training.stateless(make_loss(config, model, marker))
  trainer = image_training.build_trainer(config, _init(model, marker), loss, data, mesh, power_stds)
  watch = Watch(config, model, data, mesh, workdir, marker)
  variables, metrics = image_training.train(
    config, model.network, trainer, data, mesh, workdir, watch, private=marker is not None
  )
  if parallel.is_main_process():
    described = {"class_names": data.train.class_names, "sampler": config_lib.to_plain(config.sampler)}
    if key_id := marker.key.key_id if marker else data.train.key_id:
      described["watermark"] = {"key_id": key_id}
    denoisers.save_denoiser(
      workdir / "export",
      denoisers.model_section(config.model, model.network),
      config.diffusion.preconditioning,
      variables,
      described | {"metrics": metrics},
    )
    reports.diffusion_report(config, workdir, watch.pictures(), data.train, metrics)
  return metrics


def build_model(config, source: sources.ImageSource) -> Model:
  """The model of the sections `model` and `diffusion` for the images of `source`."""
  if config.diffusion.conditional:
    records.check_labelled(source, "train without them, diffusion.conditional=False")
  pipe = config_lib.build(AUGMENT_PIPES, config.augment_pipe)
  num_classes = source.num_classes if config.diffusion.conditional else 0
  return Model(
    denoisers.build_network(config.model, source.image_shape, num_classes, pipe.num_labels),
    denoisers.build_preconditioning(config.diffusion.preconditioning),
    config_lib.build(LOSSES, config.diffusion.loss),
  )


def _init(model: Model, marker: codecs.Marker | None) -> Callable[[jax.Array], Variables]:
  """Fresh variables of the network, with what marks its images as the state of the objective: checkpoints hold the string."""
  state_of = {OBJECTIVE: {"marker": marker.state}} if marker else {}
  return lambda key: model.network.init(key) | state_of


def make_loss(config, model: Model, marker: codecs.Marker | None = None) -> image_training.BatchLoss:
  """The loss (variables, batch, key) -> [b] of training: images marked if so, augmented, with dropout."""
  flips = config_lib.build(augment.AUGMENTATIONS, config.augment)
  pipe = config_lib.build(AUGMENT_PIPES, config.augment_pipe)

  def loss(variables, batch, key):
    flip_key, pipe_key, noise_key, dropout_key = jax.random.split(key, 4)
    images = marker(variables[OBJECTIVE]["marker"], batch["image"]) if marker else batch["image"]
    variables = {name: tree for name, tree in variables.items() if name != OBJECTIVE}
    x0, augment_labels = pipe(to_signed(flips(images, flip_key)), pipe_key)
    labels = augment_labels if pipe.num_labels else None
    denoiser = model.denoiser(variables, batch["label"], augment_labels=labels, dropout_key=dropout_key)
    return model.loss(denoiser, x0, noise_key)

  return loss


class Watch:
  """What is looked at during training: callable as `loop.fit`'s validate(state) -> metrics of the averaged parameters.

  The loss on the held-out images, marked as those of training, at noise of its own, the same at every step; and the first eval.num_pictures samples, as
  workdir/samples/<step>.png. With eval.num_samples > 0 also FID, KID, precision and recall of so many samples against the
  first eval.num_reference training images (0: all), before they are marked, at the first validation, the last, and those at multiples of
  eval.metrics_every steps (0: no others). Also writes the power-function averages to workdir/ema.
  """

  def __init__(
    self,
    config,
    model: Model,
    data: image_training.Data,
    mesh,
    workdir: Workdir,
    marker: codecs.Marker | None = None,
  ):
    _check_eval(config, data)
    self._config, self._model, self._data, self._mesh, self._workdir = config, model, data, mesh, workdir
    self._marker = marker
    sampler = denoisers.build_sampler(config.sampler, model.preconditioning)
    self._sampler = ImageSampler(
      sampler, model.network.image_shape, mesh, config.eval.batch_size, config.seed
    )
    self._loss = jax.jit(self._losses)
    if config.eval.num_samples:
      self._extract = generation_metrics.build_extractor(config.metrics, mesh)
    self._reference = None

  def __call__(self, train_state: state.TrainState) -> dict[str, float]:
    config, variables = self._config, train_state.ema_variables
    of_marker = self._marker.state if self._marker else None
    judge = functools.partial(self._loss, variables, of_marker)
    found = image_training.held_out_means(judge, self._data, config.eval.batch_size, self._mesh)
    step = int(train_state.step)
    if config.eval.num_samples and self._measures_at(step):
      found |= self._metrics(variables)
    self._sample_pictures(variables, step)
    if config.ema.power_stds:
      folder = self._workdir / posthoc_ema.FOLDER
      posthoc_ema.save_snapshot(folder, step, tuple(config.ema.power_stds), train_state.power_averages)
    return found

  def _measures_at(self, step: int) -> bool:
    every, num_steps = self._config.eval.metrics_every, image_training.num_steps_of(self._config)
    return step in (self._config.train.validate_every, num_steps) or bool(every and step % every == 0)

  def pictures(self) -> list:
    """The PNG files of samples, by step."""
    return sorted((self._workdir / "samples").glob("*.png"))

  def _losses(self, variables, of_marker, batch):
    keys = image_training.held_out_keys(self._config.seed, batch["id"])
    denoiser = self._model.denoiser(variables, batch["label"])
    images = self._marker(of_marker, batch["image"]) if self._marker else batch["image"]
    return {"loss": self._model.loss(denoiser, to_signed(images), keys)}

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


def _check_eval(config, data: image_training.Data) -> None:
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
