"""Building blocks of the convolutional networks: a convolution with its own gradient, and BatchNorm.

`conv_general_dilated` replaces `lax.conv_general_dilated` in every convolutional network of the library.
XLA:CPU sends the gradients of a convolution that sits inside a `while` body (`fori_loop`, `scan`, a
diffrax solve) to a naive loop that is tens of times slower than the same gradient outside. Attacks
and samplers are such loops. Here the gradients are spelled out in operations that stay fast there,
and so is the convolution itself where that is faster: on few pixels, with few or with many channels.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jax_trustdiff.models import winograd
from jax_trustdiff.types import InputError

NHWC = ("NHWC", "HWIO", "NHWC")
Pads = tuple[tuple[int, int], tuple[int, int]]
WINDOW = 4  # outputs of a window; with 8 or 16 channels out twice and half as many took longer

_lax_alone = contextvars.ContextVar("lax_alone", default=False)


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """The convolution of `lax.conv_general_dilated`, with gradients that stay fast in loops on the CPU.

  Same arguments and, up to rounding, the same value. Two-dimensional NHWC / HWIO convolutions without dilation and
  groups, of one type, are those of this module when the program is traced for the CPU; all others, and
  all on an accelerator, are `lax.conv_general_dilated` itself. On the CPU the special ones allow
  reverse-mode derivatives of any order, but not `jax.jvp` (a limit of `jax.custom_vjp`).
  """
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers or NHWC)
  plain = (
    lhs.ndim == 4
    and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    and feature_group_count == batch_group_count == 1
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and preferred_element_type is None
    and lhs.shape[3] == rhs.shape[2]
    and lhs.dtype == rhs.dtype
  )
  if _lax_alone.get() or not (plain and traced_for_cpu()):
    return lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
      feature_group_count, batch_group_count, precision, preferred_element_type,
    )  # fmt: skip
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _conv(tuple(window_strides), pads, precision, lhs, rhs)


@contextlib.contextmanager
def lax_alone() -> Iterator[None]:
  """Programs traced inside hold the convolutions of `lax` and no others, as on an accelerator."""
  token = _lax_alone.set(True)
  try:
    yield
  finally:
    _lax_alone.reset(token)


def traced_for_cpu() -> bool:
  """Whether a program traced now runs on the CPU, unless its inputs are committed to another platform.

  A trace-time check keeps the jaxpr half as long as `lax.platform_dependent` would (each layer would
  hold both versions) and works under every transformation. If it is wrong, which takes arrays
  committed to a device that is not of the default platform, values are right and only speed suffers.
  """
  device = jax.config.jax_default_device
  if device is None:
    return jax.default_backend() == "cpu"
  return (device if isinstance(device, str) else device.platform) == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _conv(strides: tuple[int, int], pads: Pads, precision: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
  if _one_product_pays(x.shape, kernel):
    matrix = _as_matrix(strides, pads, x.shape, kernel)
    sizes = _output_sizes(strides, pads, x.shape, kernel)
    y = lax.dot(x.reshape(x.shape[0], -1), matrix, precision=precision)
    return y.reshape(x.shape[0], *sizes, kernel.shape[3])
  if _minimal_filtering_pays(strides, x, kernel, 32):
    groups = num_groups(2**21, x)
    y = lax.map(lambda x: winograd.convolve(x, kernel, pads, precision), grouped(x, groups))
    return y.reshape(x.shape[0], *y.shape[2:])
  if _windows_pay(strides, pads, x.shape, kernel):
    sizes = _output_sizes(strides, pads, x.shape, kernel)
    windows, matrix = _in_windows(strides, pads, x.shape, kernel)
    y = lax.dot_general(windows(x), matrix, (((3,), (0,)), ((), ())), precision=precision)
    y = y.reshape(x.shape[0], sizes[0], y.shape[2] * WINDOW, kernel.shape[3])
    return lax.slice_in_dim(y, 0, sizes[1], axis=2)
  return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC, precision=precision)


def _conv_fwd(strides, pads, precision, x, kernel):
  return _conv(strides, pads, precision, x, kernel), (x, kernel)


def _conv_bwd(strides, pads, precision, residuals, dy):
  x, kernel = residuals
  dx = _input_gradient(strides, pads, precision, x.shape, kernel, dy)
  return dx, _kernel_gradient(strides, pads, precision, x, kernel, dy)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _one_product_pays(shape: Sequence[int], kernel: jax.Array) -> bool:
  """Whether a convolution of images of `shape` [b h w c] is fastest as one matrix product over all pixels and channels.

  So it is on at most 16 pixels, where `lax` spends most of its time beside the products: a WRN-10-2 that begins with 4x4 takes 0.3
  to 0.4 of the time, and so do its gradients. The bound on the matrix keeps it in the cache; 1x1 kernels gain nothing.
  """
  _, h, w, c = shape
  fits = kernel.shape[:2] != (1, 1) and kernel.dtype in (jnp.float32, jnp.float64)
  return fits and h * w <= 16 and (h * w) ** 2 * c * kernel.shape[3] <= 2**20


def _as_matrix(strides, pads, shape, kernel) -> Float[Array, "hwc mnk"]:
  """The convolution of images of `shape` [b h w c] as a matrix: taps, and zeros where a pixel does not reach."""
  (height, width), taps = kernel.shape[:2], []
  for n, m, stride, (low, _) in zip(
    shape[1:3], _output_sizes(strides, pads, shape, kernel), strides, pads, strict=True
  ):
    taps.append(np.arange(n)[:, None] - stride * np.arange(m) + low)
  rows, columns = taps[0][:, None, :, None], taps[1][None, :, None, :]
  inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
  which = np.where(inside, rows * width + columns, height * width)  # [h w m n]
  channels = kernel.shape[2:]
  with_zeros = jnp.concatenate([kernel.reshape(-1, *channels), jnp.zeros((1, *channels), kernel.dtype)])
  h, w, m, n = which.shape
  matrix = with_zeros[which].transpose(0, 1, 4, 2, 3, 5)
  return matrix.reshape(h * w * channels[0], m * n * channels[1])


def _windows_pay(strides, pads, shape: Sequence[int], kernel: jax.Array) -> bool:
  """Whether a convolution of images of `shape` [b h w c] is fastest as a product of windows.

  So it is with up to 4 channels in, for which XLA:CPU gathers values one by one: 3x3 to 8 or 16 channels take 0.2 to 0.5 of the time,
  and the gradient with respect to the images 0.3 to 0.6. A kernel of more than 5x5 has too many values in a window.
  """
  few = shape[3] <= 4 and kernel.shape[:2] != (1, 1) and max(kernel.shape[:2]) <= 5
  fits = kernel.dtype in (jnp.float32, jnp.float64)
  sizes = _output_sizes(strides, pads, shape, kernel)
  return few and fits and shape[0] != 0 and min(*shape[1:], *kernel.shape, *sizes) > 0


def _in_windows(strides, pads, shape, kernel) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
  """(windows, matrix): each row of windows(x) @ matrix is WINDOW neighbouring outputs of the convolution with all their channels.

  windows: [b h w c] -> [b rows windows values], linear; the last window of a row may reach beyond the last output.
  matrix: [values outputs].
  """
  sizes, (down, along) = _output_sizes(strides, pads, shape, kernel), strides
  height, width, channels, _ = kernel.shape
  reach, block = (WINDOW - 1) * along + width, WINDOW * along  # pixels of a window, and from one to the next
  count, parts = -(-sizes[1] // WINDOW), -(-reach // block)
  total = (count + parts - 1) * block

  def windows(x):
    (top, bottom), (left, _) = pads
    padding = ((0, 0, 0), (top, bottom, 0), (left, total - left - x.shape[2], 0), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    blocks = x.reshape(*x.shape[:2], -1, block * channels)
    rows = jnp.concatenate([blocks[:, :, part : part + count] for part in range(parts)], -1)
    rows = rows[..., : reach * channels]
    last = (sizes[0] - 1) * down + 1
    return jnp.concatenate([rows[:, tap : tap + last : down] for tap in range(height)], -1)

  return windows, _as_matrix(strides, ((0, 0), (0, 0)), (1, height, reach, channels), kernel)


def _output_sizes(strides, pads, shape, kernel) -> tuple[int, int]:
  sizes = zip(shape[1:3], kernel.shape, strides, pads, strict=False)
  return tuple((n + low + high - size) // stride + 1 for n, size, stride, (low, high) in sizes)


def _minimal_filtering_pays(strides: tuple[int, int], x: jax.Array, kernel: jax.Array, channels: int) -> bool:
  """Whether `winograd` is the faster way and exact enough: 3x3, stride 1, float32 or float64, and not too small.

  channels: at least so many in and out. Images of fewer than 64 pixels would only take longer to compile.
  """
  fits = kernel.shape[:2] == (3, 3) and strides == (1, 1) and kernel.dtype in (jnp.float32, jnp.float64)
  return fits and min(kernel.shape[2:]) >= channels and x.shape[1] * x.shape[2] >= 64


def _input_gradient(strides, pads, precision, shape, kernel, dy) -> jax.Array:
  """The gradient with respect to the input: `dy`, dilated by the strides, convolved with the flipped kernel.

  The barrier forbids XLA to fold flip and transposition back into the convolution, which is the slow form.
  A 1x1 kernel needs no convolution: one matrix product, then dilation.
  """
  if _one_product_pays(shape, kernel):
    matrix = _as_matrix(strides, pads, shape, kernel)
    dx = lax.dot_general(dy.reshape(dy.shape[0], -1), matrix, (((1,), (1,)), ((), ())), precision=precision)
    return dx.reshape(shape)
  if _windows_pay(strides, pads, shape, kernel):
    windows, matrix = _in_windows(strides, pads, shape, kernel)
    dy = jnp.pad(dy, ((0, 0), (0, 0), (0, -dy.shape[2] % WINDOW), (0, 0)))
    dy = dy.reshape(*dy.shape[:2], -1, matrix.shape[1])
    back = jax.linear_transpose(windows, jax.ShapeDtypeStruct(shape, dy.dtype))
    return back(lax.dot_general(dy, matrix, (((3,), (1,)), ((), ())), precision=precision))[0]
  padding = []
  for n, k, stride, (low, _), m in zip(shape[1:3], kernel.shape, strides, pads, dy.shape[1:3], strict=False):
    dilated = (m - 1) * stride + 1
    padding.append((k - 1 - low, n + low - dilated))
  if kernel.shape[:2] == (1, 1):
    dx = lax.dot_general(dy, kernel[0, 0], (((3,), (1,)), ((), ())), precision=precision)
    edges = [(*pad, stride - 1) for pad, stride in zip(padding, strides, strict=True)]
    return lax.pad(dx, jnp.zeros((), dx.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
  flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
  if strides == (1, 1):
    return _conv(strides, tuple(padding), precision, dy, flipped)
  return lax.conv_general_dilated(
    dy, flipped, (1, 1), padding, lhs_dilation=strides, dimension_numbers=NHWC, precision=precision
  )


def _kernel_gradient(strides, pads, precision, x, kernel, dy) -> jax.Array:
  """The gradient with respect to the kernel, summed over groups of images.

  Minimal filtering where it pays; else, for each tap, one matrix product of shifted input and `dy`. These are
  written with matrices, not with three contracted axes, which took up to 1.6 times as long.
  """

  def of_group(total, group):
    if _minimal_filtering_pays(strides, x, kernel, 16):
      found = winograd.kernel_gradient(*group, pads, precision, total.dtype)
    else:
      found = jnp.stack(list(_tap_gradients(strides, pads, precision, kernel.shape[:2], *group)))
    return total + found.reshape(kernel.shape).astype(total.dtype), None

  groups = num_groups(2**20, x, dy)
  zeros = jnp.zeros(kernel.shape, wide(x.dtype))
  return lax.scan(of_group, zeros, (grouped(x, groups), grouped(dy, groups)))[0].astype(kernel.dtype)


def _tap_gradients(strides, pads, precision, size, x, dy) -> Iterator[jax.Array]:
  """[c k] for each of the kernel's taps, row by row."""
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)))
  rows, columns = ((m - 1) * stride + 1 for m, stride in zip(dy.shape[1:3], strides, strict=True))
  dy = dy.reshape(-1, dy.shape[3])
  for i in range(size[0]):
    for j in range(size[1]):
      stop = (x.shape[0], i + rows, j + columns, x.shape[3])
      shifted = lax.slice(x, (0, i, j, 0), stop, (1, *strides, 1)).reshape(-1, x.shape[3])
      yield lax.dot_general(
        shifted, dy, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=wide(x.dtype)
      )


def num_groups(max_bytes: int, *arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
  """In how many equal groups of images to work so that none of the arrays takes more than `max_bytes` in a group.

  Groups that fit the cache took between a third and the whole of the time of one large group.
  """
  batch, largest = arrays[0].shape[0], max(x.size * x.dtype.itemsize for x in arrays)
  return next((n for n in range(1, batch + 1) if batch % n == 0 and largest <= n * max_bytes), max(batch, 1))


def grouped(x: jax.Array, groups: int) -> jax.Array:
  """[b ...] -> [groups b/groups ...]."""
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def conv(
  features: int, size: int, stride: int = 1, *, name: str, padding: Any = "SAME", dtype: Any = jnp.float32
) -> nn.Conv:
  """A size x size convolution without bias; kernel drawn from N(0, 2 / (size * size * features))."""
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=padding,
    use_bias=False,
    dtype=dtype,
    kernel_init=conv_init,
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def linear(features: int, *, name: str, dtype: Any = jnp.float32) -> nn.Dense:
  """A linear layer; weights uniform in +-1/sqrt(fan in) as in torch, bias zero."""
  return nn.Dense(features, dtype=dtype, kernel_init=linear_init, name=name)


def wide(dtype: Any) -> Any:
  """The type of statistics, sums and logits in a network that computes in `dtype`: float32, or float64 for float64."""
  return jnp.promote_types(dtype, jnp.float32)


# The initial values are drawn as vectors: XLA:CPU compiles a four-dimensional draw five times longer.


def conv_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
  """A kernel [h w in out] drawn from N(0, 2 / (h * w * out))."""
  std = math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1]))
  return (std * jax.random.normal(key, (math.prod(shape),), dtype)).reshape(shape)


def uniform_init(limit: float) -> nn.initializers.Initializer:
  """Uniform in +-limit; torch's default for kernels and biases is 1 / sqrt(fan in)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, (math.prod(shape),), dtype, -limit, limit).reshape(shape)

  return init


def linear_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
  """Weights [in out], uniform in +-1/sqrt(in)."""
  return uniform_init(1 / math.sqrt(shape[0]))(key, shape, dtype)


def space_to_depth(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c2"]:
  """Every square of `size` x `size` positions as the channels of one."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // size, size, w // size, size, c).swapaxes(2, 3)
  return x.reshape(b, h // size, w // size, size * size * c)


class BatchNorm(nn.Module):
  """`(x - mean) / sqrt(var + eps) * scale + bias` per channel, computed in float32, returned in x's dtype.

  Evaluation: mean and var are the running statistics in the collection 'batch_stats'. Training: they
  are the moments of this batch (biased variance); the moments, with the unbiased variance as torch
  keeps it, are stored in the collection 'moments', which has the structure of 'batch_stats', and
  nothing is updated. Under `jit` with a batch sharded over devices the moments are those of the
  whole batch. `groups` > 1 (ghost BatchNorm): consecutive groups of examples are normalised each by
  its own moments, and the stored moments are the averages over the groups.
  Raises InputError if the batch is not divisible by `groups`, or has a single value per channel.
  """

  eps: float = 1e-5
  groups: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    if not train:
      gain = scale * lax.rsqrt(var.value + self.eps)
      return ((x.astype(wide(x.dtype)) - mean.value) * gain + bias).astype(x.dtype)
    if x.shape[0] % self.groups:
      raise InputError(f"BatchNorm: a batch of {x.shape[0]} does not split into {self.groups} equal groups")
    grouped = x.astype(wide(x.dtype)).reshape(self.groups, -1, *x.shape[1:])
    count = grouped.size // (self.groups * channels)
    if count < 2:
      raise InputError(f"BatchNorm: training needs more than one value per channel, got shape {x.shape}")
    axes = (1, 2, 3)
    batch_mean = grouped.mean(axes, keepdims=True)
    centred = grouped - batch_mean
    batch_var = jnp.square(centred).mean(axes, keepdims=True)
    self._store("mean", batch_mean.reshape(self.groups, channels).mean(0))
    self._store("var", batch_var.reshape(self.groups, channels).mean(0) * (count / (count - 1)))
    y = centred * (scale * lax.rsqrt(batch_var + self.eps)) + bias
    return y.reshape(x.shape).astype(x.dtype)

  def _store(self, name: str, value: jax.Array):
    self.sow("moments", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
