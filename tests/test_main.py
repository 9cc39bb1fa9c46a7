"""The command line from outside: what it prints, its exit codes, and every kind of bad input."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from workers import flags

from jax_trustdiff import main
from jax_trustdiff.training.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMOKE = "--config=configs/at_cifar.py:smoke"
QUICK = "--config.objective.name=standard"  # compiles in half the time


def command(*args, cwd=ROOT, **env):
  """The finished process of one command line."""
  return subprocess.run(
    [sys.executable, "-m", "jax_trustdiff.main", *args],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
  )


@pytest.fixture
def npz(tmp_path):
  """A function that writes a little npz folder, with arrays replaced by keyword, and returns its path."""

  def write(**replaced):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 96), ("test", 32)):
      arrays = {
        "image": rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        "label": np.arange(count, dtype=np.int32) % 10,
      }
      np.savez(folder / f"{name}.npz", **(arrays | replaced))
    return folder

  return write


def refused(capfd, workdir, *args):
  """The one line that the command line says about bad input; checks exit code, traceback and workdir."""
  before = sorted(str(p) for p in workdir.rglob("*")) if workdir.exists() else None
  code = main.main(["main", *args, f"--workdir={workdir}"])
  said = capfd.readouterr()
  after = sorted(str(p) for p in workdir.rglob("*")) if workdir.exists() else None
  lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
  assert code == 2, said.err
  assert len(lines) == 1 and "Traceback" not in said.err and said.out == "", said.err
  assert after == before, "the workdir was touched"
  return lines[0]


@pytest.mark.floor
@pytest.mark.parametrize(
  "args, message",
  [
    ([SMOKE, "--config.train.btach_size=3"], "did you mean 'batch_size'"),
    ([SMOKE, "--config.train.batch_size=many"], "train.batch_size"),
    ([SMOKE, "--config.train.batch_size=2.5"], "train.batch_size"),
    ([SMOKE, "--config.model.name=wide_resnte"], "did you mean 'wide_resnet'"),
    ([SMOKE, "--config.model.depth=11"], "depth must be 10, 16, 22"),
    ([SMOKE, "--config.eval.attack.name=pdg"], "did you mean 'pgd'"),
    ([SMOKE, "--config.eval.attack.norm=l3"], "l3"),
    ([SMOKE, "--config.objective.name=tardes"], "did you mean 'trades'"),
    ([SMOKE, "--config.data.name=cifar"], "known: "),
    ([SMOKE, "--config.data.path=/no/such/folder"], "/no/such/folder"),
    ([SMOKE, "--config.train.batch_size=0"], "batch size 0"),
    ([SMOKE, "--config.train.accumulate=3"], "accumulate"),
    ([SMOKE, "--config.train.num_epochs=0"], "num_epochs"),
    ([SMOKE, "--config.init_from=/no/such/export"], "/no/such/export"),
    ([SMOKE, "--config.mesh.data=3"], "does not fit"),
    ([SMOKE, "--config.seeds=1,1"], "seed twice"),
    ([SMOKE, "--config.seed=-1"], "seed must be at least 0"),
    (["--config=configs/wm_noise.py:smoke", "--config.seed=-1"], "seed must be at least 0"),
    ([SMOKE, "--config.train.profile=abc"], "first:last"),
    ([SMOKE, "--config.train.validate_every_epochs=-1"], "0 for never"),
    ([SMOKE, "--config.model.bn_groups=3"], "does not split into 3"),
    ([SMOKE, "--config.report.num_images=0"], "num_images must be at least 1"),
    ([SMOKE, "--config.mesh.rules=(('.*', 'bogus'),)"], "bogus"),
    ([SMOKE, "--config.objective.name=mart", "--config.objective.label_smoothing=0.1"], "label_smoothing"),
    ([SMOKE, "--config.objective.name", "tardes"], "did you mean 'trades'"),
    ([SMOKE, "--config.data.name=tfds"], "dataset"),
    ([SMOKE, "--config.task=train"], "train_classifier"),
    ([SMOKE, "--wrokdir=x"], "wrokdir"),
    ([SMOKE, "extra"], "extra"),
    (["--config=configs/at_cifer.py"], "did you mean 'configs/at_cifar.py'"),
    (["--config=configs/at_cifar.py:smok"], "did you mean 'smoke'"),
    ([], "no recipe"),
  ],
)
def test_bad_input_is_one_line(capfd, tmp_path, args, message):
  assert message in refused(capfd, tmp_path / "run", *args)


@pytest.mark.parametrize(
  "replaced, message",
  [
    ({"label": np.full(96, 10)}, "label 10 is out of range"),
    ({"label": np.zeros(5, int)}, "5 labels"),
    ({"image": np.full((96, 8, 8, 3), np.nan, np.float32)}, "NaN"),
    ({"image": np.full((96, 8, 8, 3), 300.0, np.float32)}, "300"),
    ({"image": np.zeros((96, 8), np.uint8)}, "[96, 8]"),
  ],
)
def test_bad_data_is_one_line(capfd, tmp_path, npz, replaced, message):
  folder = npz(**replaced)
  assert message.lower() in refused(capfd, tmp_path / "run", SMOKE, f"--config.data.path={folder}").lower()


def test_a_truncated_npz_is_one_line(capfd, tmp_path, npz):
  file = npz() / "train.npz"
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  assert "train.npz" in refused(capfd, tmp_path / "run", SMOKE, f"--config.data.path={file.parent}")


def test_a_workdir_in_use_or_of_another_config_is_refused(capfd, tmp_path):
  from jax_trustdiff import config

  owner = Workdir(tmp_path / "run", config.load("configs/at_cifar.py:smoke"))
  owner.open()
  assert "in use by another process" in refused(capfd, tmp_path / "run", SMOKE)
  owner.close()
  assert "seed: 0 -> 4" in refused(capfd, tmp_path / "run", SMOKE, "--config.seed=4")


def test_a_workdir_below_a_file_is_one_line(capfd, tmp_path):
  (tmp_path / "file").write_text("")
  assert "file" in refused(capfd, tmp_path / "file" / "run", SMOKE)


def test_help_and_print_config():
  shown = command("--help")
  assert shown.returncode == 0 and "--print_config" in shown.stdout
  shown = command(SMOKE, "--config.seed=4", "--print_config")
  assert shown.returncode == 0, shown.stderr
  assert "seed = 4" in shown.stdout and "train.batch_size = 64" in shown.stdout
  keys = [line.split(" = ")[0] for line in shown.stdout.splitlines()]
  assert len(keys) == len(set(keys)) > 50


def test_batches_must_fit_the_devices(tmp_path):
  env = {"XLA_FLAGS": flags(8)}
  shown = command(SMOKE, "--config.train.batch_size=36", f"--workdir={tmp_path}/run", **env)
  assert shown.returncode == 2 and "batch size 36 is not divisible by the 8 devices" in shown.stderr
  assert "Traceback" not in shown.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_smoke_writes_everything_and_runs_again_at_once(tmp_path):
  first = command(SMOKE, f"--workdir={tmp_path}/run")
  assert first.returncode == 0, first.stderr
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["task"] == "train_classifier" and len(result["config_hash"]) == 12 and result["seed"] == 0
  assert {"versions", "device", "seconds", "metrics"} <= set(result)
  for key in ("clean_accuracy", "pgd5_accuracy", "last/clean_accuracy", "last/pgd5_accuracy"):
    assert 0 <= result["metrics"][key] <= 1
  assert "compiled 1 step(s)" in first.stderr and "estimate:" in first.stderr
  for name in (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "export/model.safetensors",
    "export/model.json",
    "report/report.html",
    "report/training_curves.png",
    "report/adversarial_images.png",
  ):
    assert (tmp_path / "run" / name).exists(), name
  again = command(SMOKE, f"--workdir={tmp_path}/run")
  assert again.returncode == 0 and "compiled 1 step(s)" not in again.stderr
  assert json.loads((tmp_path / "run/result.json").read_text())["metrics"] == result["metrics"]

  fine_tuned = command(
    SMOKE,
    f"--config.init_from={tmp_path}/run/export",
    "--config.train.num_epochs=1",
    QUICK,
    f"--workdir={tmp_path}/two",
  )
  assert fine_tuned.returncode == 0, fine_tuned.stderr
  other = command(
    SMOKE,
    f"--config.init_from={tmp_path}/run/export",
    "--config.model.width=2",
    f"--workdir={tmp_path}/three",
  )
  assert other.returncode == 2 and "holds another network" in other.stderr


@pytest.mark.slow
def test_several_seeds_report_mean_and_interval(tmp_path):
  shown = command(
    SMOKE, "--config.seeds=0,1", "--config.train.num_epochs=1", QUICK, f"--workdir={tmp_path}/run"
  )
  assert shown.returncode == 0, shown.stderr
  both = json.loads((tmp_path / "run/result.json").read_text())["metrics"]
  each = [json.loads((tmp_path / f"run/seed-{s}/result.json").read_text())["metrics"] for s in (0, 1)]
  assert both["clean_accuracy"] == pytest.approx(np.mean([m["clean_accuracy"] for m in each]))
  half_width = 12.706 * abs(each[0]["clean_accuracy"] - each[1]["clean_accuracy"]) / 2
  assert both["clean_accuracy/interval"] == pytest.approx(half_width, rel=1e-3)
