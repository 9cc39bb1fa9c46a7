"""Intervals for what is measured: an accuracy on n images, a mean over a few seeds."""

import math
from collections.abc import Sequence

import numpy as np
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
