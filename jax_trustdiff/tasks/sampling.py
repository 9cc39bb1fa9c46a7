"""Images by id: the one way in which tasks sample a diffusion model."""

import collections
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jax_trustdiff import parallel
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.training.progress import ProgressReport
from jax_trustdiff.types import InputError, RunError

LABEL_KEY = 2**31 - 4  # folded into an image's key: no number of a step, and not that of any other draw


class ImageSampler:
  """uint8 images [n h w c] by their ids: image i is the same, to the byte, whatever is asked for beside it.

  Batch size, number of devices and order make no difference. The key of image i is that of `image_keys`. A value v in
  [-1, 1] becomes 127.5 v + 128, cut off and clipped to 0 .. 255 (Karras et al. 2022).

  XLA rounds a convolution or a matrix product differently in programs of different shapes, and differently in different
  rows of one, which is enough to move a pixel in a thousand by one. So a device always computes `micro_batch` images at
  once, in a program of its own shapes on every mesh (`shard_map`), with image i in row i mod micro_batch; rows nobody asked
  for are computed and dropped. Images may differ a little between micro-batches, kinds of devices and versions of JAX.

  batch_size: images on the way in all devices together, rounded up to whole micro-batches; a program runs while the images
  of the one before are fetched. micro_batch 0: what batch_size gives each device, so that it is one program.
  """

  def __init__(
    self,
    sampler: Any,  # of SAMPLERS
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    batch_size: int,
    seed: int,
    micro_batch: int = 0,
  ):
    if not micro_batch:
      parallel.check_batch(batch_size, mesh)
    if batch_size < 1 or micro_batch < 0:
      raise InputError(f"batch size {batch_size} and micro-batch {micro_batch} must be positive")
    if getattr(sampler, "coupled", False) or getattr(sampler, "step_norms", "image") == "batch":
      raise InputError("a sampler that couples the images of a batch has no image for an id")
    self._sampler, self._image_shape = sampler, tuple(image_shape)
    self.mesh, self._seed = mesh, seed
    self.micro_batch = micro_batch or batch_size // mesh.shape["data"]
    self._devices = mesh.shape["data"]
    self._on_the_way = max(1, math.ceil(batch_size / (self.micro_batch * self._devices)))
    self._evaluations = np.zeros(2, np.int64)  # of the denoiser, and the images they were for
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
      self._images, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False, axis_names={"data"}
    )
    self._run = jax.jit(mapped)

  @property
  def nfe(self) -> float:
    """Evaluations of the denoiser for an image: the mean over those made so far where every image has its own number."""
    return self._sampler.nfe or float(self._evaluations[0] / max(1, self._evaluations[1]))

  def __call__(
    self,
    denoise: Any,  # a pytree
    ids: np.ndarray,
    labels: np.ndarray | None = None,
    what: str = "",
    progress: Callable[[int], None] | None = None,
  ) -> np.ndarray:
    """The images of these ids [n] in [0, 2^31), for integer labels [n] which `denoise.with_labels` takes.

    denoise: a pytree; without labels it is the DenoiseFn that is sampled. One with `start` begins with the state start(b), if it has any.
    `what` names the images in a progress line; `progress` is called with the number of those made so far. RunError if values of an image
    are not finite.
    """
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
      raise InputError(f"image ids lie in 0 .. 2^31 - 1, found {ids.min()} .. {ids.max()}")
    numbers, group = np.unique(ids // self.micro_batch, return_inverse=True)
    row = ids % self.micro_batch
    asked = np.zeros((len(numbers), self.micro_batch), bool)
    asked[group, row] = True
    table = {"id": numbers[:, None] * self.micro_batch + np.arange(self.micro_batch)}
    if labels is not None:
      table["label"] = np.zeros_like(table["id"])
      table["label"][group, row] = labels
    found = np.empty((*table["id"].shape, *self._image_shape), np.uint8)
    waiting = collections.deque()

    def fetch(bar):
      start, running = waiting.popleft()
      images, finite, nfe = (
        x[: asked[start : start + self._devices].size] for x in parallel.gather_to_host(running)
      )
      part = asked[start : start + self._devices].reshape(-1)
      if not finite[part].all():
        bad = table["id"][start : start + self._devices].reshape(-1)[part & ~finite][0]
        raise RunError(
          f"image {bad} has values that are not finite: the sampler did not come to an end with this model"
        )
      self._evaluations += [int(nfe[part].sum()), int(part.sum())]
      found[start : start + self._devices] = images.reshape(-1, *found.shape[1:])
      done = int(asked[: start + self._devices].sum())
      bar.update(done)
      if progress is not None:
        progress(done)

    with ProgressReport(what or "image", int(asked.sum()), quiet=not what) as bar:
      for start in range(0, len(numbers), self._devices):
        waiting.append((start, self._run(denoise, self._batch(table, start))))
        if len(waiting) > self._on_the_way:
          fetch(bar)
      while waiting:
        fetch(bar)
    return found[group, row]

  def _batch(self, table: dict[str, np.ndarray], start: int) -> dict[str, jax.Array]:
    """The global arrays of the groups from `start`, one for each device; the last group again where there are no more."""
    groups = np.minimum(np.arange(start, start + self._devices), len(table["id"]) - 1)
    mine = parallel.process_rows(self._devices * self.micro_batch, self.mesh)
    return parallel.to_global(
      self.mesh, {name: values[groups].reshape(-1)[mine].astype(np.int32) for name, values in table.items()}
    )

  def _images(self, denoise, batch):
    keys = image_keys(self._seed, batch["id"])
    if "label" in batch:
      denoise = denoise.with_labels(batch["label"])
    noise = initial_noise(keys, self._image_shape)
    start = getattr(denoise, "start", None)
    state = None if start is None else start(len(keys))
    if self._sampler.nfe is None:
      if state is not None:
        raise InputError(
          "an adaptive sampler carries no state along: take weights that need none, or another sampler"
        )
      found = self._sampler.sample(denoise, noise, keys)
      x, nfe = found.x, found.nfe
    else:
      x = (
        self._sampler(denoise, noise, keys)
        if state is None
        else self._sampler(denoise, noise, keys, state=state)[0]
      )
      nfe = jnp.full(len(keys), self._sampler.nfe)
    return quantise(x), jnp.isfinite(x).all((1, 2, 3)), nfe.astype(jnp.int32)


def image_keys(seed: int, ids: jax.Array, purpose: str = "images") -> jax.Array:
  """The typed key of each image: its id folded into a key of the seed and the purpose, from which nothing else draws.

  purpose: 'images' are the draws that an image is made of; what looks at images that may have been made so takes another.
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  return jax.vmap(jax.random.fold_in, (None, 0))(key, ids)


def quantise(x: jax.Array) -> jax.Array:
  """uint8 of images in [-1, 1]: 127.5 x + 128, cut off and clipped."""
  return jnp.clip(x * 127.5 + 128, 0, 255).astype(jnp.uint8)


def balanced_labels(ids: np.ndarray, num_classes: int) -> np.ndarray:
  """Label id mod num_classes: as many images of each class as of any other."""
  return (np.asarray(ids) % num_classes).astype(np.int32)


def random_labels(ids: np.ndarray, num_classes: int, seed: int) -> np.ndarray:
  """Uniform labels, that of each image drawn from its key."""

  def draw(ids):
    keys = jax.vmap(lambda key: jax.random.fold_in(key, LABEL_KEY))(image_keys(seed, ids))
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes))(keys)

  return np.asarray(jax.jit(draw)(np.asarray(ids, np.int32)), np.int32)
