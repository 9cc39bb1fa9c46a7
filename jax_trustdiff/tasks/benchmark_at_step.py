"""The adversarial training step beside torch's, and the cliff of gradient convolutions in loops on XLA:CPU."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff.models import layers
from jax_trustdiff.models.registry import MODELS, forward_flops
from jax_trustdiff.robustness.objectives import OBJECTIVES, move_statistics
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training import optimizers, state
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError


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
  cliff: int,
) -> Callable[[Workdir], dict[str, float]]:
  """The adversarial training step of a WideResNet on one device, beside torch's on the same.

  cliff: images of the batch whose gradients of a convolution are measured inside and outside of a loop; 0: none.
  InputError if `peer_python` has no torch, RunError if the peer dies.
  """
  for name in objectives:
    if name not in ("pgd_at", "trades"):
      raise InputError(f"benchmark.objectives knows 'pgd_at' and 'trades', found {name!r}")
  python = tools.peer_python_with_torch(peer_python)
  network = MODELS["wide_resnet"](depth=depth, width=width, dtype=dtype, mean=(0.47,), std=(0.25,))

  def measure(workdir: Workdir) -> dict[str, float]:
    metrics = _cliff(cliff) if cliff else {}
    for name in objectives:
      ours = _our_step(network, name, batch_size, num_steps)
      settings = dict(
        depth=depth,
        width=width,
        batch_size=batch_size,
        num_steps=num_steps,
        objective=name,
        **tools.peer_device(),
      )
      with tools.peer(python, settings, "torch_peer.py") as theirs:
        seconds = tools.in_turns({"ours": ours, "torch": theirs}, rounds, steps_per_round)
      flops = step_flops(forward_flops(network), name, num_steps)
      metrics |= tools.figures_beside_torch(f"{name}{num_steps}", seconds, batch_size, flops)
    return metrics

  return measure


def step_flops(forward: float, objective: str, num_steps: int) -> float:
  """FLOPs of one image's training step; a gradient with respect to input or weights counts as one forward pass."""
  final = {"pgd_at": 3, "trades": 1 + 2 * 3}[objective]
  return forward * (2 * num_steps + final)


def _our_step(network, objective_name: str, batch_size: int, num_steps: int) -> Callable[[int], float]:
  """A function that runs n training steps and returns the seconds they took; compiled and warm."""
  settings = dict(norm="linf", radius=8 / 255, step_size=2 / 255, num_steps=num_steps)
  if objective_name == "trades":
    settings |= dict(beta=5.0, label_smoothing=0.1)
  objective = OBJECTIVES[objective_name](**settings)

  def loss_fn(params, collections, batch, key, step):
    variables = {"params": params, **collections}
    x, y = batch
    x_adv = objective.attack(network, jax.lax.stop_gradient(variables), x, y, key)
    loss, moments, _ = objective.loss(network, variables, x, jax.lax.stop_gradient(x_adv), y)
    moved = move_statistics(collections["batch_stats"], jax.lax.stop_gradient(moments), 0.01)
    return loss.mean(), ({"batch_stats": moved}, {})

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


def _cliff(batch_size: int) -> dict[str, float]:
  """Gradients of a 3x3 convolution, 64 to 64 channels, 32x32: inside a loop against plain lax outside of one."""
  keys = jax.random.split(jax.random.key(0), 3)
  image, kernel = (batch_size, 32, 32, 64), (3, 3, 64, 64)
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
