"""Statistics of a set of images as files: .npz with `mu` and `sigma`, the form of the files published with EDM.

Our own files hold more beside them, which other programs ignore: `features` [n d] for KID, precision and recall,
`num_images`, and `network`, the name of what computed the features.
"""

import dataclasses
import io
import os
import pathlib
import zlib

import numpy as np
from jaxtyping import Float

from jax_trustdiff.interop.pickle_data import BROKEN, one_line
from jax_trustdiff.interop.safetensors_io import write_atomically
from jax_trustdiff.types import InputError

SYMMETRY = 1e-6  # largest asymmetry of sigma, relative to its largest entry
NAMES = ("mu", "sigma", "features", "num_images", "network")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
  """Mean and covariance (divided by n - 1) of the features of a set of images, and what else is known of it."""

  mu: Float[np.ndarray, "d"]
  sigma: Float[np.ndarray, "d d"]
  features: Float[np.ndarray, "n d"] | None = None
  num_images: int | None = None
  network: str = ""  # '': unknown


def load_statistics(path: str | os.PathLike) -> FeatureStatistics:
  """The statistics in a file with `mu` [d] and `sigma` [d d], which become float64, and perhaps features.

  Raises InputError in one line when the file is missing, truncated or of another kind, when an array is missing or has
  another shape, is not finite, or sigma is no covariance (not symmetric, or with a negative diagonal).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(
      f"{path}: no such file; expected the reference statistics of FID (.npz with mu and sigma)"
    )
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in NAMES if name in getattr(file, "files", ())}
  except (*BROKEN, OSError, zlib.error) as error:
    raise InputError(f"{path}: not an .npz file of arrays, or truncated ({one_line(str(error))})") from None
  if missing := {"mu", "sigma"} - arrays.keys():
    raise InputError(f"{path}: not the statistics of FID: there is no {' and no '.join(sorted(missing))}")
  _check_moments(path, arrays["mu"], arrays["sigma"])
  return FeatureStatistics(
    mu=arrays["mu"].astype(np.float64),
    sigma=arrays["sigma"].astype(np.float64),
    **_further(path, arrays),
  )


def save_statistics(path: str | os.PathLike, statistics: FeatureStatistics) -> None:
  """Writes the statistics to a .npz file, `mu` and `sigma` in float64; it appears whole or not at all.

  Raises InputError for what `load_statistics` would not read.
  """
  path = pathlib.Path(path)
  if path.suffix != ".npz":
    raise InputError(f"{path}: the file must end in .npz")
  arrays = {name: value for name, value in vars(statistics).items() if value is not None}
  arrays |= {name: np.asarray(arrays[name], np.float64) for name in ("mu", "sigma")}
  arrays = {name: np.asarray(value) for name, value in arrays.items()}
  _check_moments(path, arrays["mu"], arrays["sigma"])
  _further(path, arrays)
  data = io.BytesIO()
  np.savez(data, **arrays)
  write_atomically(path, data.getvalue())


def _check_moments(path: pathlib.Path, mu: np.ndarray, sigma: np.ndarray) -> None:
  if not all(np.issubdtype(x.dtype, np.floating) for x in (mu, sigma)):
    raise InputError(f"{path}: mu and sigma must be real numbers, found {mu.dtype} and {sigma.dtype}")
  if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
    raise InputError(f"{path}: expected mu [d] and sigma [d d], found {mu.shape} and {sigma.shape}")
  if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
    raise InputError(f"{path}: mu or sigma is not finite")
  if mu.size == 0 or abs(sigma - sigma.T).max() > SYMMETRY * abs(sigma).max() or sigma.diagonal().min() < 0:
    raise InputError(
      f"{path}: sigma is no covariance: it is empty, not symmetric or its diagonal is negative"
    )


def _further(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict:
  """The fields of FeatureStatistics beside the moments, of those that are in `arrays`, checked."""
  found = {}
  if "features" in arrays:
    features, d = arrays["features"], arrays["mu"].size
    if features.ndim != 2 or features.shape[1] != d or not np.issubdtype(features.dtype, np.floating):
      raise InputError(f"{path}: expected features [n {d}], found {features.dtype} {features.shape}")
    if not np.isfinite(features).all():
      raise InputError(f"{path}: features are not finite")
    found["features"] = features
  if "num_images" in arrays:
    number = arrays["num_images"]
    if number.shape or not np.issubdtype(number.dtype, np.integer) or number < 2:
      raise InputError(f"{path}: num_images must be a number from 2 on")
    if "features" in arrays and len(arrays["features"]) != number:
      raise InputError(f"{path}: num_images is {number}, and there are {len(arrays['features'])} features")
    found["num_images"] = int(number)
  if "network" in arrays:
    if arrays["network"].shape or arrays["network"].dtype.kind != "U":
      raise InputError(f"{path}: network must be a name")
    found["network"] = str(arrays["network"])
  return found
