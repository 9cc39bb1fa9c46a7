"""A table of runs that differ in a few keys: what must be there first, the rows with several seeds each, their evaluations."""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel, tasks
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

TABLE, CURVES = "table.md", "curves.png"
TRAINING = "train"  # the run of a row itself, beside its evaluations, in names of metrics


def run(config, workdir: Workdir) -> dict[str, float]:
  """Runs what is not finished, and returns '<row>/<column>', the mean over the seeds, and '<row>/<column>/interval'.

  config.stages: {name: recipe}, run once each in workdir/<name>, in order. config.rows: {row: recipe}, run for every seed in
  workdir/<row>/seed-<seed>. config.evaluations: {name: recipe}, run for every row and seed in workdir/<row>/seed-<seed>-<name>.
  A recipe is what --config takes, 'configs/at_cifar.py:cpu,train.num_epochs=20'. A {word} in it stands for a path: {data},
  {generated}, {generator} and {unconditional} for the config's keys of these names, {workdir}, and {<stage>} for the folder of a
  stage; in evaluations also {row} for the folder of the row and seed, and {name} for the name of the row.
  config.order: {'stages', 'rows', 'columns': their names in order}. config.columns: {column: 'train:<metric>' or '<evaluation>:<metric>'}, also as a difference 'a - b'. config.published: {row: text}.
  config.curve: the metric of metrics.jsonl that is drawn against the epoch ('': none), of which there are config.epoch_steps steps.

  Writes workdir/report: table.md, the curves and report.html. A part that has finished is not run again.
  """
  plan = _Plan(config, workdir)
  for name, part in plan.stages.items():
    plan.complete(part, name)
  found: dict[str, list[dict[str, float]]] = {row: [] for row in plan.rows}
  for seed in plan.seeds:
    for row in plan.rows:
      metrics = {}
      for name, part in plan.parts(row, seed).items():
        one = plan.complete(part, f"{row}, seed {seed}, {name}")
        metrics |= {f"{name}:{key}": value for key, value in one.items()}
      found[row].append(metrics)
  columns = {
    row: {name: [_value(formula, metrics) for metrics in of_seeds] for name, formula in plan.columns.items()}
    for row, of_seeds in found.items()
  }
  metrics = _summary(columns)
  if parallel.is_main_process():
    workdir.open()
    _report(config, plan, workdir, columns, metrics)
  return metrics


@dataclasses.dataclass(frozen=True)
class _Part:
  """A run: its folder in that of the sweep, and its recipe with the paths in it."""

  folder: str
  recipe: str


class _Plan:
  """Every run of the sweep. Each is loaded here, so that mistakes are found before the first begins."""

  def __init__(self, config, workdir: Workdir):
    self._config, self._workdir = config, workdir
    self._places = {name: config[name] for name in ("generated", "generator", "unconditional")}
    self._places |= {"data": config.data_path, "workdir": str(workdir.path)}
    stages, rows, self.columns = (_ordered(config, name) for name in ("stages", "rows", "columns"))
    self._places |= {name: str(workdir / name) for name in stages}
    self.seeds = config_lib.parse_seeds(config.sweep_seeds, config.seed)
    self.rows = list(rows)
    self.stages = {name: self._part(name, recipe) for name, recipe in stages.items()}
    taken = [name for name in self.rows if name in self.stages]
    if taken or not self.rows:
      raise InputError(f"{taken[0]!r} is a row and a stage" if taken else "a sweep needs rows")
    for part in (*self.stages.values(), *(p for row in self.rows for p in self.parts(row, 0).values())):
      config_lib.load(part.recipe)
    for name, formula in self.columns.items():
      for term in _terms(formula):
        if term.partition(":")[0] not in (TRAINING, *config.evaluations):
          known = ", ".join((TRAINING, *config.evaluations))
          raise InputError(f"column {name!r}: {term!r} is of no run of a row; there are {known}")

  def parts(self, row: str, seed: int) -> dict[str, _Part]:
    """{'train' or an evaluation: its run} of a row with a seed."""
    folder = f"{row}/seed-{seed}"
    found = {TRAINING: self._part(folder, f"{self._config.rows[row]},seed={seed}")}
    for name, recipe in self._config.evaluations.items():
      found[name] = self._part(f"{folder}-{name}", recipe, row=str(self._workdir / folder), name=row)
    return found

  def complete(self, part: _Part, what: str) -> dict[str, float]:
    """The metrics of a run, which is run if it is not finished."""
    config = config_lib.load(part.recipe)
    folder = self._workdir.sub(part.folder, config)

    def begin():
      say(f"{what}: {part.recipe}")
      return tasks.find(config.task).run(config, folder)

    return folder.complete(begin)

  def _part(self, folder: str, recipe: str, **more: str) -> _Part:
    places = self._places | more
    words = [word for _, word, _, _ in string.Formatter().parse(recipe) if word is not None]
    if unknown := [word for word in words if word not in places]:
      raise InputError(f"{recipe!r} speaks of {{{unknown[0]}}}; there are {', '.join(places)}")
    return _Part(folder, recipe.format(**places))


def _ordered(config, section: str) -> dict[str, str]:
  """A section in the order that config.order gives its keys, which a ConfigDict does not keep."""
  if wrong := set(config[section]) ^ set(config.order[section]):
    raise InputError(
      f"order.{section} and {section} do not have the same names: {sorted(wrong)[0]!r} is in one alone"
    )
  return {name: config[section][name] for name in config.order[section]}


def _terms(formula: str) -> list[str]:
  return [term.strip() for term in formula.split(" - ")]


def _value(formula: str, metrics: Mapping[str, float]) -> float:
  values = []
  for term in _terms(formula):
    if term not in metrics:
      raise InputError(f"there is no metric {term!r}; there are {', '.join(sorted(metrics))}")
    values.append(float(metrics[term]))
  return values[0] - sum(values[1:])


def _summary(columns: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
  metrics = {}
  for row, of_row in columns.items():
    for name, values in of_row.items():
      if len(values) == 1:
        metrics[f"{row}/{name}"] = values[0]
      else:
        metrics[f"{row}/{name}"], metrics[f"{row}/{name}/interval"] = statistics.mean_interval(values)
  return metrics


def _table(config, plan: _Plan, metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
  """(header, rows) of text: accuracies in percent, means with the half-width of their interval."""

  def cell(row, name):
    text, half = f"{metrics[f'{row}/{name}']:.1%}", metrics.get(f"{row}/{name}/interval")
    return text if half is None else f"{text} ± {100 * half:.1f}"

  header = ["", *plan.columns] + (["published"] if config.published else [])
  rows = []
  for row in plan.rows:
    published = [config.published.get(row, "")] if config.published else []
    rows.append([row.replace("_", " "), *(cell(row, name) for name in plan.columns), *published])
  return header, rows


def _curves(config, plan: _Plan, workdir: Workdir) -> dict[str, tuple[list[float], list[float]]]:
  """{row: (epochs, means over the seeds)} of config.curve."""
  found = {}
  for row in plan.rows:
    runs: list[dict[int, float]] = []
    for seed in plan.seeds:
      part = plan.parts(row, seed)[TRAINING]
      lines = workdir.sub(part.folder, None).read_metrics()
      runs.append({line["step"]: line[config.curve] for line in lines if config.curve in line})
    steps = sorted(set.intersection(*map(set, runs)))
    if not steps:
      raise InputError(f"no run of {row!r} has {config.curve!r} in its metrics.jsonl")
    means = [float(np.mean([values[step] for values in runs])) for step in steps]
    found[row.replace("_", " ")] = ([step / config.epoch_steps for step in steps], means)
  return found


def _report(config, plan: _Plan, workdir: Workdir, columns, metrics: dict[str, Any]) -> None:
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  header, rows = _table(config, plan, metrics)
  lines = [header, ["---"] * len(header), *rows]
  (folder / TABLE).write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
  workdir.record("seeds", {row: of_row for row, of_row in columns.items()})
  figures = []
  if config.curve:
    curves = _curves(config, plan, workdir)
    report.accuracy_curves(curves, folder / CURVES, xlabel="epoch")
    figures.append((folder / CURVES, f"{config.curve} against the epoch, mean of {len(plan.seeds)} seed(s)"))
  report.html_report(
    folder / "report.html",
    title=config.title,
    summary=f"Mean of {len(plan.seeds)} seed(s) with the half-width of the 95 % Student interval of the mean.",
    metrics=metrics,
    figures=figures,
    tables=[(config.title, header, rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
