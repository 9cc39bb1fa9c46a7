"""Intervals for what is measured: an accuracy on n images, a mean over a few seeds, or over both; a difference of two sets of n."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from jax_trustdiff.types import InputError


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
  """(low, high) in [0, 1]: the exact interval for a success rate of which `successes` of `n` were seen.

  The ends are quantiles of beta distributions (Clopper and Pearson 1934), with a = 1 - confidence:

      low = B(a / 2; k, n - k + 1), high = B(1 - a / 2; k + 1, n - k)

  low is 0 for k = 0, high is 1 for k = n. The rate lies inside with probability `confidence` or more.
  It speaks of the choice of the n images alone, not of training again.
  """
  if n < 1 or not 0 <= successes <= n:
    raise InputError(f"an interval needs n >= 1 and successes from 0 to n, found {successes} of {n}")
  if not 0 < confidence < 1:
    raise InputError(f"confidence is {confidence}; it must lie between 0 and 1, 0.95 for 95 %")
  tail = (1 - confidence) / 2
  failures = n - successes
  low = special.betaincinv(successes, failures + 1, tail) if successes else 0.0
  high = special.betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
  return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
  """(mean, half width): the 95 % interval mean +- half width for the mean of normal values (Student 1908).

  half width = t(0.975; n - 1) * s / sqrt(n), with s the sample standard deviation (divided by n - 1).
  InputError, a ValueError, for fewer than two values: one value says nothing about its spread.
  """
  n = len(values)
  if n < 2:
    raise InputError(f"an interval of a mean needs at least 2 values, found {n}")
  spread = np.std(values, ddof=1)
  return float(np.mean(values)), float(special.stdtrit(n - 1, 0.975) * spread / math.sqrt(n))


def share_interval(shares: Float[np.ndarray, "n"]) -> tuple[float, float]:
  """(low, high): a 95 % interval for the mean of what lies in [0, 1], such as the part of the bits of each image that is read right.

  The normal one of `crossed_interval`, cut to [0, 1]. Where all are 1, or all 0, it would have no width: then that of Clopper and Pearson for
  the part of the images of which it is not so, the worst that they could be.
  """
  if np.all(shares == 1) or np.all(shares == 0):
    return binomial_interval(int(shares.sum()), len(shares))
  mean, half = crossed_interval(np.asarray(shares, np.float64)[None])
  return max(mean - half, 0.0), min(mean + half, 1.0)


def crossed_interval(values: Float[np.ndarray, "seeds images"]) -> tuple[float, float]:
  """(mean, half width): a 95 % interval for the mean over all seeds and all images, of which these are a sample.

  Every seed saw the same images. The two sources of chance are added in quadrature,

      half width^2 = t(0.975; s - 1)^2 Var_seeds / s + 1.96^2 Var_images / n

  with Var_seeds the variance of the means of the s seeds, and Var_images that of the means of the n images; what is
  peculiar to one image under one seed counts in both, so the interval is a little wide. With differences of two verdicts on
  each image it is a paired comparison. One seed: the second term alone, which says nothing about training again. The
  normal approximation: the width is zero where all values are equal, and too small near 0 and 1 with few images.
  InputError, a ValueError, for fewer than two images.
  """
  seeds, images = values.shape
  if images < 2:
    raise InputError(f"an interval over images needs at least 2, found {images}")
  square = (special.ndtri(0.975) * np.std(values.mean(axis=0), ddof=1)) ** 2 / images
  if seeds > 1:
    square += mean_interval(values.mean(axis=1).tolist())[1] ** 2
  return float(values.mean()), float(math.sqrt(square))


@dataclasses.dataclass(frozen=True)
class Difference:
  """Of a statistic of two sets: first less second, a 95 % interval, and the p-value of there being no difference."""

  value: float
  low: float
  high: float
  p: float


def paired_difference(
  statistic: Callable[[Int[np.ndarray, "n"]], float],
  n: int,
  num_resamples: int,
  seed: int,
  update: Callable[[int], None] = lambda done: None,
) -> Difference:
  """How far a statistic of n values is from that of n others, of which each is the partner of one of the first.

  statistic(rows): of those values; row i + n is the partner of row i < n. The interval is the percentile one of num_resamples bootstraps of
  the pairs (Efron 1979). p, two-sided, compares with as many sets in which the partners of some pairs, drawn by coins, have changed places
  (Pitman 1937): where a pair is as likely as the same pair turned round, p <= a with probability a at most, whatever the statistic and n. It is
  never below 2 / (num_resamples + 1). update(done) is told of 2 num_resamples. InputError for fewer than 2 pairs or 20 resamples.
  """
  from scipy import stats

  if n < 2 or num_resamples < 20:
    raise InputError(f"at least 2 pairs and 20 resamples are needed, found {n} and {num_resamples}")
  done = 0

  def difference(first, second):
    nonlocal done
    done += 1
    update(min(done, 2 * num_resamples))  # each of the two also sees the pairs as they are
    return statistic(first) - statistic(second)

  pairs = np.arange(n), np.arange(n, 2 * n)
  how = {"n_resamples": num_resamples, "vectorized": False, "rng": np.random.default_rng(seed)}
  turned = stats.permutation_test(pairs, difference, permutation_type="samples", batch=1, **how)
  drawn = stats.bootstrap(pairs, difference, paired=True, method="percentile", batch=1, **how)
  return Difference(
    float(turned.statistic), *map(float, drawn.confidence_interval), p=float(turned.pvalue)
  )
