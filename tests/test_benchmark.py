"""The benchmark's arithmetic and its run, with and without the torch peer."""

import importlib.util

import jax
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.models.registry import MODELS, forward_flops
from jax_trustdiff.tasks import benchmark
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def measured(tmp_path, **settings):
  overrides = {f"benchmark.{name}": value for name, value in settings.items()}
  config = config_lib.load("configs/benchmark.py:smoke", overrides)
  workdir = Workdir(tmp_path / "run", config)
  try:
    return benchmark.run(config, workdir)
  finally:
    workdir.close()


def test_flops_of_a_step_count_attack_and_update():
  # One forward pass is 1; a PGD step is forward and input gradient; the update is forward and both gradients.
  assert benchmark.step_flops(1.0, "pgd_at", 10) == 2 * 10 + 3
  assert benchmark.step_flops(1.0, "trades", 10) == 27  # the count published for TRADES-10


def test_forward_flops_of_the_papers_network():
  network = MODELS["wide_resnet"](depth=28, width=10)
  assert forward_flops(network) / 2e9 == pytest.approx(5.25, rel=0.01)  # GMAC, Zagoruyko and Komodakis (2016)


def test_peak_is_known_for_accelerators_only(monkeypatch):
  assert benchmark.peak_flops() is None

  class Device:
    device_kind = "NVIDIA H200"

  monkeypatch.setattr(jax, "devices", lambda: [Device()])
  assert benchmark.peak_flops() == 989e12


@pytest.mark.slow
def test_step_is_timed_beside_torch(tmp_path):
  found = measured(tmp_path)
  for step in ("pgd_at2", "trades2"):
    assert found[f"{step}/images_per_second"] > 0 and found[f"{step}/tflops"] > 0
    assert f"{step}/mfu" not in found  # no peak is known for a CPU
    if importlib.util.find_spec("torch"):
      low, middle, high = (found[f"{step}/{name}"] for name in ("ratio_low", "ratio", "ratio_high"))
      assert 0 < low <= middle <= high
      assert (tmp_path / "run/report/ratios.png").stat().st_size > 0
    else:
      assert f"{step}/ratio" not in found
  # Ours stays near the same gradient outside a loop; plain lax shows the cliff that the check is there for.
  assert found["input_gradient/in_loop_ratio"] < 3 and found["weight_gradient/in_loop_ratio"] < 3
  assert found["weight_gradient/in_loop_ratio_of_plain_lax"] > 3


def test_wrong_settings_are_refused(tmp_path):
  with pytest.raises(InputError, match="'trades', found 'mart'"):
    measured(tmp_path, objectives=("mart",))
  with pytest.raises(InputError, match="not a Python with torch"):
    measured(tmp_path, peer_python="/no/such/python")
