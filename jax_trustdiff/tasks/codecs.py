"""Watermark codecs from configs and from files, the keys that go with them, and marks in training."""

import dataclasses
import os
import pathlib
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.data.records import ImageSource
from jax_trustdiff.interop import export
from jax_trustdiff.models.registry import CODECS, NETWORKS
from jax_trustdiff.tasks import store_writing
from jax_trustdiff.tasks.denoisers import UNTRAINED, Section
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import InputError, Variables, WatermarkCodec, to_unit
from jax_trustdiff.watermark import keys
from jax_trustdiff.watermark.codec import BoundCodec
from jax_trustdiff.watermark.payloads import BCHCode

KEY_FILE = "key.json"


def build_codec(section: Section, image_shape: tuple[int, int, int]) -> WatermarkCodec:
  """The codec of a section of CODECS for images of this shape."""
  return config_lib.build(CODECS, section, image_shape=image_shape)


def model_section(section: Section, codec: WatermarkCodec) -> dict[str, Any]:
  """A section of CODECS completed with what the data decided: what an export stores and is built from."""
  return config_lib.to_plain(section) | {"image_shape": codec.image_shape}


def load_codec(directory: str | os.PathLike) -> BoundCodec:
  """The codec of an export, its variables on the default device; a callable pytree.

  InputError, in one line, if there is nothing to read or it is another kind of network.
  """
  name = export.read_description(directory)["model"].get("name")
  if name in NETWORKS and name not in CODECS:
    raise InputError(
      f"{directory} holds another network ({name}), no watermark codec: train one with configs/wm_codec.py"
    )
  codec, variables, _ = export.load_export(directory)
  if not isinstance(codec, WatermarkCodec):
    raise InputError(f"{directory} holds {type(codec).__name__}, no watermark codec")
  return BoundCodec(codec, jax.tree.map(jnp.asarray, variables))


def load_or_make(config, path: str, key: str) -> BoundCodec:
  """The codec of the export `path`, which is config.<key>, or with 'untrained' a fresh one of config.untrained_codec."""
  if not path:
    raise InputError(
      f"{key} is empty: give the export of a codec, --config.{key}=<run of wm_codec.py>/export"
    )
  if path != UNTRAINED:
    return load_codec(path)
  section = config_lib.to_plain(config.untrained_codec)
  codec = build_codec(section["model"], tuple(section["image_shape"]))
  return BoundCodec(codec, jax.jit(codec.init)(jax.random.key(config.seed)))


def fingerprint(codec: BoundCodec) -> str:
  """SHA-256 of what the codec computes: its kind, the fields that are not the defaults, but for dtype, and its parameters.

  A field that later versions add, with the default that computes the same, changes nothing.
  """
  fields = {
    field.name: getattr(codec.network, field.name)
    for field in dataclasses.fields(codec.network)
    if field.name != "dtype" and getattr(codec.network, field.name) != field.default
  }
  described = {"kind": type(codec.network).__name__} | fields
  return store_writing.fingerprint(described, codec.variables["params"])


def marked_bytes(codec: BoundCodec, images: jax.typing.ArrayLike, bits: jax.typing.ArrayLike) -> jax.Array:
  """Marked images as they are stored: uint8 of images uint8."""
  return jnp.round(255 * codec.encode(to_unit(images), bits)).astype(jnp.uint8)


# ---- marks in the training of a diffusion model ----


@dataclasses.dataclass(frozen=True)
class Marker:
  """Marks the images of every batch with one string: the data set of wm_embed.py without its copy on the disk."""

  codec: BoundCodec
  key: keys.WatermarkKey

  @property
  def state(self) -> Variables:
    """The codec's variables and the string: arguments of a program, not constants in it, which a compilation cache would keep."""
    return {"codec": self.codec.variables, "bits": jnp.asarray(self.key.array)}

  def __call__(self, state: Variables, images: jax.Array) -> jax.Array:
    """Marked bytes, with the `state` of this marker."""
    return marked_bytes(dataclasses.replace(self.codec, variables=state["codec"]), images, state["bits"])


def load_marker(config, source: ImageSource) -> Marker | None:
  """The marker of the section config.watermark for these images, None where it asks for none.

  InputError where one of codec and key is missing, they do not belong together, the images have another size or are marked
  already, and for an augmentation that a mark, also of images that are marked already, does not survive.
  """
  section = config.watermark
  if bool(section.codec) != bool(section.key):
    raise InputError(
      "watermark.codec and watermark.key go together: the export of a codec, and a key file of wm_embed.py"
    )
  if (section.codec or source.key_id) and config.augment.name != "none" and not section.survives_augment:
    raise InputError(
      f"the images are marked, and the mark does not survive augment.name={config.augment.name!r}: take 'none', or set "
      "watermark.survives_augment=True if the codec was trained through it"
    )
  if not section.codec:
    if section.required and not source.key_id:
      raise InputError(
        "the images are not marked: give data.path=<run of wm_embed.py>/images, or watermark.codec and watermark.key; "
        "watermark.required=False trains without a mark"
      )
    return None
  if source.key_id:
    raise InputError(
      f"the images are marked already, with the key {source.key_id}: leave watermark.codec empty"
    )
  codec, key = load_codec(section.codec), read_key(section.key)
  check_key(key, codec)
  if source.image_shape != key.image_shape:
    raise InputError(f"the key is for images of {key.image_shape}, and these are {source.image_shape}")
  marker = Marker(codec, key)
  looked_at = source.take(np.arange(min(256, len(source))))["image"]
  marked = to_unit(jax.jit(marker)(marker.state, looked_at))
  accuracy = float(((jax.jit(BoundCodec.decode)(codec, marked) > 0) == (key.array > 0)).mean())
  if accuracy < section.least_bit_accuracy:
    raise InputError(
      f"only {accuracy:.1%} of the bits are read back from the first {len(looked_at)} images, less than watermark.least_bit_accuracy="
      f"{section.least_bit_accuracy:g}: train the codec longer, or for these images"
    )
  return marker


# ---- keys ----


def read_key(path: str | os.PathLike) -> keys.WatermarkKey:
  """The key in a key file, or in the folder of a run that wrote one."""
  file = pathlib.Path(path).expanduser()
  if file.is_dir():
    file = file / KEY_FILE
  if not file.is_file():
    raise InputError(f"no key file {file}: wm_embed.py writes one, {KEY_FILE} in its workdir")
  return keys.from_json(_text(file, "a key file"), str(file))


def read_secret(path: str) -> str:
  """The secret in a text file, without white space around it; InputError where there is none."""
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise InputError(f"no file with a secret, {file}: write a long random text into one, and keep it")
  secret = _text(file, "a file with a secret").strip()
  if len(secret) < 16:
    raise InputError(
      f"the secret in {file} has {len(secret)} characters; give at least 16 that nobody guesses"
    )
  return secret


def _text(file: pathlib.Path, what: str) -> str:
  try:
    return file.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f"{file} cannot be read as {what}: {getattr(error, 'strerror', None) or 'it is no text'}"
    ) from None


def choose_key(
  section, codec: BoundCodec, image_shape: tuple[int, int, int], workdir: Workdir
) -> keys.WatermarkKey:
  """The key that images are marked with: that of an earlier session of this run, or what the section says.

  section: file (a key file), demo (the published bits of that length), secret_file and user (that user's string), or none
  of them: a fresh random string; with payload >= 0 the string is that number in a code that corrects num_errors, masked. InputError for more than one, or a key of another codec, length or size of images.
  """
  asked = [name for name in ("file", "demo", "secret_file") if section[name]]
  if len(asked) > 1:
    raise InputError(f"the key comes from one place, found key.{' and key.'.join(asked)}")
  if section.payload < -1 or (section.payload >= 0 and (section.file or section.demo)):
    raise InputError(
      f"key.payload={section.payload}: a number from 0 on, or -1 for none, of a fresh key; not with key.file or key.demo"
    )
  if section.user and not section.secret_file:
    raise InputError(f"key.user={section.user} is one of many with a common secret: give key.secret_file")
  num_bits = codec.network.num_bits
  if (workdir / KEY_FILE).exists():
    key = read_key(workdir / KEY_FILE)
  elif section.file:
    key = read_key(section.file)
  else:
    about = dict(
      codec_sha256=fingerprint(codec), image_shape=image_shape, quantisation="uint8", user=section.user
    )
    if section.demo:
      return keys.WatermarkKey(bits=keys.demo_bits(num_bits), **about)
    secret = read_secret(section.secret_file) if section.secret_file else secrets.token_hex(32)
    about |= dict(drawn=True, salt=keys.salt(secret, section.user))
    if section.payload < 0:
      return keys.WatermarkKey(bits=keys.as_text(keys.draw(secret, [section.user], num_bits)[0]), **about)
    mask = keys.mask(secret, section.user, num_bits, (section.payload, section.num_errors))
    bits = payload_word(section.payload, BCHCode(num_bits, section.num_errors)) ^ mask
    return keys.WatermarkKey(
      bits=keys.as_text(bits), num_errors=section.num_errors, mask=keys.as_text(mask), **about
    )
  check_key(key, codec)
  if key.image_shape != image_shape:
    raise InputError(f"the key is for images of {key.image_shape}, and these are {image_shape}")
  return key


def payload_word(payload: int, code: BCHCode) -> np.ndarray:
  """The code word of a whole number, its bits from the highest to the lowest."""
  room = code.num_payload_bits
  if not 0 <= payload < 2**room:
    raise InputError(
      f"key.payload={payload}: a code word of {code.num_bits} bits with {code.num_errors} errors has room for 0 to {2**room - 1}"
    )
  return code.encode(np.array([int(bit) for bit in f"{payload:0{room}b}"]))


def read_payload(key: keys.WatermarkKey, bits: np.ndarray) -> tuple[int, int] | None:
  """(payload, number of wrong bits) in a string that was read, or None where too many are wrong."""
  found = BCHCode(len(key.bits), key.num_errors).decode((bits > 0) ^ key.mask_array)
  return None if found is None else (int(keys.as_text(found[0]), 2), found[1])


def own_payload(key: keys.WatermarkKey) -> int:
  """What the string of the key itself says; InputError if it is no code word."""
  found = read_payload(key, key.array)
  if found is None or found[1]:
    raise InputError(
      f"the key file is damaged: its bits are no code word that {key.num_errors} errors leave readable"
    )
  return found[0]


def check_key(key: keys.WatermarkKey, codec: BoundCodec) -> None:
  """InputError unless the key is one of this codec."""
  if key.scheme != "codec":
    raise InputError(f"the key is one of the scheme {key.scheme!r}, not of a codec")
  if len(key.bits) != codec.network.num_bits:
    raise InputError(
      f"the key has {len(key.bits)} bits and the codec {codec.network.num_bits}: they do not belong together"
    )
  if key.codec_sha256 != fingerprint(codec):
    raise InputError("the key was made for another codec: its codec_sha256 is not that of this one")


def write_key(workdir: Workdir, key: keys.WatermarkKey) -> None:
  """key.json in the workdir, for nobody but its owner to read."""
  write_atomically(workdir / KEY_FILE, key.to_json() + "\n", private=True)
