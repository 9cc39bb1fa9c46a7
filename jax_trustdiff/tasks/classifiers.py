"""What the tasks about classifiers share: data and networks from a config, and their evaluation."""

import dataclasses
import pathlib
import zlib
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.attacks.registry import ATTACKS
from jax_trustdiff.data import mixing, pipeline, pseudo_labels, records, sources
from jax_trustdiff.evaluation import accuracy
from jax_trustdiff.interop import export, graph_npz, pretrained
from jax_trustdiff.models.registry import MODELS, bind
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.types import Classifier, InputError, LogitsFn, Variables, to_unit

UNTRAINED = "untrained"


@dataclasses.dataclass(frozen=True)
class ClassifierData:
  """Training, validation and test images of one data set."""

  train: sources.ImageSource
  validation: sources.ImageSource
  test: sources.ImageSource
  epoch_images: int  # images of the training split before the validation images were cut off
  generated: sources.ImageSource | None = None  # for training alone, beside `train`


def load_data(config) -> ClassifierData:
  """The splits of config.data, cut to train.num_train and eval.num_test images (0: all), and the images of config.mixing.

  train.validation_split is 'first', or 'random' for train.num_validation images that are the same in every run.
  InputError if the splits differ in image shape or classes, or if a cut leaves out a whole class.
  """
  full = config_lib.build(sources.SOURCES, config.data, split="train")
  test = config_lib.build(sources.SOURCES, config.data, split="test", class_names=full.class_names)
  records.check_alike(full, test)
  records.check_labelled(full)
  records.check_labelled(test)
  if config.train.num_train:
    full = records.limit(full, config.train.num_train)
  if config.eval.num_test:
    test = records.limit(test, config.eval.num_test)
  train, validation = records.split_validation(
    full, config.train.num_validation, config.train.validation_split
  )
  return ClassifierData(train, validation, test, len(full), _load_generated(config.mixing, train))


def _load_generated(section, real: sources.ImageSource) -> sources.ImageSource | None:
  """The images that the section `mixing` names, with the labels it names, the first num_generated of them (0: all).

  None if it names none. InputError for labels without images.
  """
  if not section.generated:
    if section.labels or section.soft_labels:
      raise InputError(
        "mixing.labels and mixing.soft_labels are of generated images, and mixing.generated names none"
      )
    return None
  found = mixing.generated_source(section.generated, real)
  if section.labels:
    found = pseudo_labels.load(section.labels).apply(found, section.soft_labels)
  elif section.soft_labels:
    raise InputError("mixing.soft_labels needs mixing.labels, a file of labels with probabilities")
  if not found.labelled:
    raise InputError(
      f"the images of {section.generated} have no labels: label them with label_generated.py and label.whose=predicted, and give"
      " mixing.labels=<its workdir>/labels.npz"
    )
  return records.limit(found, section.num_generated) if section.num_generated else found


def build_network(section, source: sources.ImageSource) -> Classifier:
  """The network of a model section for the images and classes of `source`."""
  return config_lib.build(MODELS, section, num_classes=source.num_classes, image_shape=source.image_shape)


def initial_variables(config, network: Classifier) -> Variables | None:
  """The variables of config.init_from, an export or a torch checkpoint; None if it is ''.

  InputError if they are not those of `network`.
  """
  return pretrained.load_variables(config.init_from, network)[0] if config.init_from else None


def load_classifier(
  config, source: sources.ImageSource, labelled: bool = True
) -> tuple[Classifier, Variables, tuple[str, ...]]:
  """(network, variables, class names) of config.init_from: an export, an .npz graph, a torch checkpoint or 'untrained'.

  The network of a checkpoint, and of 'untrained' (a fresh one), is that of config.model. InputError if it is not one for the images
  and classes of `source`, and for images without labels, unless `labelled` is False; these may be of one class, which says nothing
  of those of the network.
  """
  if labelled:
    records.check_labelled(source)
  if not config.init_from:
    raise InputError(
      "init_from is empty: give the export folder of a classifier, --config.init_from=<run>/export"
    )
  path = pathlib.Path(config.init_from).expanduser()
  if config.init_from == UNTRAINED:
    network = _described_network(config, source)
    variables = jax.jit(network.init)(jax.random.key(config.seed))
  elif path.is_dir():
    network, variables, _ = export.load_export(path)
    if not isinstance(network, Classifier):
      raise InputError(f"{path} holds {type(network).__name__}, no classifier")
  elif path.suffix == ".npz":
    network, variables = graph_npz.load_graph(path, source.image_shape)
  else:
    network = _described_network(config, source)
    variables = pretrained.load_variables(path, network)[0]
  for what, of_network, of_images in (
    ("images", network.image_shape, source.image_shape),
    ("classes", network.num_classes, source.num_classes),
  ):
    unknown = what == "classes" and not source.labelled and of_images == 1
    if of_network != of_images and not unknown:
      raise InputError(f"the network is made for {what} {of_network}, and the data have {of_images}")
  return network, variables, source.class_names


def _described_network(config, source: sources.ImageSource) -> Classifier:
  """The network of config.model; InputError where neither it nor the images say of how many classes."""
  if not source.labelled and source.num_classes < 2:
    raise InputError(
      "the images have no labels, and init_from does not say of how many classes the network is: give the images num_classes"
    )
  return build_network(config.model, source)


def in_float32(network: Classifier) -> Classifier:
  """The same network, which computes in float32."""
  return dataclasses.replace(network, dtype="float32")


def model_section(config, network: Classifier) -> dict[str, Any]:
  """config.model completed with what the data decided: what an export stores and `MODELS` builds from."""
  section = config_lib.to_plain(config.model)
  return section | {"num_classes": network.num_classes, "image_shape": network.image_shape}


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """Of every image of a source, and the first attacked images to look at."""

  clean: np.ndarray  # bool [n], classified right
  robust: np.ndarray  # bool [n], right before and after the attack
  shown: dict[
    str, np.ndarray
  ]  # first batch: image and x_adv in [0, 1], label, prediction, adversarial_prediction


class Evaluator:
  """Clean and robust accuracy of variables of one network on one source, compiled once.

  attack: a section of ATTACKS. batch_size need not divide the source. The key of an image depends on `seed` and its
  id alone, so a result does not depend on batch size or device count. Everything is computed in float32 with the
  highest precision, whatever the network computes in.
  """

  def __init__(
    self, network: Classifier, source: sources.ImageSource, attack, batch_size: int, mesh, seed: int
  ):
    parallel.check_batch(batch_size, mesh)
    self._network = in_float32(network)
    self._source, self._batch_size, self._mesh = source, batch_size, mesh
    self._key = jax.random.fold_in(
      jax.random.key(seed), zlib.crc32(b"evaluation")
    )  # training draws from key(seed)
    self._attack = config_lib.build(ATTACKS, attack)
    self._judge = jax.jit(self._verdicts)

  def __call__(self, variables: Variables, what: str = "", times: float = 1.0) -> Verdicts:
    """The verdicts on the whole source, with so many times the attack's radius and steps of so many times its size.

    `what` names the work in a progress line.
    """
    logits_fn = bind(self._network, variables)
    found, shown = [], {}
    with ProgressReport(what or "image", len(self._source), quiet=not what) as progress:
      for batch in pipeline.eval_batches(self._source, self._batch_size, self._mesh):
        judged = self._judge(logits_fn, batch, times)
        found.append(parallel.gather_to_host({name: judged[name] for name in ("clean", "robust", "mask")}))
        shown = shown or parallel.gather_to_host(judged | {name: batch[name] for name in ("image", "label")})
        progress.update(min(len(found) * self._batch_size, len(self._source)))
    mask = np.concatenate([f["mask"] for f in found])
    clean, robust = (np.concatenate([f[name] for f in found])[mask] for name in ("clean", "robust"))
    shown = {name: values[shown["mask"]] for name, values in shown.items()}
    return Verdicts(clean, robust, shown | {"image": shown["image"] / np.float32(255)})

  def _verdicts(self, logits_fn: LogitsFn, batch, times) -> dict[str, jax.Array]:
    lengths = [name for name in ("radius", "step_size") if hasattr(self._attack, name)]
    attack = dataclasses.replace(
      self._attack, **{name: times * getattr(self._attack, name) for name in lengths}
    )
    with jax.default_matmul_precision("highest"):
      x = to_unit(batch["image"])
      found = accuracy.verdicts(logits_fn, attack, x, batch["label"], batch["id"], self._key)
    return found | {"mask": batch["mask"]}


def attack_name(section) -> str:
  """'pgd40' for a PGD of 40 steps: the name of its accuracy in result.json."""
  return f"{section.name}{section.get('num_steps', '')}"
