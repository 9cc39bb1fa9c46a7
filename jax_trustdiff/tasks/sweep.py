"""A table of runs that differ in a few keys: what must be there first, the rows with several seeds each, their evaluations."""

import dataclasses
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel, tasks
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.tasks import seeds
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

OF_PARTS = True  # for `Workdir`
TABLE, CURVES = "table.md", "curves.png"
BARS = "bars.png"
TRAINING = "train"  # the run of a row itself, beside its evaluations, in names of metrics
VERDICTS = ("clean", "robust")  # on every image, of an evaluation of robustness
IDS = "id"  # of those images
# {word in a recipe: the config's key for it}
PLACES = dict(
  data="data_path",
  generated="generated",
  generator="generator",
  unconditional="unconditional",
  codec="codec",
  key="key",
)

_Found = dict[str, float | np.ndarray]  # '<run>:<metric>' -> its value, or the verdicts on the images [n]
_Columns = dict[str, dict[str, np.ndarray]]  # row -> column -> values [seeds] or [seeds, images]
_Curves = dict[str, list[tuple[dict[float, float], str]]]  # row -> of every seed ({epoch: value}, 'epoch')
ONE_OF_EACH = " Stages ran once: the intervals do not speak of another generator or other generated images."


def run(config, workdir: Workdir) -> dict[str, float]:
  """Runs what is not finished, and returns '<row>/<column>', the mean over the seeds, and '<row>/<column>/interval'.

  config.stages: {name: recipe}, run once each in workdir/<name>, in order. config.rows: {row: recipe}, run for every seed in
  workdir/<row>/seed-<seed>. config.evaluations: {name: recipe}, run for every row and seed in workdir/<row>/seed-<seed>-<name>;
  one that does not speak of {row} is run once for every row, in workdir/<row>/<name>, and its metrics have no interval.
  The seeds are config.sweep_seeds, or config.seed alone; stages have config.seed.
  A recipe is what --config takes, 'configs/at_cifar.py:cpu,train.num_epochs=20'. A {word} in a value of it stands for a path:
  {data}, {generated}, {codec} and so on (`PLACES`) for the config's keys `data_path`, `generated`, `codec`, where it has them,
  {workdir}, and {<stage>} for the folder of a stage; in evaluations also {row} for the folder of the row and seed, and {name} for
  the name of the row.
  config.order: {'stages', 'rows', 'columns', 'pictures': their names in order}. config.published: {row: text}.
  config.columns: {column: 'train:<metric>' or '<evaluation>:<metric>', also as a difference 'a - b'}. 'clean' and 'robust' of an
  evaluation of robustness are the verdicts on its images, and so is a difference of two: their interval speaks of other seeds and
  other images (`statistics.crossed_interval`), that of other metrics of the seeds alone, and one seed has none.
  config.baseline: a row that is subtracted from every other, seed by seed and image by image ('': none): '<row> - <baseline>/...'.
  config.curve: the metric of metrics.jsonl that is drawn against the epoch ('': none).
  config.bars: the columns drawn as bars. config.pictures: {caption: PNG of a run}, where {row} means one for every row.

  Writes workdir/report: table.md, the pictures and report.html. A part that has finished is not run again, also where seeds, rows or
  columns were added since. InputError where images that are not the same would be compared one by one.
  """
  plan = _Plan(config, workdir)
  for name, part in plan.stages.items():
    plan.complete(part, name)
  found: dict[str, list[_Found]] = {row: [] for row in plan.rows}
  curves: _Curves = {row: [] for row in plan.rows} if config.curve else {}
  columns: dict[str, list[dict[str, np.ndarray]]] = {row: [] for row in plan.rows}
  for seed in plan.seeds:
    for row in plan.rows:
      of_parts = {}
      for name, part in plan.parts(row, seed).items():
        one = plan.complete(part, f"{row}, seed {seed}, {name}")
        of_parts |= {f"{name}:{key}": value for key, value in one.items()}
      found[row].append(of_parts)
      # Here, so that a column or a curve that is not there ends the sweep at its first row.
      columns[row].append({name: _value(formula, of_parts) for name, formula in plan.columns.items()})
      if config.curve:
        curves[row].append(plan.curve(row, seed, of_parts))
  for row in plan.rows:
    _check_same_images(found[row], found[config.baseline or row][0], row, config.baseline)
  stacked = {
    row: {name: np.stack([one[name] for one in of_seeds]) for name in plan.columns}
    for row, of_seeds in columns.items()
  }
  metrics = _summary(stacked, plan)
  if config.baseline:
    metrics |= _summary(_less(stacked, config.baseline), plan)
  if parallel.is_main_process():
    workdir.open()
    _report(config, plan, workdir, stacked, metrics, curves)
  return metrics


@dataclasses.dataclass(frozen=True)
class _Part:
  """A run: its folder in that of the sweep, its recipe without values, and these, with the paths in them."""

  folder: str
  recipe: str
  values: dict[str, Any]

  def __str__(self) -> str:
    values = ",".join(f"{key}={value}" for key, value in self.values.items())
    return f"{self.recipe}{',' if ':' in self.recipe else ':'}{values}"

  def load(self):
    """Its config."""
    return config_lib.load(self.recipe, self.values)


class _Plan:
  """Every run of the sweep. Each is loaded here and its folder looked at, so that mistakes are found before the first begins."""

  def __init__(self, config, workdir: Workdir):
    self._config, self._workdir = config, workdir
    self._places = {word: config[key] for word, key in PLACES.items() if key in config}
    self._places |= {"workdir": str(workdir.path)}
    stages, rows, self.columns = (_ordered(config, name) for name in ("stages", "rows", "columns"))
    self._places |= {name: str(workdir / name) for name in stages}
    self.seeds = config_lib.parse_seeds(config.sweep_seeds, config.seed, "sweep_seeds")
    self.rows = list(rows)
    self.stages = {name: self._part(name, _seeded(recipe, config.seed)) for name, recipe in stages.items()}
    taken = [name for name in self.rows if name in self.stages]
    if taken or not self.rows:
      raise InputError(f"{taken[0]!r} is a row and a stage" if taken else "a sweep needs rows")
    if config.baseline not in ("", *self.rows):
      raise InputError(f"the baseline {config.baseline!r} is no row; there are {', '.join(self.rows)}")
    if unknown := [name for name in config.bars if name not in self.columns]:
      raise InputError(f"bars: {unknown[0]!r} is no column; there are {', '.join(self.columns)}")
    self._pictures = _ordered(config, "pictures")
    self.pictures()
    of_rows = (p for row in self.rows for seed in self.seeds for p in self.parts(row, seed).values())
    for part in (*self.stages.values(), *of_rows):
      workdir.sub(part.folder, part.load()).check()
    for name, formula in self.columns.items():
      for term in _terms(formula):
        if term.partition(":")[0] not in (TRAINING, *config.evaluations):
          known = ", ".join((TRAINING, *config.evaluations))
          raise InputError(f"column {name!r}: {term!r} is of no run of a row; there are {known}")

  def parts(self, row: str, seed: int) -> dict[str, _Part]:
    """{'train' or an evaluation: its run} of a row with a seed."""
    folder = self._folder(row, seed)
    found = {TRAINING: self._part(folder, _seeded(self._config.rows[row], seed))}
    for name, recipe in self._config.evaluations.items():
      place = f"{folder}-{name}" if self._has_seeds(name) else f"{row}/{name}"
      found[name] = self._part(place, recipe, row=str(self._workdir / folder), name=row)
    return found

  def has_seeds(self, column: str) -> bool:
    """Whether the values of a column may differ from seed to seed."""
    return any(self._has_seeds(term.partition(":")[0]) for term in _terms(self.columns[column]))

  def is_accuracy(self, column: str) -> bool:
    """Whether a column is a share of images that are seen aright, or a difference of such."""
    ends = ("_accuracy", *(f":{verdict}" for verdict in VERDICTS))
    return all(term.endswith(ends) for term in _terms(self.columns[column]))

  def _has_seeds(self, name: str) -> bool:
    """Whether a run of a row, its training or an evaluation, is one for every seed."""
    return name == TRAINING or "{row}" in self._config.evaluations[name]

  def curve(self, row: str, seed: int, found: _Found) -> tuple[dict[float, float], str]:
    """({epoch: value} of config.curve in the training of a row, 'epoch'); steps where training does not say steps_per_epoch.

    InputError if the run has no such metric.
    """
    curve, lines = self._config.curve, self._workdir.sub(self._folder(row, seed), None).read_metrics()
    steps = found.get(f"{TRAINING}:steps_per_epoch")
    values = {line["step"] / (steps or 1): line[curve] for line in lines if curve in line}
    if not values:
      known = ", ".join(sorted({name for line in lines for name in line} - {"step"}))
      raise InputError(f"the training of {row!r} has no {curve!r} in its metrics.jsonl; there are {known}")
    return values, "epoch" if steps else "step"

  def complete(self, part: _Part, what: str) -> _Found:
    """The metrics of a run and its verdicts, if it has any; it is run if it is not finished."""
    config = part.load()
    folder, task = self._workdir.sub(part.folder, config), tasks.find(config.task)

    def begin():
      say(f"{what}: {part}")
      return task.run(config, folder)

    metrics = folder.complete(begin, **seeds.states_of(task, config))
    examples = folder.recorded("examples") or {}
    return metrics | {name: np.asarray(examples[name]) for name in (*VERDICTS, IDS) if name in examples}

  def pictures(self) -> list[tuple[pathlib.Path, str]]:
    """(file, caption) of config.pictures, of the first seed."""
    found = []
    for caption, place in self._pictures.items():
      if "{row}" not in place:
        found.append((pathlib.Path(self._fill(place)), caption))
        continue
      for row in self.rows:
        folder = str(self._workdir / self._folder(row, self.seeds[0]))
        found.append((pathlib.Path(self._fill(place, row=folder)), f"{row.replace('_', ' ')}: {caption}"))
    return found

  def _folder(self, row: str, seed: int) -> str:
    return f"{row}/seed-{seed}"

  def _part(self, folder: str, recipe: str, **more: str) -> _Part:
    """Paths are filled in once the recipe is taken apart: a comma or a number in one is nothing but that."""
    recipe, values = config_lib.split_recipe(recipe)
    filled = {k: self._fill(v, **more) if isinstance(v, str) else v for k, v in values.items()}
    return _Part(folder, recipe, filled)

  def _fill(self, text: str, **more: str) -> str:
    places = self._places | more
    words = [word for _, word, _, _ in string.Formatter().parse(text) if word is not None]
    if unknown := [word for word in words if word not in places]:
      raise InputError(f"{text!r} speaks of {{{unknown[0]}}}; there are {', '.join(places)}")
    if empty := [word for word in words if not places[word]]:
      raise InputError(f"config.{PLACES.get(empty[0], empty[0])} is empty, and the sweep needs it: {text!r}")
    return text.format(**places)


def _seeded(recipe: str, seed: int) -> str:
  return f"{recipe}{',' if ':' in recipe else ':'}seed={seed}"


def _ordered(config, section: str) -> dict[str, str]:
  """A section in the order that config.order gives its keys, which a ConfigDict does not keep."""
  if wrong := set(config[section]) ^ set(config.order[section]):
    raise InputError(
      f"order.{section} and {section} do not have the same names: {sorted(wrong)[0]!r} is in one alone"
    )
  return {name: config[section][name] for name in config.order[section]}


def _terms(formula: str) -> list[str]:
  return [term.strip() for term in formula.split(" - ")]


def _value(formula: str, found: _Found) -> np.ndarray:
  """The value of a column for one seed: verdicts [n] where all of its terms are, else a number [] (of verdicts their mean)."""
  values, images = [], {}
  for term in _terms(formula):
    if term not in found:
      raise InputError(f"there is no metric {term!r}; there are {', '.join(sorted(found))}")
    values.append(np.asarray(found[term], np.float64))
    if values[-1].ndim:
      images[term] = found[f"{term.partition(':')[0]}:{IDS}"]
  if 0 < len(images) < len(values):
    return np.asarray(values[0].mean() - sum(value.mean() for value in values[1:]))
  for term, ids in images.items():
    if not np.array_equal(ids, next(iter(images.values()))):
      raise InputError(
        f"{next(iter(images))!r} and {term!r} are of other images, so their difference is of none"
      )
  return np.asarray(values[0] - sum(values[1:]))


def _check_same_images(of_seeds: Sequence[_Found], first: _Found, row: str, baseline: str) -> None:
  """InputError unless a row was evaluated on the images of `first` with every seed."""
  for one in of_seeds:
    for name in one:
      if name.endswith(f":{IDS}") and not np.array_equal(one[name], first[name]):
        than = f"in the baseline {baseline!r}" if baseline else "with another seed"
        raise InputError(f"the images of {name.partition(':')[0]} are other ones in row {row!r} than {than}")


def _less(columns: _Columns, baseline: str) -> _Columns:
  """Every other row less the row `baseline`, of the same seed and image."""
  base = columns[baseline]
  return {
    f"{row} - {baseline}": {name: values - base[name] for name, values in of_row.items()}
    for row, of_row in columns.items()
    if row != baseline
  }


def _summary(columns: _Columns, plan: _Plan) -> dict[str, float]:
  metrics = {}
  for row, of_row in columns.items():
    for name, values in of_row.items():
      place = f"{row}/{name}"
      if values.ndim == 2:
        metrics[place], metrics[f"{place}/interval"] = statistics.crossed_interval(values)
      elif len(values) > 1 and plan.has_seeds(name):
        metrics[place], metrics[f"{place}/interval"] = statistics.mean_interval(values.tolist())
      else:
        metrics[place] = float(values[0])
  return metrics


def _table(rows: Sequence[str], plan: _Plan, metrics, published) -> tuple[list[str], list[list[str]]]:
  """(header, rows) of text: accuracies in percent, means with the half-width of their interval."""

  def cell(row, name):
    value, half = metrics[f"{row}/{name}"], metrics.get(f"{row}/{name}/interval")
    if plan.is_accuracy(name):
      return f"{value:.1%}" + (f" ± {100 * half:.1f}" if half is not None else "")
    if half is None and value == round(value):  # a count
      return f"{value:,.0f}"
    digits = _digits(value if half is None else half)
    return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")

  header = ["", *plan.columns] + (["published"] if published else [])
  lines = []
  for row in rows:
    last = [published.get(row, "")] if published else []
    lines.append([row.replace("_", " "), *(cell(row, name) for name in plan.columns), *last])
  return header, lines


def _digits(value: float) -> int:
  """Digits after the point that show two of a small number's own; from 3 to 6."""
  return int(np.clip(1 - np.floor(np.log10(abs(value))), 3, 6)) if value and np.isfinite(value) else 3


def _means(runs: Sequence[Mapping[float, float]]) -> tuple[list[float], list[float]]:
  """(epochs that all runs have, means of the values there)."""
  epochs = sorted(set.intersection(*map(set, runs)))
  return epochs, [float(np.mean([values[epoch] for values in runs])) for epoch in epochs]


def _report(
  config, plan: _Plan, workdir: Workdir, columns: _Columns, metrics: dict[str, Any], curves: _Curves
) -> None:
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  tables = [(config.title, *_table(plan.rows, plan, metrics, config.published))]
  if config.baseline:
    others = [f"{row} - {config.baseline}" for row in plan.rows if row != config.baseline]
    tables.append(("Differences, of the same seeds and images", *_table(others, plan, metrics, {})))
  (folder / TABLE).write_text("\n".join(report.markdown(header, lines) for _, header, lines in tables))
  means = {
    row: {name: values.reshape(len(values), -1).mean(1).tolist() for name, values in of_row.items()}
    for row, of_row in columns.items()
  }
  workdir.record("seeds", means)
  figures = []
  if config.bars:
    _bars(config, plan, metrics, folder / BARS)
    figures.append((folder / BARS, ", ".join(config.bars)))
  if curves:
    unit, *others = {unit for runs in curves.values() for _, unit in runs}
    if others:
      raise InputError("the training of some rows has steps_per_epoch among its metrics, that of others not")
    lines = {row.replace("_", " "): _means([values for values, _ in runs]) for row, runs in curves.items()}
    report.accuracy_curves(lines, folder / CURVES, xlabel=unit)
    figures.append((folder / CURVES, f"{config.curve} against the {unit}, mean of {len(plan.seeds)} seed(s)"))
  report.html_report(
    folder / "report.html",
    title=config.title,
    summary=f"Mean of {len(plan.seeds)} seed(s) with the half-width of its 95 % interval.{ONE_OF_EACH if plan.stages else ''}",
    metrics={},  # the tables have them
    figures=figures + plan.pictures(),
    tables=tables,
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )


def _bars(config, plan: _Plan, metrics: Mapping[str, float], path: pathlib.Path) -> None:
  groups, intervals = {}, {}
  for row in plan.rows:
    name = row.replace("_", " ")
    groups[name] = {column: metrics[f"{row}/{column}"] for column in config.bars}
    intervals[name] = {}
    for column, mean in groups[name].items():
      if (half := metrics.get(f"{row}/{column}/interval")) is not None:
        intervals[name][column] = (mean - half, mean + half)
  percent = all(plan.is_accuracy(column) for column in config.bars)
  report.bars(
    groups, path, ylabel="accuracy" if percent else ", ".join(config.bars), intervals=intervals, percent=percent
  )
