"""Marks every image of a data set with one string of bits: images in, an image store and a key file out.

Zhao et al. 2023 (arXiv:2303.10137, section 3.2): a diffusion model that is trained on such a set makes images that carry the
string. Labels and ids stay, work that was interrupted ends in the same store, and every image that was written is read back
before the store is complete.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, records, sources
from jax_trustdiff.data.image_store import ImageStore, StorePlan, check_place
from jax_trustdiff.data.pseudo_labels import fingerprint as of_images
from jax_trustdiff.evaluation import image_attacks, report
from jax_trustdiff.tasks import codecs, reports, store_writing
from jax_trustdiff.training.progress import ProgressReport, say
from jax_trustdiff.training.workdir import Workdir, write_atomically
from jax_trustdiff.types import InputError, RunError, to_unit
from jax_trustdiff.watermark import detection
from jax_trustdiff.watermark.codec import BoundCodec
from jax_trustdiff.watermark.keys import WatermarkKey


def run(config, workdir: Workdir) -> dict[str, float]:
  """Marks the images of this worker's shards that are missing, and returns what was read back of the whole store.

  num_images, bit_accuracy, exact (the part of the images of which every bit is read right), psnr (mean over the images, decibels),
  and of this session marked, seconds and images_per_second; these and num_images alone as long as other workers are not done. RunError, and
  no manifest, if fewer of the bits are read right than embed.least_bit_accuracy.
  """
  section = config.embed
  worker, num_workers = store_writing.worker(section, "embed")
  if num_workers > 1 and not any(config.key[name] for name in ("file", "demo", "secret_file")):
    raise InputError("several workers need one key: give all of them key.file, key.demo or key.secret_file")
  mesh = parallel.make_local_mesh()
  codec = codecs.load_or_make(config, config.init_from, "init_from")
  source = config_lib.build(sources.SOURCES, config.data, split=section.split)
  source = records.first(source, section.num_images)
  _check(config, codec, source, mesh)
  key = codecs.choose_key(config.key, codec, source.image_shape, workdir)
  plan = StorePlan(
    num_images=len(source),
    images_per_shard=section.images_per_shard,
    image_shape=source.image_shape,
    num_classes=source.num_classes,
    class_names=source.class_names,
    provenance={"images": of_images(source), "codec": codecs.fingerprint(codec), "key_id": key.key_id},
  )
  path = pathlib.Path(section.store).expanduser() if section.store else workdir / "images"
  check_place(path, plan)

  workdir.open()
  if parallel.is_main_process():
    codecs.write_key(workdir, key)
  parallel.barrier("workdir")
  store = ImageStore(path, plan, store_writing.maker())
  make = _maker(codec, key.array, source, section.batch_size, mesh)
  marked, seconds = store_writing.fill(
    store, range(worker, plan.num_shards, num_workers), make, section.verify, "to mark"
  )
  parallel.barrier("shards")
  metrics = {"num_images": len(source), "marked": marked, "seconds": seconds}
  metrics["images_per_second"] = marked / seconds if marked else 0.0
  missing = store.missing(section.verify)
  if missing:
    say(
      f"{plan.num_shards - len(missing)} of {plan.num_shards} shards are there; the last worker writes the manifest"
    )
    return metrics
  matches, decibels = _read_back(codec, key.array, source, store, section.batch_size, mesh)
  num_bits = codec.network.num_bits
  accuracy = float(matches.mean() / num_bits)
  metrics |= {
    "bit_accuracy": accuracy,
    "exact": float((matches == num_bits).mean()),
    "psnr": float(decibels.mean()),
  }
  if accuracy < section.least_bit_accuracy:
    raise RunError(
      f"only {accuracy:.3%} of the bits are read back from the marked images, less than embed.least_bit_accuracy="
      f"{section.least_bit_accuracy:g}: the store in {path} gets no manifest; train the codec longer, or for these images"
    )
  sha256 = store.finish()
  say(
    f"complete: {len(source):,} marked images in {path}, {accuracy:.3%} of the bits read back, {metrics['psnr']:.1f} dB"
  )
  if parallel.is_main_process():
    about = {"store": str(path), "manifest_sha256": sha256, "key_id": key.key_id}
    write_atomically(workdir / "store.json", json.dumps(about, indent=2) + "\n")
    _report(config, workdir, source, store, matches, metrics, key)
  return metrics


def _check(config, codec: BoundCodec, source: records.ImageSource, mesh) -> None:
  reports.check(config)
  section = config.embed
  parallel.check_batch(section.batch_size, mesh)
  if section.images_per_shard < 1:
    raise InputError(f"embed.images_per_shard must be at least 1, found {section.images_per_shard}")
  if not 0 <= section.least_bit_accuracy <= 1:
    raise InputError(f"embed.least_bit_accuracy must lie between 0 and 1, found {section.least_bit_accuracy}")
  if source.key_id:
    raise InputError(
      f"the images are marked already, with the key {source.key_id}: a second mark would spoil the first"
    )
  made_for = codec.network.image_shape
  resized = source.image_shape != made_for and source.image_shape[-1] == made_for[-1]
  if resized and not section.any_size:
    raise InputError(
      f"the codec was made for images of {made_for}, and these are {source.image_shape}: "
      "set embed.any_size=True to mark them by resizing the mark"
    )
  shape = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.float32)
  bits = np.zeros(codec.network.num_bits, np.int32)
  jax.eval_shape(
    lambda codec, x: codec.decode(codec.encode(x, bits)), codec, shape
  )  # raises where they do not fit


def _maker(
  codec: BoundCodec, bits: np.ndarray, source: records.ImageSource, batch_size: int, mesh
) -> store_writing.Make:
  # the string is an argument: a constant would lie in the compilation cache
  mark = jax.jit(lambda codec, bits, batch: codecs.marked_bytes(codec, batch["image"], bits))
  placed, bits = parallel.replicate_to_devices(mesh, (codec, bits))

  def make(rows, progress):
    part = source.select(np.asarray(rows))
    images = pipeline.map_images(lambda batch: mark(placed, bits, batch), part, batch_size, mesh, progress)
    return images, part.labels, part.ids

  return make


def _read_back(
  codec: BoundCodec, bits: np.ndarray, source: records.ImageSource, store: ImageStore, batch_size: int, mesh
) -> tuple[np.ndarray, np.ndarray]:
  """(matches, PSNR) of every image in the store, as it lies on the disk."""

  @jax.jit
  def count(codec, bits, batch):
    return detection.count_matches(codec.decode(to_unit(batch["image"])), bits)

  placed, bits = parallel.replicate_to_devices(mesh, (codec, bits))
  matches, decibels = [], []
  with ProgressReport("image read back", len(source)) as progress:
    for shard in range(store.plan.num_shards):
      rows = np.asarray(store.plan.rows(shard))
      marked = np.asarray(store.read(shard)["images"])
      part = records.unlabelled(marked, "marked images")
      matches.append(pipeline.map_images(lambda batch: count(placed, bits, batch), part, batch_size, mesh))
      decibels.append(image_attacks.psnr(source.take(rows)["image"], marked))
      progress.update(int(rows[-1]) + 1)
  return np.concatenate(matches), np.concatenate(decibels)


def _report(
  config,
  workdir: Workdir,
  source: records.ImageSource,
  store: ImageStore,
  matches: np.ndarray,
  metrics,
  key: WatermarkKey,
) -> None:
  """The first images as they were and marked, how many bits are read of each, and report.html, in workdir/report."""
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  num_bits = len(key.bits)
  first = np.asarray(store.plan.rows(0))[: config.report.num_images]
  caption = report.marked_grid(
    source.take(first)["image"],
    np.asarray(store.read(0)["images"][: len(first)]),
    folder / "marked_images.png",
    matches=matches[: len(first)].tolist(),
    num_bits=num_bits,
  )
  report.histogram(
    {"marked images": matches},
    folder / "matches.png",
    xlabel=f"bits read right, of {num_bits}",
    ylabel="images",
    limits=(-0.5, num_bits + 0.5),
    num_bins=num_bits + 1,
  )
  kind = "random, and secret as long as the key file is" if key.drawn else "published: it proves nothing"
  report.html_report(
    folder / "report.html",
    title=f"{len(source):,} marked images",
    summary=(
      f"{metrics['bit_accuracy']:.3%} of the bits are read back, all of them from {metrics['exact']:.2%} of the images, at "
      f"{metrics['psnr']:.1f} dB (mean PSNR). The string of {num_bits} bits is {kind}; key {key.key_id}."
    ),
    metrics=metrics,
    figures=[
      (folder / "marked_images.png", caption),
      (folder / "matches.png", "Bits read right of each image"),
    ],
    tables=[("Origin of the images", ["", "value"], [[k, str(v)] for k, v in store.plan.provenance.items()])],
    config_text=config_lib.to_json(config),
    info=workdir.information(),
  )
