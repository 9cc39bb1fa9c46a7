"""Averages of the parameters over training: half-life with ramp-up, power functions, and any length after the fact.

    decay = functools.partial(half_life_decay, batch_size=512)          # for state.make_train_step
    averages = power_update(averages, params, t, POST_HOC_STDS)         # in the step, one average for each std
    params = reconstruct(snapshots, times, stds, target_std=0.08)       # afterwards, from stored averages

Steps t = 1, 2, ... are those after which an average is taken. A power-function average has weights proportional to the
g-th power of time (Karras et al. 2024, arXiv:2312.02696, section 3); its `std` is their standard deviation over t, so
that 0.05 and 0.10 mean the same share of training whatever its length.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_trustdiff.types import InputError, PyTree

POST_HOC_STDS = (0.05, 0.10)  # those that Karras et al. 2024 store
MAX_STD = 12**-0.5  # of the plain mean, exponent 0


def half_life_decay(
  t: jax.typing.ArrayLike, batch_size: int, half_life: float = 500_000, rampup_ratio: float | None = 0.05
) -> Float[Array, ""]:
  """Decay of the parameter average at step t = 1, 2, ... of a half-life in images; 0 is a plain copy.

  0.5^(batch_size / h) with h = min(half_life, rampup_ratio * images before this step), so that young averages forget
  their start (Karras et al. 2022, arXiv:2206.00364, appendix F.3). rampup_ratio None: h = half_life at once, as when
  training goes on from a trained model.
  """
  if half_life <= 0 or (rampup_ratio is not None and rampup_ratio <= 0):
    raise InputError(f"EMA half_life and rampup_ratio must be positive, got {half_life} and {rampup_ratio}")
  length = jnp.asarray(half_life, float)
  if rampup_ratio is not None:
    seen = (jnp.asarray(t, float) - 1) * batch_size
    length = jnp.minimum(length, rampup_ratio * seen)
  return jnp.exp2(-batch_size / jnp.maximum(length, 1e-8))


def power_decay(t: jax.typing.ArrayLike, std: float) -> Float[Array, ""]:
  """Decay at step t = 1, 2, ... of the power-function average: (1 - 1/t)^(g + 1), g = `exponent_of_std(std)`.

  Karras et al. 2024, eq. 2. After step t the parameters of step i have the weight (i^(g+1) - (i-1)^(g+1)) / t^(g+1):
  those of the start are forgotten at once.
  """
  t = jnp.asarray(t, float)
  return jnp.exp((exponent_of_std(std) + 1) * jnp.log1p(-1 / t))


def power_update(
  averages: Sequence[PyTree],
  params: PyTree,
  t: jax.typing.ArrayLike,
  stds: Sequence[float] = POST_HOC_STDS,
) -> tuple[PyTree, ...]:
  """The power-function averages after step t = 1, 2, ..., one for each of `stds`; at step 1 copies of `params`."""
  if len(averages) != len(stds):
    raise InputError(f"one average for each std is needed, got {len(averages)} averages and {len(stds)} stds")

  def moved(average, std):
    rest = -jnp.expm1((exponent_of_std(std) + 1) * jnp.log1p(-1 / jnp.asarray(t, float)))  # 1 - decay
    return jax.tree.map(lambda e, p: (e + rest * (p - e)).astype(e.dtype), average, params)

  return tuple(moved(average, std) for average, std in zip(averages, stds, strict=True))


def exponent_of_std(std: float) -> float:
  """The exponent g of a power-function average with this relative standard deviation, 0 < std <= 12^(-1/2).

  The largest root of g^3 + 7 g^2 + (16 - std^-2) g + 12 - std^-2 = 0 (Karras et al. 2024, appendix C).
  """
  if not 0 < std <= MAX_STD * (1 + 1e-9):
    raise InputError(f"EMA std must lie between 0 and {MAX_STD:.4f}, got {std}")
  roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
  return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6].max()))


def std_of_exponent(exponent: float) -> float:
  """Relative standard deviation of the weights of the power-function average: sqrt((g+1) / (g+3)) / (g+2)."""
  return float(np.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2))


def reconstruct(
  snapshots: Iterable[PyTree],
  times: Sequence[float] | np.ndarray,
  stds: Sequence[float] | np.ndarray,
  target_std: float,
  target_time: float | None = None,
) -> PyTree:
  """The parameters' average with `target_std` at `target_time`, from stored power-function averages.

  snapshots: average i is of relative standard deviation stds[i], stored after step (or image) times[i]; read one after
  the other, so they may come from files. target_time: by default the last of `times`; one between them is met roughly.
  Summed in float64 on the host;
  leaves are numpy arrays of the snapshots' types. See `posthoc_weights` for what is solved and its errors.
  """
  weights = posthoc_weights(times, stds, target_std, target_time)
  total, like = None, None
  for weight, snapshot in zip(weights, snapshots, strict=True):
    scaled = jax.tree.map(lambda x, weight=weight: weight * np.asarray(x, np.float64), snapshot)
    total = scaled if total is None else jax.tree.map(np.add, total, scaled)
    like = snapshot
  return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), total, like)


def posthoc_weights(
  times: Sequence[float] | np.ndarray,
  stds: Sequence[float] | np.ndarray,
  target_std: float,
  target_time: float | None = None,
) -> np.ndarray:
  """The factor of each snapshot, float64 [n], sum 1, whose weighted profiles come nearest to the target's in L2.

  Karras et al. 2024, section 3.2: profiles p_i(s) = (g_i + 1) s^g_i / t_i^(g_i + 1) on [0, t_i]; the normal equations
  sum_j <p_i, p_j> x_j = <p_i, p>, then x over its sum. InputError if no snapshot, two the same, a time that is not
  positive, or a target later than the last snapshot.
  """
  times = np.asarray(times, np.float64)
  if len(times) == 0 or len(times) != len(stds):
    raise InputError(
      f"post-hoc EMA needs a time and a std for each snapshot, got {len(times)} and {len(stds)}"
    )
  target_time = float(times.max()) if target_time is None else float(target_time)
  if times.min() <= 0 or not 0 < target_time <= times.max():
    raise InputError(
      f"post-hoc EMA needs times above 0 and a target within them, got {times.min()} .. {times.max()} and {target_time}"
    )
  if len(set(zip(times, stds, strict=True))) < len(times):
    raise InputError("post-hoc EMA: two snapshots have the same time and std")
  exponents = np.array([exponent_of_std(std) for std in stds])
  target = np.array([exponent_of_std(target_std)])
  products = _correlation(times, exponents, times, exponents)
  wanted = _correlation(times, exponents, np.array([target_time]), target)[:, 0]
  # In units of each profile's norm, without which late and early ones differ by orders of magnitude.
  norm = np.sqrt(np.diag(products))
  found = np.linalg.lstsq(products / np.outer(norm, norm), wanted / norm, rcond=1e-14)[0] / norm
  return found / found.sum()


def _correlation(times_a, exponents_a, times_b, exponents_b) -> np.ndarray:
  """<p_a, p_b> of every pair of power-function profiles: [a b]."""
  t_a, g_a = times_a[:, None], exponents_a[:, None]
  t_b, g_b = times_b[None], exponents_b[None]
  ratio = np.minimum(t_a / t_b, t_b / t_a) ** np.where(t_a < t_b, g_b, g_a)
  return (g_a + 1) * (g_b + 1) * ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
