"""Tables of runs: what runs when, what is in the table, and that a sweep goes on where it was."""

import json
import pathlib
import types

import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff import tasks
from jax_trustdiff.evaluation import report
from jax_trustdiff.tasks import seeds, sweep
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError

TABLES = ("overfitting", "epochs", "sampling_steps", "augmentations", "datasets")
SWEEPS = (
  "configs/quickstart.py",
  *(f"configs/sweeps/better_diffusion.py:{name}" for name in ("cpu", "gpu", "smoke")),
)
RECIPE = "configs/sweeps/better_diffusion.py:smoke"


@pytest.fixture
def runs(monkeypatch):
  """What was run, in order; the runs are replaced by ones that take no time."""
  done, dying, elsewhere = [], [], []

  def fake(config, workdir):
    if dying and len(done) == dying[0]:
      raise RunError("cut off")
    workdir.open()
    done.append(str(workdir.path.relative_to(workdir._parent.path)))
    if config.task == "evaluate_robustness":
      folder, _, name = str(workdir.path).rpartition("-")
      assert config.init_from == f"{folder}/{'export' if name == 'autoattack' else 'export_last'}"
      seed = int(folder[-1])
      best = {"none": [1, 1, 0, 0], "generated": [1, 1, seed, 0]}[pathlib.Path(folder).parent.name]
      robust = best if name == "autoattack" or "generated" in folder else [1, 0, 0, 0]
      ids = [1, 2, 3, 4] if any(part in str(workdir.path) for part in elsewhere) else [1, 2, 3, 5]
      clean = [True, True, True, False]
      workdir.record("examples", {"id": ids, "clean": clean, "robust": [bool(r) for r in robust]})
      return {"autoattack_accuracy": sum(robust) / 4}
    if config.task == "generate":
      return {}
    generated = config.mixing.generated
    report.image_grid(np.zeros((1, 8, 8, 1), np.uint8), workdir / "report/adversarial_images.png")
    assert generated in ("", str(workdir._parent.path / "images/images"))
    for step, value in ((8, 0.5), (16, 0.3)):
      workdir.append_metrics(step, {"validation/pgd2_accuracy": value + 0.1 * config.seed})
    return {"pgd5_accuracy": 0.5 + 0.1 * config.seed, "best_step": 16, "steps_per_epoch": 8}

  monkeypatch.setattr(tasks, "find", lambda name: types.SimpleNamespace(run=fake))
  return types.SimpleNamespace(done=done, dying=dying, elsewhere=elsewhere)


def run(folder, **overrides):
  overrides = {"sweep_seeds": "0,1"} | {name.replace("__", "."): value for name, value in overrides.items()}
  config = config_lib.load(RECIPE, overrides)
  workdir = Workdir(folder, config, of_parts=sweep.OF_PARTS)
  return workdir.complete(lambda: sweep.run(config, workdir))


def test_stages_once_and_rows_for_every_seed(tmp_path, runs):
  metrics = run(tmp_path / "run", columns__clean="train:pgd5_accuracy")
  ends = ("", "-autoattack", "-last")
  rows = [f"{row}/seed-{seed}{end}" for seed in (0, 1) for row in ("generated", "none") for end in ends]
  assert runs.done[0] == "images" and sorted(runs.done[1:]) == sorted(rows)
  assert runs.done.index("none/seed-1") > runs.done.index("generated/seed-0-last")  # seed by seed
  np.testing.assert_allclose(metrics["none/clean"], 0.55)
  # Student's interval of two values 0.1 apart: t(0.975; 1) = 12.706 times 0.0707 / sqrt 2
  np.testing.assert_allclose(metrics["none/clean/interval"], 12.7062 * 0.05, rtol=1e-4)


def test_verdicts_are_compared_image_by_image(tmp_path, runs):
  metrics = run(tmp_path / "run")
  found = [metrics[f"none/{name}"] for name in ("clean", "best", "last", "gap")]
  np.testing.assert_allclose(found, [0.75, 0.5, 0.25, 0.25])
  # the gap is that of the second image alone, with both seeds: a standard deviation of 1/2 among four images
  np.testing.assert_allclose(metrics["none/gap/interval"], 1.959964 * 0.5 / 2, rtol=1e-5)
  np.testing.assert_allclose(metrics["generated/gap"], 0)
  # the third image, with the second seed alone: seeds 0 and 1/4, images 0, 0, 1/2, 0
  np.testing.assert_allclose(metrics["generated - none/best"], 0.125)
  square = (12.7062 * 0.125) ** 2 + (1.959964 * 0.25 / 2) ** 2
  np.testing.assert_allclose(metrics["generated - none/best/interval"], np.sqrt(square), rtol=1e-5)
  assert not any(name.startswith("none - ") for name in metrics)


def test_the_table_the_pictures_and_every_seed(tmp_path, runs):
  run(tmp_path / "run")
  lines = (tmp_path / "run/report/table.md").read_text().splitlines()
  assert lines[0] == "|  | clean | best | last | gap | published |"
  assert lines[2] == "| none | 75.0% ± 49.0 | 50.0% ± 56.6 | 25.0% ± 49.0 | 25.0% ± 49.0 | nothing |"
  assert lines[3].startswith("| generated |") and lines[4] == ""
  assert lines[5] == "|  | clean | best | last | gap |" and lines[7].startswith(
    "| generated - none | 0.0% ± 0.0"
  )
  for name in ("curves.png", "bars.png"):
    assert (tmp_path / "run/report" / name).stat().st_size > 0
  page = (tmp_path / "run/report/report.html").read_text()
  assert "50.0% ± 56.6" in page and "validation/pgd2_accuracy against the epoch" in page
  assert page.count("<figure") == 4 and "none: attacked" in page and "generated: attacked" in page
  result = json.loads((tmp_path / "run/result.json").read_text())
  np.testing.assert_allclose(result["seeds"]["generated"]["best"], [0.5, 0.75])
  plan = sweep._Plan(config_lib.load(RECIPE), Workdir(tmp_path / "run", config_lib.load(RECIPE)))
  of_seeds = [plan.curve("none", seed, {"train:steps_per_epoch": 8}) for seed in (0, 1)]
  assert [unit for _, unit in of_seeds] == ["epoch", "epoch"] and plan.curve("none", 0, {})[1] == "step"
  epochs, means = sweep._means([values for values, _ in of_seeds])
  assert epochs == [1.0, 2.0]
  np.testing.assert_allclose(means, [0.55, 0.35])


def test_what_is_no_accuracy_is_not_in_percent(tmp_path, runs):
  run(tmp_path / "run", columns__gap="train:best_step")
  assert "| 16.000 ± 0.000 |" in (tmp_path / "run/report/table.md").read_text()


def test_a_sweep_goes_on_where_it_was(tmp_path, runs):
  runs.dying.append(4)
  with pytest.raises(RunError, match="cut off"):
    run(tmp_path / "run")
  first = list(runs.done)
  runs.dying.clear()
  metrics = run(tmp_path / "run")
  assert len(first) == 4 and len(runs.done) == 13 and len(set(runs.done)) == 13
  assert metrics == run(tmp_path / "other")


def test_a_part_whose_bundle_changed_is_run_again_and_its_verification_always(tmp_path, runs, monkeypatch):
  """Other parts stay as they are."""
  states = {"generate": "before", "evaluate_robustness": None}
  plain = tasks.find("")

  def find(name):
    more = {"reads": lambda config: states[name]} if name in states else {}
    return types.SimpleNamespace(run=plain.run, **more)

  monkeypatch.setattr(tasks, "find", find)
  run(tmp_path / "run")
  first = list(runs.done)
  run(tmp_path / "run", columns__gap="train:best_step")  # another column: the parts are looked at
  again = runs.done[len(first) :]
  assert len(again) == 8 and all(name.endswith(("-autoattack", "-last")) for name in again)
  states["generate"] = "after"
  run(tmp_path / "run")
  assert runs.done[len(first) + 8] == "images"


def test_seeds_and_columns_can_be_added(tmp_path, runs):
  """What is finished stays, and the table is made again; a row that changed is refused by its own folder."""
  run(tmp_path / "run", sweep_seeds="0")
  first = list(runs.done)
  metrics = run(tmp_path / "run", columns__gap="train:best_step", title="More")
  assert len(first) == 7 and len(runs.done) == 13
  assert metrics["none/gap"] == 16 and "none/clean/interval" in metrics
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["metrics"] == metrics
  assert run(tmp_path / "run", columns__gap="train:best_step", title="More") == metrics
  with pytest.raises(InputError, match="holds a run of another config .*num_epochs"):
    run(tmp_path / "run", rows__none="configs/at_cifar.py:smoke,train.num_epochs=3")
  changed = "configs/at_cifar.py:smoke,train.num_epochs=3,mixing.generated={images}/images"
  with pytest.raises(InputError, match="holds a run of another config .*num_epochs"):
    run(
      tmp_path / "run", sweep_seeds="5,0", rows__generated=changed
    )  # the last row, after seeds that are new
  assert len(runs.done) == 13 and json.loads((tmp_path / "run/result.json").read_text()) == result


def test_one_seed_has_no_interval(tmp_path, runs):
  metrics = run(tmp_path / "run", sweep_seeds="3", columns__gap="train:pgd5_accuracy")
  assert "none/gap/interval" not in metrics and metrics["none/gap"] == pytest.approx(0.8)
  # of other images alone: 1.96 times the standard deviation of four verdicts
  assert metrics["none/best/interval"] == pytest.approx(1.959964 * np.sqrt(1 / 3) / 2)
  assert "80.0% |" in (tmp_path / "run/report/table.md").read_text()


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("rows.none", "configs/at_cifar.py:smok", "unknown variant 'smok'"),
    (
      "rows.none",
      "configs/at_cifar.py:smoke,mixing.generated={pictures}",
      "speaks of {pictures}; there are data, generated, generator",
    ),
    ("stages.images", "configs/none.py", "no recipe 'configs/none.py'"),
    ("columns.best", "attack:accuracy", "is of no run of a row; there are train, autoattack"),
    ("baseline", "nothing", "the baseline 'nothing' is no row; there are none, generated"),
    ("bars", ("worst",), "bars: 'worst' is no column; there are clean, best"),
    ("pictures.attacked", "{rows}/a.png", "speaks of {rows}"),
    ("sweep_seeds", "one", "seeds"),
    ("order.rows", ("none",), "order.rows and rows do not have the same names: 'generated'"),
  ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, runs, key, value, message):
  with pytest.raises(InputError, match=message):
    run(tmp_path / "run", **{key.replace(".", "__"): value})
  assert not runs.done and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "elsewhere, message",
  [
    ("-last", "'autoattack:robust' and 'last:robust' are of other images"),
    ("/generated/", "the images of autoattack are other ones in row 'generated' than in the baseline 'none'"),
  ],
)
def test_verdicts_on_other_images_are_not_compared(tmp_path, runs, elsewhere, message):
  runs.elsewhere.append(elsewhere)
  with pytest.raises(InputError, match=message):
    run(tmp_path / "run")


def test_seeds_are_those_of_the_rows(tmp_path, runs):
  """config.seed alone without sweep_seeds, for the stages too; 'seeds' of single runs is refused."""
  run(tmp_path / "run", sweep_seeds="", seed=4)
  assert {name.split("/")[1] for name in runs.done if "/" in name} == {
    f"seed-4{end}" for end in ("", "-autoattack", "-last")
  }
  assert json.loads((tmp_path / "run/images/config.json").read_text())["seed"] == 4
  config = config_lib.load(RECIPE, {"seeds": "0,1"})
  with pytest.raises(InputError, match="sweep_seeds"):
    seeds.run(sweep.run, config, Workdir(tmp_path / "two", config))
  assert not (tmp_path / "two").exists()


def test_an_unknown_metric_is_named(tmp_path, runs):
  with pytest.raises(
    InputError, match="no metric 'train:accuracy'; there are autoattack:autoattack_accuracy, autoattack:clean"
  ):
    run(tmp_path / "run", columns__best="train:accuracy")
  assert len(runs.done) == 4  # the stage and the first row


def test_a_curve_that_is_not_there_is_named(tmp_path, runs):
  with pytest.raises(
    InputError, match="no 'validation/pgd9_accuracy' in its metrics.jsonl; there are validation/pgd2_"
  ):
    run(tmp_path / "run", curve="validation/pgd9_accuracy")
  assert len(runs.done) == 4


def test_an_evaluation_of_what_seeds_do_not_change_is_run_once(tmp_path, runs):
  """It speaks of no {row}: one run for each row, and no interval."""
  fid = "configs/at_cifar.py:smoke,seed=2"
  metrics = run(
    tmp_path / "run", evaluations__last=fid, columns__last="last:pgd5_accuracy", columns__gap="last:best_step"
  )
  assert sorted(name for name in runs.done if name.endswith("last")) == ["generated/last", "none/last"]
  assert metrics["none/last"] == pytest.approx(0.7)
  assert "none/last/interval" not in metrics and "none/best/interval" in metrics


@pytest.mark.parametrize("table", TABLES)
def test_every_table_can_be_planned(tmp_path, table):
  """Every recipe in it can be loaded, and at least half of the rows have what was published of them."""
  config = config_lib.load(f"configs/sweeps/better_diffusion.py:{table}")
  plan = sweep._Plan(config, Workdir(tmp_path / "run", config))
  assert set(config.published) <= set(plan.rows) and len(plan.rows) >= 3
  assert len(config.published) >= len(plan.rows) / 2


@pytest.mark.parametrize("recipe", SWEEPS)
def test_every_sweep_in_small_can_be_planned(tmp_path, recipe):
  """Every recipe in it can be loaded; what its stages make is what its rows read, and each differs from the baseline."""
  config = config_lib.load(recipe)
  plan = sweep._Plan(config, Workdir(tmp_path / "run", config))
  made = {str(tmp_path / "run" / name / "images") for name in plan.stages}
  trained = {row: plan.parts(row, 0)[sweep.TRAINING].load() for row in plan.rows}
  read = {row: config.mixing.generated for row, config in trained.items() if config.mixing.generated}
  assert read and set(read.values()) <= made and config.baseline in trained.keys() - read.keys()
  for row in trained.keys() - {config.baseline}:
    assert config_lib.difference(trained[config.baseline], trained[row]), row


@pytest.mark.parametrize("variant", ["cpu", "smoke"])
def test_a_journey_of_compartments_reads_the_bundles_that_its_stages_make(tmp_path, variant):
  config = config_lib.load(f"configs/cdm_journey.py:{variant}")
  plan = sweep._Plan(config, Workdir(tmp_path / "run", config))
  made = set()
  for name, part in plan.stages.items():
    stage = part.load()
    if stage.get("cdm", {}).get("path"):
      assert stage.cdm.path in made, name
    if stage.task == "cdm_train" or stage.get("cdm", {}).get("copy"):
      made.add(str(tmp_path / "run" / name / ("bundle" if stage.cdm.get("copy") else "")).rstrip("/"))
  assert len(made) == 5
  for row in plan.rows:
    assert plan.parts(row, 0)[sweep.TRAINING].load().cdm.path in made, row


def test_the_images_of_a_model_without_classes_are_asked_for_without_labels(tmp_path):
  config = config_lib.load("configs/sweeps/better_diffusion.py:sampling_steps")
  plan = sweep._Plan(config, Workdir(tmp_path / "run", config))
  labels = {
    name: part.load().generate.labels for name, part in plan.stages.items() if name.startswith("images")
  }
  assert len(labels) == 16
  assert all(asked == ("none" if "unconditional" in name else "balanced") for name, asked in labels.items())


def test_a_path_is_a_path_whatever_is_in_it(runs, tmp_path):
  """Commas, which separate places, and a number."""
  config = config_lib.load(
    RECIPE, {"rows.generated": "configs/at_cifar.py:smoke,mixing.generated={generated}"}
  )
  config.generated = "a.npz,2048,b.npz"
  plan = sweep._Plan(config, Workdir(tmp_path / "with,comma", config))
  assert plan.parts("generated", 0)[sweep.TRAINING].load().mixing.generated == "a.npz,2048,b.npz"
  assert plan.parts("generated", 0)["last"].load().init_from == str(
    tmp_path / "with,comma/generated/seed-0/export_last"
  )
  assert not runs.done


def test_bars_of_what_is_no_accuracy_are_no_percent(tmp_path, runs, monkeypatch):
  drawn, draw = [], report.bars
  monkeypatch.setattr(report, "bars", lambda *given, **more: drawn.append(more) or draw(*given, **more))
  run(tmp_path / "run", bars=("best",), columns__best="train:best_step")
  run(tmp_path / "other", bars=("best",))
  assert [(one["percent"], one["ylabel"]) for one in drawn] == [(False, "best"), (True, "accuracy")]


@pytest.mark.parametrize("value, digits", [(0.0, 3), (16.0, 3), (0.3, 3), (0.012, 3), (0.0012, 4), (1.3e-4, 5), (1e-9, 6), (float("nan"), 3)])
def test_small_numbers_have_two_digits_of_their_own(value, digits):
  assert sweep._digits(value) == digits
