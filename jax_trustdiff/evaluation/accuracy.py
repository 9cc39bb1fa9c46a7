"""Clean and adversarial verdicts of a classifier, one for each image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jax_trustdiff.types import Labels, LogitsFn, Unit

Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]  # (logits_fn, x, y, keys) -> x_adv


def image_keys(key: Key[Array, ""], ids: Int[Array, "b"]) -> Key[Array, "b"]:
  """One key for each image, from its id alone: the same image gets the same draws in any batch."""
  return jax.vmap(lambda image_id: jax.random.fold_in(key, image_id))(ids)


def verdicts(
  logits_fn: LogitsFn, attack: Attack, x: Unit, y: Labels, ids: Int[Array, "b"], key: Key[Array, ""]
) -> dict[str, Array]:
  """What became of each image: 'clean' and 'robust' [b] bool, the classes seen before and after, and the images.

  'robust' is right before and after the attack: an image that is misclassified from the beginning counts as broken,
  whatever the attack made of it. 'prediction' and 'adversarial_prediction' are int [b], 'x_adv' is Unit.
  """
  before = jnp.argmax(logits_fn(x), axis=1)
  x_adv = attack(logits_fn, x, y, image_keys(key, ids))
  after = jnp.argmax(logits_fn(x_adv), axis=1)
  return {
    "clean": before == y,
    "robust": (before == y) & (after == y),
    "prediction": before,
    "adversarial_prediction": after,
    "x_adv": x_adv,
  }
