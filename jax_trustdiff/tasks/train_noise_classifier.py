"""Trains a classifier of noisy images for classifier guidance, watches it by noise level, reports and exports it.

Dhariwal & Nichol 2021 (arXiv:2105.05233, section 4): the classifier sees images with the noise of the diffusion model and is
told how much. Its data, step, average and run are those of `train_diffusion`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import augment, records
from jax_trustdiff.diffusion.denoisers import Preconditioning
from jax_trustdiff.diffusion.guidance import NoisyClassifier, noisy_cross_entropy
from jax_trustdiff.diffusion.losses import LOSSES, DenoisingLoss
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.models.uvit import UViT
from jax_trustdiff.tasks import denoisers, image_training, noise_classifiers, reports
from jax_trustdiff.training import state
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, NoiseConditionalClassifier, Variables, to_signed


def run(config, workdir: Workdir) -> dict[str, float]:
  """`fit` to the images of config.data and their classes."""
  data = image_training.load_data(config)
  records.check_labelled(data.train)
  return fit(config, workdir, data)


def fit(
  config, workdir: Workdir, data: image_training.Data, backbone: tuple[UViT, Variables] | None = None
) -> dict[str, float]:
  """Trains to the end, or goes on from the workdir's checkpoint, and returns the metrics of the averaged parameters.

  backbone: the frozen network that a classifier of features (`UViTHead`) stands on.
  loss, in nats, of the held-out images at noise of the training density, and sigma_<s>_accuracy at each s of eval.sigmas, at
  the end and, as first/..., at the first validation. The averaged parameters of the last step are exported.
  """
  mesh = parallel.make_mesh(config.mesh.data, config.mesh.model, config.mesh.shard)
  network = noise_classifiers.build_network(config.model, data.train, backbone and backbone[0])
  preconditioning = denoisers.build_preconditioning(config.diffusion.preconditioning)
  density = config_lib.build(LOSSES, config.diffusion.loss)
  loss = image_training.stateless(make_loss(config, network, preconditioning, density))
  trainer = image_training.build_trainer(config, network.init, loss, data, mesh)
  watch = Watch(config, network, preconditioning, density, data, mesh)
  variables, metrics = image_training.train(
    config, network, trainer, data, mesh, workdir, watch, backbone=backbone and backbone[1]
  )
  if parallel.is_main_process():
    noise_classifiers.save_noise_classifier(
      workdir / "export",
      noise_classifiers.model_section(config.model, network),
      config.diffusion.preconditioning,
      variables,
      {"class_names": data.train.class_names, "metrics": metrics},
    )
    reports.noise_classifier_report(config, workdir, data.validation, metrics)
  return metrics


def make_loss(
  config, network: NoiseConditionalClassifier, preconditioning: Preconditioning, density: DenoisingLoss
) -> image_training.BatchLoss:
  """The cross-entropy (variables, batch, key) -> [b] of training: augmented images, with dropout."""
  flips = config_lib.build(augment.AUGMENTATIONS, config.augment)

  def loss(variables, batch, key):
    flip_key, noise_key, dropout_key = jax.random.split(key, 3)
    x0 = to_signed(flips(batch["image"], flip_key))
    classifier = NoisyClassifier(network, variables, preconditioning, dropout_key)
    return noisy_cross_entropy(classifier, x0, batch["label"], noise_key, density)

  return loss


class Watch:
  """Held-out loss and accuracy by noise level: callable as `loop.fit`'s validate(state) -> metrics of the averaged parameters.

  Every image has noise of its own, the same at every step and, but for its size, at every sigma.
  """

  def __init__(
    self,
    config,
    network: NoiseConditionalClassifier,
    preconditioning: Preconditioning,
    density: DenoisingLoss,
    data: image_training.Data,
    mesh,
  ):
    sigmas = config.eval.sigmas
    if (
      not sigmas
      or min(sigmas) <= 0
      or len({noise_classifiers.accuracy_at(sigma) for sigma in sigmas}) < len(sigmas)
    ):
      raise InputError(f"eval.sigmas must be different positive noise levels, at least one, found {sigmas}")
    if not len(data.validation):
      raise InputError(
        "train.num_validation=0: the classifier is watched by held-out images, give at least 1"
      )
    parallel.check_batch(config.eval.batch_size, mesh)
    self._config, self._data, self._mesh = config, data, mesh
    self._network, self._preconditioning, self._density = network, preconditioning, density
    self._loss, self._hits = jax.jit(self._losses), jax.jit(self._right)

  def __call__(self, train_state: state.TrainState) -> dict[str, float]:
    variables = train_state.ema_variables
    judge = functools.partial(self._judge, variables)
    return image_training.held_out_means(judge, self._data, self._config.eval.batch_size, self._mesh)

  def _judge(self, variables: Variables, batch) -> dict[str, jax.Array]:
    hits = {
      noise_classifiers.accuracy_at(s): self._hits(variables, batch, np.float32(s))
      for s in self._config.eval.sigmas
    }
    return {"loss": self._loss(variables, batch)} | hits

  def _losses(self, variables, batch):
    keys = image_training.held_out_keys(self._config.seed, batch["id"])
    x0, classifier = to_signed(batch["image"]), self._classifier(variables)
    return noisy_cross_entropy(classifier, x0, batch["label"], keys, self._density)

  def _right(self, variables, batch, sigma):
    keys = image_training.held_out_keys(self._config.seed, batch["id"])
    x0 = to_signed(batch["image"])
    x = x0 + sigma * initial_noise(keys, x0.shape[1:])
    logits = self._classifier(variables)(x, jnp.full(len(x), sigma))
    return logits.argmax(1) == batch["label"]

  def _classifier(self, variables) -> NoisyClassifier:
    return NoisyClassifier(self._network, variables, self._preconditioning)
