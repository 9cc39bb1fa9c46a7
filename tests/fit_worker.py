"""One process of the runs that test_training.py starts in processes of their own; prints what it found as JSON.

Arguments: 'meshes FOLDER', or 'until_stopped FOLDER COORDINATOR NUM_PROCESSES PROCESS_ID'.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import test_training as training

from jax_trustdiff import parallel
from jax_trustdiff.types import Stopped

LAYOUTS = {"replicated": (1, ()), "fsdp": (2, (("kernel", "fsdp"),))}


def meshes(folder: pathlib.Path) -> dict:
  """One undisturbed run and one stopped and resumed, with two layouts of the state, on this process's devices."""
  found = {"devices": jax.device_count()}
  for name, (model, rules) in LAYOUTS.items():
    mesh = parallel.make_mesh(model=model)
    final = training.Run(folder / name / "a", mesh=mesh, rules=rules)()
    stopped = training.Run(folder / name / "b", mesh=mesh, rules=rules)
    training.signal_at(stopped, 23)
    try:
      stopped()
    except Stopped as error:
      found[f"{name}/stopped"] = str(error)
    resumed = training.Run(folder / name / "b", mesh=mesh, rules=rules)()
    found[f"{name}/same"] = training.bits(resumed) == training.bits(final)
    kernels = [tree["kernel"] for s in (final, resumed) for tree in (s.params, s.ema)]
    found[f"{name}/pieces"] = [kernel.addressable_data(0).shape for kernel in kernels]
    found[f"{name}/lines"] = training.lines(folder / name / "a") == training.lines(folder / name / "b")
    found[f"{name}/kernel"] = np.asarray(resumed.params["kernel"], float).tolist()
  return found


def until_stopped(folder: pathlib.Path) -> dict:
  """A run without an end, four steps a dispatch, to be sent a signal."""
  run = training.Run(folder, num_steps=10**6, log_every=50, checkpoint_every=200, steps_per_dispatch=4)
  try:
    run()
  except Stopped as error:
    return {"message": str(error), "exit_code": error.exit_code, "latest": run.checkpoints.latest_step()}
  return {"message": "it came to its end"}


if __name__ == "__main__":
  task, folder, *address = sys.argv[1:]
  if address:
    parallel.start_distributed(address[0], int(address[1]), int(address[2]))
  result = {"meshes": meshes, "until_stopped": until_stopped}[task](pathlib.Path(folder))
  print(json.dumps(result), flush=True)
