"""Any length of parameter average after training: an export reconstructed from stored power-function averages.

Karras et al. 2024 (arXiv:2312.02696, section 3.2). A training run stores its averages with `save_snapshot` as

    workdir/ema/<step, 8 digits>-std<std>.safetensors

and this task combines them to the average of another relative standard deviation.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import flatten_util

from jax_trustdiff import parallel
from jax_trustdiff.interop import export, safetensors_io
from jax_trustdiff.models.registry import DIFFUSION_NETWORKS
from jax_trustdiff.tasks import denoisers
from jax_trustdiff.training import ema
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, PyTree

FOLDER = "ema"  # of a training run's workdir


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A stored average: after `step` optimizer steps, of relative standard deviation `std`."""

  step: int
  std: float
  path: pathlib.Path

  def load(self) -> PyTree:
    """The averaged parameters, a nested dict of numpy arrays; InputError if the file is damaged."""
    return safetensors_io.load(self.path)


def save_snapshot(
  folder: str | os.PathLike, step: int, stds: Sequence[float], averages: Sequence[PyTree]
) -> None:
  """Writes average i, of relative standard deviation stds[i], after `step` steps; each file whole or not at all.

  To be called by every process of a run, or with arrays of the host by the first one, which writes. InputError unless there is one average for each std.
  """
  if len(stds) != len(averages):
    raise InputError(f"one average for each std is needed, got {len(averages)} averages and {len(stds)} stds")
  for std, average in zip(stds, averages, strict=True):
    average = parallel.gather_to_host(average)
    if parallel.is_main_process():
      safetensors_io.save(pathlib.Path(folder) / f"{step:08d}-std{float(std)!r}.safetensors", average)


def read_snapshots(folder: str | os.PathLike) -> list[Snapshot]:
  """The snapshots in `folder` by step and std; no array is read. InputError if there is none."""
  found = []
  for path in pathlib.Path(folder).glob("*.safetensors"):
    if match := re.fullmatch(r"(\d{8,})-std(\d\S*)", path.stem):
      found.append(Snapshot(int(match[1]), float(match[2]), path))
  if not found:
    raise InputError(
      f"no snapshots in {folder}: expected files like 00001000-std0.05.safetensors, written in training"
    )
  return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.std))


def run(config, workdir: Workdir) -> dict[str, float]:
  """Writes workdir/export: the model of config.init_from, a training run's workdir, with the average of config.ema.

  Everything in its description stays but 'metrics', which are of other parameters; 'ema' is added. distance: that of the
  new parameters from the exported ones in units of their norm. With config.random_walk.num_steps the snapshots are those
  of an untrained network instead (see `_random_walk`), and walk_error says how well the tracked average is met.
  """
  std, walk = float(config.ema.std), config.random_walk
  ema.exponent_of_std(std)
  if bool(config.init_from) == bool(walk.num_steps):
    raise InputError("one of config.init_from, a training run's workdir, and random_walk.num_steps is needed")
  if walk.num_steps:
    if not 0 < walk.snapshot_every <= walk.num_steps:
      raise InputError(f"random_walk.snapshot_every must lie in 1 .. num_steps, got {walk.snapshot_every}")
    workdir.open()
    source = workdir / "random_walk"
    tracked = _random_walk(source, walk.num_steps, walk.snapshot_every, std, config.seed)
  else:
    source, tracked = pathlib.Path(config.init_from), None
  snapshots = read_snapshots(source / FOLDER)
  steps = sorted({snapshot.step for snapshot in snapshots})
  step = config.ema.step or steps[-1]
  if step not in steps:
    shown = ", ".join(map(str, steps if len(steps) <= 12 else [*steps[:6], "...", *steps[-5:]]))
    raise InputError(f"no snapshot of ema.step={step} in {source / FOLDER}; there are those of {shown}")
  _, variables, meta = export.load_export(source / "export")

  workdir.open()
  say(f"{len(snapshots)} snapshots of steps {steps[0]} .. {steps[-1]}: average of std {std} at step {step}")
  params = ema.reconstruct(
    (_checked(snapshot, variables["params"]) for snapshot in snapshots),
    [snapshot.step for snapshot in snapshots],
    [snapshot.std for snapshot in snapshots],
    std,
    step,
  )
  kept = {key: value for key, value in meta.items() if key not in ("format", "model", "metrics")}
  about = {"std": std, "step": step, "snapshots": len(snapshots)}
  if parallel.is_main_process():
    export.save_export(
      workdir / "export", meta["model"], variables | {"params": params}, kept | {"ema": about}
    )
  metrics = about | {"distance": _distance(params, variables["params"])}
  if tracked is not None:
    metrics["walk_error"] = _distance(params, tracked)
  return metrics


def _checked(snapshot: Snapshot, params: PyTree) -> PyTree:
  """The arrays of a snapshot; InputError unless they are those of the export."""
  found = snapshot.load()
  shapes = [{key: x.shape for key, x in safetensors_io.flatten(tree).items()} for tree in (found, params)]
  wrong = sorted(dict(shapes[0].items() ^ shapes[1].items()))
  if wrong:
    raise InputError(
      f"{snapshot.path} does not fit the export beside it: {wrong[0]} ({len(wrong)} such arrays)"
    )
  return found


def _distance(params: PyTree, others: PyTree) -> float:
  """|a - b| / |b|."""
  pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True))
  square = lambda x: float(np.sum(np.square(np.asarray(x, np.float64))))  # noqa: E731
  apart = sum(square(np.asarray(a, np.float64) - b) for a, b in pairs)
  return float(np.sqrt(apart / sum(square(b) for _, b in pairs)))


def _random_walk(source: pathlib.Path, num_steps: int, every: int, std: float, seed: int) -> PyTree:
  """Snapshots and export, as a training run writes them, of a tiny U-Net whose parameters take a random walk.

  Nothing is trained. Returns the average of `std` at the end, tracked step by step: what is to be reconstructed.
  """
  model = dict(
    name="ddpmpp",
    image_shape=(8, 8, 3),
    model_channels=8,
    channel_mult=(1,),
    num_blocks=1,
    attention_resolutions=(),
  )
  network = DIFFUSION_NETWORKS["ddpmpp"](**{key: value for key, value in model.items() if key != "name"})
  stds = (*ema.POST_HOC_STDS, std)

  variables = jax.jit(network.init)(jax.random.key(seed))
  params, unravel = flatten_util.ravel_pytree(variables["params"])

  @jax.jit
  def advance(params, averages, t):
    params += 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), t), params.shape)
    return params, ema.power_update(averages, params, t, stds)

  averages = (params,) * len(stds)
  for t in range(1, num_steps + 1):
    params, averages = advance(params, averages, jnp.asarray(t))
    if t % every == 0 or t == num_steps:
      stored = [unravel(average) for average in averages[: len(ema.POST_HOC_STDS)]]
      save_snapshot(source / FOLDER, t, ema.POST_HOC_STDS, stored)
  if parallel.is_main_process():
    denoisers.save_denoiser(
      source / "export", model, {"name": "edm"}, variables | {"params": unravel(params)}
    )
  return jax.device_get(unravel(averages[-1]))
