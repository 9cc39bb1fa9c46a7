"""Networks for tests: small exported graphs, and tiny classifiers with known answers."""

import pathlib
from dataclasses import dataclass

import jax
import numpy as np

from jax_trustdiff.interop import graph_npz
from jax_trustdiff.models.registry import bind


def load_graph(path: pathlib.Path):
  """The LogitsFn (NHWC images in [0, 1] -> logits) stored in an npz of ONNX-like nodes and OIHW weights."""
  return bind(*graph_npz.load_graph(path))


@dataclass(frozen=True)
class CentredLinear:
  """A `types.Classifier`: (flattened x - mean) @ kernel; the mean is the batch's in training mode."""

  num_classes: int = 4
  image_shape: tuple[int, int, int] = (2, 3, 1)

  def init(self, key):
    d = int(np.prod(self.image_shape))
    kernel_key, mean_key = jax.random.split(key)
    kernel = jax.random.normal(kernel_key, (d, self.num_classes))
    return {"params": {"kernel": kernel}, "batch_stats": {"mean": jax.random.uniform(mean_key, (d,))}}

  def logits(self, variables, x):
    return (_flat(x) - variables["batch_stats"]["mean"]) @ variables["params"]["kernel"]

  def train_logits(self, variables, x):
    mean = _flat(x).mean(axis=0)
    return (_flat(x) - mean) @ variables["params"]["kernel"], {"mean": mean}


def _flat(x):
  return x.reshape(x.shape[0], -1)
