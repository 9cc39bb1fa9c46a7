"""Pictures of a run and the page that shows them: training curves, attacked images, bars, grids, report.html.

Every file appears whole or not at all. Colours are those of Okabe and Ito (2008), which colour-blind readers
can tell apart.
"""

import base64
import contextlib
import html
import io
import math
import numbers
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer, Shaped, UInt8

from jax_trustdiff.types import InputError

Path = str | os.PathLike
AnyArray = np.ndarray | jax.Array
Classes = Sequence[int] | Integer[AnyArray, "n"]
Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]  # caption, header, rows

_BLUE, _VERMILLION, _GREEN, _PURPLE, _SKY, _ORANGE = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00",
)  # fmt: skip
_LINES = ("-", "--", ":")
_PALETTE = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _SKY, _ORANGE)
_INK, _MUTED, _TICK, _CROSS = "#222222", "#777777", "\N{CHECK MARK}", "\N{BALLOT X}"
_STYLE = {
  "font.family": "DejaVu Sans",  # comes with matplotlib
  "font.size": 9.5,
  "axes.titlesize": 10.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#999999",
  "axes.labelcolor": _INK,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#E6E6E6",
  "xtick.color": _INK,
  "ytick.color": _INK,
  "legend.frameon": True,
  "legend.edgecolor": "none",
  "legend.framealpha": 0.85,
  "legend.fontsize": 8.5,
  "lines.linewidth": 1.6,
  "savefig.dpi": 130,
}


# ---- training curves ----


def training_curves(
  rows: Sequence[Mapping[str, Any]], path: Path, *, score: str | None = None, title: str = ""
) -> None:
  """PNG with one small panel for each kind of scalar in `rows`, over the optimizer step.

  rows: the lines of metrics.jsonl, each with 'step' and any scalars; None and NaN leave a gap. Names of
  validation scalars begin with 'validation/'. Losses and their parts share a panel, so do accuracies
  (fractions, shown in percent; training thin, validation with dots), so do learning rate and momentum.
  Another 'prefix/name' goes to the panel 'prefix', any other name to one of its own: every scalar is drawn.
  score: the validation scalar whose largest value (of equal ones the last) is marked as the best step.
  Default: the last validation accuracy in the rows, if there is one; '' marks none.
  With more than 120 training rows a running mean is drawn over the faint values.
  """
  curves = _curves(rows)
  best = _best(curves, score)
  panels: dict[str, list[str]] = {}
  for name in sorted(curves, key=_rank):
    panels.setdefault(_panel(name), []).append(name)
  order = [p for p in _PANEL_ORDER if p in panels] + [p for p in panels if p not in _PANEL_ORDER]
  columns = 1 if len(order) == 1 else 2 if len(order) <= 4 else 3
  figure_rows = -(-len(order) // columns)
  with _figure(path, (4.6 * columns, 3.0 * figure_rows + 0.25 + (0.3 if title else 0))) as figure:
    axes = figure.subplots(figure_rows, columns, squeeze=False).ravel()
    for axis in axes[len(order) :]:
      axis.remove()
    last_step = max(steps[-1] for steps, _ in curves.values())
    for axis, panel in zip(axes, order, strict=False):
      _draw_panel(axis, panel, {name: curves[name] for name in panels[panel]}, best)
      axis.set_xlim(0, last_step * 1.02 or 1)
    if title:
      figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    notes = [] if best is None else [f"dashed upright line: best validation, step {best[1]:,.0f}"]
    if any(_is_smoothed(name, steps) for name, (steps, _) in curves.items()):
      notes.append("training curves: running mean over 1/40 of the rows, single rows faint")
    if notes:
      figure.supxlabel("; ".join(notes), x=0.99, ha="right", fontsize=8.5, color=_MUTED)


_PANEL_ORDER = ("Loss", "Accuracy", "Learning rate", "Gradient norm")
_ABOVE = dict(
  loc="lower right",
  bbox_to_anchor=(1, 1),
  ncols=2,
  borderaxespad=0.2,
  handlelength=1.3,
  columnspacing=1.0,
  frameon=False,
)
_SMOOTH_FROM = 120
_LOSSES = ("loss", "ce", "kl", "bce")


def _curves(rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{name: (steps, values)} in order of step; InputError for rows that are no metrics."""
  points: dict[str, list[tuple[float, float]]] = {}
  for row in rows:
    if "step" not in row:
      raise InputError(
        f"a row of metrics needs the key 'step', found the keys {', '.join(map(repr, row)) or 'none'}"
      )
    for name, value in row.items():
      if value is not None and not isinstance(value, numbers.Real):
        raise InputError(f"metric {name!r} at step {row['step']} must be a number, found {value!r}")
      if name != "step":
        points.setdefault(name, []).append((row["step"], math.nan if value is None else float(value)))
  if not points:
    raise InputError(f"no scalars to draw in {len(rows)} row(s) of metrics")
  return {name: tuple(np.array(sorted(p, key=lambda q: q[0]), float).T) for name, p in points.items()}


def _best(curves, score) -> tuple[str, float, float] | None:
  """(name, step, value) of the best validation, or None."""
  if score == "":
    return None
  if score is None:
    scores = [name for name in curves if _is_validation(name) and _panel(name) == "Accuracy"]
    if not scores:
      return None
    score = scores[-1]
  elif score not in curves:
    raise InputError(f"no scalar {score!r} in the metrics; there are: {', '.join(curves)}")
  steps, values = curves[score]
  if np.isnan(values).all():
    return None
  last_of_equals = np.flatnonzero(values == np.nanmax(values))[-1]
  return score, steps[last_of_equals], values[last_of_equals]


def _is_validation(name: str) -> bool:
  return name.startswith("validation/")


def _rank(name: str) -> tuple[bool, bool]:
  """The order within a panel, and so of colours: training first, the loss before its parts, clean first."""
  return _is_validation(name), not (name == "loss" or "clean" in name)


def _panel(name: str) -> str:
  """The panel in which the scalar `name` is drawn."""
  prefix, _, base = name.rpartition("/")
  if prefix not in ("", "train", "validation"):
    return prefix
  if base.endswith(("accuracy", "correct")):
    return "Accuracy"
  if base in _LOSSES or base.endswith("_loss"):
    return "Loss"
  if base in ("learning_rate", "momentum"):
    return "Learning rate"
  return "Gradient norm" if base == "grad_norm" else base


def _label(name: str, panel: str) -> str:
  """Words for the legend."""
  prefix, _, base = name.rpartition("/")
  words = re.sub(r"_(accuracy|correct)$", "", base).replace("_", " ")
  words = re.sub(r"\b(ce|kl|mse|fid)\b", lambda m: m[0].upper(), words)
  words = re.sub(r"\bpgd(\d*)\b", lambda m: f"PGD-{m[1]}" if m[1] else "PGD", words)
  if prefix == "validation":
    return f"validation {words}"
  return f"training {words}" if panel == "Accuracy" else words


def _line_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
  """Colour and dashes of each scalar of a panel, the same for training and validation of one thing."""
  subject_of = {}
  for name in names:
    base = name.rpartition("/")[2] if name.startswith(("train/", "validation/")) else name
    subject = re.sub(r"_(accuracy|correct)$", "", base)
    subject_of[name] = "adversarial" if re.fullmatch(r"(pgd|apgd|fgsm)\d*|robust", subject) else subject
  styles = {}
  for i, subject in enumerate(dict.fromkeys(subject_of.values())):
    styles[subject] = _nth_style(i)
  return {name: styles[subject] for name, subject in subject_of.items()}


def _nth_style(i: int) -> dict[str, str]:
  """Colour and dashes of the i-th line of a plot, unlike those of the others for as long as possible."""
  return {"color": _PALETTE[i % len(_PALETTE)], "linestyle": _LINES[i // len(_PALETTE) % len(_LINES)]}


def _is_smoothed(name: str, steps: np.ndarray) -> bool:
  return len(steps) > _SMOOTH_FROM and not _is_validation(name) and _panel(name) != "Learning rate"


def _draw_panel(axis, panel: str, curves, best) -> None:
  from matplotlib import ticker

  styles = _line_styles(list(curves))
  right = None
  if {"learning_rate", "momentum"} <= curves.keys():
    right = axis.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    right.set_ylabel("momentum")
    styles["momentum"]["linestyle"] = "--"
  for name, (steps, values) in curves.items():
    on_right = right is not None and name == "momentum"
    _draw_curve(right if on_right else axis, name, _label(name, panel), steps, values, styles[name])
  axis.set_title(panel if panel in _PANEL_ORDER else panel.replace("_", " "))
  axis.set_xlabel("optimizer step")
  axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  _scale_panel(axis, panel, curves)
  handles, labels = axis.get_legend_handles_labels()
  if best is not None:
    name, step, value = best
    axis.axvline(step, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if name in curves:
      text = f"{value:.1%}" if panel == "Accuracy" else f"{value:.4g}"
      star = axis.plot(step, value, "*", color="black", markersize=11, markeredgecolor="white", zorder=5)
      handles, labels = [*handles, star[0]], [*labels, f"best: {text} at step {step:,.0f}"]
  if right is not None:
    more = right.get_legend_handles_labels()
    axis.legend(handles + more[0], labels + more[1], **_ABOVE)
  elif len(labels) > 1 or panel == "Accuracy":
    axis.legend(handles, labels, loc="best", handlelength=1.6, labelspacing=0.3)


def _scale_panel(axis, panel: str, curves) -> None:
  """Units and limits of the vertical axis."""
  from matplotlib import ticker

  values = np.concatenate([v for _, v in curves.values()])
  values = values[np.isfinite(values)]
  if panel == "Accuracy":
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    axis.set_ylim(0, max(min(1.02, 1.15 * values.max(initial=0.0)), 0.1))
    axis.set_ylabel("accuracy")
  elif panel == "Loss":
    axis.set_ylabel("mean over the images" + (" (nats)" if "ce" in curves else ""))
  elif panel == "Learning rate":
    axis.set_ylabel("learning rate" if "learning_rate" in curves else "momentum")
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_ylim(0, 1.08 * values.max(initial=0.0) if values.any() and "momentum" not in curves else None)
  elif panel == "Gradient norm":
    axis.set_ylabel("L2 norm, before clipping")
    if values.size and values.min() > 0 and values.max() > 20 * values.min():
      axis.set_yscale("log")
  else:
    axis.set_ylabel("value")


def _draw_curve(axis, name: str, label: str, steps, values, style) -> None:
  if _is_validation(name):
    size = 4.5 if len(steps) <= 40 else 2
    axis.plot(
      steps, values, "o", label=label, zorder=4, ms=size, mec="white", mew=0.6, linewidth=1.9, **style
    )
  elif _is_smoothed(name, steps):
    axis.plot(steps, values, alpha=0.25, zorder=2, linewidth=0.8, **style)
    centres, means = _running_mean(steps, values, len(steps) // 40)
    axis.plot(centres, means, label=label, zorder=3, linewidth=1.2, **style)
  else:
    alone = "o" if np.isfinite(values).sum() == 1 else None
    axis.plot(steps, values, label=label, zorder=3, linewidth=1.2, marker=alone, ms=5, **style)


def _running_mean(steps, values, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Means over `window` neighbours, NaN left out of them."""
  windows = np.lib.stride_tricks.sliding_window_view
  present = np.isfinite(values)
  sums = windows(np.where(present, values, 0), window).sum(axis=1)
  counts = windows(present, window).sum(axis=1)
  return windows(steps, window).mean(axis=1), np.where(counts, sums / np.maximum(counts, 1), np.nan)


# ---- bars ----


def bars(
  groups: Mapping[str, Mapping[str, float]],
  path: Path,
  *,
  ylabel: str,
  intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
  percent: bool = True,
) -> None:
  """PNG with bars[group][name] side by side in each group, the value written on each.

  intervals: (low, high) around some of the values, drawn as whiskers. percent: values are fractions and shown
  in percent. A group may lack a name that another has.
  """
  from matplotlib import ticker

  names = list(dict.fromkeys(name for group in groups.values() for name in group))
  if not names:
    raise InputError("bars need at least one group with one value")
  intervals = intervals or {}
  strangers = [f"{g}/{n}" for g, series in intervals.items() for n in series if n not in groups.get(g, {})]
  if strangers:
    raise InputError(f"intervals without a bar: {', '.join(strangers)}")
  width = 0.8 / len(names)
  group_width = max(0.75 * len(names), 0.09 * max(map(len, groups)))
  size = (max(4.2, group_width * len(groups) + 1.2), 3.4)
  with _figure(path, size) as figure:
    axis = figure.subplots()
    tops = [0.0]
    for i, name in enumerate(names):
      present = [(g, series[name]) for g, series in enumerate(groups.values()) if name in series]
      at = [g + (i - (len(names) - 1) / 2) * width for g, _ in present]
      heights = [value for _, value in present]
      colour = _PALETTE[i % len(_PALETTE)]
      axis.bar(at, heights, 0.92 * width, label=name, color=colour, edgecolor="white")
      for x, (g, value) in zip(at, present, strict=True):
        low, high = intervals.get(list(groups)[g], {}).get(name, (value, value))
        if high > low:
          axis.errorbar(x, value, [[value - low], [high - value]], color=_INK, capsize=3, linewidth=1)
        text = f"{value:.1%}" if percent else f"{value:.4g}"
        axis.annotate(text, (x, max(high, 0)), (0, 3), textcoords="offset points", ha="center", fontsize=9)
        tops.append(high)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.tick_params(axis="x", length=0)
    axis.grid(False, axis="x")
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylabel(ylabel)
    if max(tops) > 0:
      axis.set_ylim(top=1.12 * max(tops))
    if percent:
      axis.set_yticks(np.arange(0, 1.01, 0.2) if 0.4 < max(tops) <= 1 else axis.get_yticks())
      axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=None))
    figure.legend(loc="outside upper left", ncols=len(names), handlelength=1.2)


def histogram(
  values: Mapping[str, np.ndarray],
  path: Path,
  *,
  xlabel: str,
  ylabel: str,
  limits: tuple[float, float],
  num_bins: int = 50,
) -> None:
  """PNG with how often values [n] occur in equal bins between the limits, the series stacked; those without values are left out."""
  values = {name: np.asarray(series) for name, series in values.items() if len(series)}
  if not values:
    raise InputError("a histogram needs at least one value")
  with _figure(path, (5.2, 3.4)) as figure:
    axis = figure.subplots()
    colours = [_PALETTE[i % len(_PALETTE)] for i in range(len(values))]
    axis.hist(list(values.values()), num_bins, range=limits, stacked=True, label=list(values), color=colours)
    axis.set_xlim(*limits)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(loc="best", handlelength=1.2)


# ---- accuracy against something ----


def accuracy_curves(
  curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  path: Path,
  *,
  xlabel: str,
  ylabel: str = "accuracy",
  log: bool = False,
  chance: float | None = None,
) -> None:
  """PNG with a line through the points (x, accuracy) of each of `curves`, by name; one point is a mark.

  Accuracies, or what else `ylabel` says, are fractions and shown in percent. log: the horizontal axis is logarithmic. chance: a dashed
  line at the accuracy of guessing.
  """
  from matplotlib import ticker

  if not curves:
    raise InputError("accuracy curves need at least one curve")
  with _figure(path, (5.2, 3.4)) as figure:
    axis = figure.subplots()
    for i, (name, (x, accuracy)) in enumerate(curves.items()):
      axis.plot(x, accuracy, "o", label=name, ms=4.5, **_nth_style(i))
    if chance is not None:
      axis.axhline(chance, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="chance")
    if log:
      axis.set_xscale("log")
      axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    axis.legend(loc="best", handlelength=1.6, labelspacing=0.3)


def attack_panels(
  attacks: Mapping[str, Sequence[tuple[float, float, float]]], path: Path, *, before: float
) -> None:
  """PNG with a panel for each attack: bit accuracy and, dashed, the decimal logarithm of the p-value against the strength.

  attacks: {name: [(strength, bit accuracy, p)]}. before: the bit accuracy without an attack, a line in every panel.
  """
  from matplotlib import ticker

  if not attacks:
    raise InputError("panels of attacks need at least one attack")
  columns = min(4, len(attacks))
  rows = -(-len(attacks) // columns)
  with _figure(path, (3.1 * columns, 2.5 * rows + 0.3)) as figure:
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(attacks) :]:
      axis.remove()
    lowest = min(math.log10(max(p, 1e-300)) for points in attacks.values() for _, _, p in points)
    for i, (axis, (name, points)) in enumerate(zip(axes, attacks.items(), strict=False)):
      strengths, accuracies, ps = np.array(sorted(points), float).T
      axis.plot(strengths, accuracies, "o-", ms=4, color=_BLUE, label="bit accuracy")
      axis.axhline(before, color=_MUTED, linewidth=1, linestyle=":", label="no attack")
      axis.axhline(0.5, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), label="chance")
      axis.set_title(name.replace("_", " "))
      axis.set_ylim(min(0.4, accuracies.min()) - 0.03, 1.03)
      axis.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
      right = axis.twinx()
      logarithms = np.log10(np.maximum(ps, 1e-300))
      right.plot(strengths, logarithms, "s--", ms=3, color=_VERMILLION, linewidth=1.1, label="log10 p")
      right.grid(False)
      right.set_ylim(min(1.1 * lowest, -1), 0.5)
      right.tick_params(axis="y", colors=_VERMILLION)
      if i == 0:
        handles, labels = (
          a + b
          for a, b in zip(axis.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)
        )
    figure.legend(handles, labels, loc="outside upper left", ncols=4, handlelength=1.8)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table in Markdown, its last line ended."""
  return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *lines))


# ---- grids of images ----


def adversarial_grid(
  x: Float[AnyArray, "n h w c"],
  x_adv: Float[AnyArray, "_ _ _ _"],
  path: Path,
  *,
  labels: Classes,
  predictions: Classes,
  adversarial_predictions: Classes,
  class_names: Sequence[str] | None = None,
  amplify: float | None = None,
) -> str:
  """PNG with a column for each image: clean, adversarial, and the difference amplified; returns its caption.

  x, x_adv: [n h w c] in [0, 1], one or three channels. Small images are enlarged by repeating pixels.
  The last row is 0.5 + amplify * (x_adv - x), clipped; amplify defaults to 0.5 / max|x_adv - x|, which just
  fills the range, or to 1 if nothing differs. Under an image: the predicted class, a tick if it is right.
  labels, predictions, adversarial_predictions: class numbers [n]. class_names: their words, or None for the
  numbers.
  """
  x, x_adv = (np.asarray(images, np.float32) for images in (x, x_adv))
  _check_images(x, "x")
  if x_adv.shape != x.shape:
    raise InputError(f"x has the shape {x.shape} and x_adv {x_adv.shape}: they must be the same")
  verdicts = {
    "labels": labels,
    "predictions": predictions,
    "adversarial_predictions": adversarial_predictions,
  }
  for name, classes in verdicts.items():
    if np.shape(classes) != x.shape[:1]:
      raise InputError(
        f"{name} must hold one class for each of {len(x)} images, found the shape {np.shape(classes)}"
      )
  difference = x_adv - x
  largest = float(np.abs(difference).max())
  if amplify is None:
    amplify = 0.5 / largest if largest else 1.0
  amplified = 0.5 + np.float32(amplify) * difference
  texts, marks = [], []
  for classes in verdicts.values():
    texts.append([str(class_names[int(c)]) if class_names is not None else str(int(c)) for c in classes])
    marks.append([bool(c == label) for c, label in zip(classes, labels, strict=True)])
  caption = (
    f"Top: clean images. Middle: adversarial images. Bottom: 0.5 + {amplify:.3g} \N{MULTIPLICATION SIGN} "
    f"(adversarial \N{MINUS SIGN} clean). The largest change of a pixel is {largest * 255:.1f}/255. Under "
    f"each image the predicted class: {_TICK} right, {_CROSS} wrong; the true class stands above."
  )
  rows = [
    ("clean", _to_bytes(x), list(zip(texts[1], marks[1], strict=True))),
    ("adversarial", _to_bytes(x_adv), list(zip(texts[2], marks[2], strict=True))),
    (f"difference\n\N{MULTIPLICATION SIGN} {amplify:.3g}", _to_bytes(amplified), None),
  ]
  _write(path, _png(_draw_grid(rows, texts[0], "true class")))
  return caption


def marked_grid(
  images: UInt8[AnyArray, "n h w c"],
  marked: UInt8[AnyArray, "_ _ _ _"],
  path: Path,
  *,
  matches: Sequence[int],
  num_bits: int,
  amplify: float = 10.0,
) -> str:
  """PNG with a column for each image: as it was, marked, and the difference amplified; returns its caption.

  images, marked: uint8 [n h w c], one or three channels. matches: how many of num_bits are read right of each marked one.
  The last row is 0.5 + amplify * (marked - image), of images in [0, 1], clipped.
  """
  images, marked = np.asarray(images), np.asarray(marked)
  _check_images(images, "images")
  if marked.shape != images.shape or images.dtype != np.uint8 or marked.dtype != np.uint8:
    raise InputError(
      f"images and marked ones must be bytes of one shape, got {images.dtype} {images.shape} and {marked.dtype} {marked.shape}"
    )
  if len(matches) != len(images):
    raise InputError(f"{len(matches)} numbers of matches for {len(images)} images")
  difference = (marked.astype(np.float32) - images) / 255
  error = np.maximum(np.square(difference).mean((1, 2, 3)), 1e-10)
  rows = [
    ("image", images, None),
    ("marked", marked, [(f"{right} of {num_bits} bits", right == num_bits) for right in matches]),
    (f"difference\n\N{MULTIPLICATION SIGN} {amplify:.3g}", _to_bytes(0.5 + amplify * difference), None),
  ]
  header = [f"{decibels:.1f} dB" for decibels in -10 * np.log10(error)]
  _write(path, _png(_draw_grid(rows, header, "PSNR")))
  return (
    f"Top: images. Middle: with {num_bits} bits in them, and how many are read right. Bottom: 0.5 + {amplify:.3g} "
    f"\N{MULTIPLICATION SIGN} (marked \N{MINUS SIGN} image). The largest change of a pixel is {255 * np.abs(difference).max():.0f}/255."
  )


def image_grid(
  images: Shaped[AnyArray, "n h w c"],
  path: Path,
  columns: int | None = None,
  scale: int | None = None,
  gap: int = 2,
) -> None:
  """PNG of uint8 images [n h w c], row by row, with `gap` white pixels between them.

  columns: default the square root of n, rounded up. scale: each pixel becomes scale x scale; default 1, or
  what makes an image at least 64 pixels wide.
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise InputError(f"an image grid takes uint8 images, found {images.dtype}")
  _check_images(images, "images")
  n, height, width, _ = images.shape
  scale = _whole_scale(64, width) if scale is None else scale
  columns = math.ceil(math.sqrt(n)) if columns is None else columns
  if columns < 1 or scale < 1:
    raise InputError(f"columns and scale must be at least 1, found {columns} and {scale}")
  columns = min(columns, n)
  rows, step_y, step_x = -(-n // columns), height * scale + gap, width * scale + gap
  canvas = np.full((rows * step_y - gap, columns * step_x - gap, 3), 255, np.uint8)
  for i, image in enumerate(_enlarge(images, scale)):
    top, left = (i // columns) * step_y, (i % columns) * step_x
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
  _write(path, _png(canvas))


def _check_images(images: np.ndarray, name: str) -> None:
  if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
    raise InputError(
      f"{name} must be images [n h w c] with 1 or 3 channels and n >= 1, found the shape {images.shape}"
    )


def _to_bytes(images: np.ndarray) -> np.ndarray:
  return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _whole_scale(wanted: int, size: int) -> int:
  return max(1, -(-wanted // size))


def _enlarge(images: np.ndarray, scale: int) -> np.ndarray:
  """[n h w c] -> [n h*scale w*scale 3], every pixel repeated."""
  images = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
  return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _draw_grid(rows, header: Sequence[str], title: str) -> np.ndarray:
  """Rows of (title, uint8 images, [(text, right?)] or None for no text) below a line of headers with a title of its own."""
  from PIL import Image, ImageDraw

  _, height, width, _ = rows[0][1].shape
  scale = _whole_scale(104, width)
  cell_w, cell_h, gap, line, margin = width * scale, height * scale, 10, 24, 14
  regular, bold = _font("DejaVuSans.ttf", 15), _font("DejaVuSans-Bold.ttf", 15)
  left = margin + 112
  step = cell_h + line + gap
  n = len(header)
  size = (left + n * (cell_w + gap) - gap + margin, margin + line + len(rows) * step - line - gap + margin)
  canvas = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(canvas)
  draw.text((margin, margin), title, _MUTED, regular)
  for i, text in enumerate(header):
    centre = left + i * (cell_w + gap) + cell_w / 2
    draw.text((centre, margin), _shorten(text, regular, cell_w), _INK, regular, anchor="ma")
  for r, (name, images, verdicts) in enumerate(rows):
    top = margin + line + r * step
    draw.multiline_text((margin, top + cell_h / 2), name, _INK, bold, anchor="lm", spacing=6)
    for i, image in enumerate(_enlarge(images, scale)):
      x = left + i * (cell_w + gap)
      canvas.paste(Image.fromarray(image), (x, top))
      if verdicts is not None:
        text, right = verdicts[i]
        text = _shorten(f"{_TICK if right else _CROSS} {text}", regular, cell_w)
        draw.text(
          (x + cell_w / 2, top + cell_h + 3), text, _BLUE if right else _VERMILLION, regular, anchor="ma"
        )
  return np.asarray(canvas)


def _font(name: str, size: int):
  """A font that matplotlib brings along, so that the picture is the same everywhere."""
  import matplotlib
  from PIL import ImageFont

  return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _shorten(text: str, font, width: float) -> str:
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(text + "\N{HORIZONTAL ELLIPSIS}") > width:
    text = text[:-1]
  return text + "\N{HORIZONTAL ELLIPSIS}"


# ---- report.html ----


def html_report(
  path: Path,
  title: str,
  *,
  summary: str,
  metrics: Mapping[str, Any],
  figures: Sequence[tuple[Path, str]] = (),
  tables: Sequence[Table] = (),
  config_text: str = "",
  info: Mapping[str, Any] | None = None,
) -> None:
  """One HTML file with the summary, a table of `metrics`, the figures and tables, and how the run was made.

  Nothing is loaded from elsewhere: pictures and style are inside. It follows the reader's dark or light
  setting and fits a phone. All text is escaped.
  metrics: name -> value. Where all names are 'prefix/name', a prefix is a column of the table. Values named
  ...accuracy are fractions, shown in percent. '<metric>/interval' is the half width of its interval
  and stands behind it.
  figures: (PNG file, caption). tables: (caption, header, rows). config_text: shown when unfolded.
  info: device, seconds, versions and the like; nested mappings are flattened.
  """
  body = [f"<header><h1>{_text(title)}</h1>"]
  body += [f"<p>{_text(part)}</p>" for part in re.split(r"\n\s*\n", summary.strip()) if part]
  body.append("</header>")
  if metrics:
    body.append(f"<section><h2>Results</h2>{_metrics_table(metrics)}</section>")
  for caption, header, rows in tables:
    cells = [[_format(cell) for cell in row] for row in rows]
    body.append(f"<section><h2>{_text(caption)}</h2>{_table([*map(str, header)], cells)}</section>")
  if figures:
    pictures = "".join(_figure_html(file, caption) for file, caption in figures)
    body.append(f"<section><h2>Pictures</h2>{pictures}</section>")
  if info:
    cells = [[name, _format_info(name, value)] for name, value in _flatten(info)]
    body.append(f"<section><h2>Run</h2>{_table([], cells, 'words')}</section>")
  if config_text:
    body.append(f"<details><summary>Config</summary><pre>{_text(config_text)}</pre></details>")
  page = _PAGE.replace("{{title}}", _text(title)).replace("{{body}}", "\n".join(body))
  _write(path, page.encode())


def _metrics_table(metrics: Mapping[str, Any]) -> str:
  """A line for each metric; if all are 'prefix/name', one for each name and a column for each prefix."""
  values = {
    name: _format_metric(name, value, metrics.get(f"{name}/interval"))
    for name, value in metrics.items()
    if name.removesuffix("/interval") not in metrics or not name.endswith("/interval")
  }
  parts = [name.partition("/") for name in values]
  prefixes, names = list(dict.fromkeys(p for p, _, _ in parts)), list(dict.fromkeys(n for _, _, n in parts))
  if "" in names or len(prefixes) == 1 or len(names) == len(values):
    return _table([], list(values.items()))
  rows = [[name, *(values.get(f"{prefix}/{name}", "") for prefix in prefixes)] for name in names]
  return _table(["", *prefixes], rows)


def _format_metric(name: str, value: Any, half_width: float | None) -> str:
  if name.endswith("accuracy") and isinstance(value, numbers.Real):
    return f"{value:.1%}" + ("" if half_width is None else f" \N{PLUS-MINUS SIGN} {100 * half_width:.1f}")
  return _format(value) + ("" if half_width is None else f" \N{PLUS-MINUS SIGN} {_format(half_width)}")


def _format(value: Any) -> str:
  if isinstance(value, (bool, np.bool_, str)):
    return str(value)
  if isinstance(value, numbers.Integral):
    return f"{value:,}"
  return f"{value:.4g}" if isinstance(value, numbers.Real) else str(value)


def _format_info(name: str, value: Any) -> str:
  if name == "seconds" and isinstance(value, numbers.Real) and value >= 90:
    minutes = f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
    return f"{value:,.0f} ({minutes})"
  return str(value)


def _flatten(info: Mapping[str, Any], prefix: str = ""):
  for name, value in info.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{name}: ")
    else:
      yield f"{prefix}{name}", value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
  """A table of plain texts; the first cell of a row is its heading."""
  head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
  lines = []
  for first, *rest in rows:
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in rest)
    lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
  thead = f"<thead><tr>{head}</tr></thead>" if header else ""
  return f'<div class="scroll"><table class="{kind}">{thead}<tbody>{"".join(lines)}</tbody></table></div>'


def _figure_html(file: Path, caption: str) -> str:
  file = pathlib.Path(file)
  if not file.is_file():
    raise InputError(f"no picture {file} for the report")
  data = file.read_bytes()
  if not data.startswith(b"\x89PNG\r\n\x1a\n"):
    raise InputError(f"{file} is not a PNG")
  source = "data:image/png;base64," + base64.b64encode(data).decode()
  caption, kind = _text(caption), "wide" if int.from_bytes(data[16:20], "big") > 800 else "narrow"
  picture = f'<div class="scroll"><img class="{kind}" src="{source}" alt="{caption}"></div>'
  return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark;
  --ink: #1c1c1e; --paper: #ffffff; --soft: #5f6368; --line: #dcdfe3; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17181a; --soft: #a0a4a9; --line: #393b3f; --box: #212327; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 62rem;
  color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.6rem; }
header p { max-width: 44rem; margin: 0.4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.32rem 1.1rem 0.32rem 0; text-align: left; border-bottom: 1px solid var(--line); }
.numbers td, thead th:not(:first-child) { text-align: right; }
tbody th { font-weight: 400; color: var(--soft); }
figure { margin: 0 0 1.6rem; }
img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.4rem; max-width: 44rem; }
@media (max-width: 40rem) {
  .wide { max-width: none; width: 46rem; }
  th, td { padding-right: 0.8rem; }
}
details { margin-top: 2rem; }
summary { cursor: pointer; font-weight: 600; }
pre { padding: 0.8rem; background: var(--box); border-radius: 6px; overflow-x: auto; font-size: 0.82rem; }
</style>
</head>
<body>
{{body}}
</body>
</html>
"""


# ---- files ----


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float]):
  """A matplotlib figure without a window or pyplot's state, written to `path` at the end."""
  import matplotlib
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
  _write(path, buffer.getvalue())


def _png(pixels: np.ndarray) -> bytes:
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "png", optimize=True)
  return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all, and the folder it is in."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)
