"""Classifiers that come as a graph of ONNX operators, such as the benchmark networks of the VNN-COMP competitions."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jax_trustdiff.models import layers
from jax_trustdiff.types import InputError, Logits, Unit, Variables

OPERATORS = ("Add", "Conv", "Flatten", "Gemm", "Relu", "Reshape")
NUM_INPUTS = {"Add": 2, "Conv": 3, "Gemm": 3, "Relu": 1}


@dataclasses.dataclass(frozen=True)
class GraphClassifier:
  """A `types.Classifier` in evaluation mode; hashable, equal when the fields are.

  graph: JSON {'input', 'output', 'norm': {'mean', 'std'}, 'nodes': [{'op', 'inputs', 'outputs', 'attrs'}]} with the
  OPERATORS of ONNX, in an order in which they can be computed: Conv (attributes pads and strides), Gemm with the weight transposed,
  Flatten in the order of NCHW, which Reshape is taken for. Other inputs of nodes are the names of parameters, in the layout
  of ONNX. Images are normalised by mean and std. shapes: JSON {name: shape} of the parameters. dtype: as for other networks; the parameters
  are float32.
  """

  graph: str
  shapes: str
  num_classes: int = 10
  image_shape: tuple[int, int, int] = (32, 32, 3)
  dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    nodes = json.loads(self.graph)["nodes"]
    if unknown := sorted({node["op"] for node in nodes} - set(OPERATORS)):
      raise InputError(f"graph: unknown operators {', '.join(unknown)}; known: {', '.join(OPERATORS)}")

  def init(self, key: Key[Array, ""]) -> Variables:
    """Fresh parameters: of use for their shapes."""
    shapes = {name: tuple(shape) for name, shape in json.loads(self.shapes).items()}
    keys = jax.random.split(key, len(shapes))
    return {
      "params": {
        name: 0.05 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
      }
    }

  def logits(self, variables: Variables, x: Unit) -> Logits:
    """Images in [0, 1] -> logits in float32."""
    graph, dtype = json.loads(self.graph), jnp.dtype(self.dtype)
    mean, std = (np.asarray(graph["norm"][name], np.float32) for name in ("mean", "std"))
    values = {name: jnp.asarray(value, dtype) for name, value in variables["params"].items()}
    values[graph["input"]] = ((x - mean) / std).astype(dtype)
    for node in graph["nodes"]:
      values[node["outputs"][0]] = _run(node, [values[name] for name in node["inputs"] if name in values])
    return values[graph["output"]].astype(jnp.promote_types(dtype, jnp.float32))

  def train_logits(self, variables: Variables, x: Unit):
    """InputError: these networks have no training mode."""
    raise InputError("a classifier read from a graph cannot be trained")


def _run(node: Mapping[str, Any], inputs: list[jax.Array]) -> jax.Array:
  op, attrs = node["op"], node["attrs"]
  if op in NUM_INPUTS and len(inputs) != NUM_INPUTS[op]:
    raise InputError(f"graph: {op} has {len(inputs)} inputs; expected {NUM_INPUTS[op]}")
  match op:
    case "Conv":
      x, kernel, bias = inputs
      top, left, bottom, right = attrs["pads"]
      kernel = jnp.transpose(kernel, (2, 3, 1, 0))
      padding = ((top, bottom), (left, right))
      return layers.conv_general_dilated(x, kernel, tuple(attrs["strides"]), padding) + bias
    case "Gemm":
      x, weight, bias = inputs
      return x @ weight.T + bias
    case "Relu":
      return jax.nn.relu(inputs[0])
    case "Add":
      return inputs[0] + inputs[1]
  x = inputs[0]  # Flatten, Reshape: in the order of the weights that follow
  return (jnp.transpose(x, (0, 3, 1, 2)) if x.ndim == 4 else x).reshape(x.shape[0], -1)
