"""Hard deaths of a whole training run: kill -9 at random moments, SIGTERM, a full disk."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("TRUSTDIFF_KILLS", "4"))  # 20 takes minutes
ARGS = [
  "--config=configs/at_cifar.py:smoke",
  "--config.objective.num_steps=1",
  "--config.train.batch_size=16",
  "--config.train.num_train=256",
  "--config.train.num_validation=32",
  "--config.train.checkpoint_every=20",
  "--config.train.log_every=5",
  "--config.train.validate_every_epochs=10",
]


def start(workdir, *args, **popen):
  return subprocess.Popen(
    [sys.executable, "-m", "jax_trustdiff.main", *ARGS, f"--workdir={workdir}", *args],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    **popen,
  )


def finish(process):
  """The process's standard error, once it has ended well."""
  said = process.communicate()[1]
  assert process.returncode == 0, said
  return said


def wait_for(process, text):
  """Reads standard error up to a line with `text`."""
  for line in process.stderr:
    if text in line:
      return
  raise AssertionError(f"the run ended without saying {text!r}")


def final_state(workdir):
  """Every array of the last checkpoint, as bytes, and the exported file."""
  import orbax.checkpoint as ocp

  folder = workdir / "checkpoints"
  step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  tree = ocp.StandardCheckpointer().restore(folder / str(step) / "state")
  leaves = {}

  def walk(node, path):
    if isinstance(node, dict):
      for key, value in node.items():
        walk(value, f"{path}/{key}")
    elif isinstance(node, (list, tuple)):
      for i, value in enumerate(node):
        walk(value, f"{path}/{i}")
    elif node is not None and not path.endswith("/key"):
      leaves[path] = np.asarray(node).tobytes()

  walk(tree, "")
  return step, leaves, (workdir / "export" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_bit_for_bit_the_same(tmp_path):
  epochs = f"--config.train.num_epochs={20 * max(KILLS, 4)}"
  finish(start(tmp_path / "undisturbed", epochs))
  randomness = random.Random(7)
  killed_at = []
  for i in range(KILLS):
    process = start(tmp_path / "killed", epochs)
    if i % 4:  # most deaths during training, some during start-up
      wait_for(process, "compiled")
      time.sleep(randomness.uniform(0, 1.5))
    else:
      time.sleep(randomness.uniform(0, 8))
    process.kill()
    process.communicate()
    folder = tmp_path / "killed" / "checkpoints"
    found = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    killed_at.append(max(found, default=0))
  said = finish(start(tmp_path / "killed", epochs))
  assert "cannot be read" not in said
  print(f"newest checkpoints when killed: {killed_at}")
  assert 0 < max(killed_at), "no kill came after a checkpoint"
  step, leaves, exported = final_state(tmp_path / "undisturbed")
  step2, leaves2, exported2 = final_state(tmp_path / "killed")
  assert step == step2 and leaves.keys() == leaves2.keys() and len(leaves) > 50
  assert [name for name in leaves if leaves[name] != leaves2[name]] == []
  assert exported == exported2
  one, two = (json.loads((tmp_path / n / "result.json").read_text())["metrics"] for n in ("undisturbed", "killed"))
  assert one == two
  lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("undisturbed", "killed")]
  steps = [[json.loads(line)["step"] for line in found] for found in lines]
  assert steps[0] == steps[1]
  leftovers = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if "tmp" in p.name]
  assert leftovers == []


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
  process = start(tmp_path / "run", "--config.train.num_epochs=200")
  wait_for(process, "compiled")
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  said = process.communicate()[1]
  assert process.returncode == 143, said
  assert "the same command goes on from there" in said and "Traceback" not in said
  step = int(said.split("saved at step ")[1].split(";")[0])
  assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
  second = start(tmp_path / "run", "--config.train.num_epochs=200")
  wait_for(second, f"resuming at step {step} of")
  third = start(tmp_path / "run", "--config.train.num_epochs=200")
  said = third.communicate()[1]
  assert third.returncode == 2 and "in use by another process" in said
  second.kill()
  second.communicate()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
  if mounted.returncode:
    pytest.skip("mounting a small disk needs rights this process does not have")
  try:
    process = start(disk / "run", "--config.train.num_epochs=200")
    wait_for(process, "compiled")
    while not any(p.name.isdigit() for p in (disk / "run" / "checkpoints").glob("*")):
      time.sleep(0.1)
    with open(disk / "ballast", "wb") as ballast:
      try:
        while True:
          ballast.write(b"x" * 65536)
          ballast.flush()
      except OSError:
        ballast_full = True
    assert ballast_full
    said = process.communicate()[1]
    assert process.returncode == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "disk is full" in lines[0] and "Traceback" not in said, said
    (disk / "ballast").unlink()
    again = start(disk / "run", "--config.train.num_epochs=200")
    wait_for(again, "resuming at step")
    again.kill()
    again.communicate()
  finally:
    subprocess.run(["umount", "-l", str(disk)], check=True)
