"""Networks: the only package that imports flax.linen. `MODELS` holds the classifiers by name."""

from jax_trustdiff.models.registry import MODELS, bind, forward_flops, num_params

__all__ = ["MODELS", "bind", "forward_flops", "num_params"]
