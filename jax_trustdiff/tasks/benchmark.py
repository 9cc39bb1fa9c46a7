"""Measures our code beside a peer doing the same work in the same run, in turns."""

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
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.evaluation import report
from jax_trustdiff.models import layers
from jax_trustdiff.models.registry import MODELS, forward_flops
from jax_trustdiff.robustness.objectives import OBJECTIVES, move_statistics
from jax_trustdiff.training import optimizers, state
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
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


def run(config, workdir: Workdir) -> dict[str, float]:
  """The figures of the benchmark that config.benchmark names; a table on the screen, a plot in workdir/report."""
  benchmark = config_lib.build(BENCHMARKS, config.benchmark)
  workdir.open()
  metrics = benchmark(workdir)
  (workdir / "report").mkdir(exist_ok=True)
  ratios = {
    name.removesuffix("/ratio"): {"ours / peer": v} for name, v in metrics.items() if name.endswith("/ratio")
  }
  if ratios:
    report.bars(
      ratios, workdir / "report" / "ratios.png", ylabel="time of ours / time of the peer", percent=False
    )
  return metrics


def at_step(
  depth: int,
  width: int,
  batch_size: int,
  num_steps: int,
  dtype: str,
  objectives: tuple[str, ...],
  rounds: int,
  steps_per_round: int,
  peer_python: str,
  cliff: bool,
) -> Callable[[Workdir], dict[str, float]]:
  """The adversarial training step of a WideResNet on one device, beside torch's on the same.

  InputError if `peer_python` has no torch, RunError if the peer dies.
  """
  for name in objectives:
    if name not in ("pgd_at", "trades"):
      raise InputError(f"benchmark.objectives knows 'pgd_at' and 'trades', found {name!r}")
  python = _peer_python(peer_python)
  network = MODELS["wide_resnet"](depth=depth, width=width, dtype=dtype, mean=(0.47,), std=(0.25,))

  def measure(workdir: Workdir) -> dict[str, float]:
    metrics = _cliff() if cliff else {}
    for name in objectives:
      ours = _our_step(network, name, batch_size, num_steps)
      settings = dict(
        depth=depth,
        width=width,
        batch_size=batch_size,
        num_steps=num_steps,
        objective=name,
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
        threads=len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 0,
      )
      with _peer(python, settings) as theirs:
        pairs = []
        for _ in range(rounds):
          pairs.append((ours(steps_per_round), theirs(steps_per_round) if theirs else float("nan")))
          say(f"{name}: {pairs[-1][0]:.3f} s ours, {pairs[-1][1]:.3f} s torch")
      metrics |= _figures(f"{name}{num_steps}", network, name, batch_size, num_steps, steps_per_round, pairs)
    return metrics

  return measure


BENCHMARKS = {"at_step": at_step}


def step_flops(forward: float, objective: str, num_steps: int) -> float:
  """FLOPs of one image's training step; a gradient with respect to input or weights counts as one forward pass."""
  final = {"pgd_at": 3, "trades": 1 + 2 * 3}[objective]
  return forward * (2 * num_steps + final)


def peak_flops() -> float | None:
  """Dense bfloat16 peak of this kind of device, None if it is not in the table (or a CPU)."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", kind)), None)


def _figures(label, network, objective, batch_size, num_steps, steps_per_round, pairs) -> dict[str, float]:
  ours, theirs = np.median(np.asarray(pairs), axis=0) / steps_per_round
  flops = step_flops(forward_flops(network), objective, num_steps) * batch_size / ours
  figures = {
    f"{label}/images_per_second": batch_size / ours,
    f"{label}/tflops": flops / 1e12,
  }
  if peak := peak_flops():
    figures[f"{label}/mfu"] = flops / peak
  if np.isfinite(theirs):
    ratios = [a / b for a, b in pairs]
    figures[f"{label}/torch_images_per_second"] = batch_size / theirs
    figures[f"{label}/ratio"] = float(np.median(ratios))
    figures[f"{label}/ratio_low"], figures[f"{label}/ratio_high"] = min(ratios), max(ratios)
  return {name: float(value) for name, value in figures.items()}


def _our_step(network, objective_name: str, batch_size: int, num_steps: int) -> Callable[[int], float]:
  """A function that runs n training steps and returns the seconds they took; compiled and warm."""
  settings = dict(norm="linf", radius=8 / 255, step_size=2 / 255, num_steps=num_steps)
  if objective_name == "trades":
    settings |= dict(beta=5.0, label_smoothing=0.1)
  objective = OBJECTIVES[objective_name](**settings)

  def loss_fn(params, batch_stats, batch, key, step):
    variables = {"params": params, "batch_stats": batch_stats}
    x, y = batch
    x_adv = objective.attack(network, jax.lax.stop_gradient(variables), x, y, key)
    loss, moments, _ = objective.loss(network, variables, x, jax.lax.stop_gradient(x_adv), y)
    return loss.mean(), (move_statistics(batch_stats, jax.lax.stop_gradient(moments), 0.01), {})

  optimizer = optimizers.sgd(optimizers.constant(0.01, 1, 1))
  step = jax.jit(state.make_train_step(loss_fn, optimizer, lambda t: jnp.float32(0.995)), donate_argnums=0)
  keys = jax.random.split(jax.random.key(0), 3)
  batch = (
    jax.random.uniform(keys[0], (batch_size, 32, 32, 3)),
    jax.random.randint(keys[1], (batch_size,), 0, 10),
  )
  current = jax.jit(lambda key: state.create(network.init, optimizer, key))(keys[2])
  start = time.perf_counter()
  compiled = step.lower(current, batch).compile()
  say(f"{objective_name}: compiled in {time.perf_counter() - start:.1f} s")
  current, _ = compiled(current, batch)

  def run(count: int) -> float:
    nonlocal current
    start = time.perf_counter()
    for _ in range(count):
      current, metrics = compiled(current, batch)
    jax.block_until_ready((current, metrics))
    return time.perf_counter() - start

  run(1)
  return run


def _cliff() -> dict[str, float]:
  """Gradients of a 3x3 convolution, 64 to 64 channels, 32x32, batch 16: inside a loop against plain lax outside of one."""
  keys = jax.random.split(jax.random.key(0), 3)
  image, kernel = (16, 32, 32, 64), (3, 3, 64, 64)
  x, w, g = (jax.random.normal(key, shape) for key, shape in zip(keys, (image, kernel, image), strict=True))
  count = 4

  def convolve(conv, x, w):
    return conv(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  figures = {}
  for argument, name in ((0, "input"), (1, "weight")):

    def gradient(conv, x, w, argument=argument):
      return jax.grad(lambda *a: (convolve(conv, *a) * g).sum(), argument)(x, w)

    def looped(conv, x, w, argument=argument):
      def body(_, pair):
        found = gradient(conv, *pair, argument=argument)
        return tuple(a + 1e-9 * found if i == argument else a for i, a in enumerate(pair))

      return jax.lax.fori_loop(0, count, body, (x, w))

    outside = jax.jit(lambda x, w: gradient(jax.lax.conv_general_dilated, x, w))
    inside = jax.jit(lambda x, w: looped(layers.conv_general_dilated, x, w))
    plain = jax.jit(lambda x, w: looped(jax.lax.conv_general_dilated, x, w))
    rows = [
      (_seconds(outside, x, w), _seconds(inside, x, w) / count, _seconds(plain, x, w) / count)
      for _ in range(3)
    ]
    outside_s, inside_s, plain_s = np.min(rows, axis=0)
    figures[f"{name}_gradient/in_loop_ratio"] = float(inside_s / outside_s)
    figures[f"{name}_gradient/in_loop_ratio_of_plain_lax"] = float(plain_s / outside_s)
  return figures


def _seconds(function, *args) -> float:
  jax.block_until_ready(function(*args))
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def _peer_python(peer_python: str) -> str | None:
  """The interpreter that runs the torch peer, None if there is no torch here and none was named."""
  if not peer_python:
    return sys.executable if importlib.util.find_spec("torch") else None
  found = shutil.which(peer_python)
  if found is None or subprocess.run([found, "-c", "import torch"], capture_output=True).returncode:
    raise InputError(f"benchmark.peer_python={peer_python!r} is not a Python with torch")
  return found


@contextlib.contextmanager
def _peer(python: str | None, settings: dict) -> Iterator[Callable[[int], float] | None]:
  """The torch peer as a function n -> seconds, warm; None without torch."""
  if python is None:
    say("torch is not installed: no peer to compare with")
    yield None
    return
  if jax.default_backend() == "gpu" and os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "") not in (
    "false",
    "0",
  ):
    say(
      "jax holds most of the GPU's memory: if torch runs out of it, set XLA_PYTHON_CLIENT_PREALLOCATE=false"
    )
  script = pathlib.Path(__file__).with_name("torch_peer.py")
  with subprocess.Popen(
    [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
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
    for _ in range(2):
      ask("1")
    yield lambda count: ask(str(count))["seconds"]
    process.stdin.close()
