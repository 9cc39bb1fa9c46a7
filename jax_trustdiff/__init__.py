"""Trustworthy diffusion models, and diffusion models for trustworthy machine learning, in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
  """`load_classifier`, imported when it is asked for."""
  if name == "load_classifier":
    from jax_trustdiff.interop.export import load_classifier

    return load_classifier
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
