"""Programs of their own that a test starts: with their own devices, or as several processes of one run."""

import json
import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent


def flags(devices: int) -> str:
  """XLA_FLAGS of a process with so many virtual CPU devices, beside those of the tests."""
  return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def start(script: str, devices: int, *args) -> subprocess.Popen:
  """tests/<script> on so many virtual CPU devices, with machine code of little optimisation: how work is shared out stays the same."""
  env = os.environ | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": flags(devices),
    "PYTHONPATH": str(TESTS.parent),
    "JAX_PLATFORMS": "cpu",
  }
  command = [sys.executable, str(TESTS / script), *map(str, args)]
  return subprocess.Popen(
    command, cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def answer(process: subprocess.Popen) -> dict:
  """The JSON of the last line that the worker printed; fails with its messages if it failed."""
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err[-3000:]
  return json.loads(out.splitlines()[-1])
