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
  "--config.train.checkpoint_every=10",
  "--config.train.log_every=7",
  "--config.train.validate_every_epochs=2",
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


def read_up_to(process, text):
  """What standard error says up to a line with `text`, or to its end."""
  lines = []
  for line in process.stderr:
    lines.append(line)
    if text in line:
      break
  return "".join(lines)


def wait_for(process, text):
  """As `read_up_to`, where the line has to come."""
  said = read_up_to(process, text)
  assert text in said, f"the run ended without saying {text!r}: {said}"


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


def outcome(workdir):
  """Everything a run leaves that must not depend on how often it died."""
  step, leaves, exported = final_state(workdir)
  assert len(leaves) > 50
  assert [p.name for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name] == []
  result = json.loads((workdir / "result.json").read_text())["metrics"]
  return step, leaves, exported, result, (workdir / "metrics.jsonl").read_text().splitlines()


def where(workdir, last_step, said):
  """What a run was at when it was killed, as far as its folder and its words tell."""
  if (workdir / "export").exists():
    return "export and report"
  if (workdir / "checkpoints" / str(last_step)).exists():
    return "evaluation"
  if "compiled" not in said:
    return "start-up"
  saving = any("tmp" in p.name for p in (workdir / "checkpoints").iterdir())
  return "checkpoint" if saving else "training"


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_bit_for_bit_the_same(tmp_path):
  """Of four moments two are while it trains, one after its last step, and one at any time of an undisturbed run.

  A run that comes to its end before it is killed is compared, does not count, and makes room for a fresh one.
  """
  epochs = "--config.train.num_epochs=8"
  began = time.time()
  process = start(tmp_path / "undisturbed", epochs)
  wait_for(process, "compiled")
  compiled = time.time()
  finish(process)
  ended = time.time()
  expected = outcome(tmp_path / "undisturbed")
  last_step = expected[0]
  last_save = (tmp_path / f"undisturbed/checkpoints/{last_step}").stat().st_mtime
  randomness = random.Random(7)
  killed, runs = [], 0

  def wait(process, count):
    """Until the moment of death number `count`, or the end of the process; what it has said."""
    said, moment = "", randomness.random()
    if count % 4 == 0:
      moment *= ended - began
    elif count % 4 == 3:
      while process.poll() is None and not (tmp_path / f"{runs}/checkpoints/{last_step}").exists():
        time.sleep(0.01)
      moment *= ended - last_save
    else:
      said = read_up_to(process, "compiled")
      moment *= (last_save - compiled) / 2  # for two of them
    try:
      process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    return said + process.communicate()[1]

  def compare(said):
    """Of a run that ended by itself."""
    assert "cannot be read" not in said
    assert outcome(tmp_path / str(runs)) == expected

  for _ in range(3 * KILLS):
    if len(killed) == KILLS:
      break
    process = start(tmp_path / str(runs), epochs)
    said = wait(process, len(killed))
    if process.returncode == -signal.SIGKILL:
      killed.append(where(tmp_path / str(runs), last_step, said))
    else:
      assert process.returncode == 0, said
      compare(said)
      runs += 1
  print(f"killed in: {killed}")
  assert len(killed) == KILLS, killed
  assert {"evaluation", "export and report"} & set(killed) and {"training", "checkpoint"} & set(killed), (
    killed
  )
  compare(finish(start(tmp_path / str(runs), epochs)))


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
    with open(disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
      while True:
        ballast.write(b"x" * 65536)
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
