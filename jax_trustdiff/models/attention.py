"""Attention by the fastest exact way of the backend."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_trustdiff.models import layers


def attention(
  q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
  """softmax(q k^T / sqrt(d)) v for each head, with logits and softmax in float32.

  `jax.nn.dot_product_attention` by cuDNN's fused kernel where `implementation` says so, by XLA elsewhere. The choice is
  made here because without one jax takes XLA everywhere, which stores the n x m weights of every head. The fused kernel
  has a gradient but no gradient of the gradient, and no `jax.jvp`.

  On the CPU heads go in groups whose logits fit the cache: with large batches, or under `jax.vmap` over parameters, that takes
  a third to a half of the time.
  """
  if not layers.traced_for_cpu():
    return _attention(q, k, v)
  (b, n, heads, d), m = q.shape, k.shape[1]
  groups = layers.num_groups(2**18, jax.ShapeDtypeStruct((b * heads, n, m), jnp.float32))
  if groups == 1:
    return _attention(q, k, v)
  alone = [layers.grouped(jnp.moveaxis(a, 2, 1).reshape(b * heads, a.shape[1], 1, d), groups) for a in (q, k, v)]
  mixed = jax.lax.map(lambda qkv: _attention(*qkv), alone)
  return jnp.moveaxis(mixed.reshape(b, heads, n, d), 1, 2)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  device = jax.config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.local_devices(backend=device)[0]
  capability = getattr(device, "compute_capability", "")
  return jax.nn.dot_product_attention(
    q, k, v, implementation=implementation(q.dtype, q.shape[-1], str(capability))
  )


def implementation(dtype: Any, head_dim: int, capability: str) -> str:
  """'cudnn' where its fused kernel takes such heads, otherwise 'xla'.

  capability: of an NVIDIA device, such as '8.0'; anything else means another device. cuDNN takes 16-bit floats on
  devices from 8.0 on, and channels per head that are a multiple of 8, at most 128, or 256 from 9.0 on.
  """
  version = re.fullmatch(r"(\d+)\.(\d+)", capability)
  major = int(version[1]) if version else 0
  fits = head_dim % 8 == 0 and head_dim <= (256 if major >= 9 else 128)
  return "cudnn" if major >= 8 and dtype == jnp.bfloat16 and fits else "xla"
