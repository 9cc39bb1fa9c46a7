"""Shared test set-up: CPU, a persistent compilation cache, and where the reference values are, if present."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "jax_trustdiff" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs, but many of them
# Runs that train or attack are quickest when XLA:CPU optimises a little; see `pytest_runtest_protocol` for all else.
if "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
  # Later ones always use them.
  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

gc.set_threshold(100_000, 20, 50)  # tracing makes many objects, and jax looks after its own at every collection

ROOT = pathlib.Path(__file__).resolve().parent.parent
LONG = pytest.mark.skipif(not os.environ.get("TRUSTDIFF_LONG"), reason="minutes: set TRUSTDIFF_LONG=1")


def shared_dir(*parts: str) -> pathlib.Path:
  """A path below the folder of reference values and real data; the test skips where it is absent."""
  base = pathlib.Path(os.environ.get("TRUSTDIFF_SHARED", ROOT.parent / "shared"))
  path = base.joinpath(*parts)
  if not path.exists():
    pytest.skip(f"no reference data: {'/'.join(parts)} is not below TRUSTDIFF_SHARED")
  return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
  """Programs that a test and its fixtures are the first to compile are optimised only if it is marked `computes`."""
  usual = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", not item.get_closest_marker("computes"))
  try:
    return (yield)
  finally:
    jax.config.update("jax_disable_most_optimizations", usual)
    if nextitem is not None and nextitem.path != item.path:
      # What a module leaves in jax's caches stays: the garbage collector need not look through it again and again.
      gc.collect()
      gc.freeze()


@pytest.fixture
def float64():
  """The test runs with 64-bit floats."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)
