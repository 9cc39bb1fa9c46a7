"""The networks by name, and what works for all of them: binding variables, counting parameters and FLOPs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_trustdiff.models import edm_unet, layers, uvit
from jax_trustdiff.models.graph_classifier import GraphClassifier
from jax_trustdiff.models.noise_classifier import NoiseClassifier
from jax_trustdiff.models.preact_resnet import PreActResNet
from jax_trustdiff.models.uvit_head import UViTHead
from jax_trustdiff.models.watermark_codec import ResidualCodec, StampCodec
from jax_trustdiff.models.wide_resnet import WideResNet
from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import (
  Classifier,
  DiffusionNetwork,
  Logits,
  LogitsFn,
  NoiseConditionalClassifier,
  Unit,
  Variables,
  WatermarkCodec,
)

MODELS = {"wide_resnet": WideResNet, "preact_resnet": PreActResNet}
DIFFUSION_NETWORKS = {
  "ddpmpp": edm_unet.ddpmpp,
  "ncsnpp": edm_unet.ncsnpp,
  "adm": edm_unet.adm,
  "uvit": uvit.uvit,
}
NOISE_CLASSIFIERS = {"noise_classifier": NoiseClassifier, "uvit_head": UViTHead}
CODECS = {"residual_codec": ResidualCodec, "stamp_codec": StampCodec}
NETWORKS = MODELS | DIFFUSION_NETWORKS | NOISE_CLASSIFIERS | CODECS  # what a config can ask for
GRAPHS = {"graph": GraphClassifier}  # what only a file describes
Network = Classifier | DiffusionNetwork | NoiseConditionalClassifier | WatermarkCodec


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class BoundClassifier:
  """A `LogitsFn` that is a pytree: its leaves are the variables, its structure holds the network.

  As an argument of a jitted function it recompiles for another network, not for other values.
  """

  network: Classifier = dataclasses.field(metadata={"static": True})
  variables: Variables

  def __call__(self, x: Unit) -> Logits:
    return self.network.logits(self.variables, x)


def bind(network: Classifier, variables: Variables) -> LogitsFn:
  """The evaluation-mode `LogitsFn` of `network` with these variables; a callable pytree."""
  return BoundClassifier(network=network, variables=variables)


def num_params(variables: Variables) -> int:
  """Number of trained values, running statistics not counted; arrays may be abstract (`jax.eval_shape`)."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def forward_flops(network: Network, batch: int = 1) -> int:
  """FLOPs of one evaluation of `batch` images, of a codec to write and to read: two for each multiply-add.

  Of convolutions and products, counted in the traced program, padding included (the usual convention), pointwise work not.
  Every convolution is a sum over taps there; by other ways (`layers`) it would take fewer or more.
  """
  variables = jax.eval_shape(network.init, jax.random.key(0))
  inputs = [jax.ShapeDtypeStruct((batch, *network.image_shape), jnp.float32)]
  if isinstance(network, Classifier):
    evaluate = network.logits
  elif isinstance(network, WatermarkCodec):
    inputs.append(jax.ShapeDtypeStruct((batch, network.num_bits), jnp.int32))

    def evaluate(variables, x, bits):
      return network.decode(variables, network.encode(variables, x, bits))

  else:  # told the noise level
    inputs.append(jax.ShapeDtypeStruct((batch,), jnp.float32))
    evaluate = network.apply
  with layers.lax_alone():
    return _flops(jax.make_jaxpr(evaluate)(variables, *inputs).jaxpr)


def _flops(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval.shape
      features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features
    elif eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    else:
      total += eqn.params.get("length", 1) * sum(map(_flops, _inner_jaxprs(eqn.params)))
  return total


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
  values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else [value])]
  return [jaxpr for jaxpr in (getattr(v, "jaxpr", v) for v in values) if hasattr(jaxpr, "eqns")]
