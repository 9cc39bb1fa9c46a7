"""Robust evaluation from the command line: every kind of classifier, records, resume after kill -9, RobustBench."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared_dir

from jax_trustdiff import main as main_lib
from jax_trustdiff.attacks.autoattack import AutoAttack
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.interop import export, graph_npz, pretrained, robustbench
from jax_trustdiff.models.registry import bind
from jax_trustdiff.types import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("TRUSTDIFF_KILLS", "2"))
MODEL = dict(depth=10, width=1, mean=(0.5,), std=(0.5,))


def run(*args):
  return main_lib.main(["main", "--config=configs/eval_robust.py:smoke", *args])


def result_of(workdir):
  return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """The export of a small classifier that has learned the digits."""
  folder = tmp_path_factory.mktemp("trained")
  command = [
    "main",
    "--config=configs/at_cifar.py:smoke",
    f"--workdir={folder}",
    "--config.train.num_train=600",
  ]
  command += [
    "--config.train.num_epochs=8",
    "--config.objective.name=standard",
    "--config.report.num_images=4",
  ]
  assert main_lib.main(command) == 0
  return folder / "export"


def test_a_result_has_a_record_of_every_image(trained, tmp_path):
  options = [
    "--config.attack.radius=0.1",
    "--config.eval.attack.radius=0.1",
    "--config.eval.attack.step_size=0.05",
  ]
  assert run(f"--config.init_from={trained}", f"--workdir={tmp_path}", *options) == 0
  result = result_of(tmp_path)
  metrics, examples = result["metrics"], result["examples"]
  assert {len(column) for column in examples.values()} == {32}
  assert np.mean(examples["clean"]) == metrics["clean_accuracy"] > 0.5
  assert np.mean(examples["robust"]) == metrics["autoattack_accuracy"] == metrics["recomputed_accuracy"]
  assert np.mean(examples["pgd3_robust"]) == metrics["pgd3_accuracy"]
  both = np.array(examples["robust"]) & np.array(examples["pgd3_robust"])
  assert (
    both.mean()
    == metrics["worst_case_accuracy"]
    <= metrics["autoattack_accuracy"]
    < metrics["clean_accuracy"]
  )
  assert metrics["autoattack_low"] <= metrics["autoattack_accuracy"] <= metrics["autoattack_high"]
  assert (
    metrics["after_square_accuracy"] == metrics["autoattack_accuracy"] <= metrics["after_apgd_ce_accuracy"]
  )
  assert result["standard"] is False and metrics["radius_0.5/accuracy"] >= metrics["pgd3_accuracy"]
  known = {"", "clean", "apgd_ce", "apgd_t", "fab_t", "square"}
  assert set(examples["broken_by"]) <= known and "apgd_ce" in examples["broken_by"]
  network, variables, _ = export.load_export(trained)
  with np.load(tmp_path / "adversarial.npz") as file:
    seen = np.asarray(bind(network, variables)(jnp.asarray(file["image"])).argmax(1))
    assert file["id"].tolist() == examples["id"]
  assert seen.tolist() == examples["prediction"]
  for name in ("report.html", "attacks.png", "radius.png", "hardest_images.png"):
    assert (tmp_path / "report" / name).stat().st_size > 1000
  assert not (tmp_path / "journal").exists()


def test_a_torch_checkpoint_gives_what_its_export_gives(trained, tmp_path):
  network, variables, _ = export.load_export(trained)
  pretrained.save_torch(tmp_path / "net.safetensors", network, variables)
  accuracies = []
  same = [
    f"--config.model.{field}={getattr(network, field)!r}" for field in ("mean", "std", "width", "activation")
  ]
  same[-1] = f"--config.model.activation={network.activation}"
  for path, name in ((trained, "export"), (tmp_path / "net.safetensors", "torch")):
    assert (
      run(f"--config.init_from={path}", f"--workdir={tmp_path / name}", "--config.eval.radii=()", *same) == 0
    )
    accuracies.append(result_of(tmp_path / name)["metrics"])
  assert accuracies[0] == accuracies[1]


def save_graph(path, arrays=None, nodes=None):
  """A linear classifier of 8x8 digits as a graph."""
  r = np.random.RandomState(0)
  nodes = nodes or [
    dict(op="Flatten", inputs=["x"], outputs=["f"], attrs={}),
    dict(op="Gemm", inputs=["f", "w", "b"], outputs=["y"], attrs={}),
  ]
  graph = dict(input="x", output="y", norm=dict(mean=[0.5], std=[0.5]), nodes=nodes)
  arrays = (
    dict(w=r.randn(10, 64).astype(np.float32), b=r.randn(10).astype(np.float32)) if arrays is None else arrays
  )
  np.savez(path, __graph__=np.frombuffer(json.dumps(graph).encode(), np.uint8), **arrays)
  return arrays


def test_a_graph_is_a_classifier(tmp_path):
  arrays = save_graph(tmp_path / "net.npz")
  network, variables = graph_npz.load_graph(tmp_path / "net.npz", (8, 8, 1))
  x = np.random.RandomState(1).uniform(size=(3, 8, 8, 1)).astype(np.float32)
  expected = ((x - 0.5) / 0.5).reshape(3, 64) @ arrays["w"].T + arrays["b"]
  np.testing.assert_allclose(bind(network, variables)(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
  assert network.num_classes == 10
  export.save_export(tmp_path / "export", dict(name="graph", **_fields(network)), variables)
  again, arrays, _ = export.load_export(tmp_path / "export")
  assert again == network and hash(again) == hash(network)
  assert run(f"--config.init_from={tmp_path / 'net.npz'}", f"--workdir={tmp_path / 'run'}") == 0
  assert result_of(tmp_path / "run")["metrics"]["num_images"] == 32


def _fields(network):
  return {name: getattr(network, name) for name in ("graph", "shapes", "num_classes", "image_shape", "dtype")}


def test_bad_graphs(tmp_path):
  np.savez(tmp_path / "none.npz", w=np.zeros(3))
  save_graph(tmp_path / "op.npz", nodes=[dict(op="Tanh", inputs=["x"], outputs=["y"], attrs={})])
  save_graph(tmp_path / "missing.npz", arrays={})
  (tmp_path / "cut.npz").write_bytes((tmp_path / "op.npz").read_bytes()[:100])
  for name, says in (
    ("none", "holds no classifier as a graph"),
    ("op", "unknown operators Tanh"),
    ("missing", "Gemm has 1 inputs; expected 3"),
    ("cut", "holds no classifier as a graph"),
    ("absent", "no such file"),
  ):
    with pytest.raises(InputError, match=says):
      graph_npz.load_graph(tmp_path / f"{name}.npz", (8, 8, 1))


BOARD = {
  "cifar10/Linf": [
    {"id": "Wang2023Better_WRN-28-10", "clean_acc": "92.44", "autoattack_acc": "67.31", "eps": "8/255"},
    {"id": "Broken", "clean_acc": "90", "autoattack_acc": None, "eps": "8/255"},
  ]
}


def test_leaderboard(trained, tmp_path, capsys):
  file = tmp_path / "boards.json"
  file.write_text(json.dumps(BOARD))
  board = (f"--config.robustbench.leaderboard={file}", "--config.robustbench.entry=Wang2023Better_WRN-28-10")
  assert run(f"--config.init_from={trained}", f"--workdir={tmp_path / 'run'}", *board) == 0
  metrics = result_of(tmp_path / "run")["metrics"]
  assert (metrics["leaderboard/clean_accuracy"], metrics["leaderboard/autoattack_accuracy"]) == (
    0.9244,
    0.6731,
  )
  np.testing.assert_allclose(metrics["leaderboard/clean_difference"], metrics["clean_accuracy"] - 0.9244)
  assert "Wang2023Better_WRN-28-10" in (tmp_path / "run/report/report.html").read_text()
  with pytest.raises(InputError, match="no entry 'Wang2023Better'; near: Wang2023Better_WRN-28-10"):
    robustbench.entry(file, "cifar10", "Linf", "Wang2023Better")
  with pytest.raises(InputError, match="no leaderboard 'cifar10/L2'; it has cifar10/Linf"):
    robustbench.entry(file, "cifar10", "L2", "x")
  with pytest.raises(InputError, match="'Broken' of .* has no autoattack_acc"):
    robustbench.entry(file, "cifar10", "Linf", "Broken")
  file.write_text("[1]")
  with pytest.raises(InputError, match="is no JSON file of leaderboards"):
    robustbench.entry(file, "cifar10", "Linf", "x")


def test_the_published_leaderboard():
  path = shared_dir("data", "robustbench", "leaderboards.json")
  found = robustbench.entry(path, "cifar10", "Linf", "Wang2023Better_WRN-28-10")
  assert (float(found["clean_acc"]), float(found["autoattack_acc"])) == (92.44, 67.31)


@pytest.mark.slow
@pytest.mark.computes
def test_a_published_accuracy_on_the_full_test_set(tmp_path):
  """The VNN-COMP network trained at 2/255: 69.25 % of CIFAR-10, to the image."""
  folder = shared_dir("data", "cifar10")
  command = [sys.executable, str(folder / "unpack.py"), str(tmp_path)]
  subprocess.run(command, check=True, capture_output=True)
  source = SOURCES["npz"](str(tmp_path), split="test")
  classifier = bind(*graph_npz.load_graph(shared_dir("data", "cifar10_robust_nets", "resnet2b_at_eps2.npz")))
  attack = AutoAttack(chunk_size=500)
  x = np.asarray(source.images, np.float32) / 255
  logits = attack.logits(classifier, x, source.ids, jax.random.key(0))
  assert int((logits.argmax(1) == source.labels).sum()) == 6925


@pytest.mark.parametrize(
  "changes, says",
  [
    (["--config.init_from="], "init_from is empty"),
    (["--config.init_from=nowhere/export"], "expected the folder of an export"),
    (["--config.attack.version=fast"], "unknown AutoAttack version 'fast'"),
    (
      ["--config.attack.version=custom", "--config.attack.attacks=('apgd',)"],
      "no such attack: apgd; there are apgd_ce",
    ),
    (
      ["--config.attack.attacks=('square',)", "--config.attack.num_steps=0", "--config.attack.num_queries=0"],
      "is for attack.version='custom'",
    ),
    (["--config.robustbench.entry=x"], "needs robustbench.leaderboard"),
    (["--config.attack.radius=0.1"], "give both one norm and radius"),
    (["--config.attack.radius=-1.0", "--config.eval.attack.radius=-1.0"], "radius"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, changes, says):
  assert run(f"--workdir={tmp_path / 'run'}", *changes) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
  assert not (tmp_path / "run").exists()


def process(trained, workdir):
  command = [sys.executable, "-m", "jax_trustdiff.main", "--config=configs/eval_robust.py:smoke"]
  command += [f"--config.init_from={trained}", f"--workdir={workdir}", "--config.eval.num_test=200"]
  command += ["--config.eval.radii=()", "--config.attack.radius=0.04", "--config.eval.attack.radius=0.04"]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(trained, tmp_path):
  one = process(trained, tmp_path / "undisturbed")
  most, chunks = 0, lambda name: len(list((tmp_path / name / "journal").glob("*.npz")))
  while one.poll() is None:
    most = max(most, chunks("undisturbed"))
    time.sleep(0.002)
  assert one.returncode == 0, one.communicate()[1]
  expected = result_of(tmp_path / "undisturbed")
  assert most > 2 * KILLS
  randomness, seen = random.Random(0), []
  for kill in range(KILLS):
    one = process(trained, tmp_path / "killed")
    target = (most - 2) * (kill + randomness.random()) / KILLS
    while one.poll() is None and chunks("killed") < target:
      time.sleep(0.001)
    assert one.poll() is None, one.communicate()[1]
    one.kill()
    one.communicate()
    seen.append(chunks("killed"))
  assert seen == sorted(seen) and 0 < seen[-1] < most
  one = process(trained, tmp_path / "killed")
  said = one.communicate()[1]
  assert one.returncode == 0 and f"{seen[-1]} chunks are there already" in said
  found = result_of(tmp_path / "killed")
  assert found["examples"] == expected["examples"] and found["metrics"] == expected["metrics"]
  first, second = (dict(np.load(tmp_path / name / "adversarial.npz")) for name in ("undisturbed", "killed"))
  np.testing.assert_array_equal(first["image"], second["image"])
