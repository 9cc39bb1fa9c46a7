"""What a mixture is made of, so that anybody can check it: hashes of data, settings and parameters, and of what depends on what.

A manifest is plain JSON, sealed by the SHA-256 of its canonical form. Images appear in it as salted hashes below a Merkle root: who
holds an image, the salt and a path of hashes can prove that it is in a shard; the manifest itself gives nothing away.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_trustdiff.pytrees import leaves_by_name
from jax_trustdiff.types import InputError, PyTree

SEAL = "sha256"
ACTIVE, STALE = "active", "stale"


def canonical(value: Any) -> str:
  """The one JSON text of a value: sorted keys, no spaces. InputError for NaN and infinities."""
  try:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
  except ValueError as error:
    raise InputError(f"a manifest holds finite numbers only: {error}") from None


def digest(value: Any) -> str:
  """SHA-256 of bytes, or of the canonical JSON of anything else, in hexadecimal."""
  return hashlib.sha256(value if isinstance(value, bytes) else canonical(value).encode()).hexdigest()


def tree_digest(tree: PyTree) -> str:
  """SHA-256 over the leaves in the order of their paths: path, type, shape, and bytes (little-endian, rows first).

  Typed random keys count as their data.
  """
  found = hashlib.sha256()
  leaves = leaves_by_name(tree)
  for path in sorted(leaves):
    leaf = leaves[path]
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    found.update(canonical([path, str(array.dtype), list(array.shape)]).encode())
    found.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
  return found.hexdigest()


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """The manifest with its SHA-256 in it."""
  body = {key: value for key, value in manifest.items() if key != SEAL}
  return body | {SEAL: digest(body)}


def check_seal(manifest: Mapping[str, Any], where: str) -> None:
  """InputError unless the manifest is as it was sealed."""
  if manifest.get(SEAL) != sealed(manifest)[SEAL]:
    raise InputError(f"{where} is not as it was sealed: its SHA-256 is not that of its contents")


def salted(content_id: bytes, salt: bytes) -> str:
  """What stands in a manifest for an image: HMAC-SHA-256 of its content's hash."""
  return hmac.new(salt, content_id, hashlib.sha256).hexdigest()


def merkle_root(leaves: Iterable[str]) -> str:
  """Root of the binary tree over sorted hexadecimal hashes; of none, the hash of nothing (RFC 6962, section 2.1)."""
  return _root([_leaf(one) for one in sorted(leaves)]).hex()


def merkle_proof(leaves: Iterable[str], leaf: str) -> list[tuple[str, str]]:
  """[('left' or 'right', hash of a sibling)] from a leaf up to the root; InputError if it is none of them."""
  ordered = sorted(leaves)
  if leaf not in ordered:
    raise InputError(f"{leaf[:12]}... is none of the {len(ordered)} leaves")
  return _proof([_leaf(one) for one in ordered], ordered.index(leaf))


def is_in(root: str, leaf: str, proof: Sequence[Sequence[str]]) -> bool:
  """Whether a proof of `merkle_proof`, also as JSON has it, leads from a leaf to a root."""
  found = _leaf(leaf)
  for side, sibling in proof:
    other = bytes.fromhex(sibling)
    found = _node(other, found) if side == "left" else _node(found, other)
  return found.hex() == root


def stale_after(artefacts: Mapping[str, Mapping[str, Any]], shards: Iterable[str]) -> list[str]:
  """Names of the artefacts, {name: {'depends_on': shards or artefacts, ...}}, that depend on one of these shards, also through others."""
  touched = set(shards)
  while True:
    more = {
      name for name, about in artefacts.items() if name not in touched and touched & set(about["depends_on"])
    }
    if not more:
      return sorted(touched & set(artefacts))
    touched |= more


def _leaf(text: str) -> bytes:
  return hashlib.sha256(b"\x00" + bytes.fromhex(text)).digest()


def _node(left: bytes, right: bytes) -> bytes:
  return hashlib.sha256(b"\x01" + left + right).digest()


def _split(count: int) -> int:
  """The largest power of two below `count` > 1."""
  return 1 << (count - 1).bit_length() - 1


def _root(nodes: Sequence[bytes]) -> bytes:
  if not nodes:
    return hashlib.sha256(b"").digest()
  if len(nodes) == 1:
    return nodes[0]
  middle = _split(len(nodes))
  return _node(_root(nodes[:middle]), _root(nodes[middle:]))


def _proof(nodes: Sequence[bytes], index: int) -> list[tuple[str, str]]:
  if len(nodes) == 1:
    return []
  middle = _split(len(nodes))
  if index < middle:
    return [*_proof(nodes[:middle], index), ("right", _root(nodes[middle:]).hex())]
  return [*_proof(nodes[middle:], index - middle), ("left", _root(nodes[:middle]).hex())]
