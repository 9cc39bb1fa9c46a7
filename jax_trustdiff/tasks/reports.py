"""report/ of a run: pictures, and one page that shows them with the numbers."""

import pathlib
from collections.abc import Sequence

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.data import sources
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.tasks import classifiers, noise_classifiers
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def check(config) -> None:
  """InputError for a report section that could not be honoured, to be found before the training and not after."""
  if config.report.num_images < 1:
    raise InputError(f"report.num_images must be at least 1, found {config.report.num_images}")


def classifier_report(
  config, workdir: Workdir, class_names: tuple[str, ...], verdicts: classifiers.Verdicts, metrics, score: str
) -> None:
  """Training curves, a grid of attacked test images and report.html of one classifier, in workdir/report.

  score: the name of the validation metric that chose the best checkpoint; '': none did.
  """
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  best = f"validation/{score}" if score else ""
  report.training_curves(workdir.read_metrics(), folder / "training_curves.png", score=best)
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


def robustness_report(
  config, workdir: Workdir, class_names, source, result, pgd, curve, entry, metrics
) -> None:
  """Bars after every attack, accuracy against radius, the images that withstood longest, and report.html."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  count, section = len(source), config.attack
  accuracies = {"clean": result.clean, pgd: None} | result.after
  values = {
    name: metrics[f"{pgd}_accuracy"] if flags is None else float(flags.mean())
    for name, flags in accuracies.items()
  }
  bounds = {name: statistics.binomial_interval(round(v * count), count) for name, v in values.items()}
  report.bars(
    {name: {"accuracy": value} for name, value in values.items()},
    folder / "attacks.png",
    ylabel="accuracy",
    intervals={name: {"accuracy": interval} for name, interval in bounds.items()},
  )
  curves = {pgd: ([times * config.eval.attack.radius for times in curve], list(curve.values()))}
  curves["AutoAttack" if result.standard else "all attacks"] = (
    [section.radius],
    [metrics["autoattack_accuracy"]],
  )
  report.accuracy_curves(curves, folder / "radius.png", xlabel=f"radius ({section.norm})")
  figures = [
    (folder / "attacks.png", "Accuracy that is left after each attack in turn, with 95 % intervals"),
    (folder / "radius.png", "Accuracy against radius"),
  ]
  order = np.lexsort((result.when, result.broken_by))[::-1]
  hardest = order[result.broken_by[order] >= 0][: config.report.num_images]
  if len(hardest):
    x = source.take(hardest)["image"] / np.float32(255)
    caption = report.adversarial_grid(
      x,
      result.x_adv[hardest],
      folder / "hardest_images.png",
      labels=source.labels[hardest],
      predictions=source.labels[hardest],
      adversarial_predictions=result.prediction[hardest],
      class_names=class_names,
    )
    figures.append((folder / "hardest_images.png", f"The images that were broken last. {caption}"))
  rows = [[name, f"{values[name]:.2%}", f"{low:.2%} to {high:.2%}"] for name, (low, high) in bounds.items()]
  tables = [("Accuracy left, with 95 % Clopper-Pearson intervals", ["after", "accuracy", "interval"], rows)]
  if entry is not None:
    theirs = [
      [
        name,
        f"{metrics[f'leaderboard/{name}_accuracy']:.2%}",
        f"{metrics[f'leaderboard/{name}_difference']:+.2%}",
      ]
      for name in ("clean", "autoattack")
    ]
    tables.append((f"Beside {entry['id']}", ["accuracy", "leaderboard", "ours less theirs"], theirs))
  if result.warnings:
    tables.append(("Warnings", ["what the checks found"], [[line] for line in result.warnings]))
  name = "AutoAttack" if result.standard else "a selection of attacks, which is not AutoAttack"
  report.html_report(
    folder / "report.html",
    title=f"Robust accuracy, {section.norm} {section.radius:.4g}",
    summary=(
      f"{metrics['clean_accuracy']:.2%} of {count:,} images are classified right, "
      f"{metrics['autoattack_accuracy']:.2%} still under {name} ({section.version})."
    ),
    metrics=metrics,
    figures=figures,
    tables=tables,
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def sample_grid(images: np.ndarray, path: pathlib.Path) -> None:
  """PNG of uint8 samples [n h w c], row by row."""
  path.parent.mkdir(exist_ok=True)
  report.image_grid(images, path)


def diffusion_report(
  config, workdir: Workdir, samples: Sequence[pathlib.Path], train: sources.ImageSource, metrics
) -> None:
  """Training curves, samples from first to last beside training images, and report.html of one diffusion model."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  numbers = {"validation/num_generated", "validation/num_reference"}  # the same in every row
  rows = [{k: v for k, v in row.items() if k not in numbers} for row in workdir.read_metrics()]
  report.training_curves(rows, folder / "training_curves.png")
  count = min(config.eval.num_pictures, len(train))
  report.image_grid(train.take(np.arange(count))["image"], folder / "training_images.png")
  shown = sorted({samples[0], samples[len(samples) // 2], samples[-1]})
  figures = [(samples[-1], f"Samples of the averaged parameters, step {int(samples[-1].stem):,}")]
  figures += [(folder / "training_images.png", "Training images")]
  figures += [(file, f"The same samples at step {int(file.stem):,}") for file in shown[:-1]]
  figures += [(folder / "training_curves.png", "Training and validation")]
  sampler = config.sampler
  summary = f"{metrics['num_params']:,} parameters after {metrics['num_steps']:,} steps."
  for name in ("fid", "pixel_fid"):
    if name in metrics:
      summary += (
        f" {name} {metrics[name]:.2f} of {metrics['num_generated']:,} samples against "
        f"{metrics['num_reference']:,} training images; it depends on these numbers."
      )
  report.html_report(
    folder / "report.html",
    title=f"{config.model.name} with {config.diffusion.preconditioning.name} preconditioning",
    summary=f"{summary} Samples by '{sampler.name}'.",
    metrics=metrics,
    figures=figures,
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def noise_classifier_report(config, workdir: Workdir, held_out: sources.ImageSource, metrics) -> None:
  """Accuracy by noise level, training curves and report.html of one classifier of noisy images, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  sigmas, count, steps = sorted(config.eval.sigmas), len(held_out), metrics["num_steps"]
  curves, rows = {}, []
  for prefix, step in (("first/", metrics.get("first/step")), ("", steps)):
    if step is not None:
      found = [metrics[prefix + noise_classifiers.accuracy_at(sigma)] for sigma in sigmas]
      curves[f"step {step:,}"] = (sigmas, found)
  for sigma, accuracy in zip(sigmas, found, strict=True):
    low, high = statistics.binomial_interval(round(accuracy * count), count)
    rows.append([f"{sigma:g}", f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}"])
  report.accuracy_curves(
    curves,
    folder / "accuracy_by_sigma.png",
    xlabel="sigma, the standard deviation of the noise",
    log=True,
    chance=1 / held_out.num_classes,
  )
  report.training_curves(workdir.read_metrics(), folder / "training_curves.png", score="")
  report.html_report(
    folder / "report.html",
    title="Classifier of noisy images",
    summary=(
      f"{metrics['num_params']:,} parameters after {steps:,} steps. On {count:,} held-out images: {metrics['loss']:.3f} nats "
      f"at noise of the training density, uniform guesses {np.log(held_out.num_classes):.3f}."
    ),
    metrics=metrics,
    figures=[
      (folder / "accuracy_by_sigma.png", "Accuracy on held-out images by noise level"),
      (folder / "training_curves.png", "Training and validation"),
    ],
    tables=[("Accuracy with 95 % Clopper-Pearson intervals", ["sigma", "accuracy", "interval"], rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def codec_report(config, workdir: Workdir, measured, metrics) -> None:
  """Marked images, bit accuracy after attacks, training curves and report.html of one codec, in workdir/report.

  measured: a `train_codec.Measured`.
  """
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  num_bits, count = config.model.num_bits, measured.num_images
  caption = report.marked_grid(
    measured.images,
    measured.marked,
    folder / "marked_images.png",
    matches=measured.matches.tolist(),
    num_bits=num_bits,
  )
  bounds = {name: (low, high) for name, (_, low, high) in measured.after.items()}
  report.bars(
    {name.replace("_", " "): {"bit accuracy": mean} for name, (mean, *_) in measured.after.items()},
    folder / "attacks.png",
    ylabel="bit accuracy",
    intervals={name.replace("_", " "): {"bit accuracy": interval} for name, interval in bounds.items()},
  )
  constant = "validation/learned_at_step"  # in every row
  curves = [{k: v for k, v in row.items() if k != constant} for row in workdir.read_metrics()]
  report.training_curves(curves, folder / "training_curves.png", score="")
  rows = [
    [name, f"{measured.after[name][0]:.2%}", f"{low:.2%} to {high:.2%}"]
    for name, (low, high) in bounds.items()
  ]
  report.html_report(
    folder / "report.html",
    title=f"Watermark codec of {num_bits} bits",
    summary=(
      f"{metrics['num_params']:,} parameters after {metrics['num_steps']:,} steps. On {count:,} held-out images, stored as bytes: "
      f"{metrics['bit_accuracy']:.2%} of the bits are read right, at {metrics['psnr']:.1f} dB (mean PSNR). Guesses are right in 50 %."
    ),
    metrics=metrics,
    figures=[
      (folder / "marked_images.png", caption),
      (folder / "attacks.png", "Bits read right after attacks by Pillow, with 95 % intervals"),
      (folder / "training_curves.png", "Training and validation"),
    ],
    tables=[("Bit accuracy with 95 % intervals over images", ["after", "bit accuracy", "interval"], rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
