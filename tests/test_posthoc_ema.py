"""Post-hoc averages as users make them: snapshots on disk, the export made of them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.interop import export
from jax_trustdiff.tasks import denoisers, posthoc_ema
from jax_trustdiff.tasks.posthoc_ema import read_snapshots, save_snapshot
from jax_trustdiff.training.ema import POST_HOC_STDS
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


def made(folder, recipe="configs/posthoc_ema.py", **overrides):
  config = config_lib.load(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
  workdir = Workdir(folder, config)
  try:
    return posthoc_ema.run(config, workdir)
  finally:
    workdir.close()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
  """(workdir of the smoke variant, its metrics)."""
  folder = tmp_path_factory.mktemp("walk") / "run"
  return folder, made(folder, "configs/posthoc_ema.py:smoke")


def test_smoke_meets_the_tracked_average(walk):
  folder, metrics = walk
  assert metrics["snapshots"] == 2 * 16 and metrics["step"] == 400
  assert metrics["walk_error"] < 0.01 < 10 * metrics["walk_error"] + 0.1 < metrics["distance"]
  denoise = denoisers.load_denoiser(folder / "export")
  assert np.isfinite(jax.jit(lambda d: d(jnp.zeros((2, 8, 8, 3)), jnp.ones(2)))(denoise)).all()


def test_export_keeps_the_description_of_the_run(walk, tmp_path):
  source = tmp_path / "source"
  stored = walk[0] / "random_walk"
  _, variables, meta = export.load_export(stored / "export")
  extra = {
    "denoiser": meta["denoiser"],
    "class_names": ["a"],
    "sampler": {"name": "edm"},
    "metrics": {"fid": 3},
  }
  export.save_export(source / "export", meta["model"], variables, extra)
  (source / "ema").symlink_to(stored / "ema")
  metrics = made(tmp_path / "out", init_from=str(source), ema__std=0.07, ema__step=300)
  assert "walk_error" not in metrics
  _, new, described = export.load_export(tmp_path / "out/export")
  extra.pop("metrics")
  assert described == {"format": 1, "model": meta["model"], **extra} | {
    "ema": {"std": 0.07, "step": 300, "snapshots": 32}
  }
  # a stored average is reconstructed as itself
  made(tmp_path / "stored", init_from=str(source), ema__std=0.1, ema__step=300)
  _, found, _ = export.load_export(tmp_path / "stored/export")
  snapshot = next(s for s in read_snapshots(source / "ema") if (s.step, s.std) == (300, 0.1)).load()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found["params"], snapshot)
  assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), new["params"], snapshot))) > 0.05


def test_snapshots_by_step_and_std(tmp_path):
  averages = [{"a": {"b": np.full((2, 3), value, np.float32)}} for value in (1, 2)]
  save_snapshot(tmp_path, 123_456_789, POST_HOC_STDS, averages)
  save_snapshot(tmp_path, 5, POST_HOC_STDS[::-1], averages)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names[:2] == ["00000005-std0.05.safetensors", "00000005-std0.1.safetensors"]
  (tmp_path / "notes.safetensors").write_bytes(b"")
  found = read_snapshots(tmp_path)
  assert [(s.step, s.std) for s in found] == [(5, 0.05), (5, 0.1), (123_456_789, 0.05), (123_456_789, 0.1)]
  assert [s.load()["a"]["b"][1, 1] for s in found] == [2, 1, 1, 2]
  with pytest.raises(InputError, match="got 2 averages and 1 stds"):
    save_snapshot(tmp_path, 5, (0.05,), averages)


def test_what_is_refused(walk, tmp_path):
  stored = str(walk[0] / "random_walk")
  for overrides, message in (
    ({}, "config.init_from"),
    ({"init_from": str(tmp_path)}, "no snapshots in .*ema: expected files like"),
    ({"init_from": stored, "ema__std": 0.4}, "between 0 and 0.2887, got 0.4"),
    ({"init_from": stored, "ema__step": 7}, "no snapshot of ema.step=7 .*there are those of 25, 50, .*400"),
    ({"random_walk__num_steps": 5}, "snapshot_every must lie in"),
  ):
    with pytest.raises(InputError, match=message) as error:
      made(tmp_path / "out", **overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_snapshots_of_another_network_or_damaged_are_refused(walk, tmp_path):
  stored = walk[0] / "random_walk"
  _, variables, meta = export.load_export(stored / "export")
  export.save_export(tmp_path / "export", meta["model"], variables, {"denoiser": meta["denoiser"]})
  with pytest.raises(InputError, match="no snapshots"):
    made(tmp_path / "out", init_from=str(tmp_path))
  save_snapshot(tmp_path / "ema", 1, (0.05,), [{"enc": np.ones(3, np.float32)}])
  with pytest.raises(InputError, match="does not fit the export beside it"):
    made(tmp_path / "out", init_from=str(tmp_path))
  (tmp_path / "ema/00000001-std0.05.safetensors").write_bytes(b"half a fi")
  with pytest.raises(InputError, match="not a safetensors file, or truncated"):
    made(tmp_path / "out", init_from=str(tmp_path))
