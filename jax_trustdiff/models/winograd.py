"""3x3 convolutions of stride 1 by minimal filtering, F(2x2, 3x3), in operations that XLA runs fast on a CPU.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016, arXiv:1509.09308), section 4.1: an output tile
of 2x2 pixels, Y = A^T [(G g G^T) * (B^T d B^T)] A, takes 16 products where the sum over taps takes 36. Over all tiles the
products are 16 matrix products of [tiles, channels in] and [channels in, channels out]. In float32 the result is closer to
the exact one than that of XLA:CPU's own convolution, whose sums are longer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(
  x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c k"], pads: Pads, precision=None
) -> Float[Array, "b m n k"]:
  """The convolution of stride 1 of `x`, padded by `pads` = ((top, bottom), (left, right)), with `kernel`."""
  (rows, columns), tiles = _sizes(x.shape, pads)
  data = _transformed_data(x, pads)
  filters = [
    _filter(list(row)) for row in zip(*(_filter(list(row)) for row in kernel.swapaxes(0, 1)), strict=True)
  ]
  products = [
    [lax.dot(v.reshape(-1, x.shape[3]), u, precision=precision) for v, u in zip(*pair, strict=True)]
    for pair in zip(data, filters, strict=True)
  ]

  # Columns of each tile row first; the barrier keeps XLA from computing them anew for each row of the output.
  batch, channels = x.shape[0], kernel.shape[3]
  widened = [
    jnp.stack([part.reshape(batch, *tiles, channels) for part in _output(row)], 3).reshape(
      batch, tiles[0], 2 * tiles[1], channels
    )
    for row in products
  ]
  y = jnp.stack(_output(lax.optimization_barrier(widened)), 2)
  y = y.reshape(batch, 2 * tiles[0], 2 * tiles[1], channels)
  return y[:, :rows, :columns]


def kernel_gradient(
  x: Float[Array, "b h w c"],
  dy: Float[Array, "b m n k"],
  pads: Pads,
  precision=None,
  preferred_element_type=None,
) -> Float[Array, "3 3 c k"]:
  """The gradient of sum(convolve(x, kernel, pads) * dy) with respect to the kernel: the transposes of all steps."""
  (rows, columns), tiles = _sizes(x.shape, pads)
  data = _transformed_data(x, pads)
  dy = jnp.pad(dy, ((0, 0), (0, 2 * tiles[0] - rows), (0, 2 * tiles[1] - columns), (0, 0)))
  widened = [
    [row[:, :, j::2] for j in range(2)] for row in _output_transposed([dy[:, i::2] for i in range(2)])
  ]
  grads = [_output_transposed(row) for row in widened]
  products = [
    [
      lax.dot_general(
        v.reshape(-1, x.shape[3]),
        m.reshape(-1, dy.shape[3]),
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
      )
      for v, m in zip(*pair, strict=True)
    ]
    for pair in zip(data, grads, strict=True)
  ]
  columns_of_kernel = zip(*(_filter_transposed(row) for row in products), strict=True)
  return jnp.stack([jnp.stack(_filter_transposed(list(column))) for column in columns_of_kernel], 1)


def _sizes(shape: Sequence[int], pads: Pads) -> tuple[tuple[int, int], tuple[int, int]]:
  """Height and width of the output, and how many tiles cover them."""
  out = tuple(n + low + high - 2 for n, (low, high) in zip(shape[1:3], pads, strict=True))
  return out, tuple(-(-m // 2) for m in out)


def _transformed_data(x: jax.Array, pads: Pads) -> list[list[jax.Array]]:
  """B^T d B of every 4x4 input tile d: 4 x 4 arrays [b, tile rows, tile columns, c]."""
  (rows, columns), tiles = _sizes(x.shape, pads)
  odd = (2 * tiles[0] - rows, 2 * tiles[1] - columns)
  (top, bottom), (left, right) = pads
  x = lax.pad(
    x, jnp.zeros((), x.dtype), ((0, 0, 0), (top, bottom + odd[0], 0), (left, right + odd[1], 0), (0, 0, 0))
  )
  tall = _data([lax.slice_in_dim(x, i, i + 2 * tiles[0] - 1, 2, 1) for i in range(4)])
  return [_data([lax.slice_in_dim(t, j, j + 2 * tiles[1] - 1, 2, 2) for j in range(4)]) for t in tall]


# One dimension of B^T, G, A^T and the transposes of the last two, as in equation (7) of the paper.


def _data(d):
  return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _filter(g):
  return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _output(m):
  return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_transposed(y):
  return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _filter_transposed(u):
  return [u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]]
