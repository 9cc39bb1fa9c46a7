"""Square Attack: random search by windows of constant sign, with no gradient (Andriushchenko et al. 2020, arXiv:1912.00049).

Algorithms 1 to 3 of the paper; in L1 as the L2 attack, with sums of absolute values for norms (Croce and Hein 2021,
arXiv:2103.01208, section 4).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.losses import margin_unclipped
from jax_trustdiff.attacks.runs import NEVER, AttackOfRuns, Found, fixed, per_image
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import AnyLogitsFn, Image, InputError, KeyOrKeys, Labels, LogitsFn, Unit

TINY = 1e-12
TILES = 5  # of the start in L2 and L1, along the shorter side
# after so many steps of 10,000 the part of the image in a window is divided by the second number (section 5)
SHRINKS = (
  (10, 2),
  (50, 4),
  (200, 8),
  (500, 16),
  (1000, 32),
  (2000, 64),
  (4000, 128),
  (6000, 256),
  (8000, 512),
)
STARTING = 2**20  # number of the draws of the start; those of steps count from 0


class Draws(NamedTuple):
  """The random numbers of a step; b may be 1, for all images of a batch the same."""

  corners: jax.Array  # [b 2 2] uniform in [0, 1): row and column of both windows ('linf' has one)
  turned: jax.Array  # bool [b] the pattern is transposed (not in 'linf')
  signs: jax.Array  # [b c] -1 or 1


@runtime_checkable
class DrawFn(Protocol):
  def __call__(self, number: Int[Array, ""], active: Bool[Array, "b"]) -> Draws:
    """The draws of this number. active: images that are still searched, the others need none.

    It is also asked for those after the last step, which are not used.
    """

  def stripes(self) -> Float[Array, "b w c"]:
    """Signs of the columns at the start in 'linf'."""


class Search(NamedTuple):
  """Where the search stands, [b ...]."""

  x: jax.Array  # the best image so far
  loss: jax.Array  # the margin of the label, to be lowered: that of the last image that lowered it
  margin: jax.Array  # that of `x`; not positive where it is misclassified
  queries: jax.Array  # int, evaluations of the classifier


@dataclasses.dataclass(frozen=True)
class Square(AttackOfRuns):
  """The Square Attack with the margin loss; an image is left alone as soon as it is misclassified.

  num_steps: queries after that of the start. first_part: the part of the image in a window at first. rescale: the part
  falls with the share of num_steps that are done, else with their number as for 10,000. restarts: runs from other draws.
  """

  num_steps: int = 5000
  first_part: float = 0.8
  restarts: int = 1
  rescale: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, low in (("num_steps", 1), ("restarts", 1)):
      norms.check_range(f"attack {name}", getattr(self, name), low)
    norms.check_range("attack first_part", self.first_part, 0, 1)
    if self.num_steps >= STARTING:
      raise InputError(f"attack num_steps must be below {STARTING}, found {self.num_steps}")

  def num_runs(self, num_classes: int) -> int:
    del num_classes
    return self.restarts

  @property
  def num_gradients(self) -> int:
    return 0

  def cost(self, num_classes: int) -> int:
    del num_classes
    return self.num_steps

  def run(self, logits_fn: AnyLogitsFn, x: Unit, y: Labels, key: KeyOrKeys, index) -> Found:
    del index  # in the key
    x = norms.full_precision(x)
    found = self.search(fixed(logits_fn, key, 0), x, y, KeyedDraws(key, x.shape, x.dtype))
    broken = found.margin <= 0
    return Found(found.x, jnp.where(broken, found.queries, NEVER), jnp.zeros_like(found.queries))

  def search(self, logits_fn: LogitsFn, x: Unit, y: Labels, draw: DrawFn) -> Search:
    """The search with the numbers that `draw` gives."""
    x = norms.full_precision(x)
    start = self._start(x, draw)
    margin = -margin_unclipped(logits_fn(start), y)
    begin = Search(start, margin, margin, jnp.ones(x.shape[0], jnp.int32))
    sizes = jnp.asarray(self.window_sizes(*x.shape[1:3]))
    propose = self._propose_linf if self.norm == "linf" else self._propose_with_patterns(x.shape[1:3])

    def proposal(number, search):
      return propose(x, search.x, draw(number, search.margin > 0), number, sizes[number])

    def step(state):  # the proposal is part of the state, so that XLA:CPU computes it once and apart
      number, search, proposed = state
      margin = -margin_unclipped(logits_fn(proposed), y)
      active, better = search.margin > 0, margin < search.loss
      taken = active & (better | (margin <= 0))
      search = Search(
        x=jnp.where(per_image(taken), proposed, search.x),
        loss=jnp.where(active & better, margin, search.loss),
        margin=jnp.where(taken, margin, search.margin),
        queries=search.queries + active,
      )
      return number + 1, search, proposal(number + 1, search)

    def going(state):
      number, search, _ = state
      return (number < self.num_steps) & (search.margin > 0).any()

    first = jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(going, step, (first, begin, proposal(first, begin)))[1]

  def window_sizes(self, height: int, width: int) -> np.ndarray:
    """int32 [num_steps]: the side of the window at every step; odd where the pattern needs a middle."""
    least = 1 if self.norm == "linf" else 3
    largest = min(height, width)
    sizes = []
    for number in range(self.num_steps):
      at = int(number / self.num_steps * 10_000) if self.rescale else number
      divisor = max((by for after, by in SHRINKS if at > after), default=1)
      size = max(round(math.sqrt(self.first_part / divisor * height * width)), least)
      if self.norm != "linf" and size % 2 == 0:
        size += 1
      sizes.append(min(size, largest if self.norm == "linf" else largest - (largest % 2 == 0)))
    return np.array(sizes, np.int32)

  # ---- starts and proposals ----

  def _start(self, x: Unit, draw: DrawFn) -> Unit:
    """'linf': stripes along the columns. Otherwise a grid of patterns, of the length of the radius."""
    if self.norm == "linf":
      return jnp.clip(x + self.radius * draw.stripes()[:, None], 0, 1)
    height, width = x.shape[1:3]
    size = min(height, width) // TILES
    if size < 1:
      raise InputError(f"the square attack in {self.norm} needs images of at least {TILES} x {TILES} pixels")
    pattern = jnp.asarray(eta(size, 2 if self.norm == "l2" else 4), x.dtype)
    delta, number = jnp.zeros_like(x), STARTING
    for top in range((height - size * TILES) // 2 if height <= width else 0, height - size + 1, size):
      for left in range((width - size * TILES) // 2 if width <= height else 0, width - size + 1, size):
        drawn = draw(jnp.array(number), jnp.ones(x.shape[0], bool))
        tile = jnp.where(drawn.turned[:, None, None], pattern.T, pattern)
        tile = tile[..., None] * drawn.signs[:, None, None]
        delta = delta.at[:, top : top + size, left : left + size].add(tile)
        number += 1
    return self._scaled(x, delta)

  def _scaled(self, x: Unit, delta: Image) -> Unit:
    if self.norm == "l1":
      return norms.project(x + delta, x, self.radius * (1 - 1e-6), "l1")
    return jnp.clip(x + self.radius * delta / per_image(norms.lengths(delta, "l2") + TINY), 0, 1)

  def _propose_linf(self, x, best, drawn: Draws, number, size) -> Unit:
    del number
    inside = _window(_corner(drawn.corners[:, 0], x.shape[1:3], size), x.shape[1:3], size)
    moved = best + 2 * self.radius * drawn.signs[:, None, None] * inside
    return norms.project(moved, x, self.radius, "linf")

  def _propose_with_patterns(self, extent: tuple[int, int]) -> Callable[..., Unit]:
    """The step in 'l2' and 'l1': what is in two windows goes to the first of them, in the form of the pattern."""
    sizes = self.window_sizes(*extent)
    known, phases = np.unique(sizes, return_inverse=True)
    table = np.zeros((len(known), known.max(), known.max()))
    for row, size in zip(table, known, strict=True):
      row[:size, :size] = eta(int(size), 2 if self.norm == "l2" else 4)

    def propose(x, best, drawn: Draws, number, size) -> Unit:
      first, second = (_corner(drawn.corners[:, i], extent, size) for i in (0, 1))
      pattern = jnp.asarray(table, x.dtype)[jnp.asarray(phases)[number]]
      shape = _placed(pattern, first, drawn.turned, extent)
      target, source = (_window(corner, extent, size) for corner in (first, second))
      return self._moved(x, best - x, shape * drawn.signs[:, None, None], target, source)

    return propose

  def _moved(self, x, delta, shape, target, source) -> Unit:
    length = _l2 if self.norm == "l2" else _l1  # of every channel [b 1 1 c]
    channels = x.shape[-1]
    inside = delta * target
    new = shape + inside / (TINY + length(inside))
    whole = norms.lengths(delta, self.norm)[:, None, None, None]
    moving = length(delta * jnp.maximum(target, source))
    if self.norm == "l2":
      budget = jnp.sqrt(jnp.maximum(self.radius**2 - whole**2, 0) / channels + moving**2)
    else:
      budget = jnp.maximum(self.radius - whole, 0) / channels + moving
    new = new * target
    new = new / (TINY + length(new)) * budget * (1 if self.norm == "l2" else channels)
    return self._scaled(x, jnp.where(target > 0, new, delta * (1 - source)))


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class KeyedDraws:
  """A `DrawFn`: of one key for the batch or one for each image, which makes a search independent of the batch."""

  key: Any
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  dtype: Any = dataclasses.field(metadata={"static": True})

  def __call__(self, number: Int[Array, ""], active: Bool[Array, "b"]) -> Draws:
    del active
    batch, channels = self.shape[0], self.shape[-1]
    drawn = self._uniform(number, (5 + channels,))
    return Draws(drawn[:, :4].reshape(batch, 2, 2), drawn[:, 4] > 0.5, _sign(drawn[:, 5:]))

  def stripes(self) -> Float[Array, "b w c"]:
    return _sign(self._uniform(jnp.array(STARTING), self.shape[2:]))

  def _uniform(self, number, shape: tuple[int, ...]) -> jax.Array:
    """[b *shape]"""
    keys = norms.fold_in(self.key, number)
    if keys.ndim:
      return jax.vmap(lambda key: jax.random.uniform(key, shape, self.dtype))(keys)
    return jax.random.uniform(keys, (self.shape[0], *shape), self.dtype)


def eta(size: int, power: int) -> np.ndarray:
  """The pattern of a window, float64 [size size] of unit L2 (power 2) or L1 (power 4) length: a hill above a hollow (section 3.4)."""
  top = size // 2
  pattern = np.concatenate([_hill(top, size, power), -_hill(size - top, size, power)])
  return pattern / (np.sqrt((pattern**2).sum()) if power == 2 else np.abs(pattern).sum())


def _hill(height: int, width: int, power: int) -> np.ndarray:
  """Eq. 2: the sum of rectangles that grow around the middle, the k-th of weight 1 / (k + 1)^power."""
  found = np.zeros((height, width))
  row, column = height // 2, width // 2
  for k in range(max(height // 2 + 1, width // 2 + 1)):
    found[max(row, 0) : row + 2 * k + 1, max(column, 0) : column + 2 * k + 1] += 1 / (k + 1) ** power
    row, column = row - 1, column - 1
  return found / (np.sqrt((found**2).sum()) if power == 2 else np.abs(found).sum()) if found.any() else found


def _corner(drawn: Float[Array, "b 2"], extent: tuple[int, int], size) -> Int[Array, "b 2"]:
  """Row and column of a window, floor(u (side - size))."""
  return jnp.floor(drawn * (jnp.array(extent) - size)).astype(jnp.int32)


def _window(corner: Int[Array, "b 2"], extent: tuple[int, int], size) -> Float[Array, "b h w 1"]:
  """1 in the window, 0 outside."""
  inside = [
    (jnp.arange(side) >= corner[:, i, None]) & (jnp.arange(side) < corner[:, i, None] + size)
    for i, side in enumerate(extent)
  ]
  return (inside[0][:, :, None] & inside[1][:, None, :])[..., None].astype(jnp.float32)


def _placed(pattern: Float[Array, "s s"], corner, turned, extent: tuple[int, int]) -> Float[Array, "b h w 1"]:
  """The pattern, transposed where `turned`, with its corner at `corner`; what is beyond its size is of no use."""
  rows, columns = (
    jnp.clip(jnp.arange(side) - corner[:, i, None], 0, len(pattern) - 1) for i, side in enumerate(extent)
  )
  upright = pattern[rows[:, :, None], columns[:, None, :]]
  return jnp.where(turned[:, None, None], pattern.T[rows[:, :, None], columns[:, None, :]], upright)[
    ..., None
  ]


def _sign(uniform: jax.Array) -> jax.Array:
  return jnp.where(uniform < 0.5, -1, 1).astype(uniform.dtype)


def _l2(delta: Image) -> Float[Array, "b 1 1 c"]:
  return jnp.sqrt(jnp.square(delta).sum((1, 2), keepdims=True))


def _l1(delta: Image) -> Float[Array, "b 1 1 c"]:
  return jnp.abs(delta).sum((1, 2), keepdims=True)
