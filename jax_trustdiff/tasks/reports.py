"""report/ of a run: pictures, and one page that shows them with the numbers."""

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.attacks.pgd import ATTACKS
from jax_trustdiff.evaluation import accuracy, report, statistics
from jax_trustdiff.tasks import classifiers
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import LogitsFn, to_unit


def classifier_report(
  config, workdir: Workdir, logits_fn: LogitsFn, data: classifiers.ClassifierData, verdicts, metrics
) -> None:
  """Training curves, a grid of attacked test images and report.html of one classifier, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  report.training_curves(workdir.read_metrics(), folder / "training_curves.png")
  attacked = _attacked_grid(config, logits_fn, data, folder / "adversarial_images.png")
  attack = classifiers.attack_name(config.eval.attack)
  count = len(verdicts["clean"])
  rows = []
  for name, key in (("clean", "clean"), (attack, "robust")):
    low, high = statistics.binomial_interval(int(verdicts[key].sum()), count)
    rows.append([name, f"{verdicts[key].mean():.1%}", f"{low:.1%} to {high:.1%}"])
  report.html_report(
    folder / "report.html",
    title=f"{config.model.name} trained with {config.objective.name}",
    summary=(
      f"Accuracy on {count:,} test images: {metrics['clean_accuracy']:.1%} clean, {metrics[f'{attack}_accuracy']:.1%} "
      f"under {attack} ({config.eval.attack.norm}, radius {config.eval.attack.radius:.4f})."
    ),
    metrics=metrics,
    figures=[
      (folder / "training_curves.png", "Training and validation"),
      (folder / "adversarial_images.png", attacked),
    ],
    tables=[("Accuracy with 95 % Clopper-Pearson intervals", ["attack", "accuracy", "interval"], rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def comparison_report(config, workdir: Workdir, names: tuple[str, ...], attack: str, metrics) -> None:
  """Bars of clean and robust accuracy for each of `names`, with the pictures of their own reports."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  bars = {
    name: {"clean": metrics[f"{name}/clean_accuracy"], attack: metrics[f"{name}/{attack}_accuracy"]} for name in names
  }
  report.bars(bars, folder / "accuracy.png", ylabel="accuracy")
  figures = [(folder / "accuracy.png", f"Accuracy on the test images, clean and under {attack}")]
  for name in names:
    own = workdir / name / "report"
    figures.append((own / "adversarial_images.png", f"{name}: clean, adversarial, amplified difference"))
    figures.append((own / "training_curves.png", f"{name}: training and validation"))
  report.html_report(
    folder / "report.html",
    title="Standard and adversarial training",
    summary="; ".join(f"{n}: {b['clean']:.1%} clean, {b[attack]:.1%} under {attack}" for n, b in bars.items()) + ".",
    metrics=metrics,
    figures=figures,
    tables=[],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def _attacked_grid(config, logits_fn: LogitsFn, data: classifiers.ClassifierData, path) -> str:
  """Draws the first test images attacked; returns the caption."""
  shown = data.test.take(np.arange(min(config.report.num_images, len(data.test))))
  x, y = to_unit(shown["image"]), shown["label"]
  attack = config_lib.build(ATTACKS, config.eval.attack)
  keys = accuracy.image_keys(jax.random.key(config.seed), shown["id"].astype(np.int32))
  x_adv = jax.jit(attack)(logits_fn, x, y, keys)
  before, after = (np.asarray(logits_fn(images).argmax(axis=1)) for images in (x, x_adv))
  caption = report.adversarial_grid(
    np.asarray(x),
    np.asarray(x_adv),
    path,
    labels=y,
    predictions=before,
    adversarial_predictions=after,
    class_names=data.test.class_names,
  )
  return caption or "Clean, adversarial and amplified difference"
