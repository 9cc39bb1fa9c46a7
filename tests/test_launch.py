"""The launch scripts, run: dry, and with programs of ours in the place of srun and gcloud."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
RUN = [
  "--config=configs/at_cifar.py:smoke",
  "--config.seed=3",
  "--config.x=(1, 'two words')",
  "--config.y=$HOME",
]
TPU = {"NAME": "slice", "ZONE": "zone", "TYPE": "v4-32", "VERSION": "tpu-ubuntu2204-base"}


@pytest.fixture
def stage(tmp_path):
  """Runs a script; `calls()` is what it called of srun and gcloud: a list of {'argv', 'devices'}."""
  (tmp_path / "bin").mkdir()
  for name in ("srun", "gcloud"):
    program = tmp_path / "bin" / name
    program.write_text(
      f"#!{sys.executable}\n"
      "import json, os, shutil, sys\n"
      f"record = {{'argv': [{name!r}, *sys.argv[1:]], 'devices': os.environ.get('JAX_LOCAL_DEVICE_IDS')}}\n"
      f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(record) + '\\n')\n"
      "for arg in sys.argv[1:]:\n"
      f"  if os.path.isfile(arg): shutil.copy(arg, {str(tmp_path / 'sent.tar.gz')!r})\n"
      "sys.exit(int(os.environ.get('FAIL', 0)))\n"
    )
    program.chmod(0o755)

  class Stage:
    path = tmp_path

    def run(self, script, *args, **env):
      clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_LOCAL", "DRY_RUN"))}
      clean |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | env
      command = ["bash", str(LAUNCH / script), *args]
      return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=ROOT)

    def calls(self):
      file = tmp_path / "calls"
      return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  return Stage()


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh"])
def test_scripts_are_bash(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_slurm_starts_one_process_for_each_node(stage):
  dry = stage.run("slurm.sbatch", *RUN, DRY_RUN="1", SLURM_GPUS_ON_NODE="4")
  assert dry.returncode == 0 and stage.calls() == []
  real = stage.run("slurm.sbatch", *RUN, SLURM_GPUS_ON_NODE="4")
  assert real.returncode == 0, real.stderr
  (call,) = stage.calls()
  expected = [
    "srun",
    "--ntasks-per-node=1",
    "--kill-on-bad-exit=1",
    "python",
    "-m",
    "jax_trustdiff.main",
    *RUN,
  ]
  assert call == {"argv": expected, "devices": "0,1,2,3"}
  assert shlex.split(dry.stdout) == expected
  stopped = stage.run("slurm.sbatch", *RUN, PYTHON="/opt/python", FAIL="143")
  assert stopped.returncode == 143, "the exit code of the run is that of the job"
  assert stage.calls()[1]["devices"] is None and stage.calls()[1]["argv"][3] == "/opt/python"
  assert stage.run("slurm.sbatch").returncode == 2 and len(stage.calls()) == 2


def test_slurm_directives_are_where_sbatch_reads_them():
  """sbatch stops at the first line that is neither empty nor a comment."""
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
  assert directives and max(directives) < first_command
  assert "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --signal=TERM@120" in lines


def test_tpu_commands(stage):
  actions = [["create"], ["setup"], ["run", *RUN], ["delete"]]
  dry = [stage.run("tpu_vm.sh", "--dry_run", *action, **TPU) for action in actions]
  assert [r.returncode for r in dry] == [0] * 4 and stage.calls() == []
  for action in actions:
    done = stage.run("tpu_vm.sh", *action, **TPU, PROJECT="mine", SPOT="1")
    assert done.returncode == 0, done.stderr
  calls = [call["argv"] for call in stage.calls()]
  assert all(call[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] for call in calls)
  assert [call[4] for call in calls] == ["create", "scp", "ssh", "ssh", "delete"]
  assert all(call[-2:] == ["--zone=zone", "--project=mine"] for call in calls)
  create, copy, install, run, delete = (call[5:-2] for call in calls)
  assert create == ["slice", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base", "--spot"]
  assert copy[1:] == ["slice:jax_trustdiff.tar.gz", "--worker=all"]
  assert install[:2] == run[:2] == ["slice", "--worker=all"]
  assert delete == ["slice", "--quiet"]
  remote = run[2].removeprefix("--command=")
  assert shlex.split(remote)[-len(RUN) :] == RUN, "the remote shell sees the arguments as they were given"
  assert subprocess.run(["bash", "-n", "-c", install[2].removeprefix("--command=")]).returncode == 0
  dry_run = shlex.split(dry[2].stdout)
  assert [*dry_run, "--project=mine"] == calls[3]


def test_tpu_setup_sends_the_checkout_and_leaves_nothing(stage):
  (stage.path / "tmp").mkdir()
  assert stage.run("tpu_vm.sh", "setup", **TPU, TMPDIR=str(stage.path / "tmp")).returncode == 0
  with tarfile.open(stage.path / "sent.tar.gz") as archive:
    names = archive.getnames()
  assert {"./pyproject.toml", "./jax_trustdiff/main.py", "./configs/at_cifar.py"} <= set(names)
  assert not any(part in (".git", "runs", "__pycache__") for name in names for part in name.split("/"))
  assert list((stage.path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
  "args, env, message",
  [
    ([], TPU, "usage:"),
    (["create"], {"NAME": "slice"}, "usage:"),
    (["create"], {"NAME": "slice", "ZONE": "zone"}, "create needs TYPE"),
    (["run"], TPU, "run needs --config"),
    (["start"], TPU, "unknown action 'start'"),
  ],
)
def test_tpu_refuses(stage, args, env, message):
  result = stage.run("tpu_vm.sh", *args, **env)
  assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
  assert stage.calls() == []


def test_a_failing_remote_command_fails_the_script(stage):
  assert stage.run("tpu_vm.sh", "setup", **TPU, FAIL="7").returncode == 7
  assert len(stage.calls()) == 1, "nothing is installed when the copy has failed"


def test_xm_local_prints_commands_that_work(tmp_path):
  (tmp_path / "xmanager.py").write_text("raise ImportError('a dry run needs no xmanager')")
  command = [sys.executable, LAUNCH / "xm_local.py", "--dry_run", "--config=configs/at_cifar.py:smoke"]
  command += ["--seeds=0,5", f"--sweep_dir={tmp_path / 'a sweep'}", "--gpus=0,1"]
  env = os.environ | {"PYTHONPATH": str(tmp_path)}
  out = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
  assert out.returncode == 0, out.stderr
  first, second = map(shlex.split, out.stdout.splitlines())
  assert f"--workdir={tmp_path / 'a sweep' / 'seed-0'}" in first and "CUDA_VISIBLE_DEVICES=0" in first
  assert f"--workdir={tmp_path / 'a sweep' / 'seed-5'}" in second and "CUDA_VISIBLE_DEVICES=1" in second
  shown = subprocess.run(["env", *second, "--print_config"], capture_output=True, text=True, cwd=tmp_path)
  assert shown.returncode == 0, shown.stderr
  assert "seed = 5" in shown.stdout.splitlines()
