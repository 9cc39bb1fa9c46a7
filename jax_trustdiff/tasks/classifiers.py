"""What the tasks about classifiers share: data and networks from a config, and their evaluation."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.attacks.pgd import ATTACKS
from jax_trustdiff.data import pipeline, sources
from jax_trustdiff.evaluation import accuracy
from jax_trustdiff.interop import export
from jax_trustdiff.models.registry import MODELS, bind
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.types import Classifier, InputError, LogitsFn, Variables, to_unit


@dataclasses.dataclass(frozen=True)
class ClassifierData:
  """Training, validation and test images of one data set."""

  train: sources.ImageSource
  validation: sources.ImageSource
  test: sources.ImageSource
  epoch_images: int  # images of the training split before the validation images were cut off


def load_data(config) -> ClassifierData:
  """The splits of config.data, cut to train.num_train and eval.num_test images (0: all)."""
  full = config_lib.build(sources.SOURCES, config.data, split="train")
  test = config_lib.build(sources.SOURCES, config.data, split="test")
  if config.train.num_train:
    full = sources.limit(full, config.train.num_train)
  if config.eval.num_test:
    test = sources.limit(test, config.eval.num_test)
  train, validation = sources.split_validation(full, config.train.num_validation)
  return ClassifierData(train, validation, test, len(full))


def build_network(section, source: sources.ImageSource) -> Classifier:
  """The network of a model section for the images and classes of `source`."""
  return config_lib.build(MODELS, section, num_classes=source.num_classes, image_shape=source.image_shape)


def initial_variables(config, network: Classifier) -> Variables | None:
  """The variables of the export config.init_from, or None if it is ''; InputError if they do not fit `network`."""
  if not config.init_from:
    return None
  _, variables, _ = export.load_export(config.init_from)
  wanted = jax.eval_shape(network.init, jax.random.key(0))
  if jax.tree.map(np.shape, variables) != jax.tree.map(lambda x: x.shape, wanted):
    raise InputError(f"init_from={config.init_from!r} holds another network than config.model describes")
  return variables


def model_section(config, network: Classifier) -> dict[str, Any]:
  """config.model completed with what the data decided: what an export stores and `MODELS` builds from."""
  section = config_lib.to_plain(config.model)
  return section | {"num_classes": network.num_classes, "image_shape": network.image_shape}


class Evaluator:
  """Clean and robust accuracy of variables of one network on one source, compiled once.

  attack: a section of ATTACKS. batch_size need not divide the source. The key of an image depends on `seed` and its
  id alone, so a result does not depend on batch size or device count. precise: float32 with the highest matmul
  precision, whatever the network computes in; verdicts that are published are made this way.
  """

  def __init__(self, network: Classifier, source, attack, batch_size: int, mesh, seed: int, precise: bool):
    parallel.check_batch(batch_size, mesh)
    self._network = dataclasses.replace(network, dtype="float32") if precise else network
    self._source, self._batch_size, self._mesh = source, batch_size, mesh
    self._key = jax.random.key(seed)
    self._attack = config_lib.build(ATTACKS, attack)
    self._precision = "highest" if precise else None
    self._judge = jax.jit(self._verdicts)

  def __call__(self, variables: Variables, what: str = "") -> dict[str, np.ndarray]:
    """{'clean': bool [n], 'robust': bool [n]} over the source; `what` names the work in the progress line."""
    logits_fn = bind(self._network, variables)
    found, done = [], 0
    with ProgressReport(what or "image", len(self._source)) as progress:
      for batch in pipeline.eval_batches(self._source, self._batch_size, self._mesh):
        found.append(parallel.gather_to_host(self._judge(logits_fn, batch)))
        done = min(done + self._batch_size, len(self._source))
        if what:
          progress.update(done)
    joined = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
    return {name: joined[name][joined["mask"]] for name in ("clean", "robust")}

  def _verdicts(self, logits_fn: LogitsFn, batch):
    with jax.default_matmul_precision(self._precision):
      x = to_unit(batch["image"])
      found = accuracy.verdicts(logits_fn, self._attack, x, batch["label"], batch["id"], self._key)
    return found | {"mask": batch["mask"]}


def attack_name(section) -> str:
  """'pgd40' for a PGD of 40 steps: the name of its accuracy in result.json."""
  return f"{section.name}{section.get('num_steps', '')}"
