"""The EDM sampler and the EDM training step on a DDPM++ U-Net, beside the same work written by hand and in torch."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff.diffusion.augment import edm_pipe, no_pipe
from jax_trustdiff.diffusion.denoisers import Denoiser, EDMPreconditioning
from jax_trustdiff.diffusion.losses import EDMLoss
from jax_trustdiff.diffusion.samplers import EDMSampler
from jax_trustdiff.interop import edm_names
from jax_trustdiff.models.registry import DIFFUSION_NETWORKS, forward_flops, num_params
from jax_trustdiff.tasks import benchmark_tools as tools
from jax_trustdiff.training import optimizers, state
from jax_trustdiff.training.ema import half_life_decay
from jax_trustdiff.training.progress import say
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import DenoiseFn, DiffusionNetwork, InputError, Variables


@dataclasses.dataclass(frozen=True)
class Size:
  """Of a DDPM++ U-Net for square RGB images, and of its batch."""

  image_size: int
  model_channels: int
  channel_mult: tuple[int, ...]
  num_blocks: int
  attention_resolutions: tuple[int, ...]
  dtype: str
  batch_size: int

  def network(self, num_augment_labels: int = 0) -> DiffusionNetwork:
    """Our network of this size."""
    return DIFFUSION_NETWORKS["ddpmpp"](
      **self.torch_settings(num_augment_labels)["network"], dtype=self.dtype
    )

  def torch_settings(self, num_augment_labels: int = 0) -> dict:
    """What the torch peer wants to know of it."""
    shared = ("model_channels", "channel_mult", "num_blocks", "attention_resolutions")
    network = {name: getattr(self, name) for name in shared}
    network |= {"image_shape": (self.image_size,) * 2 + (3,), "num_augment_labels": num_augment_labels}
    return {"network": network}


def sampler(
  image_size: int,
  model_channels: int,
  channel_mult: tuple[int, ...],
  num_blocks: int,
  attention_resolutions: tuple[int, ...],
  dtype: str,
  batch_size: int,
  num_steps: int,
  rounds: int,
  peer_python: str,
  peer_dtypes: tuple[str, ...],
) -> Callable[[Workdir], dict[str, float]]:
  """A batch of images by Heun's method: `EDMSampler`, a `lax.scan` written by hand for it alone, and a torch loop.

  All three evaluate the network 2 num_steps - 1 times, from the same noise and weights. Figures of the whole call, compiled
  and warm; compile_seconds are of tracing and compilation. max_difference of images is relative to their largest value.
  peer_dtypes: of torch, a peer each: 'float32' (products in TF32 on a GPU) and 'bfloat16'.
  InputError if `peer_python` has no torch, RunError if the peer dies.
  """
  size = Size(image_size, model_channels, channel_mult, num_blocks, attention_resolutions, dtype, batch_size)
  tools.check_counts(batch_size=batch_size, num_steps=num_steps - 1, rounds=rounds)
  _check_dtypes(peer_dtypes)
  network, python = size.network(), tools.peer_python_with_torch(peer_python)
  heun = EDMSampler(num_steps=num_steps)

  def measure(workdir: Workdir) -> dict[str, float]:
    variables = _variables(network)
    denoise = Denoiser(network, EDMPreconditioning(), variables)
    noise = jax.random.normal(jax.random.key(1), (batch_size, *network.image_shape))
    programs, compile_seconds = {}, {}
    for name, sample in (("ours", heun), ("scan", functools.partial(heun_by_scan, sigmas=heun.sigmas))):
      start = time.perf_counter()
      programs[name] = jax.jit(lambda d, x, sample=sample: sample(d, x)).lower(denoise, noise).compile()
      compile_seconds[name] = time.perf_counter() - start
      say(f"{name}: compiled in {compile_seconds[name]:.1f} s")
    images = {name: np.asarray(program(denoise, noise)) for name, program in programs.items()}
    timed = {
      name: tools.timed(lambda _, program=program: (program(denoise, noise),), None)
      for name, program in programs.items()
    }
    settings = size.torch_settings() | {"job": "sample", "num_steps": num_steps}
    with _torch_peers(python, peer_dtypes, settings, variables, noise=noise) as peers:
      seconds = tools.in_turns(timed | {name: peer for name, (peer, _) in peers.items()}, rounds, 1)
      images |= {name: np.load(output) for name, (_, output) in peers.items()}
    figures = tools.figures_beside_torch("sampler", seconds, batch_size, heun.nfe * forward_flops(network))
    figures |= tools.ratio_figures("sampler_beside_scan", seconds["ours"], seconds["scan"])
    figures["sampler/scan_images_per_second"] = float(batch_size / np.median(seconds["scan"]))
    largest = np.abs(images["ours"]).max()
    for name in images.keys() - {"ours"}:
      apart = np.abs(images["ours"] - images[name]).max() / largest
      figures[f"sampler/max_difference_from_{name}"] = float(apart)
    for name, value in compile_seconds.items():
      figures[f"sampler/compile_seconds_{name}"] = value
    return figures | _about(network)

  return measure


def edm_train(
  image_size: int,
  model_channels: int,
  channel_mult: tuple[int, ...],
  num_blocks: int,
  attention_resolutions: tuple[int, ...],
  dtype: str,
  batch_size: int,
  augment: tuple[float, ...],
  rounds: int,
  steps_per_round: int,
  peer_python: str,
  peer_dtypes: tuple[str, ...],
) -> Callable[[Workdir], dict[str, float]]:
  """One training step: augmentation, the EDM loss, its gradient, Adam and the parameters' average; beside torch's.

  augment: probabilities of the augmentation, each a measurement of its own; 0 is none. peer_dtypes: see `sampler`. Without dropout
  and class labels.
  InputError and RunError as `sampler`.
  """
  size = Size(image_size, model_channels, channel_mult, num_blocks, attention_resolutions, dtype, batch_size)
  tools.check_counts(batch_size=batch_size, rounds=rounds, steps_per_round=steps_per_round)
  _check_dtypes(peer_dtypes)
  pipes = {p: edm_pipe(p) if p else no_pipe() for p in augment}
  python = tools.peer_python_with_torch(peer_python)

  def measure(workdir: Workdir) -> dict[str, float]:
    figures = {}
    for probability, pipe in pipes.items():
      network = size.network(pipe.num_labels)
      variables = _variables(network)
      x0 = jax.random.uniform(jax.random.key(1), (batch_size, *network.image_shape), minval=-1.0)
      ours = _our_training(network, pipe, variables, x0)
      settings = size.torch_settings(pipe.num_labels) | {"job": "train", "augment": probability}
      with _torch_peers(python, peer_dtypes, settings, variables, images=x0) as peers:
        programs = {"ours": ours} | {name: peer for name, (peer, _) in peers.items()}
        seconds = tools.in_turns(programs, rounds, steps_per_round)
      label = "edm_train_augmented" if probability else "edm_train"
      # a gradient with respect to input or weights counts as one evaluation; augmentation is not counted
      figures |= tools.figures_beside_torch(label, seconds, batch_size, 3 * forward_flops(network))
    return figures | _about(size.network())

  return measure


def heun_by_scan(denoise: DenoiseFn, noise: jax.Array, sigmas: np.ndarray) -> jax.Array:
  """Karras et al. 2022, algorithm 1, as one writes it for itself: a scan over all steps but the last, which is D."""
  sigmas = jnp.asarray(sigmas, noise.dtype)

  def slope(x, sigma):
    return (x - denoise(x, jnp.full(len(x), sigma))) / sigma

  def step(x, interval):
    sigma, following = interval
    d = slope(x, sigma)
    euler = x + (following - sigma) * d
    return x + (following - sigma) * (d + slope(euler, following)) / 2, None

  x, _ = jax.lax.scan(step, noise * sigmas[0], (sigmas[:-1], sigmas[1:]))
  return denoise(x, jnp.full(len(x), sigmas[-1]))


def _our_training(network: DiffusionNetwork, pipe, variables: Variables, x0: jax.Array):
  """A program n -> seconds of n training steps, compiled and warm."""
  loss = EDMLoss()

  def loss_fn(params, collections, batch, key, step):
    pipe_key, noise_key = jax.random.split(key)
    images, labels = pipe(batch, pipe_key)
    denoise = Denoiser(
      network,
      EDMPreconditioning(),
      {"params": params, **collections},
      augment_labels=labels if pipe.num_labels else None,
    )
    return loss(denoise, images, noise_key).mean(), (collections, {})

  optimizer = optimizers.adamw(optimizers.constant(1e-3, 1, 1))
  decay = functools.partial(half_life_decay, batch_size=len(x0))
  step = jax.jit(state.make_train_step(loss_fn, optimizer, decay), donate_argnums=0)
  current = state.create(lambda key: jax.tree.map(jnp.copy, variables), optimizer, jax.random.key(2))
  start = time.perf_counter()
  compiled = step.lower(current, x0).compile()
  say(f"training step: compiled in {time.perf_counter() - start:.1f} s")
  return tools.timed(lambda current: (compiled(current, x0)[0],), current)


def _variables(network: DiffusionNetwork) -> Variables:
  """Fresh variables of which every branch does something: initial ones leave half of the layers at zero."""

  def filled(key):
    leaves, structure = jax.tree.flatten(network.init(key))
    sizes = [leaf.size for leaf in leaves]
    draws = jnp.split(0.02 * jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    moved = [leaf + draw.reshape(leaf.shape) for leaf, draw in zip(leaves, draws, strict=True)]
    return jax.tree.unflatten(structure, moved)

  return jax.jit(filled)(jax.random.key(0))


@contextlib.contextmanager
def _torch_peers(
  python: str | None, dtypes: Sequence[str], settings: dict, variables: Variables, **arrays: jax.Array
) -> Iterator[dict[str, tuple[Callable[[int], float], pathlib.Path]]]:
  """{'torch' or 'torch_<dtype>': (the peer of `tools.peer` with these weights and arrays, the file where it leaves its images)}.

  Empty without an interpreter for them."""
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if python:
      given = {k: np.asarray(v) for k, v in arrays.items()}
      np.savez(folder / "arrays.npz", **edm_names.to_edm(variables), **given)
    peers = {}
    for dtype in dtypes:
      output = folder / f"{dtype}.npy"
      about = {"dtype": dtype, "arrays": str(folder / "arrays.npz"), "output": str(output)}
      opened = tools.peer(python, settings | about | tools.peer_device(), "torch_peer_unet.py")
      theirs = stack.enter_context(opened)
      if theirs:
        peers["torch" if dtype == "float32" else f"torch_{dtype}"] = theirs, output
    yield peers


def _about(network: DiffusionNetwork) -> dict[str, float]:
  return {
    "network/parameters": num_params(jax.eval_shape(network.init, jax.random.key(0))),
    "network/gflop_per_evaluation": forward_flops(network) / 1e9,
  }


def _check_dtypes(dtypes: Sequence[str]) -> None:
  if unknown := set(dtypes) - {"float32", "bfloat16"}:
    raise InputError(f"benchmark.peer_dtypes knows 'float32' and 'bfloat16', found {unknown.pop()!r}")
