"""Says whether images, or the samples of a diffusion model, carry a string of bits, and how sure that is.

Images come from any source, a folder of PNG and JPEG files for example, or are sampled from the model of init_from. The verdict rests on the
string that all of them carry together, and on an exact p-value (`watermark.detection`); images that are known to carry no mark are a cross-check.
"""

import json

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.diffusion.guidance import Guided
from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.tasks import codecs, denoisers, reports
from jax_trustdiff.tasks.sampling import ImageSampler, balanced_labels
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import InputError, to_unit
from jax_trustdiff.watermark import detection, keys
from jax_trustdiff.watermark.codec import BoundCodec
from jax_trustdiff.watermark.payloads import BCHCode

VERDICT = "verdict.json"
MOST_BARS = 64  # bits shown one by one


def run(config, workdir: Workdir) -> dict[str, float]:
  """Writes workdir/verdict.json and returns its numbers.

  matches, of num_bits; p, log10_p, threshold and detected (1 or 0) at detect.false_positive_rate; key_drawn (1 or 0), without which p says
  nothing; bit_accuracy of single images;
  detected_share, the part of them that reach the threshold alone, with its interval; user, if there are several. With null images also
  null/bit_accuracy with the same key, null/highest_bit_accuracy with whichever of the keys fits each best, null/false_positive_rate of single ones with its interval, and null/p of all of them together. control/smallest_p is
  the smallest p-value of all images together over detect.control_keys random keys that nothing was marked with; payload_is_right
  (1 or 0) of a key with a payload.
  """
  section = config.detect
  mesh = parallel.make_local_mesh()
  codec = codecs.load_or_make(config, config.codec, "codec")
  codebook, key = load_keys(config, codec)
  payload = codecs.own_payload(key) if key is not None and key.num_errors else None
  detection.threshold(
    codebook.shape[1], section.false_positive_rate, len(codebook)
  )  # raises for too few bits
  parallel.check_batch(section.batch_size, mesh)
  reports.check(config)
  if section.control_keys < 0:
    raise InputError(f"detect.control_keys must be at least 0, found {section.control_keys}")
  model = denoisers.load_or_make(config)[0] if config.init_from else None
  null = source_of(config, config.null, codec, key) if config.null.name != "none" else None
  if model is None:
    source = source_of(config, config.data, codec, key)
  else:
    check_size(config, model.network.image_shape, "the model's samples", codec, key)
    sampler = build_sampler(config, model, mesh)

  workdir.open()
  if model is not None:
    images = sample(config, model, sampler)
    source = records.unlabelled(images, "samples")
  logits = logits_of(codec, source, section.batch_size, mesh)
  verdict = detection.judge(
    logits,
    codebook,
    section.false_positive_rate,
    scheme="codec",
    key_id=key.key_id if key else "",
    codec_sha256=codecs.fingerprint(codec),
  )
  share = round(verdict.detected_share * len(source))
  found = verdict.to_dict() | {
    "key_drawn": key is None or key.drawn,
    "detected_share_interval": statistics.binomial_interval(share, len(source)),
  }
  best = codebook[verdict.user or 0]
  matches = {"these images": np.asarray(detection.count_matches(logits, best))}
  if null is not None:
    clean = logits_of(codec, null, section.batch_size, mesh)
    matches["images without a mark"] = np.asarray(detection.count_matches(clean, best))
    found["null"] = _null(clean, matches["images without a mark"], codebook, verdict)
  if payload is not None:
    found["payload"] = _payload(key, payload, np.asarray(detection.read(logits)))
  if section.control_keys:
    found["control"] = _control(logits, section.control_keys, config.seed)
  metrics = _metrics(found)
  if parallel.is_main_process():
    write_atomically(workdir / VERDICT, json.dumps(found, indent=2) + "\n")
    _report(config, workdir, source, logits, best, matches, found, metrics)
  return metrics


def load_keys(config, codec: BoundCodec) -> tuple[np.ndarray, keys.WatermarkKey | None]:
  """(the strings [users n] that are looked for, the key file's key or None)."""
  section, num_bits = config.key, codec.network.num_bits
  if sum(map(bool, (section.file, section.demo, section.secret_file))) != 1:
    raise InputError(
      "give one of key.file, the key file of wm_embed.py, key.secret_file, the secret of a set of users, and key.demo"
    )
  if section.num_users != 1 and not section.secret_file:
    raise InputError(
      f"key.num_users={section.num_users} goes with key.secret_file; a key file has one string"
    )
  if section.num_users < 1:
    raise InputError(f"key.num_users must be at least 1, found {section.num_users}")
  if section.demo:
    key = keys.WatermarkKey(keys.demo_bits(num_bits), image_shape=codec.network.image_shape)
    return key.array[None], key
  if section.file:
    key = codecs.read_key(section.file)
    codecs.check_key(key, codec)
    return key.array[None], key
  return keys.draw(codecs.read_secret(section.secret_file), range(section.num_users), num_bits), None


def source_of(config, section, codec: BoundCodec, key: keys.WatermarkKey | None) -> records.ImageSource:
  """The images of a section of SOURCES, at most detect.num_images of them; InputError for another size."""
  source = config_lib.build(sources.SOURCES, section, split=config.detect.split)
  source = records.first(source, config.detect.num_images)
  check_size(config, source.image_shape, "these", codec, key)
  return source


def check_size(config, shape, whose: str, codec: BoundCodec, key: keys.WatermarkKey | None) -> None:
  """InputError for images of another size than the marked ones, unless detect.any_size."""
  marked = key.image_shape if key else codec.network.image_shape
  if shape[-1] != marked[-1]:
    raise InputError(
      f"the mark was made for images of {marked[-1]} channel(s), and {whose} have {shape[-1]}: files are read with data.channels"
    )
  if tuple(shape) != marked and not config.detect.any_size:
    raise InputError(
      f"the mark was made for images of {marked}, and {whose} are {tuple(shape)}: set detect.any_size=True to read them resized"
    )
  x = jax.ShapeDtypeStruct((1, *shape), np.float32)
  jax.eval_shape(BoundCodec.decode, codec, x)  # raises where they do not fit


def build_sampler(config, model, mesh, **changes) -> ImageSampler:
  """The sampler of config.sampler, some of its keys changed, for images of the model."""
  section = config.detect
  if section.num_images < 1:
    raise InputError("detect.num_images must be at least 1: so many samples of the model are looked at")
  sampler = denoisers.build_sampler(config_lib.to_plain(config.sampler) | changes, model.preconditioning)
  return ImageSampler(sampler, model.network.image_shape, mesh, section.batch_size, config.seed)


def sample(config, model, sampler: ImageSampler, what: str = "sample") -> np.ndarray:
  """detect.num_images samples of the model, uint8 [n h w c], of balanced classes where it has some."""
  ids = np.arange(config.detect.num_images)
  num_classes = model.network.num_classes
  labels = balanced_labels(ids, num_classes) if num_classes else None
  denoise = parallel.replicate_to_devices(sampler.mesh, Guided(model) if num_classes else model)
  return sampler(denoise, ids, labels, what)


def logits_of(codec: BoundCodec, source: records.ImageSource, batch_size: int, mesh) -> np.ndarray:
  """Logits [m n] of the bits of every image."""
  decode = jax.jit(lambda codec, batch: codec.decode(to_unit(batch["image"])))
  placed = parallel.replicate_to_devices(mesh, codec)
  return pipeline.map_images(lambda batch: decode(placed, batch), source, batch_size, mesh)


def _null(
  logits: np.ndarray, matches: np.ndarray, codebook: np.ndarray, verdict: detection.Verdict
) -> dict:
  """What images without a mark say: how often single ones reach the threshold with any of the keys, and the p-value of all together.

  matches: of single ones, with the key that the suspected images agree with best.
  """
  best = np.asarray(detection.most_matches(logits, codebook))
  _, together = detection.trace(detection.read(logits), codebook)
  detected = int((best >= verdict.threshold).sum())
  return {
    "num_images": len(logits),
    "bit_accuracy": float(matches.mean() / verdict.num_bits),
    "highest_bit_accuracy": float(best.mean() / verdict.num_bits),
    "false_positive_rate": detected / len(logits),
    "false_positive_rate_interval": statistics.binomial_interval(detected, len(logits)),
    "matches": together,
    "p": detection.family_wise(detection.p_value(together, verdict.num_bits), verdict.num_users),
  }


def _control(logits: np.ndarray, num_keys: int, seed: int) -> dict:
  """The p-values, smallest first, of all images together for keys that nothing was marked with: uniform, or conservative."""
  num_bits = logits.shape[1]
  others = keys.draw(f"control keys of seed {seed}", range(num_keys), num_bits, "control")
  matches = (np.asarray(detection.read(logits)) == others).sum(1)
  p = sorted(detection.p_value(int(count), num_bits) for count in matches)
  return {"num_keys": num_keys, "smallest_p": p[0], "p": p}


def _payload(key: keys.WatermarkKey, marked_with: int, bits: np.ndarray) -> dict:
  """The number that all images together say, None where too many bits are wrong, beside that of the key file."""
  code, read = BCHCode(len(key.bits), key.num_errors), codecs.read_payload(key, bits)
  return {
    "read": None if read is None else read[0],
    "wrong_bits": None if read is None else read[1],
    "marked_with": marked_with,
    "false_accept": code.false_accept,
  }


def _metrics(found: dict) -> dict[str, float]:
  names = (
    "matches",
    "num_bits",
    "p",
    "log10_p",
    "threshold",
    "bit_accuracy",
    "detected_share",
    "num_images",
    "num_users",
  )
  metrics = {name: found[name] for name in names}
  metrics |= {"detected": int(found["decision"]), "key_drawn": int(found["key_drawn"])}
  if found["user"] is not None:
    metrics["user"] = found["user"]
  if "payload" in found:
    metrics["payload_is_right"] = int(found["payload"]["read"] == found["payload"]["marked_with"])
  if "control" in found:
    metrics["control/smallest_p"] = found["control"]["smallest_p"]
  null = found.get("null", {})
  return metrics | {
    f"null/{name}": null[name]
    for name in ("bit_accuracy", "highest_bit_accuracy", "false_positive_rate", "matches", "p")
    if null
  }


def _report(
  config,
  workdir: Workdir,
  source: records.ImageSource,
  logits: np.ndarray,
  key: np.ndarray,
  matches: dict,
  found: dict,
  metrics,
) -> None:
  """Matches of single images, the mean logit of every bit, the first images, and report.html, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  num_bits = found["num_bits"]
  report.histogram(
    matches,
    folder / "matches.png",
    xlabel=f"bits that agree with the key, of {num_bits}",
    ylabel="images",
    limits=(-0.5, num_bits + 0.5),
    num_bins=num_bits + 1,
  )
  agreeing = np.where(key > 0, logits, -logits).mean(0)
  figures = [(folder / "matches.png", "Bits that agree with the key, of each image alone")]
  if num_bits <= MOST_BARS:
    report.bars(
      {str(i): {"mean logit of the key's bit": float(value)} for i, value in enumerate(agreeing)},
      folder / "bits.png",
      ylabel="logit",
      percent=False,
    )
    caption = "How each bit of the key is read, mean over the images: above 0 right, below 0 wrong"
    figures.append((folder / "bits.png", caption))
  shown = source.take(np.arange(min(config.report.num_images, len(source))))["image"]
  report.image_grid(shown, folder / "images.png")
  low, high = found["detected_share_interval"]
  decided = "carry the mark" if found["decision"] else "do not show the mark"
  users = f" among {found['num_users']:,} users" if found["num_users"] > 1 else ""
  who = f" of user {found['user']}" if found["user"] is not None and found["decision"] else ""
  chance = f", which happens by chance with probability {found['p']:.3g}{users}"
  if not found["key_drawn"]:
    decided = f"agree with a published key in {found['matches']} of {num_bits} bits"
    chance = ". Nobody drew this key at random, so no probability of chance can be given"
  rows = [
    ["agreeing bits of all images together", f"{found['matches']} of {num_bits}"],
    ["needed for a detection", str(found["threshold"])],
    ["p-value", f"{found['p']:.3g} (10^{found['log10_p']:.1f})"],
    ["false-positive rate asked for", f"{found['false_positive_rate']:g}{users}"],
    ["bit accuracy of single images", f"{found['bit_accuracy']:.2%}"],
    ["single images that reach the threshold", f"{found['detected_share']:.2%} ({low:.2%} to {high:.2%})"],
    [
      "key",
      ("random" if found["key_drawn"] else "published or chosen: p-values say nothing")
      + f"; {found['key_id']}",
    ],
  ]
  if "payload" in found:
    payload = found["payload"]
    said = (
      "too many bits are wrong"
      if payload["read"] is None
      else f"{payload['read']}, with {payload['wrong_bits']} wrong bits"
    )
    rows.append(
      ["payload", f"{said}; random bits say some number with probability {payload['false_accept']:.2g}"]
    )
  if "control" in found:
    control = found["control"]
    rows.append(
      [
        f"smallest p of {control['num_keys']} keys that nothing was marked with",
        f"{control['smallest_p']:.3g}",
      ]
    )
  if "null" in found:
    null = found["null"]
    low, high = null["false_positive_rate_interval"]
    rows += [
      ["of images without a mark", f"{null['num_images']:,}"],
      ["their bit accuracy with this key", f"{null['bit_accuracy']:.2%}"],
      ["with the key that fits each best", f"{null['highest_bit_accuracy']:.2%}"],
      ["of them reach the threshold", f"{null['false_positive_rate']:.2%} ({low:.2%} to {high:.2%})"],
      ["agreeing bits of all of them together", f"{null['matches']} of {num_bits}, p {null['p']:.3g}"],
    ]
  report.html_report(
    folder / "report.html",
    title=f"These images {decided}{who}",
    summary=f"{found['num_images']:,} images: {found['matches']} of {num_bits} bits agree with the key{chance}.",
    metrics=metrics,
    figures=[*figures, (folder / "images.png", "The first images")],
    tables=[("Verdict, with 95 % Clopper-Pearson intervals", ["", "value"], rows)],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
