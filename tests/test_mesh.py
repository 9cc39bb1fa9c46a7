"""One device, eight virtual devices and two processes train alike."""

import json
import os
import socket

import numpy as np
import pytest
from workers import answer, start

CASES = [("standard", "float32", 20), ("trades", "float64", 5)]
OF_TWO = CASES[1:]  # of two processes
if os.environ.get("TRUSTDIFF_LONG"):
  CASES += [("ikl", "float64", 6)]
  CASES.insert(1, ("trades", "float32", 1))
  OF_TWO = CASES


def losses():
  """The losses of every case on one device, on eight, and of some on two processes of one device each."""
  one = answer(start("losses_worker.py", 1, json.dumps(CASES)))
  eight = answer(start("losses_worker.py", 8, json.dumps(CASES)))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  pair = [start("losses_worker.py", 1, json.dumps(OF_TWO), address, 2, i) for i in range(2)]
  found = [process.communicate(timeout=600) for process in pair]
  assert [process.returncode for process in pair] == [0, 0], found
  two = json.loads(found[0][0].splitlines()[-1])
  assert [one["devices"], eight["devices"], two["devices"]] == [1, 8, 2]
  assert [one["processes"], eight["processes"], two["processes"]] == [1, 1, 2]
  return one["losses"], eight["losses"], two["losses"]


@pytest.mark.slow
def test_the_same_losses_on_every_mesh():
  one, eight, two = losses()
  for case, alone, of_eight in zip(CASES, one, eight, strict=True):
    assert len(alone) == case[2] and np.isfinite(alone).all(), case
    if len(alone) > 1:
      assert np.ptp(alone) > 1e-3, case  # something is trained
    np.testing.assert_allclose(of_eight, alone, rtol=1e-5, err_msg=str(case))
  for case, found in zip(OF_TWO, two, strict=True):
    np.testing.assert_allclose(found, one[CASES.index(case)], rtol=1e-5, err_msg=str(case))
