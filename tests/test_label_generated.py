"""Labels of generated images by a classifier, the choice of the surest, and training on them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.data import mixing, pseudo_labels, sources
from jax_trustdiff.data.image_store import ImageStore, StorePlan
from jax_trustdiff.data.pseudo_labels import PseudoLabels, surest
from jax_trustdiff.data.records import image_source
from jax_trustdiff.tasks import (
  classifiers,
  evaluate_robustness,
  generate,
  label_generated,
  train_diffusion,
  train_noise_classifier,
)
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError

RECIPE = "configs/label_generated.py:smoke"


def source(count=10, num_classes=3):
  images = np.broadcast_to(np.arange(count)[:, None, None, None], (count, 8, 8, 1)).astype(np.uint8)
  return image_source([images], [np.arange(count) % num_classes], "generated", num_classes)


def labels(position=(1, 4, 7), label=(2, 0, 1), soft=True, num_images=10, num_classes=3):
  label = np.array(label, np.int32)
  confidence = np.full(len(label), 0.5, np.float32)
  probabilities = (0.25 * np.eye(num_classes)[label] + 0.25).astype(np.float16) if soft else None
  of_images = pseudo_labels.fingerprint(source(num_images, num_classes))
  return PseudoLabels(
    np.array(position), label, confidence, probabilities, num_images, num_classes, of_images
  )


# ---- the choice ----


def test_the_surest_of_each_class_are_chosen():
  """int(0.4 k) of each class by falling confidence: 2 of 5, 1 of 4, and at least 1 of 1."""
  label = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 2])
  confidence = np.array([0.1, 0.9, 0.5, 0.2, 0.6, 0.9, 0.4, 0.3, 0.2, 0.0], np.float32)
  np.testing.assert_array_equal(surest(label, confidence, 0.4), [1, 2, 4, 9])
  np.testing.assert_array_equal(surest(label, confidence, 1.0), np.arange(10))


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_other_parts_are_refused(fraction):
  with pytest.raises(InputError, match=r"\(0, 1\]"):
    surest(np.zeros(3, int), np.ones(3), fraction)


def test_a_fifth_is_a_fifth_whatever_its_rounding():
  """0.2 of 500,000 in floating point is 100,000, and 0.1 of 30 is 3, not 2."""
  for count, fraction, expected in ((5000, 0.2, 1000), (30, 0.1, 3), (10, 0.7, 7)):
    assert len(surest(np.zeros(count, int), np.random.RandomState(0).rand(count), fraction)) == expected


# ---- the file ----


def test_labels_are_stored_and_applied(tmp_path):
  labels().save(tmp_path / "labels.npz")
  found = pseudo_labels.load(tmp_path / "labels.npz")
  hard, soft = found.apply(source()), found.apply(source(), soft=True)
  for chosen in (hard, soft):
    np.testing.assert_array_equal(chosen.images[:][:, 0, 0, 0], [1, 4, 7])
    np.testing.assert_array_equal(chosen.labels, [2, 0, 1])
    np.testing.assert_array_equal(chosen.ids, [1, 4, 7])
  assert hard.soft_labels is None and "soft_label" not in hard.take([0])
  batch = soft.take([2, 0])
  np.testing.assert_array_equal(batch["soft_label"], [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
  assert batch["soft_label"].dtype == np.float32
  part = soft.select([1])
  np.testing.assert_array_equal(part.take([0])["soft_label"], [[0.5, 0.25, 0.25]])


def test_real_images_are_certain_beside_soft_labels():
  both = mixing.together(source(4), labels().apply(source(), soft=True))
  np.testing.assert_array_equal(both.take([1, 3, 5])["soft_label"], [[0, 1, 0], [1, 0, 0], [0.5, 0.25, 0.25]])
  np.testing.assert_array_equal(both.take([4])["id"], [-2])


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(num_images=11), "11 images in 3 classes, and there are 10 images"),
    (dict(num_classes=4), "in 4 classes, and there are 10 images in 3"),
  ],
)
def test_labels_of_other_images_are_refused(change, message):
  with pytest.raises(InputError, match=message):
    labels(**change).apply(source())


@pytest.mark.parametrize(
  "change",
  [
    dict(position=[4, 1, 7]),
    dict(position=[1, 4, 10]),
    dict(position=[-1, 4, 7]),
    dict(label=[0, 1, 3]),
    dict(label=[0, 1]),
    dict(probabilities=np.zeros((3, 4), np.float16)),
    dict(probabilities=np.zeros((2, 3), np.float16)),
  ],
)
def test_damaged_files_are_refused(tmp_path, change):
  arrays = vars(labels()) | {name: np.array(value) for name, value in change.items()}
  np.savez(tmp_path / "labels.npz", **arrays)
  with pytest.raises(InputError, match="damaged"):
    pseudo_labels.load(tmp_path / "labels.npz")


def test_other_files_are_refused(tmp_path):
  np.savez(tmp_path / "images.npz", image=np.zeros(3))
  with pytest.raises(InputError, match="holds no 'position'"):
    pseudo_labels.load(tmp_path / "images.npz")
  labels(soft=False).save(tmp_path / "labels.npz")
  with pytest.raises(InputError, match="no probabilities"):
    pseudo_labels.load(tmp_path / "labels.npz").apply(source(), soft=True)


# ---- the task ----


def run(folder, **overrides):
  config = config_lib.load(RECIPE, {name.replace("__", "."): value for name, value in overrides.items()})
  workdir = Workdir(folder, config)
  try:
    return label_generated.run(config, workdir), workdir
  finally:
    workdir.close()


def test_the_task_orders_by_the_probability_of_the_given_label(tmp_path):
  metrics, workdir = run(tmp_path / "run")
  config = config_lib.load(RECIPE)
  digits = config_lib.build(classifiers.sources.SOURCES, config.generated, split="train")
  network, variables, _ = classifiers.load_classifier(config, digits)
  logits = np.asarray(
    classifiers.bind(network, variables)(jnp.asarray(digits.images[:500] / np.float32(255)))
  )
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  given = digits.labels[:500]
  expected = surest(given, p[np.arange(500), given], 0.2)
  found = pseudo_labels.load(workdir / "labels.npz")
  np.testing.assert_array_equal(found.position, expected)
  np.testing.assert_array_equal(found.label, given[expected])
  np.testing.assert_allclose(found.confidence, p[expected, given[expected]], rtol=1e-5)
  np.testing.assert_allclose(found.probabilities, p[expected], atol=1e-3)
  assert metrics["num_chosen"] == len(expected) and metrics["num_images"] == 500
  assert metrics["agreement"] == (p.argmax(1) == given).mean()
  assert {file.name for file in (workdir / "report").iterdir()} == {
    "confidence.png", "report.html", "surest_and_least_sure.png"
  }  # fmt: skip
  predicted, folder = run(tmp_path / "predicted", label__whose="predicted", label__top_fraction=1.0)
  np.testing.assert_array_equal(pseudo_labels.load(folder / "labels.npz").label, p.argmax(1))
  assert predicted["num_chosen"] == 500


def test_the_task_goes_on_at_the_chunk_where_it_was(tmp_path, monkeypatch):
  whole, workdir = run(tmp_path / "whole")
  put, calls = label_generated.FolderJournal.put, []

  def dying(journal, name, arrays):
    if len(calls) == 2:
      raise RunError("cut off")
    calls.append(name)
    put(journal, name, arrays)

  monkeypatch.setattr(label_generated.FolderJournal, "put", dying)
  with pytest.raises(RunError, match="cut off"):
    run(tmp_path / "cut")
  again = []
  monkeypatch.setattr(
    label_generated.FolderJournal, "put", lambda j, name, arrays: (again.append(name), put(j, name, arrays))
  )
  metrics, cut = run(tmp_path / "cut")
  assert calls == ["000000", "000001"] and again == ["000002"]
  assert metrics == whole
  assert (cut / "labels.npz").read_bytes() == (workdir / "labels.npz").read_bytes()


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("label.whose", "mine", "given and predicted"),
    ("label.top_fraction", 0.0, r"\(0, 1\]"),
    ("label.chunk_size", 0, "at least 1"),
    ("init_from", "", "init_from is empty"),
  ],
)
def test_wrong_settings_write_nothing(tmp_path, name, value, message):
  with pytest.raises(InputError, match=message):
    run(tmp_path / "run", **{name.replace(".", "__"): value})
  assert not (tmp_path / "run").exists()


# ---- training on them ----


def test_training_takes_the_labels(tmp_path):
  images = source(40, 10)
  np.savez(tmp_path / "a.npz", image=images.images[:], label=images.labels)
  found = labels(position=np.arange(30), label=np.arange(30) % 10, num_images=40, num_classes=10)
  found.save(tmp_path / "labels.npz")
  settings = {"mixing.generated": str(tmp_path / "a.npz"), "mixing.labels": str(tmp_path / "labels.npz")}

  def load(**more):
    return classifiers.load_data(config_lib.load("configs/at_cifar.py:smoke", settings | more)).generated

  assert len(load()) == 30 and load().soft_labels is None
  assert load(**{"mixing.soft_labels": True}).take([3])["soft_label"].shape == (1, 10)
  with pytest.raises(InputError, match="mixing.generated names none"):
    load(**{"mixing.generated": ""})
  with pytest.raises(InputError, match="needs mixing.labels"):
    load(**{"mixing.labels": "", "mixing.soft_labels": True})


# ---- images without labels ----


@pytest.mark.slow
def test_images_of_a_model_without_classes_get_the_labels_that_a_classifier_sees(tmp_path):
  """Generated without labels, labelled, trained on; and refused where they are not labelled yet."""
  store = str(tmp_path / "generate/images")
  config = config_lib.load("configs/generate_cifar.py:smoke,untrained.num_classes=0,generate.labels=none")
  workdir = Workdir(tmp_path / "generate", config)
  generate.run(config, workdir)
  workdir.close()
  found = sources.parts(store)
  assert (found.labelled, found.num_classes, found.class_names) == (False, 1, ("unlabelled",))
  assert not mixing.generated_source(store, source(num_classes=10)).labelled
  with pytest.raises(InputError, match="num_classes=10; the store has 1 classes"):
    sources.image_store(store, 10)
  with pytest.raises(InputError, match="no labels: train without them"):
    train_diffusion.build_model(config_lib.load("configs/edm_cifar.py:smoke"), found)
  settings = dict(generated__name="parts", eval__num_images=0)
  with pytest.raises(InputError, match="the images have no labels: label.whose=predicted"):
    run(tmp_path / "given", **settings, generated__path=store)
  settings |= dict(generated__path=store, label__whose="predicted")
  with pytest.raises(InputError, match="does not say of how many classes"):
    run(tmp_path / "unknown", **settings)
  metrics, workdir = run(tmp_path / "run", **settings, generated__num_classes=10)
  assert metrics["num_images"] == 96 and not any(name.startswith("agreement") for name in metrics)
  chosen = pseudo_labels.load(workdir / "labels.npz")
  assert chosen.num_classes == 10 and len(set(chosen.label)) > 1
  training = {"mixing.generated": store}
  with pytest.raises(InputError, match="have no labels: label them with label_generated.py"):
    classifiers.load_data(config_lib.load("configs/at_cifar.py:smoke", training))
  as_data = {"data.name": "parts", "data.path": store, "data.num_classes": 10, "eval.split": "train"}
  config = config_lib.load("configs/eval_robust.py:smoke", as_data)
  with pytest.raises(InputError, match="the images have no labels"):
    evaluate_robustness.run(config, Workdir(tmp_path / "judged", config))
  del as_data["eval.split"]
  config = config_lib.load("configs/noise_classifier.py:smoke", as_data)
  with pytest.raises(InputError, match="the images have no labels"):
    train_noise_classifier.run(config, Workdir(tmp_path / "noise", config))
  training["mixing.labels"] = str(workdir / "labels.npz")
  data = classifiers.load_data(config_lib.load("configs/at_cifar.py:smoke", training))
  assert data.generated.labelled and data.generated.num_classes == 10
  np.testing.assert_array_equal(data.generated.labels, chosen.label)
  np.testing.assert_array_equal(data.generated.images[:], found.images[:][chosen.position])


def test_labels_of_other_images_or_another_order_are_refused(tmp_path):
  """Even of as many images in as many classes; labels of the first images are labels of those."""
  images = np.random.RandomState(0).randint(0, 256, (200, 8, 8, 1), np.uint8)
  label = np.arange(200) % 3
  first = image_source([images], [label], "generated", 3)
  found = dataclasses.replace(labels(num_images=200), fingerprint=pseudo_labels.fingerprint(first))
  found.apply(first)
  for other in (image_source([images[::-1]], [label], "", 3), image_source([images], [label[::-1]], "", 3)):
    with pytest.raises(InputError, match="200 other images, or of these in another order"):
      found.apply(other)
  of_part = first.select(np.arange(100))
  found = dataclasses.replace(labels(num_images=100), fingerprint=pseudo_labels.fingerprint(of_part))
  np.testing.assert_array_equal(found.apply(first).ids, [1, 4, 7])


def test_classes_of_other_names_are_refused(tmp_path):
  """A class that has another name in the store than among the real images; numbers are no names."""
  real = dataclasses.replace(source(), class_names=("cat", "dog", "fox"))
  plan = StorePlan(6, 3, (8, 8, 1), 3, ("dog", "cat", "fox"), {"from": "test"})
  store = ImageStore(tmp_path / "store", plan)
  for shard in range(2):
    store.write(shard, np.zeros((3, 8, 8, 1), np.uint8), np.arange(3), np.arange(3) + 3 * shard)
  store.finish()
  with pytest.raises(InputError, match="class 0 is 'dog'; in the real images it is 'cat'"):
    mixing.generated_source(str(tmp_path / "store"), real)
  assert mixing.generated_source(str(tmp_path / "store"), source()).class_names == ("0", "1", "2")
  np.savez(tmp_path / "a.npz", image=np.zeros((6, 8, 8, 1), np.uint8), label=np.arange(6) % 3)
  both = sources.parts(f"{tmp_path / 'a.npz'},{tmp_path / 'store'}", 3)
  assert both.class_names == ("dog", "cat", "fox") and len(both) == 12
