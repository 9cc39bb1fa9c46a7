"""Classifiers in one .npz file: the graph as JSON bytes under '__graph__', parameters under their names in it."""

import json
import os
import pathlib
import zipfile

import jax
import numpy as np

from jax_trustdiff.models.graph_classifier import GraphClassifier
from jax_trustdiff.types import InputError, Variables

GRAPH = "__graph__"


def load_graph(
  path: str | os.PathLike, image_shape: tuple[int, int, int] = (32, 32, 3)
) -> tuple[GraphClassifier, Variables]:
  """(network, variables) for images of this shape; InputError for a file that holds no such classifier."""
  path = pathlib.Path(path)
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    graph = json.loads(bytes(arrays.pop(GRAPH)).decode())
    params = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    shapes = json.dumps({name: array.shape for name, array in params.items()})
    network = GraphClassifier(json.dumps(graph), shapes, 1, image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    num_classes = jax.eval_shape(network.logits, {"params": params}, images).shape[1]
  except FileNotFoundError:
    raise InputError(f"{path}: no such file") from None
  except (OSError, EOFError, zipfile.BadZipFile, KeyError, ValueError, TypeError, IndexError) as error:
    reason = " ".join(str(error).split())
    raise InputError(
      f"{path} holds no classifier as a graph for images {list(image_shape)}: {reason}"
    ) from None
  return GraphClassifier(network.graph, shapes, num_classes, image_shape), {"params": params}
