"""Trustworthy diffusion models, and diffusion models for trustworthy machine learning, in JAX."""

import importlib

__version__ = "0.1.0"


_LOADERS = {
  "load_classifier": "jax_trustdiff.interop.export",
  "load_codec": "jax_trustdiff.tasks.codecs",
  "load_denoiser": "jax_trustdiff.tasks.denoisers",
  "load_noise_classifier": "jax_trustdiff.tasks.noise_classifiers",
}


def __getattr__(name: str):
  """`load_classifier` and the like, imported when they are asked for."""
  if name in _LOADERS:
    return getattr(importlib.import_module(_LOADERS[name]), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
