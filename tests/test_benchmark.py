"""The benchmark's arithmetic and its run, with and without the torch peer."""

import contextlib
import importlib.util
import types

import jax
import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.models.registry import MODELS, forward_flops
from jax_trustdiff.tasks import benchmark
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError


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


def test_peak_is_that_of_the_whole_name(monkeypatch):
  assert benchmark.peak_flops() is None  # a CPU
  for kind, peak in {
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": None,
    "Tesla T4": None,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
  }.items():
    monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
    assert benchmark.peak_flops() == peak, kind


def test_mfu_is_that_of_one_device(monkeypatch):
  monkeypatch.setattr(benchmark, "peak_flops", lambda: 1e12)
  monkeypatch.setattr(jax, "device_count", lambda: 4)
  network = MODELS["wide_resnet"](depth=10, width=1)
  found = benchmark._figures("x", network, "pgd_at", 8, 2, 5, [(1.0, np.nan)] * 3)
  assert found["x/images_per_second"] == 40
  assert found["x/mfu"] == pytest.approx(forward_flops(network) * (2 * 2 + 3) * 40 / 1e12)
  assert "x/ratio" not in found


def test_ratios_are_plotted_as_numbers(tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(
    benchmark.report, "bars", lambda groups, path, **settings: drawn.update(settings, groups=groups)
  )
  monkeypatch.setattr(benchmark, "_our_step", lambda *_: lambda count: 1.35 * count)
  monkeypatch.setattr(benchmark, "_peer", lambda *_: contextlib.nullcontext(lambda count: 1.0 * count))
  measured(tmp_path, cliff=False)
  assert (
    drawn["groups"] == {f"{step}2": {"ours / peer": 1.35} for step in ("pgd_at", "trades")}
    and drawn["percent"] is False
  )


@pytest.mark.parametrize("answer", ["", """read line; echo '{"ready": "x", "parameters": 1}'"""])
def test_a_dying_peer_is_a_failed_run(tmp_path, answer):
  peer = tmp_path / "python"
  peer.write_text(f"#!/bin/sh\n{answer}\nexit 3\n")
  peer.chmod(0o755)
  with pytest.raises(RunError, match="ended with code 3"), benchmark._peer(str(peer), {}):
    pass


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
