"""AutoAttack: a fixed sequence of attacks without parameters, each on the images that the ones before did not break.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
arXiv:2003.01690. The one place among the mechanisms that jits: work is handed to the devices in chunks of fixed shapes, and
between the runs of an attack (a target class, a restart) the images that are left move together.
"""

import contextlib
import dataclasses
import hashlib
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_trustdiff.attacks import norms
from jax_trustdiff.attacks.apgd import APGD
from jax_trustdiff.attacks.fab import FAB
from jax_trustdiff.attacks.runs import NEVER, AttackOfRuns, fixed
from jax_trustdiff.attacks.square import Square
from jax_trustdiff.types import AnyLogitsFn, InputError, RandomizedLogitsFn, RunError

STANDARD = ("standard", "plus", "rand")
VERSIONS = (*STANDARD, "rapid")
ABOUT = "about"  # the entry of a journal that says whose it is
NOT_BROKEN, WRONG = -1, -2  # in `Result.broken_by`
VERDICT, REPEATS = 2**29, 5  # draws of a classifier that draws: of verdicts, and of the check whether it does
SQUARE_GAIN = 0.002  # of the accuracy: what Square alone may take without a warning
FLAT_SHARE = 0.1  # of the gradients of APGD: so many may be zero without a warning
ROUNDING = 1e-5  # of the largest logit: a margin may change by so much with the place of an image in a batch
SMALLEST_PIECE = 4  # chunks may be this much smaller than asked for, where few images are left

Fetch = Callable[[Any], Any]  # device arrays, perhaps of several processes -> numpy arrays


@runtime_checkable
class Journal(Protocol):
  """Where the result of every chunk is kept, so that an evaluation that was cut off goes on exactly where it was."""

  def get(self, name: str) -> dict[str, np.ndarray] | None:
    """What was put under this name, or None."""

  def put(self, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Keeps the arrays."""


class Advance(NamedTuple):
  """How far an evaluation is, for progress lines."""

  done: float  # of `total`; in evaluations of the classifier, for images that are left to the end
  total: float
  attack: str
  robust: int  # images not broken so far


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of n images.

  x_adv: float32 [n h w c], the image itself where nothing broke it. prediction: int [n], of x_adv.
  clean, robust: bool [n]; right on the image, and on x_adv too. after: {attack: bool [n]}, robust after each in turn.
  broken_by: int [n], the number of the attack; NOT_BROKEN, or WRONG for an image that was misclassified to begin with.
  when: int [n], evaluations of the classifier in the run that broke the image, NEVER for the others.
  flat: {attack: share of the gradients that were zero}. seconds are not measured here. warnings: what the checks found.
  standard: whether the numbers may be called AutoAttack.
  """

  x_adv: np.ndarray
  prediction: np.ndarray
  clean: np.ndarray
  robust: np.ndarray
  after: dict[str, np.ndarray]
  broken_by: np.ndarray
  when: np.ndarray
  flat: dict[str, float]
  warnings: tuple[str, ...]
  standard: bool

  @property
  def clean_accuracy(self) -> float:
    return float(self.clean.mean())

  @property
  def robust_accuracy(self) -> float:
    return float(self.robust.mean())


def attacks_of(version: str, norm: str, radius: norms.Scalar, num_classes: int) -> dict[str, AttackOfRuns]:
  """{name: attack} of a version, in its order.

  standard   apgd_ce, apgd_t, fab_t, square
  plus       apgd_ce and apgd_dlr with 5 restarts, fab with 5, square, apgd_t, fab_t
  rand       apgd_ce and apgd_dlr with gradients over 20 draws, for a classifier that draws
  rapid      apgd_ce, apgd_t: the first two of standard; no standard version

  In the 'l1' of standard and rapid APGD has large radii, apgd_ce five restarts and apgd_t five targets. With fewer than 4 classes the targeted DLR loss
  is not defined and cross-entropy takes its place, with fewer than 3 the margin takes that of DLR.
  """
  if version not in VERSIONS:
    raise InputError(f"unknown AutoAttack version {version!r}; known: {', '.join(VERSIONS)}")
  many = norm == "l1" and version in ("standard", "rapid")
  large = dict(large_radii=many)
  dlr = "dlr" if num_classes >= 3 else "margin_unclipped"
  towards = "dlr" if num_classes >= 4 else "ce"
  base = (norm, radius)
  targeted = {
    "apgd_t": APGD(*base, towards, num_targets=5 if many else 9, **large),
    "fab_t": FAB(*base, num_targets=9),
  }
  square = {"square": Square(*base)}
  if version == "rand":
    return {
      "apgd_ce": APGD(*base, "ce", num_draws=20, **large),
      "apgd_dlr": APGD(*base, dlr, num_draws=20, **large),
    }
  restarts = 5 if many or version == "plus" else 1
  first = {"apgd_ce": APGD(*base, "ce", restarts=restarts, **large)}
  if version == "plus":
    first |= {"apgd_dlr": APGD(*base, dlr, restarts=5, **large), "fab": FAB(*base, num_targets=0, restarts=5)}
    return first | square | targeted
  if version == "rapid":
    return first | {"apgd_t": targeted["apgd_t"]}
  return first | targeted | square


def choose(
  attacks: Mapping[str, AttackOfRuns], names: Sequence[str], num_steps: int = 0, num_queries: int = 0
) -> dict[str, AttackOfRuns]:
  """Those of `attacks` that are named, in this order, with other numbers of steps (APGD, FAB) and queries (Square); 0: their own."""
  if unknown := [name for name in names if name not in attacks] or ([] if names else ["nothing"]):
    raise InputError(f"no such attack: {', '.join(unknown)}; there are {', '.join(attacks)}")
  found = {}
  for name in names:
    steps = num_queries if isinstance(attacks[name], Square) else num_steps
    found[name] = dataclasses.replace(attacks[name], num_steps=steps) if steps else attacks[name]
  return found


class AutoAttack:
  """Called as `attack(logits_fn, x, y, key)`: the `Result` of images [n h w c] in [0, 1] with labels [n].

  norm, radius: the threat model, radius in [0, 1] pixel units. version: one of VERSIONS, or {name: attack} of the attacks to run.
  chunk_size: images that are computed at once on all devices together. mesh: with an axis 'data' over which the images of a
  chunk are shared out; None: one device. fetch: from device arrays to numpy; with several processes, for all of them.
  warn: is called with a line for everything that the checks find.

  The draws of an image follow from `key`, the name of the attack, the number of the run and the id of the image, so results do
  not depend on chunks, devices or order, but for rounding. A programme is compiled for each attack and size of chunk, with
  radius, labels and targets as arguments.
  """

  def __init__(
    self,
    norm: str = "linf",
    radius: float = 8 / 255,
    version: str | Mapping[str, AttackOfRuns] = "standard",
    *,
    chunk_size: int = 128,
    mesh: Mesh | None = None,
    fetch: Fetch = jax.device_get,
    warn: Callable[[str], None] = warnings.warn,
  ):
    norms.check_norm(norm)
    norms.check_range("attack radius", radius)
    if isinstance(version, str):
      attacks_of(version, norm, radius, 10)
    elif not version or any((a.norm, a.radius) != (norm, radius) for a in version.values()):
      raise InputError(
        f"a list of attacks must name at least one, and all must have the norm {norm!r} and the radius {radius}"
      )
    self.norm, self.radius, self.version = norm, radius, version
    self._mesh = mesh if mesh is not None else Mesh(np.array(jax.devices()[:1]), ("data",))
    devices = self._mesh.shape["data"]
    if chunk_size < 1:
      raise InputError(f"chunk_size must be at least 1, found {chunk_size}")
    self._chunk = -(-chunk_size // devices) * devices
    self._fetch, self._warn = fetch, warn
    self._predict, self._programs = self._mapped(_predict), {}

  def attacks(self, num_classes: int) -> dict[str, AttackOfRuns]:
    """{name: attack} in the order in which they are run."""
    if isinstance(self.version, str):
      return attacks_of(self.version, self.norm, self.radius, num_classes)
    return dict(self.version)

  def __call__(
    self,
    logits_fn: AnyLogitsFn,
    x: np.ndarray | jax.Array,
    y: np.ndarray | jax.Array,
    key: jax.Array,
    *,
    ids: np.ndarray | None = None,
    attack_fn: AnyLogitsFn | None = None,
    journal: Journal | None = None,
    progress: Callable[[Advance], None] | None = None,
  ) -> Result:
    """The result for these images; float32 for every verdict.

    logits_fn: decides, with the highest precision of products. attack_fn: is attacked in its place (the same classifier in
    bfloat16, say); an image is broken only where `logits_fn` misclassifies what was found, by more than rounding. ids: [n], of the images, for their
    draws; 0 .. n-1 if None. InputError for images or labels that do not fit, RunError where an invariant does not hold.
    """
    x, y = _checked(x, y)
    ids = np.arange(len(x)) if ids is None else np.asarray(ids)
    standard = attack_fn is None and self.version in STANDARD
    precision = "highest" if attack_fn is None else None
    verdict_fn = self._placed(logits_fn)
    attack_fn = verdict_fn if attack_fn is None else self._placed(attack_fn)
    evaluation = _Evaluation(self, verdict_fn, attack_fn, precision, x, y, ids, key, journal, progress)
    return dataclasses.replace(evaluation.run(), standard=standard)

  def pieces(self, count: int) -> list[int]:
    """Sizes of the chunks of `count` images: whole ones, and one or two smaller ones where the last would be mostly empty."""
    devices = self._mesh.shape["data"]
    sizes = [self._chunk]
    while sizes[-1] % (2 * devices) == 0 and sizes[-1] * SMALLEST_PIECE > self._chunk:
      sizes.append(sizes[-1] // 2)
    found = []
    while count > 0:
      fitting = [size for size in sizes if size <= count]
      found.append(fitting[0] if fitting else sizes[-1])
      count -= found[-1]
    return found

  def logits(self, logits_fn, x: np.ndarray, ids: np.ndarray, key: jax.Array, number: int = 0) -> np.ndarray:
    """Logits [n k] in float32 with the highest precision; `number` is that of a classifier's draws."""
    found = []
    for start in range(0, len(x), self._chunk):  # always whole chunks: one program, and so one rounding
      part = slice(start, start + self._chunk)
      batch = self.rows(self._chunk, x=x[part], id=ids[part].astype(np.int32))
      scalars = (key, jnp.array(VERDICT + number))
      found.append(self._fetch(self._predict(logits_fn, scalars, batch))[: len(x[part])])
    return np.concatenate(found)

  def execute(self, attack, precision, attack_fn, key, index, batch) -> dict[str, np.ndarray]:
    """What a run of `attack` found for the rows of `batch`: 'x_adv', 'when' and 'flat' of `Found`."""
    scalars = (key, jnp.array(index, jnp.int32), jnp.array(self.radius, jnp.float32))
    program = self._program(dataclasses.replace(attack, radius=0.0), precision)
    return self._fetch(program(attack_fn, scalars, batch))

  def rows(self, size: int, **columns: np.ndarray) -> dict[str, jax.Array]:
    """The columns of a batch on the devices, the last row again up to `size` rows."""
    sharding = NamedSharding(self._mesh, PartitionSpec("data"))
    found = {}
    for name, values in columns.items():
      full = np.concatenate([values, np.repeat(values[-1:], size - len(values), 0)])
      found[name] = jax.make_array_from_callback(full.shape, sharding, lambda i, full=full: full[i])
    return found

  def _placed(self, fn):
    """The classifier as a pytree, whose arrays are arguments of a programme, on all devices."""
    leaves = jax.tree.leaves(fn)
    fn = jax.tree_util.Partial(fn) if len(leaves) == 1 and leaves[0] is fn else fn
    return jax.device_put(fn, NamedSharding(self._mesh, PartitionSpec()))

  def _mapped(self, fn):
    """fn(classifier, scalars, batch), the rows of the batch shared out over the devices, each of which goes on for itself."""
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
      fn,
      mesh=self._mesh,
      in_specs=(whole, whole, rows),
      out_specs=rows,
      check_vma=False,
      axis_names={"data"},
    )
    return jax.jit(mapped)

  def _program(self, attack: AttackOfRuns, precision: str | None):
    """The compiled run of an attack, whatever its radius."""
    if (attack, precision) not in self._programs:

      def run(attack_fn, scalars, batch):
        key, index, radius = scalars
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, index), i))(batch["id"])
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
          found = dataclasses.replace(attack, radius=radius).run(
            attack_fn, batch["x"], batch["y"], keys, index
          )
        return found._asdict()

      self._programs[attack, precision] = self._mapped(run)
    return self._programs[attack, precision]


class _Evaluation:
  """One call of AutoAttack."""

  def __init__(self, owner: AutoAttack, verdict_fn, attack_fn, precision, x, y, ids, key, journal, progress):
    self.owner, self.verdict_fn, self.attack_fn, self.precision = owner, verdict_fn, attack_fn, precision
    self.x, self.y, self.ids, self.key = x, y, ids, key
    self.journal, self.progress = journal, progress
    self.warnings: list[str] = []
    self.x_adv = x.copy()
    self.broken_by = np.full(len(x), NOT_BROKEN, np.int32)
    self.when = np.full(len(x), NEVER, np.int32)

  def run(self) -> Result:
    logits = self._logits(self.x, self.ids)
    attacks = self.owner.attacks(logits.shape[1])
    self._check_classifier(logits, attacks)
    self._check_journal(logits, attacks)
    clean = logits.argmax(1) == self.y
    self.broken_by[~clean] = WRONG
    robust, after, flat = clean.copy(), {}, {}
    costs = np.cumsum([0] + [a.num_runs(logits.shape[1]) * a.cost(logits.shape[1]) for a in attacks.values()])
    for number, (name, attack) in enumerate(attacks.items()):
      runs = attack.num_runs(logits.shape[1])
      flat[name] = self._attack(number, name, attack, runs, robust, costs)
      after[name] = robust.copy()
    logits = self._logits(self.x_adv, self.ids)
    prediction = logits.argmax(1)
    self._check_result(robust, _margin(logits, self.y))
    self._check_gains(clean, after, flat)
    found = self.x_adv, prediction, clean, robust, after, self.broken_by, self.when, flat
    return Result(*found, tuple(self.warnings), standard=False)

  def _attack(
    self, number: int, name: str, attack, runs: int, robust: np.ndarray, costs: np.ndarray
  ) -> float:
    """Lowers the flags `robust` of what the attack breaks; the share of its gradients that were zero."""
    key = jax.random.fold_in(self.key, zlib.crc32(name.encode()))
    flat = gradients = 0
    for index in range(runs):
      left, start = np.flatnonzero(robust), 0
      for piece, size in enumerate(self.owner.pieces(len(left))):
        chunk = left[start : start + size]
        start += size
        found = self._chunk(f"{number:02d}-{name}-{index:03d}-{piece:05d}", attack, key, index, chunk, size)
        broken = chunk[found["broken"]]
        self.x_adv[broken], self.when[broken] = found["x_adv"], found["when"]
        self.broken_by[broken] = number
        robust[broken] = False
        flat, gradients = flat + int(found["flat"]), gradients + len(chunk) * attack.num_gradients
        if self.progress is not None:
          share = (index + min(1, start / len(left))) / runs
          done = costs[number] + share * (costs[number + 1] - costs[number])
          self.progress(Advance(float(done), float(costs[-1]), name, int(robust.sum())))
    return flat / gradients if gradients else 0.0

  def _chunk(self, name: str, attack, key, index: int, chunk: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Of these images: 'broken' bool [m], 'x_adv' and 'when' of those that are, 'flat' of all. Kept in the journal."""
    ids = self.ids[chunk]
    known = self.journal.get(name) if self.journal is not None else None
    if known is not None:
      return known
    batch = self.owner.rows(size, x=self.x[chunk], y=self.y[chunk], id=ids.astype(np.int32))
    run = self.owner.execute(attack, self.precision, self.attack_fn, key, index, batch)
    x_adv, when = (run[name][: len(chunk)] for name in ("x_adv", "when"))
    claimed = np.flatnonzero(when != NEVER)
    broken = np.zeros(len(chunk), bool)
    if len(claimed):
      self._check_points(name, self.x[chunk[claimed]], x_adv[claimed])
      logits = self._logits(x_adv[claimed], ids[claimed])
      broken[claimed] = _margin(logits, self.y[chunk[claimed]]) < -ROUNDING
    found = {"ids": ids, "broken": broken, "x_adv": x_adv[broken], "when": when[broken]}
    found["flat"] = run["flat"][: len(chunk)].sum()
    if self.journal is not None:
      self.journal.put(name, found)
    return found

  def _logits(self, x: np.ndarray, ids: np.ndarray, number: int = 0) -> np.ndarray:
    return self.owner.logits(self.verdict_fn, x, ids, self.key, number)

  # ---- checks ----

  def _note(self, line: str) -> None:
    self.warnings.append(line)
    self.owner._warn(line)

  def _check_journal(self, logits: np.ndarray, attacks: Mapping[str, AttackOfRuns]) -> None:
    """RunError if the journal is of another evaluation: of other images, attacks, draws, predictions or sizes of chunks."""
    if self.journal is None:
      return
    digest = hashlib.sha256(repr((attacks, self.precision, self.owner.pieces(10**4))).encode())
    key = jax.random.key_data(self.key)
    for array in (self.x, self.y, self.ids, np.asarray(key), logits.argmax(1)):
      digest.update(np.ascontiguousarray(array))
    about = {"sha256": np.frombuffer(digest.digest(), np.uint8)}
    known = self.journal.get(ABOUT)
    if known is None:
      self.journal.put(ABOUT, about)
    elif not np.array_equal(known["sha256"], about["sha256"]):
      raise RunError(
        "the journal belongs to another evaluation: of another classifier, other images, attacks or draws, or with other chunks "
        "(as on another number of devices)"
      )

  def _check_classifier(self, logits: np.ndarray, attacks: Mapping[str, AttackOfRuns]) -> None:
    """What makes the attacks' verdicts doubtful, and what makes them impossible."""
    num_classes = logits.shape[1]
    if not np.isfinite(logits).all():
      raise InputError("the classifier's logits are not finite")
    if num_classes < 2 or not 0 <= self.y.min() <= self.y.max() < num_classes:
      raise InputError(
        f"labels {self.y.min()} to {self.y.max()} for a classifier of {num_classes} classes, 0..{num_classes - 1}"
      )
    draws = isinstance(self.verdict_fn, RandomizedLogitsFn)
    if (draws or self._is_random()) and self.owner.version != "rand":
      self._note(
        "the classifier draws random numbers: gradients need version 'rand', and verdicts are of one draw"
      )
    if logits.max() < 1 + 1e-5 and logits.min() > -1e-5 and np.abs(logits.sum(1) - 1).max() < 1e-5:
      self._note(
        "the classifier seems to return probabilities: logits are expected, and losses of these saturate"
      )
    for name in ("apgd_dlr", "apgd_t"):
      if num_classes < 4 and name in attacks and attacks[name].loss != "dlr":
        self._note(
          f"with {num_classes} classes the DLR loss of {name} is not defined: {attacks[name].loss} takes its place"
        )

  def _is_random(self) -> bool:
    """Whether repeated forward passes of a few images differ, in one programme or between programmes."""
    count = min(len(self.x), self.owner.pieces(1)[0])
    x, ids = self.x[:count], self.ids[:count]
    first, *others = (self._logits(x, ids) for _ in range(REPEATS - 1))
    if not isinstance(self.verdict_fn, RandomizedLogitsFn):
      with jax.default_matmul_precision("highest"):
        others.append(self.owner._fetch(jax.jit(lambda fn, x: fn(x))(self.verdict_fn, x)))
    scale = np.linalg.norm(first, axis=1).max() + 1e-12
    return any(np.linalg.norm(first - other, axis=1).max() / scale > 1e-4 for other in others)

  def _check_points(self, name: str, x: np.ndarray, x_adv: np.ndarray) -> None:
    """RunError unless what an attack found is in the cube and in the ball, but for rounding."""
    delta = (x_adv.astype(np.float64) - x).reshape(len(x), -1)
    size = delta.shape[1]
    order, rounding = {"linf": (np.inf, 1e-6), "l2": (2, 6e-8 * size**0.5), "l1": (1, 6e-8 * size)}[
      self.owner.norm
    ]
    slack = rounding + (0 if self.owner.norm == "linf" else 1e-5 * self.owner.radius)
    length = np.linalg.norm(delta, order, axis=1).max()
    if not (np.isfinite(x_adv).all() and 0 <= x_adv.min() and x_adv.max() <= 1):
      raise RunError(f"{name} left [0, 1]: {x_adv.min()} to {x_adv.max()}")
    if length > self.owner.radius + slack:
      raise RunError(f"{name} left the ball: {self.owner.norm} {length} with radius {self.owner.radius}")

  def _check_result(self, robust: np.ndarray, margin: np.ndarray) -> None:
    """RunError unless margins on the final images say, but for rounding, what the flags say."""
    wrong = np.flatnonzero(np.where(robust, margin < -10 * ROUNDING, margin > 10 * ROUNDING))
    if len(wrong):
      raise RunError(
        f"{len(wrong)} images are classified otherwise when they are looked at again (id {self.ids[wrong[0]]} is the first): "
        "the classifier is random, or its predictions depend on the other images of a batch"
      )
    if close := int((np.abs(margin) <= ROUNDING).sum()):
      self._note(f"{close} images lie on the boundary between two classes to within rounding")

  def _check_gains(self, clean: np.ndarray, after: dict[str, np.ndarray], flat: dict[str, float]) -> None:
    """Signs that gradients lead astray."""
    before = clean.mean()
    for name, flags in after.items():
      if name == "square" and len(after) > 1 and before - flags.mean() > SQUARE_GAIN:
        self._note(
          f"square, which uses no gradient, lowered the accuracy by {before - flags.mean():.2%}: gradients may be masked"
        )
      before = flags.mean()
    for name, share in flat.items():
      if share > FLAT_SHARE:
        self._note(f"{share:.0%} of the gradients of {name} were zero: gradients may be masked")


def _margin(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
  """z_y - max_{j != y} z_j over the largest logit of each image: below 0 where it is misclassified."""
  rows = np.arange(len(y))
  others = logits.copy()
  others[rows, y] = -np.inf
  return (logits[rows, y] - others.max(1)) / (np.abs(logits).max(1) + 1e-12)


def _predict(logits_fn, scalars, batch):
  key, number = scalars
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["id"])
  with jax.default_matmul_precision("highest"):
    logits = fixed(logits_fn, keys, number)(batch["x"])
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _checked(x: np.ndarray | jax.Array, y: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """float32 images and int32 labels."""
  x, y = np.asarray(x), np.asarray(y)
  if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating) or not len(x):
    raise InputError(f"images are {x.dtype} {list(x.shape)}; expected floats [n h w c] in [0, 1]")
  if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
    raise InputError(f"labels are {y.dtype} {list(y.shape)}; expected integers [{len(x)}]")
  if not (np.isfinite(x).all() and 0 <= x.min() and x.max() <= 1):
    raise InputError(f"images lie in [{x.min()}, {x.max()}]; expected finite values in [0, 1]")
  return x.astype(np.float32), y.astype(np.int32)
