"""Samplers on eight devices: nobody talks to the host or to each other, and images are those of one device."""

import pytest
from workers import answer, start


@pytest.mark.slow
def test_eight_devices_sample_alone_and_alike():
  one, eight = (answer(start("sampler_worker.py", devices)) for devices in (1, 8))
  assert (one.pop("devices"), eight.pop("devices")) == (1, 8)
  for name in one:
    assert eight[name]["loops"] >= 1, name
    assert eight[name]["different"] == one[name]["different"] == 64, name
    if name == "coupled":  # the batch's norms are a mean over the devices: the check would see a collective
      assert "all-reduce" in eight[name]["talk"]
      continue
    assert not eight[name]["talk"] and not one[name]["talk"], name
    assert eight[name]["bytes"] == one[name]["bytes"], name
    if name != "predictor_corrector":  # whose norms XLA sums in another order in a batch of another size
      assert eight[name]["images"] == one[name]["images"], name  # every bit of the floats
