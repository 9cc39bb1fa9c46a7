"""The same run for several seeds at once on this machine, as one XManager experiment.

    python launch/xm_local.py --config=configs/at_cifar.py:smoke --seeds=0,1,2 --sweep_dir=runs/sweep

Every seed is a job of its own with the workdir SWEEP_DIR/seed-<seed>. All start together, so they share the
cores; with --gpus=0,1 they are dealt to those GPUs in turn. Overrides of the config go into the recipe
string: --config=configs/at_cifar.py:smoke,train.num_epochs=2. --dry_run prints the commands and starts
nothing; without it, `pip install xmanager` is needed. Exit code 1 if a job fails.
"""

import os
import pathlib
import shlex
import sys

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent

_CONFIG = flags.DEFINE_string("config", None, "recipe with variants and overrides", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "one job for each")
_SWEEP_DIR = flags.DEFINE_string("sweep_dir", None, "folder of the workdirs", required=True)
_GPUS = flags.DEFINE_list("gpus", [], "GPUs to deal the jobs to; empty: every job sees all")
_PYTHON = flags.DEFINE_string("python", sys.executable, "interpreter in which jax_trustdiff runs")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands, start nothing")


def jobs() -> list[tuple[list[str], dict[str, str]]]:
  """(arguments after the interpreter, environment) of every job."""
  found = []
  for i, seed in enumerate(_SEEDS.value):
    workdir = os.path.abspath(os.path.join(_SWEEP_DIR.value, f"seed-{int(seed)}"))
    arguments = [f"--config={_CONFIG.value}", f"--config.seed={int(seed)}", f"--workdir={workdir}"]
    env = {"PYTHONPATH": str(ROOT)}
    if _GPUS.value:
      env["CUDA_VISIBLE_DEVICES"] = _GPUS.value[i % len(_GPUS.value)]
    found.append((["-m", "jax_trustdiff.main", *arguments], env))
  return found


def main(argv: list[str]) -> None:
  """Prints the commands, or starts them and waits."""
  del argv
  if _DRY_RUN.value:
    for arguments, env in jobs():
      print(shlex.join([*(f"{k}={v}" for k, v in env.items()), _PYTHON.value, *arguments]))
    return

  from xmanager import xm, xm_local

  with xm_local.create_experiment(experiment_title=f"jax_trustdiff {_CONFIG.value}") as experiment:
    spec = xm_local.Local.Spec()
    (executable,) = experiment.package([xm.binary(path=_PYTHON.value, executor_spec=spec)])
    for arguments, env in jobs():
      experiment.add(xm.Job(executable, xm_local.Local(), args=arguments, env_vars=env))


if __name__ == "__main__":
  app.run(main)
