"""AutoAttack beside the package pyautoattack: the same network, images and threat model, in one run."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from jax_trustdiff.attacks.autoattack import AutoAttack
from jax_trustdiff.data import records, sources
from jax_trustdiff.interop import graph_npz
from jax_trustdiff.models.registry import MODELS, bind
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, Variables, to_unit

PREFERENCE = 30.0  # far above the other logits of a fresh network; exp(-30) is still a number


def autoattack(
  graph: str,
  depth: int,
  width: int,
  data_path: str,
  num_images: int,
  norm: str,
  radius: float,
  version: str,
  attack_dtype: str,
  batch_size: int,
  rounds: int,
  peer_python: str,
) -> Callable[[Workdir], dict[str, float]]:
  """Seconds of an evaluation, ours and the peer's in turns, and the images that are left.

  graph: a classifier as an .npz file; '': a WideResNet of `depth` and `width` with fresh weights, each program its own, and a first
  class that is preferred by far: nothing breaks, and every image costs the whole of every attack. attack_dtype: 'float32' with the
  highest precision, or 'bfloat16' (not of a graph), in which the network is attacked; verdicts are of float32. The peer has the
  precision that it has by default, which on a GPU is TF32.
  data_path: a folder of .npz files with test images; '': random ones. InputError if `peer_python` has no torch or no pyautoattack.
  """
  if attack_dtype not in ("float32", "bfloat16"):
    raise InputError(f"benchmark.attack_dtype knows 'float32' and 'bfloat16', found {attack_dtype!r}")
  if graph and attack_dtype != "float32":
    raise InputError("the graph of benchmark.graph is float32, and so is benchmark.attack_dtype")
  python = tools.peer_python_with_torch(peer_python, "pyautoattack")
  if graph:
    network, variables = graph_npz.load_graph(pathlib.Path(graph).expanduser())
  else:
    network = MODELS["wide_resnet"](depth=depth, width=width, mean=(0.47,), std=(0.25,))
    variables = _preferring_first_class(jax.jit(network.init)(jax.random.key(0)))
  if data_path:
    source = records.limit(sources.npz(data_path, network.num_classes, split="test"), num_images)
    x, y = np.asarray(to_unit(np.asarray(source.images)), np.float32), source.labels
  elif graph:
    raise InputError("benchmark.graph needs benchmark.data_path, a folder of .npz files with test images")
  else:
    x = np.random.RandomState(0).uniform(size=(num_images, *network.image_shape)).astype(np.float32)
    y = np.zeros(num_images, np.int32)

  def measure(workdir: Workdir) -> dict[str, float]:
    attack = AutoAttack(norm, radius, version, chunk_size=batch_size, warn=say)
    classifier, fast, left = bind(network, variables), None, {}
    if attack_dtype != "float32":
      fast = bind(dataclasses.replace(network, dtype=attack_dtype), variables)

    def ours(count: int) -> float:
      start = time.perf_counter()
      for _ in range(count):
        left["ours"] = attack(classifier, x, y, jax.random.key(0), attack_fn=fast).robust
      return time.perf_counter() - start

    first = ours(1)
    say(f"first evaluation, with compilation: {first:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
      images = pathlib.Path(folder) / "images.npz"
      np.savez(images, x=x, y=y)
      settings = dict(
        graph=graph and str(pathlib.Path(graph).expanduser().absolute()), depth=depth, width=width
      )
      settings |= dict(norm=norm, radius=radius, version=version, batch_size=batch_size, images=str(images))
      answers = []
      with tools.peer(
        python, settings | tools.peer_device(), "torch_peer_autoattack.py", warm_ups=0, answers=answers
      ) as theirs:
        seconds = tools.in_turns({"ours": ours, "torch": theirs}, rounds, 1)
    figures = {"num_images": len(x), "robust": int(left["ours"].sum())}
    figures |= {"seconds": float(np.median(seconds["ours"])), "first_seconds": first}
    figures["images_per_second"] = len(x) / figures["seconds"]
    if answers:
      theirs_left = np.array(answers[-1]["robust"])
      figures |= {"torch_robust": int(theirs_left.sum()), "torch_seconds": float(np.median(seconds["torch"]))}
      if graph:  # otherwise the programs have other weights
        figures["verdicts_that_differ"] = int((theirs_left != left["ours"]).sum())
      figures |= tools.ratio_figures("autoattack", seconds["ours"], seconds["torch"])
    return figures

  return measure


def _preferring_first_class(variables: Variables) -> Variables:
  """Of a WideResNet, with the bias of the first logit raised by PREFERENCE."""

  def raised(path, leaf):
    last = [key.key for key in path[-2:]] == ["logits", "bias"]
    return leaf.at[0].add(PREFERENCE) if last else leaf

  return jax.tree_util.tree_map_with_path(raised, variables)
