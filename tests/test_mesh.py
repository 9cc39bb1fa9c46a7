"""One device, eight virtual devices and two processes train alike."""

import json
import socket

import numpy as np
import pytest
from workers import answer, start


def losses(objective, dtype, steps):
  """The losses on one device, on eight, and on two processes of one device each."""
  one = answer(start("losses_worker.py", 1, objective, dtype, steps))
  eight = answer(start("losses_worker.py", 8, objective, dtype, steps))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  pair = [start("losses_worker.py", 1, objective, dtype, steps, address, 2, i) for i in range(2)]
  found = [process.communicate(timeout=600) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], found
  two = json.loads(found[0][0].splitlines()[-1])
  assert [one["devices"], eight["devices"], two["devices"]] == [1, 8, 2]
  assert [one["processes"], eight["processes"], two["processes"]] == [1, 1, 2]
  return (np.array(run["losses"]) for run in (one, eight, two))


@pytest.mark.slow
@pytest.mark.parametrize(
  "objective, dtype, steps", [("standard", "float32", 20), ("trades", "float32", 1), ("trades", "float64", 5)]
)
def test_the_same_losses_on_every_mesh(objective, dtype, steps):
  one, eight, two = losses(objective, dtype, steps)
  assert len(one) == steps and np.isfinite(one).all()
  if steps > 1:
    assert np.ptp(one) > 1e-3  # something is trained
  np.testing.assert_allclose(eight, one, rtol=1e-5)
  np.testing.assert_allclose(two, one, rtol=1e-5)
