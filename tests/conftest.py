"""Shared test set-up: CPU, a persistent compilation cache, and where the reference values are, if present."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "jax_trustdiff" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs, but many of them
# Tests compile more than they compute; at level 0 those that compute take longer than is won.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def shared_dir(*parts: str) -> pathlib.Path:
  """A path below the folder of reference values and real data; the test skips where it is absent."""
  base = pathlib.Path(os.environ.get("TRUSTDIFF_SHARED", ROOT.parent / "shared"))
  path = base.joinpath(*parts)
  if not path.exists():
    pytest.skip(f"no reference data: {'/'.join(parts)} is not below TRUSTDIFF_SHARED")
  return path


@pytest.fixture
def float64():
  """The test runs with 64-bit floats."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)
