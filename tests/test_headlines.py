"""What the README says of the journeys, by the commands that it gives: tens of minutes each, behind TRUSTDIFF_LONG.

TRUSTDIFF_FASHION_MNIST: the folder of its four idx files. Limits of time are for two cores that do nothing else.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from conftest import LONG, ROOT, shared_dir

pytestmark = [LONG, pytest.mark.slow]


def metrics_of(workdir, *args):
  """(metrics of a run from the command line, with what XLA does for users; its minutes)"""
  plain = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")}
  began = time.monotonic()
  command = [sys.executable, "-m", "jax_trustdiff.main", *args, f"--workdir={workdir}"]
  shown = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
  assert shown.returncode == 0, shown.stderr[-3000:]
  found = json.loads((workdir / "result.json").read_text())["metrics"]
  print(json.dumps(found, indent=1))
  return found, (time.monotonic() - began) / 60


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
  """A folder with CIFAR-10 as .npz files."""
  folder = tmp_path_factory.mktemp("cifar")
  command = [sys.executable, str(shared_dir("data", "cifar10") / "unpack.py"), str(folder)]
  subprocess.run(command, check=True, capture_output=True)
  return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codec_of_cifar(cifar, tmp_path, seed):
  args = "--config=configs/wm_codec.py:cpu", f"--config.data.path={cifar}", f"--config.seed={seed}"
  found, minutes = metrics_of(tmp_path / "run", *args)
  assert found["bit_accuracy"] >= 0.99 and found["psnr"] >= 30
  for attack in ("jpeg_75", "noise_0.05", "crop_0.1"):
    assert found[f"bit_accuracy_after_{attack}"] >= 0.95, attack
  assert minutes <= 20


def test_journey_of_watermarks(tmp_path):
  folder = os.environ.get("TRUSTDIFF_FASHION_MNIST", "")
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip("no Fashion-MNIST: TRUSTDIFF_FASHION_MNIST names no folder")
  args = "--config=configs/wm_journey.py:cpu", f"--config.data_path={folder}"
  found, minutes = metrics_of(tmp_path / "run", *args)
  assert found["samples_of_the_model/log10 p"] < -6
  assert found["samples_of_its_twin/smallest p of 20 other keys"] > 0.01 / 20
  assert minutes <= 40


def test_marks_on_the_initial_noise(cifar, tmp_path):
  training = {"data.name": "npz", "data.path": cifar, "eval.num_samples": 0, "train.validate_every": 250}
  training |= {"train.num_images": 48_000}
  metrics_of(
    tmp_path / "model",
    "--config=configs/edm_cifar.py:cpu",
    *(f"--config.{k}={v}" for k, v in training.items()),
  )
  marking = {"init_from": tmp_path / "model/export", "reference.name": "npz", "reference.path": cifar}
  marking |= {
    "metrics.features.name": "inception",
    "metrics.batch_size": 8,
    "sampler.num_steps": 12,
    "seed": 1,
  }
  marking |= {"detect.num_images": 512, "detect.batch_size": 64, "detect.num_reference": 512}
  marking["secret_file"] = tmp_path / "secret.txt"  # or one run in twenty would fail
  marking["secret_file"].write_text("the secret of the test of marks on the initial noise\n")
  found, _ = metrics_of(
    tmp_path / "run", "--config=configs/wm_noise.py:cpu", *(f"--config.{k}={v}" for k, v in marking.items())
  )
  assert found["none/bit_accuracy"] >= 0.99 and found["none/matches"] == 64
  assert found["fid_difference_low"] < found["fid_difference"] < found["fid_difference_high"]
  assert found["fid_difference_p"] > 0.01  # exact: one secret in a hundred would fail, and this one is fixed


def test_time_of_eight_shards(tmp_path):
  """The machine is to do nothing else."""
  found, _ = metrics_of(tmp_path / "run", "--config=configs/benchmark.py:mixture")
  assert min(found["vmap/ratio"], found["vmap_of_2/ratio"]) <= 1.1 and found["network/parameters"] > 40e6


def test_journey_of_compartments(tmp_path):
  found, minutes = metrics_of(tmp_path / "run", "--config=configs/cdm_journey.py:cpu")

  def kid(row):
    middle, half_width = (found[f"{row}/KID of pixels{end}"] for end in ("", "/interval"))
    return middle - half_width, middle + half_width

  others = ["averaged", *(row for row in {name.split("/")[0] for name in found} if row.startswith("only_"))]
  others = [name for name in others if " - " not in name]
  assert len(others) == 1 + 5
  for other in others:
    assert kid("by_classifier")[1] < kid(other)[0], other
  assert found["canary_forgotten/planted picture"] == 0 < found["by_classifier/planted picture"]
  attributed, verified = (
    json.loads((tmp_path / "run" / stage / "result.json").read_text())["metrics"]
    for stage in ("attributed", "verified")
  )
  assert attributed["agreement"] >= 0.9
  assert verified["faults"] == 0 and verified["replayed"] == 2
  assert minutes <= 40
