"""Image operations of augmentation policies on uint8 batches, with the values that Pillow gives, inside jit.

    images = apply(images, ("rotate", "solarize", "color"), which, values)    # every image its own operation and value

Operations are of three kinds, so that sixteen of them cost little more than one of each, whatever each image draws:

    on values     each value of a channel becomes another:     autocontrast, equalize, invert, posterize, solarize,
                                                               solarize_add, brightness, contrast
    on places     each pixel is the one at another place:      rotate, shear_x, shear_y, translate_x, translate_y
    blends        with a grey or a blurred image:              color, sharpness

Those on values and blends are cheap arithmetic, of which each image takes its own result; those on places share one
gather with a map for each image. Boxes that are painted over (`fill_box`, `cutout_abs`) stand apart.

Values and blends are those of Pillow's `ImageOps` and `ImageEnhance`, places those of its `Image.transform` and
`Image.rotate`. Pixels are equal, but that Pillow's float64 may come out one lower where an exact quotient of
`autocontrast` is an integer, as float32 here may in a bicubic shear.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from jax_trustdiff.types import Bytes, InputError

# The centre of the output pixel in row i and column j is the point (x, y) = map @ (j, i, 1) of the input.
Map = Float[Array, "b 2 3"]


def apply(
  images: Bytes,
  names: tuple[str, ...],
  which: Int[Array, "b"],
  values: Real[Array, "b"],
  fill: int = 0,
  bicubic_shear: bool = False,
) -> Bytes:
  """Image i after operation names[which[i]] with values[i]; which[i] = -1 leaves it as it is.

  names: of OPERATIONS. The values are

      brightness, contrast, color, sharpness   factor: 0 black, mean grey, grey image, blurred; 1 as it is; above: more
      posterize                                bits kept, 0 to 8
      solarize                                 values from this one on are inverted, 0 to 256
      solarize_add                             added, up to 255; then values from 128 on are inverted
      rotate                                   degrees counter-clockwise about the centre
      shear_x, shear_y                         tangent: row i + 1/2 moves left by value * (i + 1/2), column j + 1/2 up
      shear_x_centered, shear_y_centered       the same about the centre of the image, not its corner
      translate_x, translate_y                 pixels to the left, upwards
      autocontrast, equalize, invert           not used

  Maps take the nearest pixel, or with bicubic_shear four of them for shear_x and shear_y (cubic convolution of Keys
  1981 with a = -1, as Pillow's), and `fill` outside. `solarize_add` adds to every value before it inverts, as the
  PyTorch RandAugment does; the TensorFlow one adds to values below 128 and inverts none.
  InputError for unknown names and for images without 1 or 3 channels.
  """
  _check(images, names)
  height, width = images.shape[1:3]
  chosen = {name: which == index for index, name in enumerate(names)}
  factors, wide = values[:, None, None, None], images.astype(jnp.int32)
  out = wide
  for name in (n for n in names if n in _ON_PIXELS):
    out = _where(chosen[name], _ON_PIXELS[name](wide, factors), out)
  out = out.astype(jnp.uint8)

  sheared = [n for n in names if bicubic_shear and n in ("shear_x", "shear_y")]
  for name in sheared:
    out = _where(chosen[name], _shear_bicubic(images, values, name == "shear_y", fill), out)
  moved = [n for n in names if n in _MAPS and n not in sheared]
  if moved:
    maps = jnp.select(
      [chosen[n][:, None, None] for n in moved],
      [_MAPS[n](values, height, width) for n in moved],
      _map(values, 0.0, 0.0),
    )
    any_moved = functools.reduce(jnp.logical_or, [chosen[n] for n in moved])
    out = _where(any_moved, affine(images, maps, fill), out)
  return out


def _where(chosen: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  return jnp.where(chosen[:, None, None, None], new, old)


def crop_flip(images: Bytes, offsets: Int[Array, "b 2"], mirrored: Bool[Array, "b"], pad: int) -> Bytes:
  """Crops at (row, column) `offsets` in [0, 2 pad] of the zero-padded images, then mirrored where asked."""
  height, width = images.shape[1:3]
  rows = jnp.arange(height) + offsets[:, :1] - pad
  columns = jnp.arange(width) + offsets[:, 1:] - pad
  columns = jnp.where(mirrored[:, None], columns[:, ::-1], columns)
  return _pixels(images, rows[:, :, None], columns[:, None, :])


def flip_crop_shift(
  images: Bytes,
  mirrored: Bool[Array, "b"],
  cuts: Int[Array, "b 2"],
  places: Int[Array, "b 2"],
  offsets: Int[Array, "b 2"],
) -> Bytes:
  """Mirrored where asked, then a window of the image, shifted: CropShift of Li & Spratling 2023 (arXiv:2301.09879).

  The window leaves out cuts = (rows, columns) of the image, its first pixel is the one at `places` in [0, cuts]. It is
  padded with `cuts` zeros on every side, and the crop of the old size at `offsets` in [0, cuts] comes out.
  """
  coordinates = []
  for axis, size in enumerate(images.shape[1:3]):
    cut, place, offset = (x[:, axis : axis + 1] for x in (cuts, places, offsets))
    in_window = jnp.arange(size) + offset - cut
    inside = (in_window >= 0) & (in_window < size - cut)
    coordinates.append(jnp.where(inside, in_window + place, -1))
  rows, columns = coordinates
  columns = jnp.where(mirrored[:, None] & (columns >= 0), images.shape[2] - 1 - columns, columns)
  return _pixels(images, rows[:, :, None], columns[:, None, :])


def rotate(images: Bytes, angles: Float[Array, "b"], fill: int = 0) -> Bytes:
  """Rotates counter-clockwise by `angles` in degrees about the centre; nearest pixel, `fill` outside.

  The output pixel in row i and column j is the input pixel that contains the point

      x = cos(a) (j - cx) - sin(a) (i - cy) + cx + 1/2        cx = (w - 1) / 2
      y = sin(a) (j - cx) + cos(a) (i - cy) + cy + 1/2        cy = (h - 1) / 2

  with coordinates rounded to 1/65536, as PIL's `Image.rotate(angle, NEAREST)` does.
  """
  return affine(images, _rotation(angles, *images.shape[1:3]), fill)


def affine(images: Bytes, maps: Map, fill: int = 0) -> Bytes:
  """The pixel that contains the point maps @ (j, i, 1) = (x, y), for each row i and column j; `fill` outside.

  Pixel (i, j) is the square from (j, i) to (j + 1, i + 1). Coordinates are rounded to 1/65536, as Pillow's are.
  """
  height, width = images.shape[1:3]
  i, j = jnp.arange(height)[:, None], jnp.arange(width)
  fixed = jnp.floor(maps * 65536 + 0.5).astype(jnp.int32)[..., None, None]
  columns, rows = (
    (fixed[:, axis, 0] * j + fixed[:, axis, 1] * i + fixed[:, axis, 2]) >> 16 for axis in (0, 1)
  )
  return _pixels(images, rows, columns, fill)


def fill_box(
  images: Bytes, start: Int[Array, "b 2"], stop: Int[Array, "b 2"], color: tuple[int, ...] = (0,)
) -> Bytes:
  """Paints rows start[:, 0] to stop[:, 0] - 1 and columns start[:, 1] to stop[:, 1] - 1; what is outside is not painted.

  color: a value for all channels, or one for each.
  """
  rows, columns = (jnp.arange(size) for size in images.shape[1:3])
  inside_rows = (rows >= start[:, :1]) & (rows < stop[:, :1])
  inside_columns = (columns >= start[:, 1:]) & (columns < stop[:, 1:])
  inside = inside_rows[:, :, None, None] & inside_columns[:, None, :, None]
  return jnp.where(inside, jnp.asarray(color, jnp.uint8), images)


def cutout_abs(images: Bytes, centers: Float[Array, "b 2"], sides: Float[Array, "b"]) -> Bytes:
  """Paints a box about (row, column) `centers` in (125, 123, 114), the mean of ImageNet; images of side < 0 stay.

  As the PyTorch RandAugment paints it with Pillow: from center - side/2, or 0 where that is outside, to `side` further
  on, both rounded down and both painted. So the box is a pixel longer than `side`, and one that begins outside keeps
  its length. One channel: painted in 123, the grey of that color.
  """
  first = jnp.maximum(centers - sides[:, None] / 2, 0).astype(jnp.int32)
  last = jnp.floor(first + sides[:, None]).astype(jnp.int32)
  stop = jnp.where(sides[:, None] < 0, 0, last + 1)
  return fill_box(images, first, stop, (125, 123, 114) if images.shape[-1] == 3 else (123,))


# ---- values and blends: of pixels [b h w c] int32 and values [b 1 1 1], int32 from 0 to 255 ----


def _autocontrast(pixels: jax.Array, values: jax.Array) -> jax.Array:
  low, high = (x[:, None, None] for x in _extremes(_histogram(pixels)))
  # Vector registers have no integer division. The half keeps a float quotient off the integers.
  stretched = (255 * (pixels - low) + 0.5) / jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched.astype(jnp.int32), pixels)


def _equalize(pixels: jax.Array, values: jax.Array) -> jax.Array:
  batch, height, width, channels = pixels.shape
  counts = _histogram(pixels)
  below = jnp.cumsum(counts, -1) - counts
  highest = _extremes(counts)[1][..., None]
  step = jnp.take_along_axis(below, highest, axis=-1) // 255  # the highest value that occurs does not count
  shares = jax.lax.div(step // 2 + below, jnp.broadcast_to(jnp.maximum(step, 1), below.shape))
  table = jnp.minimum(shares, 255)
  table = jnp.where(step > 0, table, jnp.arange(256)).swapaxes(1, 2)
  places = pixels.reshape(batch, height * width, channels)
  return jnp.take_along_axis(table, places, axis=1, mode="promise_in_bounds").reshape(pixels.shape)


def _histogram(pixels: jax.Array) -> jax.Array:
  """[b c 256] counts of each value in each channel."""
  batch, height, width, channels = pixels.shape

  def count(values):
    return jnp.zeros(256, jnp.int32).at[values].add(1, mode="promise_in_bounds")

  return jax.vmap(jax.vmap(count, in_axes=1))(pixels.reshape(batch, height * width, channels))


def _extremes(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Lowest and highest value that occurs in each channel, [b c]."""
  levels, occurs = jnp.arange(256), counts > 0
  return jnp.where(occurs, levels, 255).min(-1), jnp.where(occurs, levels, 0).max(-1)


def _posterize(pixels: jax.Array, values: jax.Array) -> jax.Array:
  return pixels & -(1 << (8 - values.astype(jnp.int32)))


def _solarize(pixels: jax.Array, values: jax.Array | int) -> jax.Array:
  return jnp.where(pixels < values, pixels, 255 - pixels)


def _solarize_add(pixels: jax.Array, values: jax.Array) -> jax.Array:
  return _solarize(jnp.clip(pixels + values.astype(jnp.int32), 0, 255), 128)


def _contrast(pixels: jax.Array, values: jax.Array) -> jax.Array:
  gray = _gray(pixels)
  count = gray[0].size
  mean = (2 * gray.sum((1, 2, 3), keepdims=True, dtype=jnp.int32) + count) // (2 * count)  # rounded
  return _blend(mean, pixels, values)


def _gray(pixels: jax.Array) -> jax.Array:
  """[b h w 1]: luma of ITU-R BT.601 in 16 bits, rounded; of one channel itself."""
  if pixels.shape[-1] == 1:
    return pixels
  weighted = pixels * jnp.array([19595, 38470, 7471], jnp.int32)
  return (weighted.sum(-1, keepdims=True, dtype=jnp.int32) + 0x8000) >> 16


def _smooth(pixels: jax.Array) -> jax.Array:
  """Mean of a pixel and its neighbours, itself five times as heavy, rounded; the outermost pixels stay."""
  height, width = pixels.shape[1:3]
  if height < 3 or width < 3:
    return pixels
  padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
  total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * pixels
  i, j = jnp.arange(height)[:, None], jnp.arange(width)
  inner = (i > 0) & (i < height - 1) & (j > 0) & (j < width - 1)
  return jnp.where(inner[..., None], (2 * total + 13) // 26, pixels)


def _blend(other: jax.Array | int, pixels: jax.Array, factors: jax.Array) -> jax.Array:
  """other + factor (pixels - other) with a product and a sum of float32, clipped and rounded down."""
  factors = factors.astype(jnp.float32)
  moved = factors * (pixels - other).astype(jnp.float32)
  # Bits in between keep the compiler from one rounding of both, which comes out one lower or higher here and there.
  bits = jax.lax.bitcast_convert_type(moved, jnp.int32) | jnp.isnan(factors).astype(jnp.int32)
  return jnp.clip(other + jax.lax.bitcast_convert_type(bits, jnp.float32), 0, 255).astype(jnp.int32)


_ON_PIXELS: dict[str, Callable] = {
  "autocontrast": _autocontrast,
  "equalize": _equalize,
  "invert": lambda pixels, values: 255 - pixels,
  "posterize": _posterize,
  "solarize": _solarize,
  "solarize_add": _solarize_add,
  "brightness": lambda pixels, values: _blend(0, pixels, values),
  "contrast": _contrast,
  "color": lambda pixels, values: _blend(_gray(pixels), pixels, values),
  "sharpness": lambda pixels, values: _blend(_smooth(pixels), pixels, values),
}


# ---- places ----


def _map(like: jax.Array, x_of_i, y_of_j, x=0.0, y=0.0) -> jax.Array:
  """x = j + x_of_i * i + 1/2 + x, y = i + y_of_j * j + 1/2 + y."""
  parts = (1.0, x_of_i, 0.5 + x, y_of_j, 1.0, 0.5 + y)
  columns = [jnp.broadcast_to(jnp.asarray(part, jnp.float32), like.shape) for part in parts]
  return jnp.stack(columns, -1).reshape(-1, 2, 3)


def _rotation(angles: jax.Array, height: int, width: int) -> jax.Array:
  radians = -jnp.deg2rad(angles)
  cos, sin = jnp.cos(radians), jnp.sin(radians)
  center_x, center_y = (width - 1) / 2, (height - 1) / 2
  x = center_x + 0.5 - cos * center_x - sin * center_y
  y = center_y + 0.5 + sin * center_x - cos * center_y
  return jnp.stack([cos, sin, x, -sin, cos, y], -1).reshape(-1, 2, 3)


# Of (values [b], height, width): the map of each operation.
_MAPS: dict[str, Callable] = {
  "rotate": _rotation,
  "shear_x": lambda v, h, w: _map(v, v, 0.0, x=v / 2),
  "shear_y": lambda v, h, w: _map(v, 0.0, v, y=v / 2),
  "shear_x_centered": lambda v, h, w: _map(v, v, 0.0, x=v * (1 - h) / 2),
  "shear_y_centered": lambda v, h, w: _map(v, 0.0, v, y=v * (1 - w) / 2),
  "translate_x": lambda v, h, w: _map(v, 0.0, 0.0, x=v),
  "translate_y": lambda v, h, w: _map(v, 0.0, 0.0, y=v),
}


def _shear_bicubic(images: jax.Array, amounts: jax.Array, vertical: bool, fill: int) -> jax.Array:
  """Row i is read at j + amount (i + 1/2), four pixels of it for each; vertical: columns instead of rows."""
  if vertical:
    return _shear_bicubic(images.swapaxes(1, 2), amounts, False, fill).swapaxes(1, 2)
  height, width = images.shape[1:3]
  shift = amounts[:, None, None] * (jnp.arange(height)[:, None] + 0.5)
  x = jnp.arange(width) + shift  # [b h w]; the centre of pixel j is at j
  left = jnp.floor(x).astype(jnp.int32)
  t = (x - left)[..., None]

  def tap(offset):
    columns = jnp.clip(left + offset, 0, width - 1)[..., None]
    return jnp.take_along_axis(images, columns, axis=2, mode="promise_in_bounds").astype(jnp.float32)

  a, b, c, d = (tap(offset) for offset in (-1, 0, 1, 2))
  value = b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (b - a - c + d)))
  inside = ((x >= -0.5) & (x < width - 0.5))[..., None]
  return jnp.where(inside, jnp.clip(value, 0, 255).astype(jnp.uint8), jnp.uint8(fill))


def _pixels(images: jax.Array, rows: jax.Array, columns: jax.Array, fill: int = 0) -> jax.Array:
  """images[b, rows, columns], `fill` where these are outside; rows and columns broadcast to [b h w]."""
  batch, height, width, channels = images.shape
  inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
  places = jnp.clip(rows, 0, height - 1) * width + jnp.clip(columns, 0, width - 1)
  flat = images.reshape(batch, height * width, channels)
  places = places.reshape(batch, height * width, 1)
  out = jnp.take_along_axis(flat, places, axis=1, mode="promise_in_bounds").reshape(images.shape)
  return jnp.where(inside[..., None], out, jnp.uint8(fill))


OPERATIONS = (*_ON_PIXELS, *_MAPS)


def _check(images: jax.Array, names: tuple[str, ...]) -> None:
  unknown = [name for name in names if name not in OPERATIONS]
  if unknown:
    raise InputError(f"no image operation {unknown[0]!r}; known: {', '.join(OPERATIONS)}")
  if images.shape[-1] not in (1, 3):
    raise InputError(f"images of 1 or 3 channels are augmented by these operations, found {images.shape[-1]}")
