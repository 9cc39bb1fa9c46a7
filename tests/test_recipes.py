"""Every recipe's smoke variant from the command line, compiled quickly, and the same recipes from an installed wheel."""

import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import zipfile

import pytest
from conftest import LONG

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RECIPES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.py"))

IN_JOURNEY = ("wm_codec", "wm_embed", "wm_edm", "wm_attack")
IN_JOURNEY += ("cdm_classifier", "cdm_centroids", "cdm_compose", "cdm_protect", "cdm_attribute", "cdm_forget", "cdm_add", "cdm_verify")
IN_JOURNEY += ("cdm_merge", "cdm_prove")
MARKS = {"at_cifar": pytest.mark.floor, "cdm_journey": LONG}


def command(*args, path=ROOT, cwd=ROOT, **env):
  return subprocess.run(
    [sys.executable, "-m", "jax_trustdiff.main", *args],
    capture_output=True,
    text=True,
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(path)} | env,
  )


def cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
  # those of the benchmark and the quickstart are run by test_benchmark.py and test_colabs.py, IN_JOURNEY as stages and rows of wm_journey and
  # cdm_journey, and without the command line by test_cdm_bundle.py
  "recipe",
  [
    pytest.param(name, marks=MARKS.get(name, ()))
    for name in RECIPES
    if name not in ("benchmark", "quickstart", *IN_JOURNEY)
  ],
)
def test_smoke_takes_less_than_a_minute_of_two_cores(tmp_path, recipe):
  before = cpu_seconds()
  quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # they compile for longer than they compute
  shown = command(f"--config=configs/{recipe}.py:smoke", f"--workdir={tmp_path}/run", **quick)
  assert shown.returncode == 0, shown.stderr
  assert cpu_seconds() - before < 2 * 60
  result = json.loads((tmp_path / "run/result.json").read_text())
  assert result["metrics"] and all(math.isfinite(value) for value in result["metrics"].values())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with the unpacked wheel, as pip would install it."""
  folder = tmp_path_factory.mktemp("wheel")
  subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT],
    check=True,
  )
  (wheel,) = folder.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / "site")
  return folder / "site"


OF_EACH = """
import contextlib, io, sys
import jax_trustdiff
from jax_trustdiff.main import main
for recipe in sys.argv[1:]:
  shown = io.StringIO()
  with contextlib.redirect_stdout(shown):
    code = main(["main", f"--config=configs/{recipe}.py:smoke", "--print_config"])
  assert code == 0 and "task = " in shown.getvalue(), recipe
print(jax_trustdiff.__file__)
"""


@pytest.mark.slow
def test_an_installed_wheel_has_the_recipes(installed, tmp_path):
  found = subprocess.run(
    [sys.executable, "-c", OF_EACH, *RECIPES],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(installed)},
  )
  assert found.returncode == 0, found.stderr
  assert found.stdout.startswith(str(installed))
