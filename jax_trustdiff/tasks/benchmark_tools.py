"""What the benchmarks share: peaks of devices, a torch program as a peer, timings in turns and their ratios."""

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from jax_trustdiff.training.progress import say
from jax_trustdiff.types import InputError, RunError

# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets; by words of jax's device_kind, the first
# that fit. V100 and T4 are not here: they have no bfloat16.
PEAK_FLOPS = {
  "H200": 989e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "A100": 312e12,
  "L4": 121e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops() -> float | None:
  """Dense bfloat16 peak of this kind of device, None if it is not in the table (or a CPU)."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind)), None)


def check_counts(**counts: int) -> None:
  """InputError unless each is at least 1."""
  for name, count in counts.items():
    if count < 1:
      raise InputError(f"benchmark.{name} is too small")


def in_turns(
  programs: Mapping[str, Callable[[int], float] | None], rounds: int, count: int
) -> dict[str, np.ndarray]:
  """Seconds of one repetition in each round [rounds] by name; a program maps a number of repetitions to their seconds.

  Programs that are None are left out. Every program takes `count` repetitions in each round, the first one another in each, so that what else the machine
  does meets all of them.
  """
  order = [name for name, program in programs.items() if program is not None]
  seconds = {name: [] for name in order}
  for turn in range(rounds):
    for name in order[turn % len(order) :] + order[: turn % len(order)]:
      seconds[name].append(programs[name](count) / count)
    say(", ".join(f"{seconds[name][-1]:.3f} s {name}" for name in order))
  return {name: np.asarray(values) for name, values in seconds.items()}


def ratio_figures(label: str, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """The median of the ratios of paired rounds, the lowest and the highest."""
  ratios = ours / theirs
  return {
    f"{label}/ratio": float(np.median(ratios)),
    f"{label}/ratio_low": float(ratios.min()),
    f"{label}/ratio_high": float(ratios.max()),
  }


def speed_figures(label: str, seconds: float, images: int, flops: float) -> dict[str, float]:
  """Images and FLOPs per second of `images` images of `flops` each in so many seconds, and the part of the device's peak."""
  rate = flops * images / seconds
  figures = {f"{label}/images_per_second": images / seconds, f"{label}/tflops": rate / 1e12}
  if peak := peak_flops():
    figures[f"{label}/mfu"] = rate / peak
  return {name: float(value) for name, value in figures.items()}


def figures_beside_torch(
  label: str, seconds: Mapping[str, np.ndarray], images: int, flops: float
) -> dict[str, float]:
  """Medians of the rounds of 'ours' and of what there is of 'torch' and 'torch_<dtype>', and the ratios of ours to theirs.

  flops: of one image. Figures beside 'torch_<dtype>' are of the label `<label>_beside_torch_<dtype>`.
  """
  figures = speed_figures(label, np.median(seconds["ours"]), images, flops)
  for name in seconds:
    if name.startswith("torch"):
      figures[f"{label}/{name}_images_per_second"] = float(images / np.median(seconds[name]))
      beside = label if name == "torch" else f"{label}_beside_{name}"
      figures |= ratio_figures(beside, seconds["ours"], seconds[name])
  return figures


def timed(step: Callable, *state) -> Callable[[int], float]:
  """A warm program of `step`: state -> state; n -> the seconds of n steps, each from the state that the last one left."""

  def program(count: int) -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(count):
      state = step(*state)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  program(1)
  return program


def peer_device() -> dict[str, str | int]:
  """The settings of a peer on the device that jax uses."""
  cpu = jax.default_backend() == "cpu"
  return {
    "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
    "threads": len(os.sched_getaffinity(0)) if cpu else 0,
  }


def peer_python_with_torch(peer_python: str, *packages: str) -> str | None:
  """The interpreter that runs the torch peer, None if torch or one of `packages` is not here and no interpreter was named."""
  needed = ("torch", *packages)
  if not peer_python:
    return sys.executable if all(map(importlib.util.find_spec, needed)) else None
  found = shutil.which(peer_python)
  command = f"import {', '.join(needed)}"
  if found is None or subprocess.run([found, "-c", command], capture_output=True).returncode:
    raise InputError(f"benchmark.peer_python={peer_python!r} is not a Python with {' and '.join(needed)}")
  return found


@contextlib.contextmanager
def peer(
  python: str | None, settings: dict, script: str, warm_ups: int = 2, answers: list[dict] | None = None
) -> Iterator[Callable[[int], float] | None]:
  """The torch program `script` as a function n -> seconds of n repetitions, warm; None without an interpreter for it.

  script: a file of this folder that reads settings and numbers of repetitions, as `torch_peer.py` says. answers: takes
  all that it answers. RunError if it dies.
  """
  if python is None:
    say("torch, or what else the peer needs, is not installed: nothing to compare with")
    yield None
    return
  if jax.default_backend() == "gpu" and os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") not in (
    "false",
    "0",
  ):
    say(
      "jax holds most of the GPU's memory: if torch runs out of it, set XLA_PYTHON_CLIENT_PREALLOCATE=false"
    )
  path = pathlib.Path(__file__).with_name(script)
  with subprocess.Popen(
    [python, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
  ) as process:

    def ask(line: str) -> dict:
      answer = ""
      with contextlib.suppress(BrokenPipeError):  # it ended before it read the line
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
      if not answer:
        with contextlib.suppress(BrokenPipeError):
          process.stdin.close()
        raise RunError(f"the torch peer ended with code {process.wait()}; its own message, if any, is above")
      return json.loads(answer)

    ready = ask(json.dumps(settings))
    say(f"peer: torch {ready['ready']}, {ready['parameters']:,} parameters")
    for _ in range(warm_ups):
      ask("1")

    def program(count: int) -> float:
      answer = ask(str(count))
      if answers is not None:
        answers.append(answer)
      return answer["seconds"]

    yield program
    process.stdin.close()
