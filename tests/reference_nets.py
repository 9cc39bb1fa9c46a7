"""Networks for tests: an interpreter of small exported graphs, and tiny classifiers with known answers."""

import json
import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff.models import layers


def load_graph(path: pathlib.Path):
  """The LogitsFn (NHWC images in [0, 1] -> logits) stored in an npz of ONNX-like nodes and OIHW weights."""
  arrays = dict(np.load(path))
  graph = json.loads(bytes(arrays.pop("__graph__")).decode())
  mean, std = (np.array(graph["norm"][name], np.float32) for name in ("mean", "std"))

  def logits(x):
    values = {**arrays, graph["input"]: (x - mean) / std}
    for node in graph["nodes"]:
      values[node["outputs"][0]] = _run(node, [values[name] for name in node["inputs"]])
    return values[graph["output"]]

  return logits


def _run(node, inputs):
  op, attrs = node["op"], node["attrs"]
  if op == "Conv":
    x, kernel, bias = inputs
    top, left, bottom, right = attrs["pads"]
    kernel = jnp.transpose(kernel, (2, 3, 1, 0))
    return layers.conv_general_dilated(x, kernel, attrs["strides"], ((top, bottom), (left, right))) + bias
  if op == "Gemm":
    return inputs[0] @ inputs[1].T + inputs[2]
  if op == "Relu":
    return jax.nn.relu(inputs[0])
  if op == "Add":
    return inputs[0] + inputs[1]
  if op == "Flatten":  # in the NCHW order of the weights that follow
    return jnp.transpose(inputs[0], (0, 3, 1, 2)).reshape(inputs[0].shape[0], -1)
  raise NotImplementedError(op)


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
