"""Manifests: one text, one hash, and what a changed byte, a foreign image or a removed shard does to them."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff.cdm import manifest
from jax_trustdiff.types import InputError


def test_one_text_whatever_the_order():
  one = {"b": [1, {"y": 2, "x": "ü"}], "a": None}
  other = {"a": None, "b": [1, {"x": "ü", "y": 2}]}
  assert manifest.canonical(one) == manifest.canonical(other)
  assert manifest.digest(one) == manifest.digest(other) != manifest.digest({**one, "a": 0})
  assert manifest.digest(b"abc") == hashlib.sha256(b"abc").hexdigest()
  with pytest.raises(InputError, match="finite numbers"):
    manifest.canonical({"loss": float("nan")})


def tree(seed=0):
  rng = np.random.RandomState(seed)
  return {
    "a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)},
    "step": np.int32(7),
    "key": jax.random.key(1),
  }


def test_the_hash_of_a_tree_sees_values_paths_types_and_shapes():
  one = manifest.tree_digest(tree())
  assert one == manifest.tree_digest(jax.tree.map(lambda x: x, tree()))
  assert one == manifest.tree_digest(tree() | {"a": {"kernel": jnp.asarray(tree()["a"]["kernel"])}})
  kernel = tree()["a"]["kernel"]
  flipped = kernel.copy()
  flipped.view(np.uint8)[0, 0] ^= 1
  assert one == manifest.tree_digest(tree() | {"a": {"kernel": np.asfortranarray(kernel)}})
  for changed in (
    {"a": {"kernel": flipped}},
    {"a": {"bias": kernel}},
    {"a": {"kernel": kernel.reshape(4, 3)}},
    {"a": {"kernel": kernel.view(np.int32)}},
    {"key": jax.random.key(2)},
  ):
    assert manifest.tree_digest(tree() | changed) != one


def test_a_seal_breaks_when_anything_changes():
  whole = manifest.sealed({"shards": {"a": 1}, "seed": 3})
  manifest.check_seal(whole, "manifest.json")
  assert manifest.sealed(whole) == whole
  for changed in ({"seed": 4}, {"shards": {"a": 2}}, {"more": 1}, {"sha256": "0" * 64}):
    with pytest.raises(InputError, match="not as it was sealed"):
      manifest.check_seal(whole | changed, "manifest.json")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_membership_is_proved_by_a_path(count):
  leaves = [manifest.salted(bytes([i]) * 32, b"salt") for i in range(count)]
  root = manifest.merkle_root(leaves)
  assert root == manifest.merkle_root(reversed(leaves))
  foreign = manifest.salted(b"x" * 32, b"salt")
  for leaf in leaves:
    proof = manifest.merkle_proof(leaves, leaf)
    assert manifest.is_in(root, leaf, proof) and len(proof) <= int(np.ceil(np.log2(count)))
    assert not manifest.is_in(root, foreign, proof)
  with pytest.raises(InputError, match="none of the"):
    manifest.merkle_proof(leaves, foreign)
  assert manifest.merkle_root(leaves[1:]) != root
  assert manifest.merkle_root([]) == hashlib.sha256(b"").hexdigest()
  assert manifest.salted(b"x" * 32, b"other") != foreign


def test_what_depends_on_a_shard_is_found_through_others():
  artefacts = {
    "classifier": {"depends_on": ["a", "b"]},
    "centroids of b": {"depends_on": ["b"]},
    "samples": {"depends_on": ["classifier"]},
    "page": {"depends_on": ["samples"]},
    "centroids of c": {"depends_on": ["c"]},
  }
  assert manifest.stale_after(artefacts, ["a"]) == ["classifier", "page", "samples"]
  assert manifest.stale_after(artefacts, ["c"]) == ["centroids of c"]
  assert manifest.stale_after(artefacts, []) == []
