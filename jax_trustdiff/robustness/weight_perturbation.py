"""Adversarial weight perturbation: the gradient that trains a network is taken where its weights are worse.

Wu, Xia and Wang 2020, "Adversarial Weight Perturbation Helps Robust Generalization" (arXiv:2004.05884). With the
adversarial images of the weights w held fixed, one step of ascent leads to w + v, and the gradient of the loss there
moves w:

    v = ascent(loss, params, gamma)
    gradient = grad(loss)(params + v)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_trustdiff.attacks.norms import Scalar
from jax_trustdiff.types import PyTree


def ascent(loss: Callable[[PyTree], jax.Array], params: PyTree, gamma: Scalar) -> PyTree:
  """v with ||v_l|| = gamma ||w_l|| along the gradient of `loss`, for every weight w_l of two dimensions or more.

  v_l = gamma ||w_l|| g_l / ||g_l||, with L2 norms over all entries of a weight: the step that uses up the paper's bound
  ||v_l|| <= gamma ||w_l||. 0 for vectors (biases, and scales of normalisations), as in its released code, and where the
  gradient is 0. loss: params -> a number. No gradient flows through v.
  """
  params = jax.lax.stop_gradient(params)

  def step(w, g):
    if w.ndim < 2:
      return jnp.zeros_like(w)
    length = _length(g)
    return (gamma * _length(w) * jnp.where(length > 0, g / jnp.where(length > 0, length, 1), 0)).astype(
      w.dtype
    )

  return jax.lax.stop_gradient(jax.tree.map(step, params, jax.grad(loss)(params)))


def _length(x):
  return jnp.sqrt(jnp.square(x).sum())
