"""Prints the losses of a few training steps as JSON: run by test_mesh.py on several kinds of meshes.

Usage: losses_worker.py CASES [COORDINATOR NUM_PROCESSES PROCESS_ID]
CASES is JSON: [[objective, dtype, steps], ...]; those in float64 come last, since they switch the process to it.
"""

import json
import sys

import jax
import jax.numpy as jnp

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.tasks import classifiers, train_classifier
from jax_trustdiff.training import state

OBJECTIVES = {
  "standard": {"name": "standard", "label_smoothing": 0.1},
  "trades": {"name": "trades", "beta": 5.0, "norm": "linf", "radius": 0.1, "step_size": 0.03, "num_steps": 3},
  "ikl": {"name": "ikl", "norm": "linf", "radius": 0.1, "step_size": 0.03, "num_steps": 2},
}
TRAIN = {"ikl": {"num_train": 128}}  # four steps an epoch: its table turns over


def losses(objective: str, dtype: str, num_steps: int) -> list[float]:
  """The losses of the first steps of a run on all devices."""
  if dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  plain = config_lib.to_plain(config_lib.load("configs/at_cifar.py:smoke"))
  plain["objective"] = OBJECTIVES[objective]
  plain["model"]["dtype"] = dtype
  plain["augment"] = {"name": "pad_crop_flip", "pad": 1, "flip": False}
  plain["train"] |= {"batch_size": 32, "num_epochs": 20} | TRAIN.get(objective, {})
  config = config_lib.from_plain(plain)
  mesh = parallel.make_mesh()
  data = classifiers.load_data(config)
  network = classifiers.build_network(config.model, data.train)
  trainer = train_classifier.build_trainer(config, network, data, mesh)

  def init(key):
    """Parameters and all else of floats in the precision of the run."""
    floats = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return jax.tree.map(floats, trainer.init(key))

  current = state.create_sharded(init, trainer.optimizer, jax.random.key(0), mesh, ())
  feed = trainer.feed
  feed.start(0)

  @jax.jit
  def step(current, arrays, payload):
    return trainer.step(current, feed.take(arrays, payload[0]))

  found = []
  for _ in range(num_steps):
    current, metrics = step(current, feed.arrays, feed.next(1))
    found.append(float(metrics["loss"]))
  return found


if len(sys.argv) > 2:
  parallel.start_distributed(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
found = [losses(*case) for case in json.loads(sys.argv[1])]
if parallel.is_main_process():
  print(json.dumps({"devices": jax.device_count(), "processes": jax.process_count(), "losses": found}))
