"""report/ of a run: pictures, and one page that shows them with the numbers."""

from jax_trustdiff import config as config_lib
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.tasks import classifiers
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def check(config) -> None:
  """InputError for a report section that could not be honoured, to be found before the training and not after."""
  if config.report.num_images < 1:
    raise InputError(f"report.num_images must be at least 1, found {config.report.num_images}")


def classifier_report(
  config, workdir: Workdir, class_names: tuple[str, ...], verdicts: classifiers.Verdicts, metrics
) -> None:
  """Training curves, a grid of attacked test images and report.html of one classifier, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  report.training_curves(workdir.read_metrics(), folder / "training_curves.png")
  shown = {name: values[: config.report.num_images] for name, values in verdicts.shown.items()}
  caption = report.adversarial_grid(
    shown["image"],
    shown["x_adv"],
    folder / "adversarial_images.png",
    labels=shown["label"],
    predictions=shown["prediction"],
    adversarial_predictions=shown["adversarial_prediction"],
    class_names=class_names,
  )
  attack = classifiers.attack_name(config.eval.attack)
  count = len(verdicts.clean)
  rows = []
  for name, right in (("clean", verdicts.clean), (attack, verdicts.robust)):
    low, high = statistics.binomial_interval(int(right.sum()), count)
    rows.append([name, f"{right.mean():.1%}", f"{low:.1%} to {high:.1%}"])
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
      (folder / "adversarial_images.png", caption),
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
    name: {"clean": metrics[f"{name}/clean_accuracy"], attack: metrics[f"{name}/{attack}_accuracy"]}
    for name in names
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
    summary="; ".join(f"{n}: {b['clean']:.1%} clean, {b[attack]:.1%} under {attack}" for n, b in bars.items())
    + ".",
    metrics=metrics,
    figures=figures,
    tables=[],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
