"""The two currencies of the library, the ranges of images, and the error for bad input.

    DenoiseFn = Callable[[Signed, Sigma], Signed]   # D(x, sigma): estimate of the clean image
    LogitsFn  = Callable[[Unit], Logits]            # a classifier with its parameters bound

Images are NHWC. `Unit` images lie in [0, 1] (classifiers, attacks), `Signed` images in [-1, 1]
(diffusion), and images on disk are uint8. Convert with `to_unit` and `to_signed` only.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key, UInt8

PyTree = Any
Variables = dict[str, Any]  # {'params': ..., 'batch_stats': ...}, nested dicts of arrays
OBJECTIVE = "objective"  # the collection beside a network's own that a training objective keeps its state in
BACKBONE = "backbone"  # the collection of a frozen network's variables: in no checkpoint, since nothing changes them

Image = Float[Array, "b h w c"]  # of any range: a gradient, a difference, a start outside the cube
Unit = Float[Array, "b h w c"]
Signed = Float[Array, "b h w c"]
Bytes = UInt8[Array, "b h w c"]
Sigma = Float[Array, "b"]
Logits = Float[Array, "b k"]
Labels = Int[Array, "b"]
SoftLabels = Float[Array, "b k"]  # probabilities of the classes, e.g. of mixed images
AnyLabels = Labels | SoftLabels
Bits = Integer[Array, "b n"]
PerExample = Float[Array, "b"]
KeyOrKeys = Key[Array, ""] | Key[Array, "b"]  # one key for the batch, or one for each image

DenoiseFn = Callable[[jax.Array, jax.Array], jax.Array]
LogitsFn = Callable[[jax.Array], jax.Array]


class InputError(ValueError):
  """Something the user gave is wrong: one line that says what was found and what would be right.

  The command line prints the message after `error: ` and exits with code 2; no traceback.
  """


class RunError(RuntimeError):
  """A run cannot go on: one line that says why and what is left (exit code 1)."""


class Stopped(Exception):
  """A run was asked to stop, has saved, and can be started again (SIGTERM or Ctrl-C)."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


@runtime_checkable
class Classifier(Protocol):
  """A network as the rest of the library sees it: pure functions of explicit variables."""

  num_classes: int
  image_shape: tuple[int, int, int]  # (h, w, c)

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables: {'params': ..., 'batch_stats': ...}."""

  def logits(self, variables: Variables, x: jax.Array) -> jax.Array:
    """Evaluation mode, running statistics: Unit [b h w c] -> Logits [b k] in float32."""

  def train_logits(self, variables: Variables, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """Training mode, statistics of this batch: (Logits [b k] float32, batch moments).

    The moments have the tree structure of variables['batch_stats'] (unbiased variances, as torch
    keeps them); nothing is updated. The caller moves its running statistics with
    `(1 - momentum) * running + momentum * moments`.
    """


@runtime_checkable
class RandomizedLogitsFn(Protocol):
  """A classifier that draws random numbers, such as one with a random defence before it; a pytree."""

  def draw(self, key: jax.Array) -> LogitsFn:
    """The classifier with its draws fixed by `key`: one for the batch, or one for each image [b]."""


AnyLogitsFn = LogitsFn | RandomizedLogitsFn


@runtime_checkable
class DiffusionNetwork(Protocol):
  """The raw network F of a diffusion model: pure functions of explicit variables."""

  image_shape: tuple[int, int, int]  # (h, w, c)
  num_classes: int  # 0: unconditional
  num_augment_labels: int  # 0: not conditioned on augmentations

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables: {'params': ...}, and 'constants' where the network has any."""

  def apply(
    self,
    variables: Variables,
    x: jax.Array,
    noise_labels: jax.Array,
    class_labels: jax.Array | None = None,
    augment_labels: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """F(x [b h w c]; noise_labels [b]) -> [b h w c_out] in float32.

    class_labels [b k] one-hot (None: zeros), augment_labels [b a] (None: left out). Without a dropout_key the network
    is in evaluation mode.
    """


@runtime_checkable
class NoiseConditionalClassifier(Protocol):
  """A classifier of noisy images that is told the noise level: pure functions of explicit variables."""

  image_shape: tuple[int, int, int]  # (h, w, c)
  num_classes: int

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables: {'params': ...}."""

  def apply(
    self,
    variables: Variables,
    x: jax.Array,
    noise_labels: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """x [b h w c], noise_labels [b] -> Logits [b k] in float32. Without a dropout_key in evaluation mode."""


@runtime_checkable
class WatermarkCodec(Protocol):
  """Networks that write bits into images and read them back: pure functions of explicit variables."""

  num_bits: int
  image_shape: tuple[int, int, int]  # (h, w, c)

  def init(self, key: jax.Array) -> Variables:
    """Fresh variables {'params': {'encoder': ..., 'decoder': ...}}."""

  def encode(self, variables: Variables, x: jax.Array, bits: jax.Array) -> jax.Array:
    """Unit [b h w c] and bits 0 or 1 [b n] -> the marked images, Unit, in float32."""

  def decode(self, variables: Variables, x: jax.Array) -> jax.Array:
    """Unit [b h w c] -> logits [b n] in float32: positive for a 1."""


def to_unit(x: jax.typing.ArrayLike) -> jax.Array:
  """`x` in [0, 1], float32 (float64 under jax_enable_x64), from uint8 (divided by 255) or from Signed floats in [-1, 1]."""
  x = jnp.asarray(x)
  if x.dtype == jnp.uint8:
    return x.astype(float) / 255
  return (x + 1) / 2


def to_signed(x: jax.typing.ArrayLike) -> jax.Array:
  """`x` in [-1, 1], float32 (float64 under jax_enable_x64), from uint8 (divided by 127.5, minus 1) or from Unit floats in [0, 1]."""
  x = jnp.asarray(x)
  if x.dtype == jnp.uint8:
    return x.astype(float) / 127.5 - 1
  return x * 2 - 1
