"""The notebooks: stripped and well formed, and their code runs from the first cell to the last."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

import jax_trustdiff

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "colabs").glob("*.ipynb"))


def code_cells(notebook):
  """The sources of the code cells that are to be executed."""
  cells = json.loads(notebook.read_text())["cells"]
  run = [
    c for c in cells if c["cell_type"] == "code" and "skip-execution" not in c["metadata"].get("tags", [])
  ]
  return ["".join(cell["source"]) for cell in run]


def execute(notebook):
  """Runs the code cells in one namespace, which is returned."""
  namespace = {"__name__": "__main__"}
  for i, source in enumerate(code_cells(notebook)):
    exec(compile(source, f"{notebook.name}, code cell {i}", "exec"), namespace)
  return namespace


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_is_stripped_and_well_formed(notebook):
  content = json.loads(notebook.read_text())
  assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
  assert (
    content["metadata"]["kernelspec"]["name"] == "python3"
    and content["metadata"]["language_info"]["name"] == "python"
  )
  cells = content["cells"]
  assert len({cell["id"] for cell in cells}) == len(cells)
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
  assert code[0]["metadata"]["tags"] == ["skip-execution"] and "%pip install" in "".join(code[0]["source"])
  for source in code_cells(notebook):
    compile(source, notebook.name, "exec")


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
  (notebook,) = [n for n in NOTEBOOKS if n.stem == "quickstart"]
  monkeypatch.chdir(tmp_path)
  found = execute(notebook)
  assert found["metrics"] and np.isfinite(list(found["metrics"].values())).all()
  x, attacked, radius = np.asarray(found["x"]), found["attacked"], found["attack"].radius
  for name, classifier in found["classifiers"].items():
    x_adv = np.asarray(attacked[name])
    assert 0.9 * radius < np.abs(x_adv - x).max() <= radius + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    right = (np.asarray(classifier(found["x"])).argmax(axis=1) == np.asarray(found["y"])).mean()
    assert found["metrics"][f"{name}/clean"] == pytest.approx(right, abs=1e-6)
    folder = pathlib.Path(found["workdir"].path) / name / "seed-0"
    last = jax_trustdiff.load_classifier(folder / "export_last")
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    right_at_last = (np.asarray(last(found["x"])).argmax(axis=1) == np.asarray(found["y"])).mean()
    assert metrics["last/clean_accuracy"] == pytest.approx(right_at_last, abs=1e-6)
    curve = [group[name] for group in found["curve"].values()]
    assert curve[0] == pytest.approx(right, abs=1e-6), "a radius of 0 is no attack"
    assert curve[-1] < curve[0]
  with Image.open("attacked.png") as grid, Image.open("radius.png") as bars:
    assert grid.width > 800 and bars.width > 400
  assert (pathlib.Path(os.fspath(found["workdir"].path)) / "report" / "report.html").is_file()
