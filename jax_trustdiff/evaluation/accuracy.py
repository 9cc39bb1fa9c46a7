"""Clean and adversarial verdicts of a classifier, one for each image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jax_trustdiff.types import Labels, LogitsFn, Unit

Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]  # (logits_fn, x, y, keys) -> x_adv


def image_keys(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
  """One key for each image, from its id alone: the same image gets the same draws in any batch."""
  return jax.vmap(lambda image_id: jax.random.fold_in(key, image_id))(ids)


def verdicts(
  logits_fn: LogitsFn, attack: Attack, x: Unit, y: Labels, ids: Int[Array, "b"], key: Key[Array, ""]
) -> dict[str, Bool[Array, "b"]]:
  """Whether each image is classified right: 'clean', and 'robust' (right before and after the attack).

  An image that is already misclassified counts as broken, whatever the attack made of it.
  """
  clean = jnp.argmax(logits_fn(x), axis=1) == y
  x_adv = attack(logits_fn, x, y, image_keys(key, ids))
  return {"clean": clean, "robust": clean & (jnp.argmax(logits_fn(x_adv), axis=1) == y)}
